"""The doctor: what it finds on machines, in runs and at addresses that are well, and
that are not.
"""

import errno
import ipaddress
import itertools
import json
import os
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flower_mcepl.agents import ALGORITHMS, AgentState, MceplAgent
from flower_mcepl.cli import app as commands
from flower_mcepl.cli import main
from flower_mcepl.doctor import FAILED, OK, WARNING, Finding, Order, SuperLink, examine, restart
from flower_mcepl.doctor.findings import Examination
from flower_mcepl.doctor.machine import (
    check_disk,
    check_ray_cluster,
    check_shared_memory,
    check_state_folder,
    check_torch,
)
from flower_mcepl.doctor.packages import check_extras, check_packages, check_python
from flower_mcepl.doctor.restart import check_restart
from flower_mcepl.doctor.superlink import check_superlink, split_address
from flower_mcepl.doctor.trial import try_rounds
from flower_mcepl.errors import ConfigError, DataError
from flower_mcepl.exchange.parcels import Parcel
from flower_mcepl.exchange.turn import open_mail, play_round
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.options import RoundOptions
from flower_mcepl.runs.settings import DeviceSettings
from flower_mcepl.runs.simulation import simulate
from flower_mcepl.runs.store import StateStore
from flower_mcepl.studies.engines import agent_of_node, introductions
from flower_mcepl.studies.flower_app import read_app
from flower_mcepl.topology import Topology
from tests.fleet.agents import make_agent, make_fleet
from tests.fleet.study_app import write_app


# One a worker: worksteal may come back to this file, and a process has one module of
# a name.
@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_app(tmp_path_factory.mktemp("apps"), "doctor")


def findings(*arguments: Any, **options: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(Order(*arguments, **options))}


def of_status(found: dict[str, Finding], status: str) -> dict[str, str]:
    return {name: finding.found for name, finding in found.items() if finding.status == status}


# --- one check ---


def test_what_a_check_raises_is_what_it_found() -> None:
    for error, told in (
        (DataError("agent 3 has\nno data."), "agent 3 has no data."),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (SystemExit(2), "SystemExit: 2"),
        (RuntimeError(), "RuntimeError: no reason"),
    ):
        with Examination("sample", remedy="Do this.") as check:
            raise error
        assert check.finding == Finding("sample", FAILED, told, "Do this.")


def test_a_person_may_stop_it() -> None:
    with pytest.raises(KeyboardInterrupt), Examination("sample", remedy=""):
        raise KeyboardInterrupt


def test_what_an_app_prints_does_not_reach_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Examination("sample", remedy="") as check:
        print("hello")
        check.ok("fine")
    print("after")
    assert capsys.readouterr() == ("after\n", "hello\n")


