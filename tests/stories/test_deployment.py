"""examples/deployment: a fleet of real SuperLink and SuperNodes, and what can be
checked of its files without one.
"""

import configparser
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.common.config import parse_config_args

from flower_mcepl import AgentData, RunRecord, Topology, read_run, simulate
from flower_mcepl.agents import load_state
from flower_mcepl.config.fields import field_keys
from flower_mcepl.record.reading import Run
from flower_mcepl.report.table import agent_table
from flower_mcepl.runs.settings import DeviceSettings
from flower_mcepl.studies.flower_app import imported_client, read_app
from tests.fleet.agents import without_run
from tests.fleet.deployment import NODES, SCRIPTS, Fleet
from tests.fleet.flower import RecordingGrid, gossip
from tests.fleet.study_app import write_app

COLUMNS = (
    "round",
    "agent",
    "accuracy",
    "loss",
    "density",
    "sent_bytes",
    "received_bytes",
    "uplink_bytes",
)


def small_app(folder: Path, name: str) -> Path:
    """A small app that keeps every frame and evaluates in every round."""
    app = write_app(folder, name)
    settings = app / "pyproject.toml"
    more = 'keep-frames = true\ncheckpoint-every = 1\nresume = ""\nmin-agents = 0\nagents = ""\n'
    settings.write_text(
        settings.read_text().replace("evaluate-every = 1\n", f"evaluate-every = 1\n{more}")
    )
    return app


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path / "fleet") as fleet:
        fleet.up()
        yield fleet


def assert_same_exchange(real: Run, expected: Run) -> None:
    """Every frame, but for what binds it to its run, and what came of it."""
    for key in ("frames", "lacking", "refused"):
        assert [line[key] for line in real.relay] == [line[key] for line in expected.relay], key
    rows = [sorted([row[c] for c in COLUMNS] for row in run.rounds) for run in (real, expected)]
    assert rows[0] == rows[1]
    frames = [
        {file.name: without_run(file.read_bytes()) for file in (run.path / "frames").iterdir()}
        for run in (real, expected)
    ]
    assert frames[0] == frames[1]


def assert_same_states(fleet: Fleet, expected: Run) -> None:
    """What lies on the devices after the closing exchange is what the agents of
    `expected` ended with.
    """
    for agent in range(len(NODES)):
        state, other = fleet.stored_state(agent).state, load_state(expected.agents[agent])
        assert state.facts == other.facts
        assert state.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(state.tensors[name], other.tensors[name]) for name in other.tensors)


def simulated(
    fleet: Fleet,
    app: Path,
    folder: Path,
    topology: Topology | None = None,
    *,
    guests: Sequence[str] = (),
) -> Run:
    """The fleet's last run under `simulate`: same run config, same node configs."""
    nodes = (*NODES, *guests)
    real = read_run(fleet.record())
    config: dict[str, Any] = real.config["run_config"]
    with imported_client(read_app(app)) as client:
        agents = [
            client.agent_fn(
                Context(
                    run_id=1,
                    node_id=agent,
                    node_config=fleet.node_config(node),
                    state=RecordDict(),
                    run_config=config,
                )
            )
            for agent, node in enumerate(nodes)
        ]
    record = RunRecord.create(path=folder, name="oracle", config={}, with_frames=True)
    simulate(
        agents,
        topology or Topology.ring(len(NODES)),
        num_rounds=config["num-rounds"],
        evaluate_every=1,
        record=record,
    )
    return read_run(record.path)


def replayed(
    fleet: Fleet, app: Path, folder: Path, *, killed: int, back: int, max_staleness: int
) -> Run:
    """The fleet's run in one process, with node 1 away from round `killed` on until
    round `back`.
    """
    real = read_run(fleet.record())
    config: dict[str, Any] = real.config["run_config"]
    with imported_client(read_app(app)) as client:
        grid = RecordingGrid(client, len(NODES), config)
        for agent, node in enumerate(NODES):
            grid.contexts[1000 + agent].node_config.update(fleet.node_config(node))
        strategy = gossip(
            grid,
            Topology.ring(len(NODES)),
            rounds=config["num-rounds"],
            before={
                killed: lambda: grid.unavailable.add(1001),
                killed + 1: lambda: (grid.unavailable.clear(), grid.down.add(1001))[0],
                back: grid.down.clear,
            },
            evaluate_every=1,
            max_staleness=max_staleness,
            record=folder,
            keep_frames=True,
        )
    assert strategy.record is not None
    return read_run(strategy.record.path)


