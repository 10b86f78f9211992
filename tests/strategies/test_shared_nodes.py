"""Several agents on one node: the bits of one node each, and failures of their own."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import ConfigError, FlowerMceplError, Topology, simulate
from flower_mcepl.clients import make_client_app, neighbor_average_mod, stacked_seats
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.clients.seats import seat_context
from flower_mcepl.errors import IncompleteRunError, RosterError
from flower_mcepl.messages.bundle import NodeBundle, is_bundle
from flower_mcepl.record.reading import read_run
from flower_mcepl.report.overview import plot_run
from flower_mcepl.report.table import agent_table
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.strategies import GossipStrategy
from flower_mcepl.strategies.shared_nodes import Seat, SharedNodes
from tests.fleet.agents import make_fleet
from tests.fleet.flower import RecordingGrid, app_grid, gossip
from tests.fleet.flower_messages import RUN_CONFIG, a_context, be_a_node, data_fn, model_fn

RING = Topology.ring(6)


@pytest.fixture(autouse=True)
def identity() -> None:
    be_a_node()


def learned(strategy: GossipStrategy) -> list[Any]:
    return [strategy.monitor.evaluations(), strategy.monitor.train_loss]


def frames_by_pair(strategy: GossipStrategy) -> dict[Any, Any]:
    """Counts by sender and receiver, over links and within nodes."""
    ledger = strategy.exchange.ledger
    assert not ledger.links.keys() & ledger.local.keys()
    return {**ledger.links, **ledger.local}


def shared(nodes: int, per_node: int, **options: Any) -> tuple[RecordingGrid, GossipStrategy]:
    grid = app_grid(nodes)
    return grid, gossip(grid, RING, agents_per_node=per_node, **options)


@pytest.mark.parametrize("per_node", [2, 3, 6])
def test_the_bits_are_those_of_one_node_each(per_node: int) -> None:
    alone = gossip(app_grid(6), RING)
    grid, strategy = shared(6 // per_node, per_node)
    assert learned(strategy) == learned(alone)
    assert frames_by_pair(strategy) == frames_by_pair(alone)
    assert len(grid.log) == 6 // per_node * 5  # one message a node and round
    assert all(is_bundle(message.content) for message in grid.log)


@pytest.mark.parametrize("per_node", [1, 2, 3, 6])
def test_between_agents_of_a_node_nothing_goes_over_a_link(tmp_path: Path, per_node: int) -> None:
    _, strategy = shared(6 // per_node, per_node, record=tmp_path)
    totals = gossip(app_grid(6), RING).exchange.ledger.totals()
    assert strategy.record is not None
    run = read_run(strategy.record.path)
    assert {(link["sender"], link["receiver"]) for link in run.links} == {
        (j, i) for j, i in RING.links() if j // per_node != i // per_node
    }
    assert {(pair["sender"], pair["receiver"]) for pair in run.local} == {
        (j, i) for j, i in RING.links() if j // per_node == i // per_node
    }
    local = run.totals.get("local_total", 0)
    assert run.totals["links_total"] + local == totals["links_total"]
    for key in ("relay_total", "uplink_total", "header_total"):
        assert run.totals[key] == totals[key]
    assert (
        sum(row["received_bytes"] for row in run.last_evaluated().values())
        <= (run.relay[-1]["link_bytes"])
    )
    assert (run.relay[-1]["link_bytes"], run.relay[-1].get("local_bytes", 0)) == (
        run.totals["links_total"],
        local,
    )
    by_line = {
        key: sum(row[4] for line in run.traffic for row in line.get(key, []))
        for key in ("links", "local")
    }
    assert by_line == {"links": run.totals["links_total"], "local": local}
    table = agent_table(run)
    assert ("payload between agents of one node" in table) == (per_node > 1)
    if per_node == 1:
        assert run.totals == totals
        assert not any("local" in key for row in (*run.relay, *run.traffic) for key in row)
    if per_node == 2:
        assert plot_run(run).stat().st_size > 10_000
    if per_node == 6:
        assert run.totals["links_total"] == run.relay[-1]["link_bytes"] == 0 < local
        assert run.totals["link_bits_per_weight"] is None


def test_states_lie_on_the_disk_of_the_node_by_agent(tmp_path: Path) -> None:
    grid = app_grid(3)
    for context in grid.contexts.values():
        context.node_config["state-dir"] = str(tmp_path)
    strategy = gossip(grid, RING, agents_per_node=2)
    assert learned(strategy) == learned(gossip(app_grid(6), RING))
    found = {path.name for path in tmp_path.glob("*/agent-*") if path.is_dir()}
    assert found == {f"agent-{agent:04d}" for agent in range(6)}


def test_an_agent_that_fails_fails_alone() -> None:
    def fragile(context: Context) -> Any:
        if agent_index(context) == 3:
            raise RuntimeError("no data today")
        return data_fn(context)

    grid = RecordingGrid(make_client_app(model_fn, fragile), 3, RUN_CONFIG)
    strategy = gossip(grid, RING, agents_per_node=2, min_agents=5, incomplete=None)
    assert strategy.roster.absent(strategy.roster.node_of) == [3]
    assert strategy.monitor.evaluations()


def test_a_node_that_is_away_takes_all_of_its_agents_along() -> None:
    grid = app_grid(3)
    strategy = GossipStrategy(
        RING, record=None, evaluate_every=2, wait_timeout=0.01, min_agents=4, agents_per_node=2
    )
    counts, take_in = [], strategy._take_in

    def counting(round: int, replies: Iterable[Message], *more: Any) -> None:
        replies = list(replies)
        counts.append(sum(not reply.has_error() for reply in replies))
        take_in(round, replies, *more)

    strategy._take_in = counting  # type: ignore[method-assign, assignment]
    outage = {2: lambda: grid.down.add(1001), 3: grid.down.clear}

    def between(round: int, _: object) -> None:
        outage.pop(round + 1, lambda: None)()

    strategy.start(grid, num_rounds=4, timeout=30.0, evaluate_fn=between)
    assert counts[:4] == [6, 4, 6, 6]


def hostile(spoil: Callable[[RecordDict], None]) -> ClientApp:
    """App whose node with partition-id 1 spoils what it answers after round 1."""

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        rounds = {
            part["order"]["server-round"]
            for part in NodeBundle.from_records(message.content).parts.values()
            if "order" in part
        }
        if context.node_config["partition-id"] == 1 and rounds == {2}:
            spoil(reply.content)
        return reply  # type: ignore[no-any-return]

    return make_client_app(model_fn, data_fn, mods=[mod])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop("bundle"),
        lambda content: content.update({"bundle": ConfigRecord({"seats": [0, 0]})}),
        lambda content: content.update(
            {"bundle": ConfigRecord({"agents-per-node": 2, "seats": [7]})}
        ),
        lambda content: [content.pop(name) for name in [*content] if name != "bundle"],
        lambda content: content.update({"1/agent": ConfigRecord({"agent": 0})}),
        lambda content: content.update({"1/failed": ConfigRecord({"reason": 3})}),
    ],
)
def test_a_spoiled_answer_is_the_failure_of_its_own_agents(
    spoil: Callable[[RecordDict], None],
) -> None:
    failures: dict[str, str] = {}
    strategy = GossipStrategy(
        RING, record=None, evaluate_every=4, wait_timeout=0.01, min_agents=4, agents_per_node=2
    )
    changes = strategy.attendance.changes

    def noting(round: int, answered: Any, failed: Any, *more: Any) -> dict[str, str]:
        failures.update(failed)
        return changes(round, answered, failed, *more)

    strategy.attendance.changes = noting  # type: ignore[method-assign, assignment]
    strategy.start(RecordingGrid(hostile(spoil), 3, RUN_CONFIG), num_rounds=3, timeout=30.0)
    assert set(failures) <= {"agent 2", "agent 3"}
    assert "agent 3" in failures


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_reason_of_one_node_ends_no_run_however_many_agents_it_plays(nodes: int) -> None:
    """As where its disk is full; what two nodes say ends the run in the third round."""

    def full(message: Message, context: Context, call_next: Any) -> Message:
        if int(context.node_config["partition-id"]) < nodes and message.metadata.group_id > "1":
            raise OSError(f"agent {context.node_config['partition-id']}: no room")
        return call_next(message, context)  # type: ignore[no-any-return]

    grid = RecordingGrid(make_client_app(model_fn, data_fn, mods=[full]), 3, RUN_CONFIG)
    strategy = GossipStrategy(
        RING, record=None, evaluate_every=9, wait_timeout=0.01, min_agents=2, agents_per_node=2
    )
    error, match, trained = (
        (IncompleteRunError, "these agents: 0, 1", 5)
        if nodes == 1
        else (RosterError, r"rounds up to round 4 \(4 of them in this one\)", 3)
    )
    with pytest.raises(error, match=match):
        strategy.start(grid, num_rounds=5, timeout=30.0)
    assert len(strategy.monitor.train_loss) == trained


def a_question(seat: int) -> Message:
    return Message(RecordDict({"identify": ConfigRecord()}), dst_node_id=seat, message_type="query")


def test_a_node_that_plays_gets_nothing_for_its_other_agents() -> None:
    nodes = app_grid(2)
    nodes.slow.add(1000)
    grid = SharedNodes(nodes, per_node=3)
    assert [str(seat) for seat in grid.get_node_ids()] == [
        f"{node}/{place}" for node in (1000, 1001) for place in range(3)
    ]
    (first,) = grid.push_messages([a_question(3000)])
    held, other = grid.push_messages([a_question(3001), a_question(3003)])
    assert (held, bool(first), bool(other)) == ("", True, True)
    assert {answer.metadata.src_node_id for answer in grid.pull_messages([first, other])} == {3003}
    nodes.deliver()
    (answer,) = grid.pull_messages([first])
    assert answer.content["agent"]["agent"] == 0
    (again,) = grid.push_messages([a_question(3001)])
    assert again


def test_what_nobody_answers_is_forgotten_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = app_grid(1)
    nodes.slow.add(1000)
    grid = SharedNodes(nodes, per_node=2)
    grid.push_messages([a_question(2000)])
    later = a_question(2000).metadata.ttl + 1
    clock = "flower_mcepl.strategies.shared_nodes.time.monotonic"
    now = time.monotonic()
    monkeypatch.setattr(clock, lambda: now + later)
    (message_id,) = grid.push_messages([a_question(2001)])
    assert message_id


def test_asking_ends_with_its_time() -> None:
    nodes = app_grid(2)
    nodes.slow.add(1001)
    answers = SharedNodes(nodes, per_node=2).send_and_receive(
        [a_question(seat) for seat in range(2000, 2004)], timeout=0.05
    )
    assert [answer.content["agent"]["agent"] for answer in answers] == [0, 1]


def test_a_resumed_run_asks_each_agent(tmp_path: Path) -> None:
    options: dict[str, Any] = {"agents_per_node": 2, "record": tmp_path, "checkpoint_every": 1}
    whole = gossip(app_grid(3), RING, rounds=4, **options)
    assert whole.record is not None
    grid = app_grid(3)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gossip(grid, RING, rounds=4, before={4: stop}, **options)
    (broken,) = (path for path in tmp_path.iterdir() if path != whole.record.path)
    resumed = gossip(grid, RING, rounds=4, resume=broken, **options)
    assert learned(resumed)[0][4] == learned(whole)[0][4]
    assert resumed.exchange.ledger.totals() == whole.exchange.ledger.totals()
    assert resumed.exchange.ledger.totals()["local_total"] > 0


def test_agents_must_divide_evenly_over_the_nodes() -> None:
    with pytest.raises(ConfigError, match=r"6 agents must divide evenly .* got 4"):
        GossipStrategy(RING, agents_per_node=4)
    with pytest.raises(ConfigError, match="agents-per-node must be >= 1"):
        GossipStrategy(RING, agents_per_node=0)
    for per_node in (0, 4):
        with pytest.raises(ConfigError, match=rf"6 agents must divide evenly .* got {per_node}"):
            simulate(make_fleet(6), RING, num_rounds=1, agents_per_node=per_node)


def test_an_app_of_its_own_plays_one_agent_a_node() -> None:
    app = ClientApp(mods=[neighbor_average_mod])
    app.train()(lambda message, context: message)
    message = RecordDict(NodeBundle(2, {0: {}}).to_records(ConfigRecord))
    with pytest.raises(ConfigError, match="agents-per-node above 1 needs an app of make_client"):
        app(Message(message, dst_node_id=1, message_type="train"), a_context())


def test_one_agent_sees_its_own_context_alone() -> None:
    context = a_context(2, node={"num-partitions": 4, "state-dir": "none"})
    context.state["agent-7/mine"] = ConfigRecord({"a": 1})
    context.state["agent-6/other"] = ConfigRecord({"b": 1})
    own = seat_context(context, seat=1, per_node=3)
    assert own.node_config["partition-id"] == 7
    assert own.node_config["num-partitions"] == 12
    assert {*own.state} == {"mine"}
    assert context.node_config["partition-id"] == 2


REASONS = st.dictionaries(st.integers(10, 19), st.text(min_size=1, max_size=20))
PARTS: st.SearchStrategy[dict[int, Any]] = st.dictionaries(
    st.integers(0, 9), st.dictionaries(st.sampled_from(["order", "a/b", "0"]), st.just({}))
)


@given(PARTS, REASONS)
def test_a_bundle_comes_back(parts: dict[int, Any], failures: dict[int, str]) -> None:
    back = NodeBundle.from_records(NodeBundle(20, parts, failures).to_records())
    assert (back.per_node, back.parts, back.failures) == (20, parts, failures)


LARGE = Array(dtype="uint8", shape=(10**6,), stype="safetensors", data=bytes(10**6))


@pytest.mark.parametrize(
    ("record", "entries", "rule"),
    [
        ("bundle", ArrayRecord({"seats": LARGE}), "agents-per-node must be a whole number"),
        ("bundle", ConfigRecord({"agents-per-node": True, "seats": [0]}), "agents-per-node must"),
        ("bundle", ConfigRecord({"agents-per-node": 2, "seats": [2]}), "seats must be below"),
        ("bundle", ConfigRecord({"agents-per-node": 2, "seats": [0, 0]}), "seats must name each"),
        ("0/failed", ArrayRecord({"reason": LARGE}), "reason must be text .*; got <Array>"),
        ("0/failed", ConfigRecord({"reason": "x" * 20_001}), "reason must be text of at most"),
    ],
)
def test_a_bundle_is_checked_as_every_record_is(record: str, entries: Any, rule: str) -> None:
    """Its error is short, whatever came: no node makes the server print arrays."""
    records = RecordDict({"bundle": ConfigRecord({"agents-per-node": 2, "seats": [0]})})
    records[record] = entries
    with pytest.raises(ConfigError, match=rule) as caught:
        NodeBundle.from_records(records)
    assert len(str(caught.value)) < 300


@given(st.integers(0, 2**64 - 1), st.integers(1, 1000), st.data())
def test_a_seat_is_a_number_that_leads_back_to_its_node(
    node: int, per_node: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, per_node - 1))
    seat = Seat(node, place, per_node)
    assert divmod(seat, per_node) == (node, place)
    assert f"{seat}" == f"{node}/{place}"


# --- agents of a node as a stack ---


def stacked_app(**changes: Any) -> tuple[RecordingGrid, ClientApp]:
    app = make_client_app(model_fn, changes.pop("data_fn", data_fn))
    config = {**RUN_CONFIG, "engine": "batched", **changes}
    return RecordingGrid(app, 3, config), app


def test_a_nodes_agents_calculate_as_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and bytes are those of the loop, but for the last places of a float."""
    sizes: list[int] = []
    play = stacked_seats.play_together

    def noting(stack: Any, *args: Any) -> Any:
        sizes.append(len(stack.agents))
        return play(stack, *args)

    monkeypatch.setattr(stacked_seats, "play_together", noting)
    grid, _ = stacked_app()
    stacked = gossip(grid, RING, agents_per_node=2)
    assert sizes == [2] * 3 * 5  # three nodes, four rounds and the closing exchange
    alone = gossip(app_grid(6), RING)
    assert frames_by_pair(stacked) == frames_by_pair(alone)
    assert stacked.monitor.train_loss == pytest.approx(alone.monitor.train_loss, rel=1e-4)
    for row, other in zip(stacked.monitor.rows, alone.monitor.rows, strict=True):
        assert row["accuracy"] == pytest.approx(other["accuracy"], abs=0.1)


