"""Simulations without a barrier, and rounds on a virtual clock."""

import contextlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl import ConfigError, MceplAgent, Topology, read_run, simulate
from flower_mcepl.agents import load_state
from flower_mcepl.exchange.turn import Reply
from flower_mcepl.record.figures import (
    bytes_by_round,
    bytes_to,
    clock_to,
    curve_by_clock,
    full_curve,
)
from flower_mcepl.record.reading import Run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.table import agent_table
from flower_mcepl.runs.barrier import VirtualRounds
from flower_mcepl.runs.checkpoint import newest_checkpoint
from flower_mcepl.runs.events import Event
from tests.fleet.agents import make_fleet, noisy_net, same_tensors
from tests.oracles.baselines import server_of
from tests.runs.test_resumption import plain_rows

RING = Topology.ring(4)


class Played(NamedTuple):
    """A run: what was sent by agent and round, and its record."""

    frames: dict[tuple[int, int], list[bytes]]
    run: Run
    agents: list[MceplAgent]
    result: float


def played(
    folder: Path, *, agents: list[MceplAgent] | None = None, name: str = "run", **options: Any
) -> Played:
    fleet = make_fleet(4) if agents is None else agents
    frames: dict[tuple[int, int], list[bytes]] = {}

    def keep(round: int, agent: int, reply: Reply) -> None:
        assert (reply.refused, reply.lacking) == ([], [])
        frames[agent, round] = [frame.data for frame in reply.frames]

    record = RunRecord.create(folder, name=name, config={})
    result = simulate(
        fleet,
        RING,
        record=record,
        on_reply=keep,
        **{"num_rounds": 6, "evaluate_every": 2, **options},
    )
    return Played(frames, read_run(record.path), fleet, result.result)


def values(run: Run, *, but: tuple[str, ...] = ("seconds", "clock", "closing")) -> list[Any]:
    return sorted(
        ({key: value for key, value in row.items() if key not in but} for row in run.rounds),
        key=lambda row: (row["round"], row["agent"]),
    )


def digests(run: Run) -> list[Any]:
    return [(line["round"], line["frames"], line["train_loss"]) for line in run.relay]


# --- equal speeds ---


@pytest.mark.parametrize("options", [{}, {"age_decay": 0.5}, {"max_staleness": 0}])
def test_equal_speeds_are_rounds_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    rounds = played(tmp_path, **options)
    own = played(tmp_path, schedule="async", **options)
    assert own.frames == rounds.frames
    assert values(own.run) == values(rounds.run)
    assert digests(own.run) == digests(rounds.run)
    assert own.result == rounds.result
    assert own.run.summary is not None
    assert rounds.run.summary is not None
    assert own.run.summary["bytes"] == rounds.run.summary["bytes"]
    for left, right in zip(own.agents, rounds.agents, strict=True):
        assert same_tensors(dict(left.model.scores), dict(right.model.scores))


def test_a_clock_of_rounds_changes_nothing_but_the_clock(tmp_path: Path) -> None:
    plain = played(tmp_path)
    timed = played(tmp_path, speeds="1, 1, 5, 2; latency=0.25")
    assert timed.frames == plain.frames
    assert values(timed.run) == values(plain.run)
    assert [line["clock"] for line in timed.run.relay] == [5.5 * t for t in range(1, 7)] + [33.0]
    assert {row["round"]: row["clock"] for row in timed.run.rounds} == {2: 11.0, 4: 22.0, 6: 33.0}
    assert all("clock" not in row for row in (*plain.run.rounds, *plain.run.relay))