# --- packages ---


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let packages have other versions, or (None) be missing."""
    truth = metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return truth(name)
        if versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return str(versions[name])

    monkeypatch.setattr(metadata, "version", version)


def demanding(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    truth = metadata.requires
    monkeypatch.setattr(
        metadata, "requires", lambda name: list(lines) if name == "flower-mcepl" else truth(name)
    )


def test_this_environment_fits() -> None:
    assert check_python().status == OK
    found = check_packages()
    assert found.status == OK, found
    assert found.values["versions"]["numpy"] == metadata.version("numpy")


def test_a_missing_and_an_old_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    demanding(
        monkeypatch, "networkx>=3.2", "torch>=2.2", "numpy>=1.26", 'nowhere; extra == "vision"'
    )
    installed(monkeypatch, networkx=None, torch="2.1.2+cu121")
    found = check_packages()
    assert found.status == FAILED
    assert (
        found.found == "networkx is missing (needed: >=3.2); torch is 2.1.2+cu121 (needed: >=2.2)"
    )
    assert "pip install" in found.remedy
    assert found.values["versions"]["networkx"] is None


def test_what_an_extra_of_a_package_needs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    demanding(
        monkeypatch,
        'flwr[simulation]>=1.41; extra == "simulation"',
        'matplotlib>=3.8; extra == "report"',
    )
    installed(monkeypatch, ray=None, matplotlib="3.9")
    found = check_extras()
    assert found.status == OK  # a device needs none
    assert "simulation not installed (ray is missing" in found.found
    assert found.values["extras"] | {"simulation": False, "report": True} == found.values["extras"]
    installed(monkeypatch, ray="1.0", matplotlib="3.9")
    assert check_extras().status == WARNING
    assert "[simulation]'" in check_extras().remedy


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    found = check_python()
    assert (found.status, "3.10.4" in found.found) == (FAILED, True)


def test_without_metadata_the_packages_fail_and_nothing_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    for function in ("version", "requires", "metadata"):
        monkeypatch.setattr(metadata, function, missing)
    assert {check().status for check in (check_python, check_packages, check_extras)} == {FAILED}


# --- machine ---


def test_the_state_folder_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    found = check_state_folder(DeviceSettings(state_dir=str(folder)))
    assert found.status == OK, found
    assert not list(tmp_path.iterdir())
    folder.mkdir(parents=True)
    (folder / "mine").write_text("stays")
    assert check_state_folder(DeviceSettings(state_dir=str(folder))).status == OK
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_no_state_folder_is_a_choice() -> None:
    assert check_state_folder(DeviceSettings(state_dir="none")).status == OK


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    found = check_state_folder(DeviceSettings(state_dir=str(tmp_path)))
    assert found.status == FAILED
    assert "No space left" in found.found
    assert "state-dir" in found.remedy
    assert not list(tmp_path.iterdir())


def test_a_disk_that_gives_back_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateStore, "load", lambda *_, **__: None)
    found = check_state_folder(DeviceSettings(state_dir=str(tmp_path)))
    assert (found.status, "not what is read back" in found.found) == (FAILED, True)


def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user, as root does, may write everywhere")
    assert check_state_folder(DeviceSettings(state_dir=str(tmp_path / "state"))).status == FAILED
    assert check_disk("disk", tmp_path / "state", "states", "state-dir").status == FAILED


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "state"
    assert check_state_folder(DeviceSettings(state_dir=str(folder))).status == FAILED
    found = check_disk("disk", folder, "states", "state-dir")
    assert (found.status, "is no folder" in found.found, "state-dir" in found.remedy) == (
        FAILED,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("free", "status"), [(10**12, OK), (500_000_000, WARNING), (1_000_000, FAILED)]
)
def test_free_space(
    free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**12, 0, free)
    )
    found = check_disk("disk", tmp_path / "new", "states", "state-dir")
    assert found.status == status
    assert found.values["free_bytes"] == free
    records = check_disk("disk", tmp_path / "new", "records", "record-dir", needed=False)
    assert records.status == (OK if status == OK else WARNING)
    assert not (tmp_path / "new").exists()


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flower_mcepl.doctor.machine.find_spec", lambda name: None)
    assert check_shared_memory(tmp_path) is None
    monkeypatch.setattr("flower_mcepl.doctor.machine.find_spec", lambda name: object())
    assert check_shared_memory(tmp_path / "nowhere") is None
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(64, 0, 64_000_000)
    )
    found = check_shared_memory(tmp_path)
    assert found is not None
    assert (found.status, "--shm-size" in found.remedy) == (WARNING, True)


def test_a_ray_cluster_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flower_mcepl.doctor.machine.find_spec", lambda name: object())
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert check_ray_cluster() is None
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        note.write_text(f"127.0.0.1:{cluster.getsockname()[1]}\n", encoding="utf-8")
        alive = check_ray_cluster()
    gone = check_ray_cluster()
    note.write_text("", encoding="utf-8")
    empty = check_ray_cluster()
    assert alive is not None
    assert gone is not None
    assert empty is not None
    assert (alive.status, gone.status, empty.status) == (OK, WARNING, WARNING)
    assert f"Remove {note}" in gone.remedy
    assert "does not answer" in gone.found
    monkeypatch.setattr("flower_mcepl.doctor.machine.find_spec", lambda name: None)
    assert check_ray_cluster() is None


def test_the_torch_device() -> None:
    assert check_torch(DeviceSettings(device="cpu")).status == OK
    crowd = check_torch(DeviceSettings(device="cpu", threads=10_000))
    assert (crowd.status, "threads" in crowd.remedy) == (WARNING, True)
    assert check_torch(DeviceSettings(device="cuda:77")).status == FAILED


# --- a run ---


def test_a_sound_run_has_all_figures(app: Path) -> None:
    found = findings(app, partition_id=2)
    assert not of_status(found, FAILED)
    expected = introductions(read_app(app), read_app(app).config)[2]
    assert found["weights"].values["fingerprint"] == expected["fingerprint"]
    assert found["weights"].values["num_weights"] == 36 + 192
    assert found["weights"].values["first_mask"] == expected["first-mask"]
    model = found["personal-model"]
    assert "at most: written now, under random masks" in model.found
    assert model.values["retention"] == found["weights"].values["retention"]
    assert 0 < model.values["file_bytes"] < 1000
    assert found["data"].values["num_examples"] == 24
    assert found["data"].values["train_counts"] == expected["train-counts"]
    assert found["graph"].values == {
        "connected": True,
        "in_degree": 2,
        "out_degree": 2,
        "neighbors": [1, 3],
    }
    step = found["local-step"]
    assert step.values["step_seconds"] * step.values["steps"] == pytest.approx(
        step.values["train_seconds"]
    )
    assert "measured now on this machine" in step.found
    assert found["evaluation"].status == OK
    assert 0 <= found["evaluation"].values["accuracy"] <= 1
    traffic = found["traffic"].values
    assert traffic["up_bytes"] == found["frame"].values["delta_bytes"] > 0
    assert traffic["down_bytes"] == 2 * traffic["up_bytes"]
    assert traffic["first_up_bytes"] == found["frame"].values["whole_bytes"]


def test_the_trial_measures_what_a_run_sends_and_stores(tmp_path: Path) -> None:
    """A fleet whose agents all hold the same data sends what the trial says, and its
    stored states are that large.
    """
    trial = try_rounds(make_agent(0), (1, 2), RoundOptions())
    sizes: list[int] = []
    agents = make_fleet(3)
    simulate(
        agents,
        Topology.complete(3),
        num_rounds=1,
        on_reply=lambda round, agent, reply: sizes.extend(
            len(frame.data) for frame in reply.frames if agent == 0
        ),
    )
    assert sizes == [trial.whole_bytes]

    fleet = make_fleet(3)
    mails = [open_mail(agent, max_staleness=5) for agent in fleet]
    posted: dict[int, list[bytes]] = {}
    for number in range(1, 5):
        come, posted = posted, {}
        for agent, mail in zip(fleet, mails, strict=True):
            others = {j: frames for j, frames in come.items() if j != agent.index}
            parcel = Parcel(
                number, tuple(others) if come else None, others, acknowledged=number - 1 or None
            )
            posted[agent.index] = [frame.data for frame in play_round(agent, mail, parcel).frames]
    StateStore(tmp_path).save(Generation.of(fleet[0], mails[0], run="0" * 16, round=4))
    (stored,) = tmp_path.glob("*.state")
    # safetensors' header names arrays
    assert trial.state_bytes(2) == pytest.approx(stored.stat().st_size, rel=0.35)
    assert trial.state_bytes(2) > trial.state_bytes(0) > 9 * 228
    with_best = try_rounds(make_agent(0), (1, 2), RoundOptions(keep_best=True))
    assert with_best.state_bytes(0) - trial.state_bytes(0) > 9 * 228


class Forgetful(MceplAgent):
    """An algorithm of a third party that remembers more than its state holds."""

    def train(self, *, round: int) -> dict[str, float]:
        self.trained = getattr(self, "trained", 0) + 1
        return {**super().train(round=round), "train-count": self.trained}


class Careless(MceplAgent):
    """One whose state is incomplete from the parent on."""

    def state(self) -> AgentState:
        whole = super().state()
        arrays = {name: a for name, a in whole.arrays.items() if not name.startswith("velocity/")}
        return AgentState(whole.facts, arrays)


def restart_of(rebuild: Callable[[], MceplAgent]) -> Finding:
    agent = rebuild()
    trial = try_rounds(agent, (1, 2), RoundOptions())
    return check_restart(agent, rebuild, (1, 2), trial=trial, options=RoundOptions())


def test_a_state_that_lacks_something_is_found() -> None:
    forgetful = restart_of(lambda: make_agent(0, kind=Forgetful))
    assert forgetful.status == FAILED
    assert forgetful.values["differs"] == ["metric train-count"]
    assert "state()" in forgetful.remedy
    careless = restart_of(lambda: make_agent(0, kind=Careless, momentum=0.9))
    assert careless.status == FAILED
    # a state that was never whole
    assert any(name.startswith("state scores/") for name in careless.values["differs"])
    assert restart_of(lambda: make_agent(0, kind=Careless)).status == OK


def test_data_that_each_process_draws_otherwise_are_found() -> None:
    agents = (make_agent(0, data_of=number) for number in itertools.count())
    found = restart_of(lambda: next(agents))
    assert found.status == WARNING
    assert "built anew twice from one state" in found.found
    assert "data functions draw from seeds" in found.remedy


def test_what_a_restart_cannot_be_compared_with_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "LONGEST", -1)
    assert "not compared" in restart_of(lambda: make_agent(0)).found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_can_be_examined(app: Path, algorithm: str) -> None:
    found = findings(app, [f"algorithm='{algorithm}'"])
    assert not of_status(found, FAILED) | of_status(found, WARNING)
    assert "to the same bits" in found["restart"].found
    sends = found["frame"].values["whole_bytes"] > 0
    assert sends == (algorithm not in ("local", "local-masks"))
    if ALGORITHMS[algorithm].agent.server_based:
        assert "down_bytes" not in found["traffic"].values
        assert "server" in found["graph"].found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("score-lr=-1.0", "score-lr must be a finite number >= 0"),
        ("topolgy='ring'", "Did you mean 'topology'"),
        ("topology='rign'", "rign"),
        ("num-agents='four'", "num-agents must be int"),
        ("momentum=0.5", "'momentum' is not in the app's config"),
    ],
)
def test_wrong_settings_are_told_and_what_needs_them_is_left_out(
    app: Path, settings: str, words: str
) -> None:
    found = findings(app, [settings])
    assert list(of_status(found, FAILED)) == ["run-config"]
    assert words in found["run-config"].found
    assert found["run-config"].remedy
    assert "agent" not in found
    assert "state-folder" in found  # the machine is examined all the same


def test_settings_that_cannot_be_read(app: Path) -> None:
    found = findings(app, ["partition"])
    assert list(of_status(found, FAILED)) == ["settings"]
    assert "run-config" not in found


def test_a_wrong_node_config(app: Path) -> None:
    found = findings(app, node_config=["partition-id=0 state-dir='relative'"])
    assert "absolute path" in found["device-settings"].found
    assert of_status(found, FAILED).keys() == {"device-settings", "run-config"}
    # beyond the fleet; missing, as on a device
    for node_config in ("partition-id=4", "retention-conv=0.2"):
        told = findings(app, node_config=[node_config])["run-config"]
        assert (told.status, "partition-id is a number from 0 to 3" in told.found) == (FAILED, True)


def test_the_node_config_is_the_devices_own(app: Path, tmp_path: Path) -> None:
    found = findings(
        app,
        node_config=[
            f"partition-id=1 retention-conv=0.5 state-dir='{tmp_path}' tell-classes=false"
        ],
    )
    assert not of_status(found, FAILED)
    assert "conv 0.5" in found["weights"].values["retention"]
    assert str(tmp_path) in found["state-folder"].found
    assert "train_counts" not in found["data"].values
    assert "record-disk" not in found  # records are the SuperLink's


def test_a_graph_in_two_parts(app: Path, tmp_path: Path) -> None:
    (tmp_path / "edges").write_text("0 1\n2 3\n")
    found = findings(app, [f"topology='file:{tmp_path / 'edges'}'"])
    assert found["graph"].status == WARNING
    assert "NOT connected" in found["graph"].found
    assert "add links" in found["graph"].remedy
    assert found["graph"].values["connected"] is False
    assert not of_status(found, FAILED)


def test_a_graph_that_changes_is_connected_over_the_rounds(app: Path) -> None:
    found = findings(app, ["topology='random-neighbors:degree=1' num-agents=3 num-rounds=50"])
    assert found["graph"].values["connected"] is True
    assert found["graph"].values["in_degree"] == 1


def test_an_app_whose_functions_fail(app: Path) -> None:
    found = findings(app, ["crash=true"])
    assert of_status(found, FAILED) == {"agent": "RuntimeError: crashes on purpose"}
    assert "data functions" in found["agent"].remedy
    assert "local-step" not in found


def test_an_app_with_a_client_of_its_own_is_examined_as_far_as_it_goes() -> None:
    found = findings(Path(__file__).parents[2] / "examples" / "drop_in" / "gossip")
    assert not of_status(found, FAILED)
    assert "averaging by neighbor_average_mod" in found["client-app"].found
    # nothing of a run that nobody has described
    assert not {"run-config", "graph", "agent", "data"} & set(found)


def test_an_app_that_cannot_be_imported(tmp_path: Path) -> None:
    app = write_app(tmp_path, "broken")
    (app / "mcepl_broken_probe" / "client_app.py").write_text(
        "import sys\nsys.exit('no licence')\n"
    )
    found = findings(app)
    assert of_status(found, FAILED) == {"client-app": "SystemExit: no licence"}


def test_an_evaluation_that_fails_is_a_warning_before_the_run(
    app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(agent: MceplAgent) -> dict[str, float]:
        return {"accuracy": 81.5, "loss": 1.0}

    monkeypatch.setattr(MceplAgent, "evaluate", evaluate)
    found = findings(app)
    assert list(of_status(found, FAILED)) == []
    assert found["evaluation"].status == WARNING
    assert "got 81.5. Divide it" in found["evaluation"].found
    assert "trains all the same" in found["evaluation"].found
    assert "traffic" in found


def test_training_that_diverges(app: Path) -> None:
    found = findings(app, ['algorithm="dsgd"', "dsgd.lr=3e38"])
    assert list(of_status(found, FAILED)) == ["local-step"]
    assert "Lower lr" in found["local-step"].found
    assert "traffic" not in found


def test_data_that_are_not_finite(app: Path) -> None:
    found = findings(app, ["scale=inf"])
    assert list(of_status(found, FAILED)) == ["agent"]
    assert "agent 0's training split must hold finite inputs" in found["agent"].found


def test_a_disk_that_is_too_small_for_the_states(
    app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 0, 5_000))
    found = findings(app)
    assert of_status(found, FAILED).keys() == {"state-disk", "record-disk", "state"}
    assert "state-runs" in found["state"].remedy


def test_a_folder_that_is_no_app(tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert list(of_status(found, FAILED)) == ["run-config"]
    assert "pyproject.toml" in found["run-config"].found


def test_agents_of_nodes_are_those_of_the_run(app: Path) -> None:
    read = read_app(app)
    with agent_of_node(read, read.config, {"partition-id": 1, "num-partitions": 4}) as agent:
        assert agent.describe() == introductions(read, read.config)[1]


# --- a SuperLink ---


def make_certificate(
    folder: Path,
    *,
    names: tuple[str, ...] = ("127.0.0.1",),
    days: tuple[float, float] = (-1, 90),
    name: str = "server",
) -> tuple[Path, Path]:
    """A self-signed certificate, valid in these days from now, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    alternatives = [
        x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n)
        for n in names
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    files = folder / f"{name}.crt", folder / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Listen on loopback, and let `answer` have every connection; what it raises ends
    that connection.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                try:
                    answer(connection)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