def test_a_node_with_one_agent_is_a_stack_of_one() -> None:
    app = make_client_app(model_fn, data_fn)
    grid = RecordingGrid(app, 6, {**RUN_CONFIG, "engine": "batched"})
    assert len(gossip(grid, RING).monitor.rows) == len(gossip(app_grid(6), RING).monitor.rows)


def test_an_agent_that_cannot_be_opened_fails_alone_and_a_stack_fails_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fragile(context: Context) -> Any:
        if agent_index(context) == 3:
            raise RuntimeError("no data today")
        return data_fn(context)

    grid, _ = stacked_app(data_fn=fragile)
    strategy = gossip(grid, RING, agents_per_node=2, min_agents=5, incomplete=None)
    assert strategy.roster.absent(strategy.roster.node_of) == [3]
    assert strategy.monitor.evaluations()

    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stacked_seats, "play_together", broken)
    grid, _ = stacked_app()
    with pytest.raises(FlowerMceplError, match=r"agent 0: RuntimeError: out of memory"):
        gossip(grid, RING, agents_per_node=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"algorithm": "dsgd"}, r"got algorithm dsgd, of class DsgdAgent"),
        ({"arithmetic": "fast"}, r"needs arithmetic exact; that of algorithm mcepl .* 'fast'"),
        ({"filters": 0.5}, r"needs filters 1 everywhere; that of algorithm mcepl .* 0\.5"),
    ],
)
def test_what_no_stack_can_follow_is_refused_before_the_run(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RunSettings.from_run_config({"engine": "batched", **config})
    RunSettings.from_run_config(config)


def test_an_engine_that_there_is_not_is_refused_on_both_sides() -> None:
    with pytest.raises(ConfigError, match=r"engine must be one of loop, batched; got 'gpu'"):
        RunSettings.from_run_config({"engine": "gpu"})
    grid, _ = stacked_app(engine="gpu")
    with pytest.raises(FlowerMceplError, match=r"engine must be one of loop, batched; got 'gpu'"):
        gossip(grid, RING, agents_per_node=2)