@settings(max_examples=20)
@given(took=st.lists(st.lists(st.floats(0.1, 9.0), min_size=3, max_size=3), min_size=1, max_size=6))
def test_a_round_takes_as_long_as_its_slowest_agent(took: list[list[float]]) -> None:
    clock = VirtualRounds(3, lambda agent, round, begin: took[round - 1][agent])
    expected = 0.0
    for round, seconds in enumerate(took, start=1):
        begin = clock.clock
        clock.begin(clock.free(), round, evaluating=False)
        came = clock.end(round, evaluating=False, patient=round == len(took))
        expected = max(expected + s for s in seconds)
        assert clock.clock == expected
        assert {agent: (c.round, c.began) for agent, c in came.items()} == dict.fromkeys(
            range(3), (round, begin)
        )


# --- unequal speeds ---


def test_the_events_of_a_run_give_its_bits_again(tmp_path: Path) -> None:
    options = {"schedule": "async", "age_decay": 0.7, "max_staleness": 3}
    fleets = [make_fleet(4, model_fn=noisy_net) for _ in range(2)]
    speeds = "1, 2.5, 7; 1@4=3; noise=0.3; latency=0.1"
    first = played(tmp_path, agents=fleets[0], speeds=speeds, **options)
    again = played(tmp_path, agents=fleets[1], events=first.run.path, **options)
    assert again.frames == first.frames
    assert values(again.run, but=("seconds",)) == values(first.run, but=("seconds",))
    assert digests(again.run) == digests(first.run)
    assert again.run.events == first.run.events
    for agent, path in first.run.agents.items():
        assert load_state(path).encode() == load_state(again.run.agents[agent]).encode()
    other = played(tmp_path, events=[Event.from_row(row) for row in first.run.events], **options)
    assert other.frames != first.frames  # another network
    assert other.run.events == first.run.events


def test_whoever_answers_goes_on_at_once(tmp_path: Path) -> None:
    """One of four is five times slower: the others play five times the rounds."""
    options = {"num_rounds": 99, "time_budget": 20.0, "speeds": "1, 1, 1, 5"}
    own = played(tmp_path, schedule="async", **options)
    counts = [max(r for agent, r in own.frames if agent == i) - 1 for i in range(4)]
    assert counts == [20, 20, 20, 4]
    assert own.run.finished
    assert own.run.stopped_early == {"round": 20, "planned": 99, "fewest": 4}
    closing = [row for row in own.run.rounds if row.get("closing")]
    assert [(row["agent"], row["round"], row["clock"]) for row in closing] == [
        *((agent, 20, 20.0) for agent in range(3)),
        (3, 4, 20.0),
    ]
    result = own.run.result()
    assert (result["agents"], result["round"]) == (4, 20)
    assert result["mean"] == pytest.approx(sum(row["accuracy"] for row in closing) / 4)
    assert own.run.summary is not None
    assert own.run.summary["result"]["mean"] == result["mean"]
    # evaluations are of the agent's own rounds, when it got its next parcel
    rows = [(r["round"], r["clock"]) for r in own.run.rounds if r["agent"] == 3]
    assert rows == [(2, 10.0), (4, 20.0)]


def test_a_budget_ends_no_round_that_has_begun(tmp_path: Path) -> None:
    own = played(tmp_path, schedule="async", speeds="1, 1, 1, 5", time_budget=7.0, num_rounds=50)
    assert max(r for agent, r in own.frames if agent == 3) == 3  # two rounds, and the closing
    assert own.run.relay[-1]["clock"] == 10.0
    assert [line["answered"] for line in own.run.relay] == [4, 4, *[3] * 5, 4]
    assert [line["round"] for line in own.run.relay] == [*range(1, 9)]
    # lines that stand at the end alone say what had gone over the links by their clock
    in_time = sorted(own.run.relay, key=lambda line: line["clock"])
    links = [line["link_bytes"] for line in in_time]
    assert links == sorted(links)
    assert links[-1] == own.run.totals["links_total"]
    assert "of 50 rounds, when its time was over; the slowest agent played 2" in agent_table(
        own.run
    )
    assert "not in the mean" not in agent_table(own.run)


