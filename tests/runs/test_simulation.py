import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flower_mcepl import (
    ConfigError,
    DivergedError,
    FingerprintError,
    MceplAgent,
    RunRecord,
    Topology,
    TopologyError,
    read_run,
    simulate,
)
from flower_mcepl.agents import load_state
from flower_mcepl.exchange import outbox
from flower_mcepl.exchange.turn import Reply
from flower_mcepl.streams import torch_threads
from tests.fleet.agents import (
    SEED,
    Reader,
    make_agent,
    make_fleet,
    noisy_net,
    same_tensors,
    small_net,
)

RING = Topology.ring(3)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def run(
    agents: list[MceplAgent] | None = None, topology: Topology = RING, **options: Any
) -> tuple[Any, list[bytes]]:
    """Rows without times, and every frame that any agent sent."""
    frames: list[bytes] = []

    def keep(round: int, agent: int, reply: Reply) -> None:
        frames.extend(frame.data for frame in reply.frames)

    agents = make_fleet(topology.num_agents) if agents is None else agents
    result = simulate(
        agents, topology, on_reply=keep, **{"num_rounds": 4, "evaluate_every": 2, **options}
    )
    return untimed(result.rows), frames


def test_the_same_seeds_give_the_same_rows_and_bits() -> None:
    first, again = run(make_fleet(3, model_fn=noisy_net)), run(make_fleet(3, model_fn=noisy_net))
    assert first == again


def test_other_seeds_give_other_rows_and_bits() -> None:
    rows, frames = run()
    other_rows, other_frames = run(make_fleet(3, seed=SEED + 1))
    assert rows != other_rows
    assert not set(frames) & set(other_frames)


def test_neither_global_generators_nor_the_order_of_building_matter() -> None:
    expected = run(make_fleet(3, model_fn=noisy_net))
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    backwards = [make_agent(index, model_fn=noisy_net) for index in (2, 1, 0)][::-1]
    assert run(backwards) == expected
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002


def test_agents_hear_their_neighbors_and_nobody_else() -> None:
    """An agent of another retention changes its neighbors from the second round on, and
    nobody cut off from it.
    """
    topology = Topology.from_edges([(0, 1), (2, 3)], num_agents=4)
    mixed = {"first_retention": 0.3}

    def frames_of(retention: float) -> dict[tuple[int, int], list[bytes]]:
        frames = {}

        def keep(round: int, agent: int, reply: Reply) -> None:
            frames[round, agent] = [frame.data for frame in reply.frames]

        agents = [
            make_agent(0, retention=retention, **mixed),
            *(make_agent(i, **mixed) for i in (1, 2, 3)),
        ]
        simulate(agents, topology, num_rounds=3, on_reply=keep)
        return frames

    one, other = frames_of(0.3), frames_of(0.6)
    differs = {key for key in one if one[key] != other[key]}
    assert differs == {(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)}


@pytest.mark.parametrize(
    ("num_rounds", "evaluate_every", "rounds"),
    [(5, 2, [2, 4, 5]), (4, 2, [2, 4]), (2, 10, [2]), (3, 1, [1, 2, 3])],
)
def test_multiples_and_the_last_round_are_evaluated(
    num_rounds: int, evaluate_every: int, rounds: list[int]
) -> None:
    rows, _ = run(num_rounds=num_rounds, evaluate_every=evaluate_every)
    assert [(row["round"], row["agent"]) for row in rows] == [
        (round, agent) for round in rounds for agent in range(3)
    ]


def test_an_evaluation_is_the_one_after_the_exchange_of_its_round() -> None:
    early, _ = run(num_rounds=2, evaluate_every=2)
    late, _ = run(num_rounds=6, evaluate_every=2)
    keys = ("round", "agent", "accuracy", "loss", "density")
    assert [[row[key] for key in keys] for row in early] == [
        [row[key] for key in keys] for row in late[:3]
    ]


