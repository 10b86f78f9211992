"""How a run ends: finished, incomplete, failed or interrupted, and what is kept."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

from flower_mcepl import IncompleteRunError, LostWorkerError, RosterError, Topology
from flower_mcepl.errors import same_reason
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.strategies import GossipStrategy, attendance
from flower_mcepl.strategies.roster import Roster
from tests.fleet.flower import agent_grid, gossip
from tests.fleet.grid import InProcessGrid

DEAD = (
    "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before finishing "
    "this task.\n\tclass_name: ClientAppActor\n\tactor_id: 17b3'>"
)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "flwr")
    return caplog


class FailingGrid(InProcessGrid):
    """Nodes answer some messages with an error, as Flower's simulation words it."""

    fails: dict[int, str]  # by node
    code = 0

    def _reply(self, node: int, message: Message) -> Message:
        if node in self.fails:
            return Message(Error(self.code, self.fails[node]), reply_to=message)
        return super()._reply(node, message)


def failing_grid(num_nodes: int) -> FailingGrid:
    grid = FailingGrid(agent_grid(num_nodes).app, num_nodes)
    grid.fails = {}
    return grid


def only_run(folder: Path) -> Run:
    (path,) = folder.iterdir()
    return read_run(path)


def checkpoints(run: Run) -> list[str]:
    return sorted(file.name for file in (run.path / "checkpoint").glob("*.checkpoint"))


def test_a_run_is_finished_when_all_that_had_not_left_answered_the_closing(tmp_path: Path) -> None:
    grid = agent_grid(4)
    gossip(grid, record=tmp_path, before={3: lambda: grid.down.add(1003)})
    run = only_run(tmp_path)
    assert run.status == "finished"
    assert run.relay[-1]["missing"] == [3]


def test_a_missing_closing_answer_makes_a_run_incomplete_and_resumable(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    grid = agent_grid(3)

    def lose(message: Message) -> Message:
        if message.metadata.message_type == "evaluate":
            grid.mute.add(1001)
        return message

    grid.tamper = lose
    gossip(grid, record=tmp_path, checkpoint_every=2, incomplete=True)
    run = only_run(tmp_path)
    assert run.status == "incomplete"
    assert run.summary is not None
    assert run.summary["error"]["type"] == "IncompleteRunError"
    assert "these agents: 1." in run.summary["error"]["reason"]
    assert checkpoints(run)
    assert f"flwr run . --run-config 'resume=\"{run.path}\"'" in log.text
    grid.mute.clear()
    grid.tamper = lambda message: message
    gossip(grid, resume=run.path, checkpoint_every=2)
    assert read_run(run.path).status == "finished"
    assert not checkpoints(run)


@pytest.mark.parametrize(
    ("every", "way_out"),
    [(25, "and resume the run"), (0, r"and start the run anew \(it has no checkpoint\)")],
)
def test_an_agent_that_leaves_between_the_last_round_and_the_closing_had_not_left_before(
    every: int, way_out: str, tmp_path: Path
) -> None:
    grid = agent_grid(3)
    options: dict[str, Any] = {"wait_timeout": 0.01, "evaluate_every": 2, "checkpoint_every": every}
    with pytest.raises(IncompleteRunError, match=f"these agents: 2.*{way_out}"):
        GossipStrategy(Topology.ring(3), record=tmp_path, **options).start(
            Leaving(grid, 1002, last=2), num_rounds=2, timeout=30.0
        )
    assert only_run(tmp_path).status == "incomplete"


class Leaving:
    """A grid whose node goes away once it has answered the last round."""

    def __init__(self, grid: InProcessGrid, node: int, *, last: int) -> None:
        self.grid, self.node, self.last, self.rounds = grid, node, last, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def push_messages(self, messages: list[Message]) -> Any:
        ids = self.grid.push_messages(messages)
        self.rounds += 1
        if self.rounds == self.last:
            self.grid.down.add(self.node)
        return ids


@pytest.mark.parametrize(("least", "left"), [(0, 2), (0, 1), (1, 1), (3, 2)])
def test_min_agents_holds_in_every_round(least: int, left: int, tmp_path: Path) -> None:
    """Of 3 agents some leave in round 3: more than half must stay, unless said."""
    grid = agent_grid(3)
    leaving = {3: lambda: grid.down.update({1000 + agent for agent in range(left, 3)})}
    needed = least or 2
    if left >= needed:
        gossip(grid, record=tmp_path, before=leaving, min_agents=least)
        assert only_run(tmp_path).status == "finished"
        return
    with pytest.raises(RosterError, match=f"round 3 needs {needed} agents, but {left} took part"):
        gossip(grid, record=tmp_path, before=leaving, min_agents=least, checkpoint_every=2)
    run = only_run(tmp_path)
    assert (run.status, len(run.relay)) == ("failed", 2)
    assert checkpoints(run) == ["round-000002.checkpoint"]


def test_the_same_reason_round_after_round_ends_the_run(tmp_path: Path) -> None:
    grid = failing_grid(5)
    fails = {1003: "agent 3: no room in 17 MB", 1004: "agent 4: no room in 18 MB"}
    with pytest.raises(RosterError, match=r"same reason in 3 rounds up to round 4 \(2 of them"):
        gossip(grid, rounds=9, record=tmp_path, before={2: lambda: grid.fails.update(fails)})
    assert only_run(tmp_path).status == "failed"


@pytest.mark.parametrize(
    ("num_agents", "per_node", "least"),
    [(2, 1, 2), (20, 1, 2), (21, 1, 3), (30, 1, 3), (1000, 1, 100), (1000, 20, 5)],
)
def test_a_few_devices_of_a_large_fleet_end_no_run(
    num_agents: int, per_node: int, least: int
) -> None:
    """Nodes that fail for one reason: less than a tenth of all go on failing alone."""

    def play(failing: int) -> None:
        people = attendance.Attendance(
            Roster(num_agents),
            min_agents=1,
            wait_timeout=1.0,
            agents_per_node=per_node,
        )
        failed = {f"agent {i}": "no room on the disk" for i in range(failing * per_node)}
        for round in range(1, 4):
            people.check(round, range(num_agents), failed, first=False)

    play(least - 1)
    with pytest.raises(RosterError, match=rf"{least * per_node} of them in this one"):
        play(least)


def test_a_reason_of_one_agent_or_with_a_pause_ends_no_run(tmp_path: Path) -> None:
    grid = failing_grid(5)
    fails = {1003: "agent 3: no room", 1004: "agent 4: no room"}
    steps = {
        2: lambda: grid.fails.update(fails),
        4: grid.fails.clear,
        5: lambda: grid.fails.update({1003: fails[1003]}),
    }
    gossip(grid, rounds=9, record=tmp_path, before=steps, incomplete=True)
    assert len(only_run(tmp_path).relay) == 9 + 1


def test_a_lost_worker_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "in_simulation", lambda: True)
    grid = failing_grid(5)
    with pytest.raises(LostWorkerError, match=r"round 3: .*agent 1: error 0: ActorDiedError: The"):
        gossip(
            grid,
            rounds=9,
            record=tmp_path,
            checkpoint_every=1,
            before={3: lambda: grid.fails.update({1001: DEAD})},
        )
    run = only_run(tmp_path)
    assert (run.status, len(run.relay)) == ("failed", 2)
    assert checkpoints(run) == ["round-000001.checkpoint", "round-000002.checkpoint"]
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["error"]["type"] == "LostWorkerError"