def test_the_curve_by_the_clock_is_of_the_last_value_of_each_agent(tmp_path: Path) -> None:
    run = played(tmp_path, schedule="async", speeds="1, 1, 1, 3").run
    values: dict[int, float] = {}
    expected = {}
    for now in sorted({row["clock"] for row in run.rounds}):
        values |= {r["agent"]: r["accuracy"] for r in run.rounds if r["clock"] == now}
        if len(values) == 4:
            expected[now] = sum(values[i] for i in range(4)) / 4
    assert dict(curve_by_clock(run)) == pytest.approx(expected)
    assert min(expected) == 6.0  # the slow one has played two rounds
    best = max(expected.values())
    assert clock_to(run, best) == min(t for t, mean in expected.items() if mean == best)
    assert clock_to(run, 1.01) is None
    assert curve_by_clock(played(tmp_path).run) == []


def test_every_agent_plays_its_rounds_without_a_budget(tmp_path: Path) -> None:
    own = played(tmp_path, schedule="async", speeds="1, 3, 10, 2; noise=0.2")
    assert set(own.frames) == {(a, r) for a in range(4) for r in range(1, 8)}
    assert own.run.stopped_early == {}
    assert own.run.finished
    assert [line["answered"] for line in own.run.relay] == [4] * 7
    clocks = [line["clock"] for line in own.run.relay]
    assert all(a <= b for a, b in itertools.pairwise(clocks))
    assert own.run.damage == ""


def test_a_fast_agent_hears_a_slow_one_until_its_vote_is_too_old(tmp_path: Path) -> None:
    """The slow neighbors of agent 0 say nothing after their first mask."""
    heard: dict[int, list[dict[int, float]]] = {}
    fleet = make_fleet(4)

    def spy(agent: MceplAgent) -> None:
        fuse = agent.fuse

        def noted(inbox: Any, *, round: int, votes: Any = {}) -> None:  # noqa: B006
            entry = {sender: votes.get(sender, 1.0) for sender in inbox}
            heard.setdefault(agent.index, []).append(entry)
            fuse(inbox, round=round, votes=votes)

        agent.fuse = noted  # type: ignore[method-assign]

    for agent in fleet:
        spy(agent)
    # agents 1 and 3, the neighbors of 0 and 2, take 3.5 times as long
    options = {"age_decay": 0.5, "max_staleness": 2, "num_rounds": 9, "time_budget": 9.0}
    played(tmp_path, agents=fleet, schedule="async", speeds="1, 3.5", **options)
    # the common first masks, until they are too old; then those that came after 3.5
    # seconds, after 7, and before the closing
    ages = [1, 2, None, 0, 1, 2, 0, 1, 0]
    votes = [{} if a is None else {1: 0.5**a, 3: 0.5**a} for a in ages]
    assert heard[0] == votes
    assert heard[1] == [{0: 1.0, 2: 1.0}] * len(heard[1])


# --- deadlines ---


def test_who_is_late_misses_rounds_and_counts_when_it_comes(tmp_path: Path) -> None:
    """As the strategies do: nobody waits for one that usually misses the deadline."""
    options = {"speeds": "30, 30, 30, 400", "num_rounds": 12, "evaluate_every": 99}
    late = played(tmp_path, timeout_factor=3.0, **options)
    answers = {line["round"]: line for line in late.run.relay}
    # nothing of the other times is known before three rounds were played
    assert [answers[t]["answered"] for t in (1, 2, 3, 4)] == [4] * 4
    missed = [t for t, line in answers.items() if line["missing"] == [3]]
    assert missed
    assert set(missed) <= {*range(5, 12)}
    came = [t for t, line in answers.items() if line["late"]]
    assert came
    assert all({*answers[t]["late"]} == {"3"} for t in came)
    assert "late" in answers[missed[0]]["states"]["agent 3"]
    assert answers[12]["answered"] == answers[13]["answered"] == 4  # the last ones wait
    clocks = [answers[t]["clock"] for t in sorted(answers)]
    lengths = [b - a for a, b in zip([0.0, *clocks], clocks, strict=False)]
    assert lengths[:4] == [400.0] * 4
    assert set(lengths[4:-2]) == {30.0}