def test_bytes_in_the_rows_are_the_frames_lengths() -> None:
    sizes: dict[tuple[int, int], list[int]] = {}

    def measure(round: int, agent: int, reply: Reply) -> None:
        sizes[round, agent] = [len(frame.data) for frame in reply.frames]

    rows = simulate(make_fleet(3), RING, num_rounds=4, evaluate_every=2, on_reply=measure).rows
    # the closing one
    assert {key for key, frames in sizes.items() if not frames} == {
        (5, agent) for agent in range(3)
    }
    # small deltas: no key is due
    assert all(len(frames) == 1 for key, frames in sizes.items() if key[0] < 5)
    for row in rows:
        up = [sum(sum(sizes[t, agent]) for t in range(1, row["round"] + 1)) for agent in range(3)]
        mine = up[row["agent"]]
        assert (row["uplink_bytes"], row["sent_bytes"], row["received_bytes"]) == (
            mine,
            2 * mine,
            sum(up) - mine,
        )


def test_agents_without_neighbors_still_learn() -> None:
    rows, frames = run(topology=Topology.from_edges([], num_agents=3))
    assert {row["received_bytes"] for row in rows} == {0}
    assert len(set(frames)) == len(frames) == 4 * 3
    alone, _ = run(make_fleet(1), Topology.from_edges([], num_agents=1))
    assert alone[0]["accuracy"] == rows[0]["accuracy"]


def test_the_log_has_one_line_a_round() -> None:
    lines: list[str] = []
    run(log=lines.append)
    assert [line.split(" | ")[0] for line in lines] == [
        "round 1/4",
        "round 2/4",
        "round 3/4",
        "round 4/4",
        "closing",
    ]
    assert "3/3 answered" in lines[0]
    assert "accuracy after round 2" in lines[2]
    assert "accuracy after round 4" in lines[4]


# --- the record ---


def test_the_record_is_what_the_result_says_and_agents_come_back(tmp_path: Path) -> None:
    agents = make_fleet(3)
    record = RunRecord.create(name="test", config={"seed": SEED}, path=tmp_path / "run")
    result = simulate(agents, RING, num_rounds=4, evaluate_every=2, record=record)

    read = read_run(tmp_path / "run")
    assert read.rounds == result.rows
    assert read.summary["status"] == result.summary["status"] == "finished"
    assert read.summary["accuracy"] == result.summary["accuracy"]
    assert result.personalized_accuracy == np.mean([row["accuracy"] for row in result.rows[-3:]])
    assert [row["round"] for row in read.relay] == [1, 2, 3, 4, 5]
    assert [agent["agent"] for agent in read.config["agents"]] == [0, 1, 2]
    assert {agent["fingerprint"] for agent in read.config["agents"]} == {agents[0].fingerprint}
    assert not read.truncated
    assert list(read.agents) == [0, 1, 2]
    for index, path in read.agents.items():
        later = make_agent(index)
        later.restore(load_state(path))
        assert same_tensors(later.state().tensors, agents[index].state().tensors)
        assert later.evaluate()["accuracy"] == result.rows[-3 + index]["accuracy"]


def test_classes_stay_out_of_the_record_where_they_are_not_to_be_told(tmp_path: Path) -> None:
    told = []
    for tell in (True, False):
        record = RunRecord.create(name="test", config={}, path=tmp_path / str(tell))
        simulate(make_fleet(3), RING, num_rounds=1, tell_classes=tell, record=record)
        told.append(read_run(record.path).config["agents"])
    for open_, discreet in zip(*told, strict=True):
        assert open_.keys() - discreet.keys() == {"classes", "train_counts", "test_counts"}
        assert open_ == {**open_, **discreet}
    assert "_counts" not in (tmp_path / "False" / "config.json").read_text()


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "interrupted"), (DivergedError, "failed")]
)
def test_a_stopped_run_leaves_a_readable_record(
    error: type[BaseException], status: str, tmp_path: Path
) -> None:
    def stop(round: int, agent: int, reply: Reply) -> None:
        if (round, agent) == (4, 1):
            raise error("stop")

    record = RunRecord.create(name="test", config={}, path=tmp_path / "run")
    threads = torch.get_num_threads()
    with pytest.raises(error):
        simulate(make_fleet(3), RING, num_rounds=9, evaluate_every=2, record=record, on_reply=stop)
    read = read_run(tmp_path / "run")
    assert read.summary["status"] == status
    assert [row["round"] for row in read.relay] == [1, 2, 3]
    assert [row["round"] for row in read.rounds] == [2, 2, 2]
    assert read.summary["accuracy"]["round"] == 2
    assert read.agents == {}
    assert torch.get_num_threads() == threads