def test_a_reason_is_the_same_but_for_its_numbers() -> None:
    assert same_reason("agent 3: out of 17 MB\nmore") == same_reason("agent 14: out of 9 MB")
    assert same_reason("agent 3: out of memory") != same_reason("agent 3: no such file")


def test_the_same_failure_is_told_once_and_its_whole_text_kept_once(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    grid = failing_grid(7)
    reason = f"agent {{}}: no room for {'x' * 300}\nsecond line"
    fails = {1000 + agent: reason.format(agent) for agent in (4, 5, 6)}
    steps = {2: lambda: grid.fails.update(fails), 4: grid.fails.clear}
    gossip(grid, rounds=6, record=tmp_path, before=steps)
    (line,) = [message for message in log.messages if "failed. " in message]  # of two rounds
    assert line.startswith("round 2: agent 4, agent 5, agent 6 failed. error 0: agent 4: no room")
    assert len(line) < 260
    run = only_run(tmp_path)
    assert {len(text) for text in run.relay[1]["failed"].values()} == {200}
    assert run.relay[1]["states"]["agent 4"].startswith("failed: error 0: agent 4: no room")
    kept = (run.path / "failures.txt").read_text()
    indented = fails[1004].replace("\n", "\n    ")
    assert kept == f"round 2, agent 4: error 0: {indented}\n\n"


def test_of_many_agents_the_first_is_named_and_the_others_counted(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    grid = failing_grid(11)
    fails = {1000 + agent: f"agent {agent}: no room" for agent in range(6, 11)}
    gossip(
        grid,
        rounds=3,
        record=tmp_path,
        before={2: lambda: grid.fails.update(fails), 3: grid.fails.clear},
    )
    assert "round 2: agent 10 and 4 others failed. error 0: agent 10: no room" in log.messages


def test_an_apps_own_dead_actor_is_no_lost_worker(tmp_path: Path) -> None:
    grid = failing_grid(5)
    grid.code = 2  # the app raised it
    steps = {
        2: lambda: grid.fails.update({1001: "RuntimeError: the actor is dead"}),
        3: grid.fails.clear,
    }
    gossip(grid, rounds=4, record=tmp_path, before=steps)
    assert only_run(tmp_path).status == "finished"