@pytest.mark.flower
@pytest.mark.slow
def test_three_supernodes_exchange_the_masks_of_simulate(fleet: Fleet, tmp_path: Path) -> None:
    app = small_app(tmp_path, "fleet")
    fleet.finish(fleet.start_run(app, "num-rounds=6"))
    real, expected = read_run(fleet.record()), simulated(fleet, app, tmp_path / "oracle")
    assert [line["answered"] for line in real.relay] == [3] * 7
    assert len({facts["retention"] for facts in real.config["agents"]}) == 3
    assert_same_exchange(real, expected)
    assert_same_states(fleet, expected)
    fleet.down()


@pytest.mark.flower
@pytest.mark.slow
def test_a_killed_supernode_comes_back_as_the_same_agent(fleet: Fleet, tmp_path: Path) -> None:
    app = small_app(tmp_path, "outage")
    run = fleet.start_run(app, "num-rounds=8")
    fleet.wait_until(lambda: "ROUND 2]" in fleet.log("node-1"), "round 2 at node-1", of=run)
    fleet.kill("node-1")
    assert fleet.stored_rounds(1) == [1]

    stranger = fleet.start_stranger()
    fleet.wait_for_rounds(3, of=run)
    fleet.up("node-1")
    fleet.finish(run)

    real = read_run(fleet.record())
    answered = [line["round"] for line in real.relay if "1" in line["frames"]]
    back = answered[1]
    assert answered == [1, *range(back, 9)]
    assert 4 <= back <= 8
    assert all(line["answered"] == (2 if 2 <= line["round"] < back else 3) for line in real.relay)
    # it did not begin afresh
    assert [line["fresh"] for line in real.relay] == [[0, 1, 2]] + [[]] * 8
    assert "agent 1" in real.relay[1]["failed"]
    told = [line["states"].get("agent 1") for line in real.relay]
    assert (told[0], told[2], told[back - 1]) == ("running", "gone", "running")
    assert str(told[1]).startswith("failed: error 5")

    # With the state of round 1 on its disk, and with neighbors that used its mask of
    # round 1 meanwhile.
    expected = replayed(fleet, app, tmp_path / "oracle", killed=2, back=back, max_staleness=5)
    assert_same_exchange(real, expected)
    forgetful = replayed(fleet, app, tmp_path / "forgetful", killed=2, back=back, max_staleness=0)
    assert real.relay[1]["frames"] == forgetful.relay[1]["frames"]
    assert all(
        real.relay[3]["frames"][agent] != forgetful.relay[3]["frames"][agent]
        for agent in ("0", "2")
    )

    assert stranger.wait(timeout=60) != 0
    said = fleet.log("stranger")
    assert "2004" in said
    assert "Receiving" not in said
    assert not (fleet.folder / "stranger" / "state").exists()
    assert not list((fleet.folder / "stranger").rglob("*.py"))  # not even the app
    fleet.down()


@pytest.mark.flower
@pytest.mark.slow
def test_a_run_whose_superlink_was_killed_resumes(fleet: Fleet, tmp_path: Path) -> None:
    app = small_app(tmp_path, "resumption")
    broken = fleet.start_run(app, "num-rounds=5")
    fleet.wait_for_rounds(2, of=broken)
    fleet.kill("superlink")
    fleet.wait_until(lambda: broken.poll() is not None, "run.sh", of=None)
    assert broken.returncode != 0

    fleet.up()
    fleet.finish(fleet.start_run(app, "num-rounds=5", f'resume="{fleet.record()}"'))
    real, expected = read_run(fleet.record()), simulated(fleet, app, tmp_path / "oracle")
    assert len(real.config["resumptions"]) == 1
    assert real.config["resumptions"][0]["after_round"] >= 2
    assert_same_exchange(real, expected)
    assert_same_states(fleet, expected)
    fleet.down()


# One registered device of four is hostile, in every round in another way. Each row is
# an entry of the table of what others say; after two bad answers comes a good one, so
# that it stays out of quarantine. Nobody hears it, but it hears all: what the three
# others do is then what they do under `simulate`.
HOSTILE_CLIENT = """

def spoil(reply, round):
    import math
    from flwr.app import Array, ArrayRecord, ConfigRecord
    import numpy as np
    agent, metrics = reply.content["agent"], reply.content["metrics"]
    rows = {
        2: lambda: agent.update({"parameters": "{}", "fingerprint": "x", "a-fact": b"bytes"}),
        3: lambda: agent.update({"parameters": '{"a":' * 900 + "1" + "}" * 900}),
        5: lambda: metrics.update({"train-loss": math.inf}),
        6: lambda: metrics.update({"accuracy": 1e6}),
        8: lambda: agent.update({"refused": ["x" * 20_000_000]}),
        9: lambda: reply.content.update(
            {"frame": ArrayRecord({"frame": Array(np.zeros(50_000_000, np.uint8))})}
        ),
        11: lambda: agent.update(
            {"lacking": [0, 1, 2], "refused": ["\\x1b]52;c;x\\x07\\nINFO : forged"]}
        ),
        12: lambda: agent.update({"agent": 1}),
    }
    rows.get(round, lambda: None)()


def misbehave(message, context, call_next):
    reply = call_next(message, context)
    if context.node_config.get("hostile") and not reply.has_error():
        spoil(reply, message.content["order"]["server-round"])
    return reply


app = make_client_app(model_fn, data_fn, mods=[misbehave])
"""
HOSTILE_ROUNDS = {2, 3, 5, 6, 8, 9, 12}