def test_a_timeout_ends_a_round_in_any_case(tmp_path: Path) -> None:
    run = played(tmp_path, speeds="1, 1, 1, 15", round_timeout=10.0, num_rounds=5).run
    # once one is late, the others are not held up, until the last round waits for it
    assert [line["clock"] for line in run.relay] == [10.0, 11.0, 12.0, 13.0, 15.0, 15.0]
    assert [line["late"] for line in run.relay] == [{}, {}, {}, {}, {"3": 1}, {}]


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "asynchron"}, "schedule must be one of rounds, async; got 'asynchron'"),
        ({"time_budget": 5.0}, "with schedule rounds it must be 0; got 5.0. Set num-rounds"),
        ({"schedule": "async", "time_budget": -1.0}, "time-budget must be >= 0 seconds"),
        ({"schedule": "async", "patience": 2}, "no rounds of all agents to stop after; patience"),
        ({"events": []}, "events are played by schedule \"async\"; got 'rounds'"),
        ({"schedule": "async", "events": [], "speeds": "1"}, "speeds and time_budget beside them"),
        ({"timeout_factor": 2.0}, "on the clock of speeds; got .2.0, inf.. Pass speeds"),
        ({"speeds": "1", "schedule": "async", "round_timeout": 9.0}, 'schedule "rounds", or leave'),
        ({"speeds": "1", "timeout_factor": -1.0}, r"timeout_factor must be >= 0 \(0: off\)"),
        ({"speeds": "1", "round_timeout": 0.0}, "round_timeout must be > 0 seconds; got 0.0"),
        ({"speeds": "1; 4@0=2"}, r"one of the agents 0\.\.3; got '4@0=2'"),
        (
            {"speeds": "1", "round_timeout": 9.0, "checkpoint_every": 2},
            "writes no checkpoints: answers that are late would be lost",
        ),
        ({"age_decay": 0.0}, r"must be in \(0, 1\]; got 0.0"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        played(tmp_path, **options)


def test_a_server_waits_for_all(tmp_path: Path) -> None:
    agents = make_fleet(2)
    for options in ({"schedule": "async"}, {"age_decay": 0.5}):
        with pytest.raises(ConfigError, match=r"server-based algorithm"):
            simulate(agents, server=server_of("fedavg", 2), num_rounds=1, **options)


def test_events_of_a_run_by_rounds(tmp_path: Path) -> None:
    run = played(tmp_path).run
    with pytest.raises(ConfigError, match=r"holds none\. Name the record of such a run"):
        played(tmp_path, schedule="async", events=run.path)
    own = played(tmp_path, schedule="async").run
    with pytest.raises(ConfigError, match="gives agent 0 its round 6"):
        played(tmp_path, schedule="async", events=own.path, num_rounds=5)


def test_a_resumed_run_by_rounds_goes_on_with_its_clock(tmp_path: Path) -> None:
    options = {"speeds": "1, 1, 5, 2", "checkpoint_every": 2}
    whole = played(tmp_path, **options)

    def stop(round: int, agent: int, reply: Reply) -> None:
        if round == 6:
            raise KeyboardInterrupt

    record = RunRecord.create(tmp_path, name="broken", config={})
    rest: dict[str, Any] = {"num_rounds": 6, "evaluate_every": 2, **options}
    with pytest.raises(KeyboardInterrupt):
        simulate(make_fleet(4), RING, record=record, on_reply=stop, **rest)
    with pytest.raises(ConfigError, match=r"speeds was '1\.0, 1\.0, 5\.0, 2\.0' and is now ''"):
        simulate(make_fleet(4), RING, resume=record.path, **{**rest, "speeds": ""})
    simulate(make_fleet(4), RING, resume=record.path, **rest)
    run = read_run(record.path)
    assert values(run, but=("seconds",)) == values(whole.run, but=("seconds",))
    assert [line["clock"] for line in run.relay] == [line["clock"] for line in whole.run.relay]
    assert math.isfinite(run.relay[-1]["clock"])


def test_the_last_round_waits_for_everybody(tmp_path: Path) -> None:
    record = RunRecord.create(tmp_path, name="x", config={})
    options: dict[str, Any] = {"speeds": "1, 1, 50", "round_timeout": 5.0}
    graph = Topology.ring(3)
    simulate(make_fleet(3), graph, num_rounds=4, evaluate_every=2, record=record, **options)
    run = read_run(record.path)
    assert run.finished
    assert [line["answered"] for line in run.relay[1:]] == [2, 2, 3, 3]
    assert run.result()["agents"] == 3


def test_a_budget_that_cuts_slow_agents_off_is_in_the_record(tmp_path: Path) -> None:
    record = RunRecord.create(tmp_path, name="x", config={})
    options: dict[str, Any] = {"speeds": "1, 1, 9", "schedule": "async", "time_budget": 12.0}
    graph = Topology.ring(3)
    simulate(make_fleet(3), graph, num_rounds=4, evaluate_every=2, record=record, **options)
    run = read_run(record.path)
    assert run.stopped_early == {"round": 4, "planned": 4, "fewest": 2}
    assert "x: finished (the slowest agent played 2 rounds), 3 agents, 4 rounds" in agent_table(run)
    assert [line["missing"] for line in run.relay] == [[], [], [2], [2], []]


def test_the_last_point_of_a_curve_is_the_result(tmp_path: Path) -> None:
    """Agents end after unequal rounds; the mean of the fastest alone is no result."""
    options = {"num_rounds": 99, "time_budget": 20.0, "speeds": "1, 1, 2, 5; noise=0.2"}
    run = played(tmp_path, schedule="async", **options).run
    result = run.result()
    closing = [row["accuracy"] for row in run.rounds if row.get("closing")]
    assert len(closing) == 4
    round, mean, *_ = run.curve()[-1]
    assert (round, mean) == (result["round"], pytest.approx(sum(closing) / 4))
    assert round not in run.partial_rounds()
    assert full_curve(run)[-1] == (round, mean)
    assert bytes_to(run, max(mean for _, mean in full_curve(run))) is not None
    whole = sum(row["received_bytes"] for row in run.rounds if row.get("closing"))
    assert bytes_by_round(run)[round] == whole == run.totals["links_total"]


def test_the_time_left_ends_with_the_budget_and_with_the_last_event(tmp_path: Path) -> None:
    lines: list[str] = []
    options = {"num_rounds": 10**6, "time_budget": 20.0, "speeds": "1, 1, 1, 5"}
    played(tmp_path, schedule="async", log=lines.append, **options)
    told = [line for line in lines if " left |" in line]
    assert [line.split()[1] for line in told] == [f"{t}/1000000" for t in range(1, 5)]
    # a million rounds would take hours
    assert all(re.search(r" \? left| 0m\d\ds left", line) for line in told)
    assert [line.split(" | ")[0] for line in lines[4:21]] == [
        *(f"round {t}/20" for t in range(5, 21)),
        "closing",
    ]


def test_events_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="events come from a run record of schedule async"):
        simulate(make_fleet(3), Topology.ring(3), num_rounds=2, schedule="async", events=[])


