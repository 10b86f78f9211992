"""Real `flwr run` on Ray: the same masks as `simulate`, for every agent and round,
whatever the number of workers, on one node or on a cluster of two.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flower_mcepl import (
    AgentData,
    MceplAgent,
    MceplConfig,
    RunRecord,
    Topology,
    read_run,
    shared_module,
    simulate,
)
from flower_mcepl.agents import load_state
from flower_mcepl.data.splits import DataSettings
from flower_mcepl.launch import run_app

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
NUM_AGENTS, NUM_ROUNDS, SEED = 10, 3, 5
RUN_CONFIG = {
    "num-agents": NUM_AGENTS,
    "num-rounds": NUM_ROUNDS,
    "topology": "ring",
    "seed": SEED,
    "evaluate-every": 1,
}

pytestmark = [pytest.mark.slow, pytest.mark.flower]


def flower_record(folder: Path, *, workers: int | None = None) -> Path:
    """Record of a run with so many workers; without, on the cluster that there is."""
    ray = "" if workers is None else f"init-args-num-cpus={workers} "
    outcome = run_app(
        QUICKSTART,
        run_config={**RUN_CONFIG, "record-dir": str(folder)},
        num_supernodes=NUM_AGENTS,
        federation_config=f"{ray}client-resources-num-cpus=1",
        timeout=600,
    )
    assert outcome.status == "finished:completed", outcome.log[-3000:]
    (record,) = folder.iterdir()
    return record


def quickstart_agents(run_config: dict[str, Any]) -> list[MceplAgent]:
    """Agents of the quickstart's task, for `simulate`."""
    sys.path.insert(0, str(QUICKSTART))
    try:
        from mcepl_quickstart.task import Net, load_data
    finally:
        sys.path.remove(str(QUICKSTART))
    import tomllib

    defaults = tomllib.loads((QUICKSTART / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    config: dict[str, Any] = {**defaults, **run_config}
    net = shared_module(Net, seed=SEED)
    settings = DataSettings.from_run_config(config)
    splits = [
        load_data(index, num_agents=NUM_AGENTS, settings=settings, seed=SEED)
        for index in range(NUM_AGENTS)
    ]
    return [
        MceplAgent(
            index,
            net,
            AgentData.of(train, test, agent=index, validation=validation),
            MceplConfig.from_run_config(config, agent=index),
            seed=SEED,
        )
        for index, (train, validation, test) in enumerate(splits)
    ]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's task under `simulate`."""
    agents = quickstart_agents(RUN_CONFIG)
    record = RunRecord.create(tmp_path_factory.mktemp("oracle"), name="oracle", config={})
    simulate(
        agents, Topology.ring(NUM_AGENTS), num_rounds=NUM_ROUNDS, evaluate_every=1, record=record
    )
    return record.path


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_flwr_run_gives_the_masks_of_simulate(workers: int, oracle: Path, tmp_path: Path) -> None:
    assert_same(oracle, flower_record(tmp_path, workers=workers))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two nodes of Ray, with a processor each."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    places = [["--head", f"--port={address.rpartition(':')[2]}"], [f"--address={address}"]]
    nodes = []
    try:
        for number, place in enumerate(places):
            log = tmp_path.parent / f"{tmp_path.name}-node-{number}.log"
            nodes.append(_ray_node(place, log))
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)


def _ray_node(place: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a node, and wait until it says that it runs."""
    options = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    command = [str(Path(sys.executable).with_name("ray")), "start", *place, *options, "--block"]
    with log.open("wb") as out:
        node = subprocess.Popen(command, stdout=out, stderr=out)
    deadline = time.monotonic() + 180
    while b"Ray runtime started" not in log.read_bytes():
        assert node.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.2)
    return node


@pytest.mark.usefixtures("cluster")
def test_so_does_a_ray_cluster(oracle: Path, tmp_path: Path) -> None:
    assert_same(oracle, flower_record(tmp_path))


def assert_same(one: Path, other: Path) -> None:
    """Assert that two records have the same frames, figures and final states."""
    ours, theirs = read_run(one), read_run(other)
    assert [line["frames"] for line in ours.relay] == [line["frames"] for line in theirs.relay]
    assert all(len(line["frames"]) == NUM_AGENTS for line in ours.relay[:NUM_ROUNDS])
    columns = (
        "round",
        "agent",
        "accuracy",
        "loss",
        "density",
        "sent_bytes",
        "received_bytes",
        "uplink_bytes",
    )
    assert [[row[c] for c in columns] for row in ours.rounds] == [
        [row[c] for c in columns] for row in theirs.rounds
    ]
    traffic = [(run.path / "traffic.jsonl").read_text() for run in (ours, theirs)]
    assert traffic[0] == traffic[1]
    assert sorted(theirs.agents) == list(range(NUM_AGENTS))
    for index, path in theirs.agents.items():
        mine, its = load_state(ours.agents[index]), load_state(path)
        assert mine.facts == its.facts
        assert all((mine.tensors[name] == its.tensors[name]).all() for name in mine.tensors)