@pytest.mark.flower
@pytest.mark.slow
def test_a_hostile_device_and_an_impostor_harm_nobody(fleet: Fleet, tmp_path: Path) -> None:
    app = small_app(tmp_path, "hostile")
    (client,) = app.glob("*/client_app.py")
    client.write_text(client.read_text() + HOSTILE_CLIENT)
    graph = tmp_path / "graph.txt"
    heard = [(i, j) for i in range(3) for j in range(3) if i != j] + [(i, 3) for i in range(3)]
    matrix = [[int((i, j) in heard) for j in range(4)] for i in range(4)]
    graph.write_text("\n".join(" ".join(map(str, row)) for row in matrix))
    fleet.add_guest("guest-3", "partition-id=3 hostile=true")
    fleet.add_guest("impostor", "partition-id=1")
    keys = [fleet.public_key(name) for name in (*NODES, "guest-3")]
    (tmp_path / "agents.txt").write_text(
        "".join(f"{agent} {key}\n" for agent, key in enumerate(keys))
    )
    fleet.finish(
        fleet.start_run(
            app,
            "num-rounds=13 num-agents=4 min-agents=3",
            f'topology="file:{graph}" agents="{tmp_path / "agents.txt"}"',
        )
    )

    real = read_run(fleet.record())
    failed = {line["round"]: line["failed"] for line in real.relay}
    assert all("agent 3" in failed[round] for round in HOSTILE_ROUNDS)
    assert "by the file of agents' keys" in str(failed[1])
    log = (fleet.folder / "run.log").read_text(errors="replace")
    assert "\\x1b]52;c;x\\x07\\nINFO : forged" in log
    assert "\x1b]52" not in log
    expected = simulated(
        fleet, app, tmp_path / "oracle", Topology.from_file(graph), guests=["guest-3"]
    )
    for agent in range(3):
        frames = [
            [line["frames"][str(agent)] for line in run.relay[:-1]] for run in (real, expected)
        ]
        assert frames[0] == frames[1]
        state, other = fleet.stored_state(agent).state, load_state(expected.agents[agent])
        assert all(torch.equal(state.tensors[name], other.tensors[name]) for name in other.tensors)
    assert "accuracy" in agent_table(real)
    fleet.down()


# What can be checked without a fleet


def page(name: str) -> str:
    return (SCRIPTS / name).read_text()


def options(text: str, program: str) -> set[str]:
    """The long options that commands of a program are given, line continuations
    included.
    """
    commands = re.findall(rf"{program} (--(?:[^\n\\]|\\.|\\\n)*)", text)
    assert commands
    return {
        option
        for command in commands
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", command)
    }


@pytest.fixture(scope="module")
def flowers_help() -> dict[str, str]:
    """What Flower's programs tell of their options; it takes seconds to load them."""
    code = """
from importlib.metadata import entry_points
import sys

for name in sys.argv[1:]:
    (program,) = entry_points(group="console_scripts", name=name)
    sys.argv = [name, "--help"]
    try:
        program.load()()
    except SystemExit as end:
        assert not end.code, end
    print("\\0")
"""
    command = [sys.executable, "-c", code, *PROGRAMS]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(zip(PROGRAMS, told.split("\0"), strict=False))