def test_a_killed_run_leaves_its_rounds(tmp_path: Path) -> None:
    record = RunRecord.create(name="test", config={}, path=tmp_path / "run")
    seen: list[int] = []

    def look(round: int, agent: int, reply: Reply) -> None:
        if (round, agent) == (4, 2):  # as it is on disk while the run goes on
            read = read_run(tmp_path / "run")
            assert read.summary is None
            seen.extend(row["round"] for row in read.relay)

    simulate(make_fleet(3), RING, num_rounds=5, record=record, on_reply=look)
    assert seen == [1, 2, 3]


# --- what does not fit together ---


def test_different_weights_are_refused_by_name() -> None:
    agents = make_fleet(3)
    with torch.no_grad():
        changed = make_agent(2).model.module
        changed[0].weight.view(-1)[0] += 1e-7
    agents[2] = make_agent(2, model_fn=lambda: changed)
    with pytest.raises(
        FingerprintError,
        match=f"agent 2 and agent 0 .*: {agents[2].fingerprint} and {agents[0].fingerprint}",
    ):
        simulate(agents, RING, num_rounds=1)


@pytest.mark.parametrize(
    "pick",
    [
        lambda a: a[:2],
        lambda a: [a[1], a[0], a[2]],
        lambda a: [a[0], a[1], a[1]],
        lambda a: [*a, make_agent(3)],
        lambda a: [],
    ],
)
def test_a_fleet_that_does_not_fit_the_graph_is_refused(
    pick: Callable[[list[MceplAgent]], list[MceplAgent]],
) -> None:
    agents = pick(make_fleet(3))
    indices = [agent.index for agent in agents]
    with pytest.raises(TopologyError) as refused:
        simulate(agents, RING, num_rounds=1)
    assert f"the graph has agents 0..2, in this order; got agents {indices}" in str(refused.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_rounds": 0},
        {"threads": -1},
        {"evaluate_every": 0},
        {"max_staleness": -1},
        {"key_interval": -1},
    ],
)
def test_numbers_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"must be >=|key-interval is a number of rounds"):
        simulate(make_fleet(3), RING, **{"num_rounds": 1, **bad})


def test_frames_decode_to_the_agents_masks() -> None:
    agents = make_fleet(3, model_fn=small_net)
    readers = [Reader(agent) for agent in agents]
    seen = []

    def compare(round: int, agent: int, reply: Reply) -> None:
        for written in reply.frames:
            frame = readers[agent].read(written.data)
            seen.append((round, frame.header.sender, frame.header.reference))
            assert written.reference == frame.header.reference
            assert written.content == frame.header.content
            assert same_tensors(frame.tensors, agents[agent].outgoing())
            assert same_tensors(frame.tensors, dict(reply.payload))

    simulate(agents, RING, num_rounds=2, on_reply=compare)
    assert seen == [(1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 0, 1), (2, 1, 1), (2, 2, 1)]


# --- the wire changes no bit ---


def states(agents: list[MceplAgent]) -> list[dict[str, torch.Tensor]]:
    return [agent.state().tensors for agent in agents]


def without_a_wire(agents: list[MceplAgent], topology: Topology, num_rounds: int) -> None:
    """The same rounds with tensors handed from agent to agent."""
    for round in range(1, num_rounds + 1):
        for agent in agents:
            agent.train(round=round)
        sent = [agent.outgoing() for agent in agents]
        for agent in agents:
            agent.fuse(
                {j: sent[j] for j in topology.in_neighbors(agent.index, round=round)}, round=round
            )


def packed_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    real = outbox.write_frame

    def write(*args: Any, **options: Any) -> Any:
        return real(*args, **{**options, "reference": None, "packed": True})

    monkeypatch.setattr(outbox, "write_frame", write)