# --- runs that break off ---


class Interruption(Exception):
    """What ends a run in these tests, as a kill would."""


SPEEDS = "1, 2.5, 7; 1@4=3; noise=0.3; latency=0.1"
OWN: dict[str, Any] = {
    **{"schedule": "async", "age_decay": 0.7, "max_staleness": 3},
    **{"num_rounds": 7, "evaluate_every": 2},
}


def simulated(
    path: Path,
    *,
    at: tuple[int, int] = (-1, -1),
    heard: list[tuple[int, int]] | None = None,
    **options: Any,
) -> None:
    """Simulate into a new record at ``path``, or on in that of a run that broke off."""

    def stumble(round: int, agent: int, reply: Reply) -> None:
        if heard is not None:
            heard.append((round, agent))
        if (round, agent) == at:
            raise Interruption

    if "resume" not in options:
        record = RunRecord.create(path.parent, name="x", config={}, path=path, with_frames=True)
        options["record"] = record
    fleet = make_fleet(4, model_fn=noisy_net)
    simulate(fleet, RING, on_reply=stumble, **{**OWN, "checkpoint_every": 2, **options})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    simulated(path, speeds=SPEEDS, checkpoint_every=0)
    return path


FOLDERS = ("agents", "frames")


def assert_the_same(one: Path, two: Path) -> None:
    for file in ("rounds.jsonl", "relay.jsonl", "traffic.jsonl", "events.jsonl"):
        assert plain_rows(one, file) == plain_rows(two, file), file
    left, right = read_run(one), read_run(two)
    assert left.summary is not None
    assert right.summary is not None
    for key in ("status", "num_rounds", "result", "bytes", "links"):
        assert left.summary[key] == right.summary[key], key
    names = {folder: {path.name for path in (one / folder).iterdir()} for folder in FOLDERS}
    assert len(names["agents"]) == 4
    for folder in FOLDERS:
        for name in names[folder]:
            assert (one / folder / name).read_bytes() == (two / folder / name).read_bytes()


