"""All checks in their order: the machine, then the run, then the SuperLink.

Those that load torch are imported as they begin.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.doctor.findings import Examination, Finding
from flower_mcepl.doctor.packages import check_extras, check_packages, check_python
from flower_mcepl.doctor.superlink import SuperLink, check_superlink
from flower_mcepl.launch.plan import parse_run_config
from flower_mcepl.studies.flower_app import read_app


@dataclass(frozen=True)
class Order:
    """What to examine beside the machine."""

    app: Path | None = None  # folder of a Flower app
    run_config: Sequence[str] = ()  # as for `flwr run`
    node_config: Sequence[str] = ()  # as for `flower-supernode`: all that it says on the device
    partition_id: int | None = None  # over that of the node config
    superlink: SuperLink | None = None


def examine(order: Order) -> Iterator[Finding]:
    """Findings as they come; nothing is raised but what ends the process."""
    with Examination("settings", remedy="Write settings as 'key=value key=\"text\"'.") as check:
        run_config = parse_run_config(order.run_config)
        node_config = parse_run_config(order.node_config)
        if order.partition_id is not None:
            node_config["partition-id"] = order.partition_id
        if not order.node_config:
            node_config.setdefault("partition-id", 0)
    if check.failed:
        yield check.finding
        run_config, node_config = {}, {}
    config = {**_app_config(order.app), **run_config}
    yield from _examine_machine(config, node_config)
    if not order.node_config:  # devices keep no records
        yield _record_disk(config, needed=order.app is not None)
    if order.app is not None and not check.failed:
        from flower_mcepl.doctor.app_run import examine_run

        yield from examine_run(order.app, run_config, node_config, alone=bool(order.node_config))
    if order.superlink is not None:
        yield from check_superlink(order.superlink)


def _examine_machine(
    config: Mapping[str, Any], node_config: Mapping[str, Any]
) -> Iterator[Finding]:
    from flower_mcepl.doctor import machine
    from flower_mcepl.runs.settings import DeviceSettings, read_device

    yield check_python()
    yield check_packages()
    yield check_extras()
    device = DeviceSettings()
    with Examination(
        "device-settings", remedy="Correct it in --node-config or --run-config."
    ) as check:
        device = read_device(config, node_config)
    if check.failed:
        yield check.finding
    yield machine.check_torch(device)
    with Examination(
        "state-disk", remedy="Set state-dir to an absolute path in --node-config."
    ) as check:
        folder = device.state_folder()
    if check.failed:
        yield check.finding
    elif folder is not None:
        key = "state-dir, an absolute path"
        yield machine.check_disk("state-disk", folder, "agents' states", key)
    yield machine.check_state_folder(device)
    for found in (machine.check_shared_memory(), machine.check_ray_cluster()):
        if found is not None:
            yield found


def _record_disk(config: Mapping[str, Any], *, needed: bool) -> Finding:
    from flower_mcepl.doctor.machine import check_disk
    from flower_mcepl.runs.settings import RunSettings

    folder = Path(str(config.get("record-dir", RunSettings().record_dir)))
    return check_disk(
        "record-disk",
        folder,
        "run records",
        "start from another folder, or set record-dir",
        needed=needed,
    )


def _app_config(app: Path | None) -> dict[str, Any]:
    """App's own settings; that it has none is for the check of the run to tell."""
    with Examination("app", remedy="") as check:
        config = {} if app is None else read_app(app.resolve()).config
    return {} if check.failed else config