@pytest.mark.parametrize(
    "topology", [RING, Topology.random_neighbors(6, degree=2, seed=4)], ids=["ring", "changing"]
)
def test_masks_are_the_same_bits_however_they_travel(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As changes and chains of changes, whole, packed at one bit per weight, and not at
    all.
    """
    size, rounds = topology.num_agents, 8
    kinds: dict[str, list[list[int | None]]] = {}
    contents: dict[str, list[str]] = {}
    fleets: dict[str, list[MceplAgent]] = {}

    def travel(name: str, **options: Any) -> None:
        kinds[name], contents[name] = [], []

        def keep(round: int, agent: int, reply: Reply) -> None:
            assert (reply.refused, reply.lacking) == ([], [])
            kinds[name].append([frame.reference for frame in reply.frames])
            contents[name] += {frame.content for frame in reply.frames}

        fleets[name] = make_fleet(size, model_fn=noisy_net)
        simulate(fleets[name], topology, num_rounds=rounds, on_reply=keep, **options)

    travel("changes")
    travel("keys", key_interval=1)
    packed_frames(monkeypatch)
    travel("packed")
    fleets["no wire"] = make_fleet(size, model_fn=noisy_net)
    without_a_wire(fleets["no wire"], topology, rounds)

    assert sum(refs[0] not in (0, None) for refs in kinds["changes"] if refs) == (rounds - 1) * size
    assert all(len(refs) == 2 for refs in kinds["keys"][size:] if refs)  # a key beside every delta
    assert {refs[0] for refs in kinds["packed"] if refs} == {None}
    assert contents["changes"] == contents["keys"] == contents["packed"]
    truth = states(fleets["no wire"])
    for name in ("changes", "keys", "packed"):
        assert all(
            same_tensors(mine, true) for mine, true in zip(states(fleets[name]), truth, strict=True)
        ), name


def test_keys_come_at_the_interval(tmp_path: Path) -> None:
    record = RunRecord.create(name="test", config={}, path=tmp_path / "run")
    simulate(make_fleet(3), RING, num_rounds=7, key_interval=3, record=record)
    run = read_run(record.path)
    keys = {line["round"]: [row[2] for row in line["uplinks"]] for line in run.traffic}
    assert keys == {
        1: [1] * 3,
        2: [0] * 3,
        3: [0] * 3,
        4: [1] * 3,
        5: [0] * 3,
        6: [0] * 3,
        7: [1] * 3,
        8: [],
    }
    assert run.config["key_interval"] == 3
    assert run.summary is not None
    assert run.summary["bytes"]["uplink_keys"] == 9
    # those of round 1 alone: after that everyone holds what changed
    assert run.summary["bytes"]["link_keys"] == 6


# --- threads ---


def test_threads_are_set_and_set_back() -> None:
    before = torch.get_num_threads()
    for wanted in (before + 1, 0):
        with torch_threads(wanted):
            assert torch.get_num_threads() == (wanted or before)
        assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="inside"), torch_threads(before + 1):
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="threads must be >= 0"), torch_threads(-1):
        pass


def test_the_record_says_how_to_repeat_it(tmp_path: Path) -> None:
    record = RunRecord.create(tmp_path, name="again", config={})
    simulate(make_fleet(3), RING, num_rounds=2, evaluate_every=1, max_staleness=4, record=record)
    config = read_run(record.path).config
    assert Topology.from_config(config["topology"]) == RING
    settings = {
        key: config[key]
        for key in ("seed", "num_rounds", "evaluate_every", "max_staleness", "threads")
    }
    assert settings == {
        "seed": SEED,
        "num_rounds": 2,
        "evaluate_every": 1,
        "max_staleness": 4,
        "threads": 1,
    }
    assert config["agents"][1]["parameters"]["score_lr"] == make_fleet(3)[1].config.score_lr


def test_different_first_masks_are_refused() -> None:
    agents = [
        make_agent(0, retention=0.1),
        make_agent(1, retention=0.5),
        make_agent(2, retention=0.1),
    ]
    with pytest.raises(
        FingerprintError, match=r"agent 1 and agent 0 .*common first masks.*first_retention"
    ):
        simulate(agents, RING, num_rounds=1)