@pytest.mark.parametrize("at", [(4, 2), (5, 2), (7, 2), (8, 1)])
@pytest.mark.parametrize("again", [False, True])
def test_a_resumed_run_is_one_that_was_never_interrupted(
    at: tuple[int, int], again: bool, undisturbed: Path, tmp_path: Path
) -> None:
    """The slow agent is number 2; (8, 1) is in the closing exchange."""
    path = tmp_path / "run"
    with pytest.raises(Interruption):
        simulated(path, at=at, speeds=SPEEDS)
    if again:  # before and after another checkpoint
        for later in (at, (6, 2)):
            with contextlib.suppress(Interruption):
                simulated(path, resume=path, at=later, speeds=SPEEDS)
            if read_run(path).finished:
                break
    if not read_run(path).finished:
        simulated(path, resume=path, speeds=SPEEDS)
    assert_the_same(path, undisturbed)
    assert not (path / "checkpoint").exists()
    assert read_run(path).config["resumptions"][0]["after_round"] in (2, 4, 6, 7)


def test_a_run_that_plays_events_is_resumed_with_them(undisturbed: Path, tmp_path: Path) -> None:
    path, events = tmp_path / "run", read_run(undisturbed).events
    with pytest.raises(Interruption):
        simulated(path, at=(5, 2), events=undisturbed)
    with pytest.raises(ConfigError, match=r"replayed was '[0-9a-f]{16}' and is now ''"):
        simulated(path, resume=path)
    others = [Event.from_row({**row, "clock": 2 * row["clock"]}) for row in events]
    with pytest.raises(ConfigError, match=r"replayed was '[0-9a-f]{16}' and is now '[0-9a-f]{16}'"):
        simulated(path, resume=path, events=others)
    assert read_run(path).status == "failed"  # as it was: nothing of it was touched
    simulated(path, resume=path, events=undisturbed)
    assert_the_same(path, undisturbed)


