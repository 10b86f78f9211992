"""Real `flwr run` on Ray: a run whose ServerApp is killed in the middle, and resumed,
ends as one that never was.
"""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from flower_mcepl import RunRecord, Topology, read_run, simulate
from flower_mcepl.agents import load_state
from flower_mcepl.launch import RunOutcome, run_app
from tests.stories.test_flwr_run import SEED, quickstart_agents

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
NUM_AGENTS, NUM_ROUNDS, KILLED_AFTER, EVERY = 10, 10, 5, 2

pytestmark = [pytest.mark.slow, pytest.mark.flower]


def flower_run(folder: Path, **run_config: object) -> RunOutcome:
    config = {
        "num-agents": NUM_AGENTS,
        "num-rounds": NUM_ROUNDS,
        "topology": "ring",
        "seed": SEED,
        "evaluate-every": 3,
    }
    return run_app(
        QUICKSTART,
        run_config={**config, "checkpoint-every": EVERY, "record-dir": str(folder), **run_config},
        num_supernodes=NUM_AGENTS,
        federation_config="init-args-num-cpus=2 client-resources-num-cpus=1",
        timeout=600,
    )


def kill_server(folder: Path, killed: list[int]) -> None:
    """Kill the process that writes the record below ``folder`` once it has closed some
    rounds.
    """
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        for relay in folder.glob("*/relay.jsonl"):
            if len(relay.read_bytes().splitlines()) >= KILLED_AFTER:
                killed.append(int((relay.parent / ".lock").read_text()))
                os.kill(killed[0], signal.SIGKILL)
                return
        time.sleep(0.01)


def test_a_run_whose_server_was_killed_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert flower_run(whole).ok
    killed: list[int] = []
    killer = threading.Thread(target=kill_server, args=(broken, killed))
    killer.start()
    outcome = flower_run(broken)
    killer.join()
    assert killed
    assert not outcome.ok
    (path,) = broken.iterdir()
    stopped = read_run(path)
    assert stopped.summary is None
    assert KILLED_AFTER <= len(stopped.relay) < NUM_ROUNDS

    resumed = flower_run(broken, resume=str(path))
    assert resumed.ok, resumed.log[-3000:]
    assert list(broken.iterdir()) == [path]
    (expected,) = whole.iterdir()
    ours, theirs = read_run(path), read_run(expected)
    (noted,) = ours.config["resumptions"]
    assert noted["after_round"] % EVERY == 0
    assert noted["after_round"] <= len(stopped.relay)
    assert [line["round"] for line in ours.relay] == list(range(1, NUM_ROUNDS + 2))
    assert [line["frames"] for line in ours.relay] == [line["frames"] for line in theirs.relay]
    assert [line["fresh"] for line in ours.relay[1:]] == [[]] * NUM_ROUNDS
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
    rows = [sorted([row[c] for c in columns] for row in run.rounds) for run in (ours, theirs)]
    assert rows[0] == rows[1]
    assert (path / "traffic.jsonl").read_text() == (expected / "traffic.jsonl").read_text()
    assert sorted(ours.agents) == sorted(theirs.agents) == list(range(NUM_AGENTS))
    for index, file in ours.agents.items():
        mine, other = load_state(file), load_state(theirs.agents[index])
        assert mine.facts == other.facts
        assert mine.tensors.keys() == other.tensors.keys()
        assert all((mine.tensors[name] == other.tensors[name]).all() for name in mine.tensors)
    assert sorted(file.name for file in (path / "agents").iterdir()) == sorted(
        file.name for file in (expected / "agents").iterdir()
    )


def test_a_run_without_a_barrier_is_resumed_and_its_whole_log_gives_its_bits(
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    killed: list[int] = []
    killer = threading.Thread(target=kill_server, args=(broken, killed))
    killer.start()
    assert not flower_run(broken, schedule="async").ok
    killer.join()
    (path,) = broken.iterdir()
    resumed = flower_run(broken, schedule="async", resume=str(path))
    assert resumed.ok, resumed.log[-3000:]
    run = read_run(path)
    (noted,) = run.config["resumptions"]
    assert noted["after_round"] >= EVERY
    assert [line["fresh"] for line in run.relay[1:]] == [[]] * NUM_ROUNDS
    record = RunRecord.create(tmp_path, name="again", config={})
    config = {"num-agents": NUM_AGENTS, "num-rounds": NUM_ROUNDS, "topology": "ring", "seed": SEED}
    simulate(
        quickstart_agents(config),
        Topology.ring(NUM_AGENTS),
        num_rounds=NUM_ROUNDS,
        evaluate_every=3,
        schedule="async",
        events=path,
        record=record,
    )
    again = read_run(record.path)
    assert [line["frames"] for line in run.relay] == [line["frames"] for line in again.relay]
    assert again.result() == run.result()
    for index, file in run.agents.items():
        mine, other = load_state(file), load_state(again.agents[index])
        assert all((mine.tensors[name] == other.tensors[name]).all() for name in mine.tensors)