received: list[bytes] = []


def speaks_tls(files: tuple[Path, Path]) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as stream:
            received.append(stream.recv(100))

    return answer


def says_hello(connection: socket.socket) -> None:
    connection.sendall(b"220 hello\r\n")
    connection.recv(1000)


def says_nothing(connection: socket.socket) -> None:
    while connection.recv(1000):
        pass


def test_a_superlink_with_tls_is_sent_nothing(tmp_path: Path) -> None:
    files = make_certificate(tmp_path)
    received.clear()
    with server(speaks_tls(files)) as address:
        connection, tls = check_superlink(SuperLink(address, files[0]))
    assert connection.status == OK
    assert tls.status == OK, tls
    assert tls.values["days_left"] == pytest.approx(90, abs=1)
    assert set(received) <= {b""}


def test_a_certificate_that_ends_soon(tmp_path: Path) -> None:
    files = make_certificate(tmp_path, days=(-1, 5))
    with server(speaks_tls(files)) as address:
        assert check_superlink(SuperLink(address, files[0]))[1].status == WARNING


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        ({"days": (-9, -2)}, "has expired"),
        ({"days": (2, 9)}, "not valid yet"),
        ({"names": ("10.9.8.7",)}, "not for this IP address"),
        ({"names": ("relay.example.org",)}, "not for this IP address"),
    ],
)
def test_a_bad_certificate(certificate: dict[str, Any], words: str, tmp_path: Path) -> None:
    files = make_certificate(tmp_path, **certificate)
    with server(speaks_tls(files)) as address:
        connection, tls = check_superlink(SuperLink(address, files[0]))
    assert connection.status == OK
    assert tls.status == FAILED
    assert words in tls.found
    assert tls.remedy