def test_a_run_that_its_budget_ended_loses_no_round(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "run"
    options: dict[str, Any] = {"speeds": SPEEDS, "time_budget": 20.0, "num_rounds": 50}
    simulated(whole, checkpoint_every=0, **options)
    played = [line for line in read_run(whole).events if 0 in line["given"]]
    with pytest.raises(Interruption):  # in the closing exchange
        simulated(path, at=(len(played) + 1, 0), checkpoint_every=100, **options)
    with pytest.raises(ConfigError, match=r"time_budget was 20\.0 and is now 0\.0"):
        simulated(path, resume=path, **{**options, "time_budget": 0.0})
    heard: list[tuple[int, int]] = []
    simulated(path, resume=path, checkpoint_every=100, heard=heard, **options)
    assert len(heard) == 4  # the closing exchange alone
    assert_the_same(path, whole)


def test_a_checkpoint_grows_little_with_the_lead_of_the_fast(tmp_path: Path) -> None:
    """Rounds wait for the slow agent, with answers that say what is new alone."""
    path = tmp_path / "run"
    with pytest.raises(Interruption):
        simulated(path, at=(40, 0), speeds="1, 1, 1, 1000", num_rounds=50)
    checkpoint = newest_checkpoint(path / "checkpoint")
    assert len(json.dumps(checkpoint.facts)) < 50_000
    text = checkpoint.group("own-rounds")["json"].tobytes().decode()
    assert len(json.loads(text)["open"]) > 20
    assert text.count('"num-weights"') == 3  # a handshake of each that has answered


def test_a_checkpoint_is_of_rounds_in_the_mean(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Interruption):
        simulated(path, at=(7, 2), speeds=SPEEDS)
    # what an agent plays is played when it gets its parcel, before the checkpoint
    files = sorted((path / "checkpoint").glob("*.checkpoint"))
    assert [file.name for file in files] == ["round-000004.checkpoint", "round-000006.checkpoint"]
    facts = newest_checkpoint(path / "checkpoint").facts
    answered = facts["last-frames"]
    assert answered[2] < 6 <= sum(answered) / 4 < max(answered)
    copy, heard = tmp_path / "copy", list[tuple[int, int]]()
    shutil.copytree(path, copy)
    simulated(copy, resume=copy, heard=heard, speeds=SPEEDS)
    counted = [(t, agent) for agent in range(4) for t in range(1, answered[agent] + 1)]
    under_way = {(t + 1, agent) for agent, t in enumerate(answered)}
    assert frames(path) - under_way > {*counted}
    # frames since then go, those of the fast agents before it stay
    with pytest.raises(Interruption):
        simulated(path, resume=path, at=heard[0], speeds=SPEEDS)
    assert frames(path) - under_way == {*counted}


def frames(record: Path) -> set[tuple[int, ...]]:
    """Rounds and agents of the frames that are kept."""
    names = (file.name for file in (record / "frames").iterdir())
    return {tuple(map(int, re.findall(r"\d+", name))) for name in names}


def test_a_run_without_a_barrier_keeps_its_rounds(undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Interruption):
        simulated(path, at=(5, 2), speeds=SPEEDS)
    with pytest.raises(ConfigError, match=r"as many rounds as it had.*num-rounds = 7; got 9"):
        simulated(path, resume=path, speeds=SPEEDS, num_rounds=9)
    with pytest.raises(ConfigError, match="speeds was"):
        simulated(path, resume=path, speeds="1")


def test_ctrl_c_is_resumed_too(undisturbed: Path, tmp_path: Path) -> None:
    """The record says how far it came, and goes on to the same bits."""
    path = tmp_path / "run"

    def interrupt(round: int, agent: int, reply: Reply) -> None:
        if (round, agent) == (5, 2):
            raise KeyboardInterrupt

    record = RunRecord.create(tmp_path, name="x", config={}, path=path, with_frames=True)
    fleet = make_fleet(4, model_fn=noisy_net)
    options = {**OWN, "speeds": SPEEDS, "checkpoint_every": 1}
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        simulate(fleet, RING, record=record, on_reply=interrupt, log=lines.append, **options)
    run = read_run(path)
    assert run.status == "interrupted"
    assert run.result()["mean"] is not None
    assert "can go on after round 5" in lines[-1]
    assert "interrupted" in agent_table(run)
    simulated(path, resume=path, speeds=SPEEDS)
    assert_the_same(path, undisturbed)
