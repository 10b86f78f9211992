"""``flower-mcepl doctor``: what could keep a device or a run from working."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flower_mcepl.cli.wide import wide_console
from flower_mcepl.doctor import FAILED, OK, WARNING, Finding, Order, SuperLink, examine
from flower_mcepl.errors import ConfigError


def doctor(
    app: Annotated[
        Path | None,
        typer.Argument(help="Folder of a Flower app: examine one agent of its run, too."),
    ] = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option(help="Override settings of the app, as in `flwr run`; may be repeated."),
    ] = None,
    node_config: Annotated[
        list[str] | None,
        typer.Option(help="All that the device's `flower-supernode --node-config` says."),
    ] = None,
    partition_id: Annotated[
        int | None,
        typer.Option(help="Which agent to examine (default: the node config's, else 0)."),
    ] = None,
    superlink: Annotated[
        str | None,
        typer.Option(help="Try to reach the SuperLink at this address.", metavar="HOST:PORT"),
    ] = None,
    root_certificates: Annotated[
        Path | None,
        typer.Option(help="Its certificate authority, ca.crt (default: those of the system)."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="It is meant to speak without TLS.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for the SuperLink.")
    ] = 5.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object in place of lines.")
    ] = False,
) -> None:
    """Check a device or a run before it starts.

    Alone it examines the machine: versions, extras, torch and its device, disk space,
    and whether an agent's state can be written and read back. With an app it builds one
    agent as a run would and lets it train for four rounds, by itself: settings, graph,
    data, the fingerprint of the shared weights (to compare devices), the time of a
    local step on this machine, now, and the size of frames and state, and so the bytes
    of a round. With --superlink it connects and begins TLS; it sends no message, key or
    certificate.

    Nothing is changed: the state that is written is removed again. Lines begin with ok,
    warning or failed; the exit code is 1 if a check failed, else 0.

    \b
    Examples:
      flower-mcepl doctor
      flower-mcepl doctor examples/quickstart \\
        --run-config 'algorithm="dsgd"' --partition-id 3
      flower-mcepl doctor my-app --node-config 'partition-id=3 data="/srv/agent-data"'
      flower-mcepl doctor --superlink relay.example.org:9443 --root-certificates ca.crt
    \b
    Do two devices hold the same weights? The output of these must be equal:
      flower-mcepl doctor my-app --json \\
        | jq -r '.checks[] | select(.check == "weights") | .values.fingerprint'
    """  # noqa: D301 (click's sign for lines that stay as they are)
    order = Order(
        app,
        run_config or [],
        node_config or [],
        partition_id,
        _link(superlink, root_certificates, insecure=insecure, timeout=timeout),
    )
    findings = []
    console = wide_console()
    for finding in examine(order):
        findings.append(finding)
        if not as_json:
            _print(finding, console)
    counts = Counter(finding.status for finding in findings)
    if as_json:
        console.print(json.dumps(_report(findings, counts), indent=2, default=str))
    else:
        console.print(
            f"{len(findings)} checks: "
            f"{', '.join(f'{counts[s]} {s}' for s in (OK, WARNING, FAILED))}"
        )
    if counts[FAILED]:
        raise typer.Exit(1)


def _link(
    address: str | None, certificates: Path | None, *, insecure: bool, timeout: float
) -> SuperLink | None:
    if address is None:
        if certificates is not None or insecure:
            raise ConfigError(
                "--root-certificates and --insecure are about a SuperLink. Add --superlink "
                "HOST:PORT."
            )
        return None
    if certificates is not None and insecure:
        raise ConfigError(
            "--insecure means without TLS, --root-certificates with it; both were given. Leave "
            "out one."
        )
    return SuperLink(address, certificates, insecure, timeout)


def _print(finding: Finding, console: Console) -> None:
    console.print(f"{finding.status:<8} {finding.check}: {finding.found}")
    if finding.remedy:
        console.print(f"{'':<8}   -> {finding.remedy}")


def _report(findings: list[Finding], counts: Counter[str]) -> dict[str, object]:
    return {
        "ok": not counts[FAILED],
        "counts": {status: counts[status] for status in (OK, WARNING, FAILED)},
        "checks": [finding.to_json() for finding in findings],
    }