def test_a_certificate_for_another_host_name(tmp_path: Path) -> None:
    files = make_certificate(tmp_path, names=("relay.example.org",))
    with server(speaks_tls(files)) as address:
        _, tls = check_superlink(SuperLink(address.replace("127.0.0.1", "localhost"), files[0]))
    assert (tls.status, "another host name" in tls.found) == (FAILED, True), tls


def test_a_certificate_of_somebody_else(tmp_path: Path) -> None:
    files, (other, _) = make_certificate(tmp_path), make_certificate(tmp_path, name="other")
    with server(speaks_tls(files)) as address:
        for trusted in (other, None):
            _, tls = check_superlink(SuperLink(address, trusted))
            assert (tls.status, "not from the given" in tls.found) == (FAILED, True), tls


@pytest.mark.parametrize("answer", [says_hello, says_nothing])
def test_a_server_without_tls(answer: Callable[[socket.socket], None], tmp_path: Path) -> None:
    certificate, _ = make_certificate(tmp_path)
    with server(answer) as address:
        connection, tls = check_superlink(SuperLink(address, certificate, timeout=0.5))
        assert connection.status == OK
        assert (tls.status, "does not speak TLS" in tls.found) == (FAILED, True), tls
        _, plain = check_superlink(SuperLink(address, insecure=True, timeout=0.5))
        assert (plain.status, "not encrypted" in plain.found) == (WARNING, True), plain