PROGRAMS = {
    "flower-superlink": ["superlink.sh", "systemd/flower-superlink.service"],
    "flower-supernode": ["supernode.sh", "systemd/flower-supernode@.service"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("program", "files"), PROGRAMS.items())
def test_the_options_are_those_of_the_installed_flower(
    program: str, files: list[str], flowers_help: dict[str, str]
) -> None:
    told = flowers_help[program]
    assert f"usage: {program}" in told
    known = set(re.findall(r"--[a-z][a-z-]+", told))
    for name in files:
        used = options(page(name), program)
        assert len(used) >= 6
        assert used <= known, name
    assert options(page(files[0]), program) == options(page(files[1]), program)


@pytest.mark.parametrize("name", ["flower-superlink.service", "flower-supernode@.service"])
def test_the_units_are_well_formed(name: str) -> None:
    unit = configparser.RawConfigParser(strict=False, comment_prefixes=("#",), delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(re.sub(r"\\\n\s*", "", page(f"systemd/{name}")))
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["UMask"] == "0077"
    assert "StateDirectory" in service
    if "supernode" in name:
        assert service["Restart"] == "always"
        assert int(service["RestartSec"]) >= 60  # for so long a killed node counts as online


def test_the_image_is_made_of_files_that_are_there() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", page("Containerfile"), re.MULTILINE)
    sources = " ".join(copied).split()
    assert "flower_mcepl" in sources
    assert all((SCRIPTS.parents[1] / source).exists() for source in sources)


@pytest.mark.parametrize(
    "name", ["certificates.sh", "superlink.sh", "supernode.sh", "up.sh", "run.sh", "down.sh"]
)
def test_the_scripts_are_sound_and_tell_what_they_do(name: str) -> None:
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    text = page(name)
    assert "set -euo pipefail" in text
    assert "umask 077" in text or '. "$(dirname "${BASH_SOURCE[0]}")/fleet.sh"' in text
    told = subprocess.run(
        [SCRIPTS / name, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert name in told
    assert "#!" not in told
    assert "set -euo" not in told


def joined_by_the_script(folder: Path, node_config: str) -> str:
    """The node config with which supernode.sh starts Flower's program."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "flower-supernode"
    program.write_text('#!/bin/sh\nfor last; do :; done\nprintf %s "$last"\n')
    program.chmod(0o755)
    (folder / "node.env").write_text(
        f"SUPERLINK='relay.example.org:9443'\nNODE_CONFIG='{node_config}'\n"
    )
    path = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    started = subprocess.run(
        [SCRIPTS / "supernode.sh", folder], env=path, capture_output=True, text=True, check=True
    )
    return started.stdout


def joined_by_the_unit(folder: Path, node_config: str) -> str:
    """The node config of the systemd unit."""
    (told,) = re.findall(
        r"--node-config (.+)$", page("systemd/flower-supernode@.service"), re.MULTILINE
    )
    return (
        shlex.split(told)[0]
        .replace("%S/flower-supernode/%i", str(folder))
        .replace("${NODE_CONFIG}", node_config)
    )


@pytest.mark.parametrize("joined", [joined_by_the_script, joined_by_the_unit])
def test_a_device_may_set_what_the_readme_says(
    joined: Callable[[Path, str], str], tmp_path: Path
) -> None:
    """Flower refuses a key that comes twice, as one would that the scripts set, too."""
    (told,) = re.findall(r"`NODE_CONFIG` takes (.+?), and whatever", page("README.md"), re.DOTALL)
    keys = re.findall(r"`([a-z-]+)`", told)
    of_algorithms = {"retention-conv", "retention-linear", "filters", "step-budget", "depth"}
    of_algorithms |= {"density", "weights", "weights-except"}
    assert set(keys) == {"partition-id"} | of_algorithms | field_keys(DeviceSettings) - {
        "state-dir"
    }
    found = parse_config_args(
        [joined(tmp_path, " ".join(f"{key}={number}" for number, key in enumerate(keys)))]
    )
    assert found == {
        "state-dir": str(tmp_path / "state"),
        **{key: number for number, key in enumerate(keys)},
    }


def test_certificates_are_made_once_and_are_good_for_the_names(tmp_path: Path) -> None:
    def make(*names: str) -> dict[str, bytes]:
        subprocess.run(
            [SCRIPTS / "certificates.sh", tmp_path, *names], check=True, capture_output=True
        )
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    first = make("relay.example.org", "10.0.0.5")
    assert make("10.0.0.5") == first
    assert {
        name: (tmp_path / name).stat().st_mode & 0o777
        for name in ("ca.key", "server.key", "ca.crt")
    } == {
        "ca.key": 0o600,
        "server.key": 0o600,
        "ca.crt": 0o644,
    }
    for check in (
        ["-verify_hostname", "relay.example.org"],
        ["-verify_ip", "10.0.0.5"],
        ["-verify_ip", "127.0.0.1"],
    ):
        command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", *check, "server.crt"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    other = make("other.example.org")
    assert other["server.crt"] != first["server.crt"]
    assert (other["ca.crt"], other["ca.key"]) == (first["ca.crt"], first["ca.key"])


def test_the_data_function_of_the_readme_reads_a_folder(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", page("README.md"), re.DOTALL)
    for split, number in (("train", 12), ("test", 4)):
        images, labels = np.zeros((number, 1, 8, 8), np.float32), np.arange(number) % 3
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    names: dict[str, Any] = {}
    exec(code, names)
    context = Context(
        run_id=1,
        node_id=7,
        node_config={"data": str(tmp_path)},
        state=RecordDict(),
        run_config={"seed": 0},
    )
    data = AgentData.of(*names["data_fn"](context), agent=0)
    assert (data.train.num_examples, data.test.num_examples) == (12, 4)