def test_insecure_to_a_server_with_tls(tmp_path: Path) -> None:
    with server(speaks_tls(make_certificate(tmp_path))) as address:
        _, tls = check_superlink(SuperLink(address, insecure=True))
    assert (tls.status, "Leave out --insecure" in tls.remedy) == (FAILED, True)


def test_a_closed_port() -> None:
    with server(says_nothing) as address:
        pass
    (found,) = check_superlink(SuperLink(address))
    assert (found.status, "refuses" in found.found, "Start the SuperLink" in found.remedy) == (
        FAILED,
        True,
        True,
    )


def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    (found,) = check_superlink(SuperLink("relay.example.org:9443", timeout=0.5))
    assert (found.status, "within 0.5 s" in found.found, "firewalls" in found.remedy) == (
        FAILED,
        True,
        True,
    )


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    (found,) = check_superlink(SuperLink("relay.example.invalid:9443"))
    assert (found.status, "no known host name" in found.found) == (FAILED, True)


def test_a_file_that_holds_no_certificates(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("nothing of the kind")
    with server(says_nothing) as address:
        for file in ("ca.crt", "nowhere.crt"):
            _, tls = check_superlink(SuperLink(address, tmp_path / file))
            assert (tls.status, "cannot be read as certificates" in tls.found) == (FAILED, True), (
                tls
            )


def test_addresses() -> None:
    assert split_address("relay.example.org:9443") == ("relay.example.org", 9443)
    assert split_address("[::1]:80") == ("::1", 80)
    for wrong in (
        "relay",
        ":80",
        "::1:80",
        "relay:",
        "relay:0",
        "relay:70000",
        "relay:http",
        "[relay]:80",
        "[::1:80",
    ):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            split_address(wrong)
        assert check_superlink(SuperLink(wrong))[0].status == FAILED


# --- the command ---


def test_the_command_prints_lines_and_what_to_do(app: Path) -> None:
    result = CliRunner().invoke(
        commands, ["doctor", str(app), "--run-config", "crash=true"], catch_exceptions=False
    )
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    place = lines.index("failed   agent: RuntimeError: crashes on purpose")
    assert lines[place + 1].strip().startswith("-> Mend the app's")
    assert lines[-1].endswith("1 failed")


def test_the_command_prints_json_and_nothing_else(
    app: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["flower-mcepl", "doctor", str(app), "--partition-id", "1", "--json"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "the app talks" in err
    assert report["ok"] is True
    assert sum(report["counts"].values()) == len(report["checks"])
    checks = {check["check"]: check for check in report["checks"]}
    assert (
        checks["weights"]["values"]["fingerprint"]
        == introductions(read_app(app), read_app(app).config)[1]["fingerprint"]
    )
    assert {check["status"] for check in report["checks"]} <= {OK, WARNING}


def test_the_command_reaches_a_superlink() -> None:
    with server(says_nothing) as address:
        pass
    result = CliRunner().invoke(
        commands, ["doctor", "--superlink", address, "--json"], catch_exceptions=False
    )
    assert result.exit_code == 1
    assert json.loads(result.stdout)["checks"][-1]["check"] == "superlink-connection"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--insecure"],
        ["--root-certificates", "ca.crt"],
        ["--superlink", "a:1", "--insecure", "--root-certificates", "b"],
    ],
)
def test_contradicting_options(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["flower-mcepl", "doctor", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: --")


def test_help_shows_how() -> None:
    text = CliRunner().invoke(commands, ["doctor", "--help"]).output
    assert (
        "flower-mcepl doctor --superlink relay.example.org:9443 --root-certificates ca.crt\n"
        in text
    )
    assert "jq -r" in text
