"""Who is who: a number belongs to the node that bore it first, or to a key."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

from flower_mcepl import ConfigError, RosterError, Topology
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.strategies.identities import Identities, read_agent_keys
from flower_mcepl.strategies.intake import BAD_ANSWERS, QUARANTINE
from tests.fleet.flower import agent_grid, gossip
from tests.fleet.grid import InProcessGrid


def only_run(folder: Path) -> Run:
    (path,) = folder.iterdir()
    return read_run(path)


@dataclass(frozen=True)
class Node:
    node_id: int
    public_key: bytes = b""


def nodes(**keys: bytes) -> list[Node]:
    return [Node(int(name[1:]), key) for name, key in keys.items()]


# --- the binding on its own ---


def test_a_number_belongs_to_the_key_that_bore_it_first() -> None:
    identities = Identities()
    identities.look(nodes(n7=b"one", n8=b"two", n9=b"one"))
    identities.check(7, 3, online={7})
    identities.bind(7, 3)
    with pytest.raises(RosterError, match=r"nodes 7 and 8 both say they are agent 3"):
        identities.check(8, 3, online={7, 8})
    # also while the node is away
    with pytest.raises(RosterError, match=r"node 8 says it is agent 3, .*for this run.*takeover"):
        identities.check(8, 3, online={8})
    identities.check(9, 3, online={9})  # the same key under another node id
    identities.check(8, 4, online={7, 8})


def test_a_node_without_a_key_is_bound_by_its_id() -> None:
    identities = Identities()
    identities.bind(7, 3)
    identities.check(7, 3, online={7})
    with pytest.raises(RosterError, match=r"with the key node 8; but agent 3 is .*node 7"):
        identities.check(8, 3, online={8})
    assert identities.state() == {}  # node ids do not outlive a run of Flower's


def test_takeover_lets_another_node_in_while_the_first_is_away() -> None:
    identities = Identities(takeover=True)
    identities.bind(7, 3)
    identities.check(8, 3, online={8})
    with pytest.raises(RosterError, match="both say"):
        identities.check(8, 3, online={7, 8})


def test_keys_that_come_back_after_a_resumption_mean_what_they_meant() -> None:
    before = Identities()
    before.look(nodes(n1=b"a", n2=b"b", n3=b"c"))
    for node in (1, 2, 3):
        before.bind(node, node)
    after = Identities()
    after.restore(before.state())
    after.look(nodes(n11=b"a", n12=b"x"))  # 2 and 3 are still away
    after.check(11, 1, online={11, 12})
    for agent in (1, 2, 3):
        with pytest.raises(RosterError, match="for this run"):
            after.check(12, agent, online={12})
    assert after.state() == before.state()


def test_keys_of_which_none_comes_back_do_not_last() -> None:
    """Simulated nodes, and SuperNodes without a key file, have new ones each time."""
    before = Identities()
    before.look(nodes(n1=b"a", n2=b"b"))
    before.bind(1, 1)
    after = Identities()
    after.restore(before.state())
    after.look(nodes(n11=b"x", n12=b"y"))
    after.check(12, 1, online={11, 12})


# --- the file of keys ---


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, bytes]]:
    """Public keys as in a .pub file, and as Flower stores them."""
    keys = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(3)]
    return [
        (
            key.public_bytes(formats.Encoding.OpenSSH, formats.PublicFormat.OpenSSH).decode(),
            key.public_bytes(formats.Encoding.PEM, formats.PublicFormat.SubjectPublicKeyInfo),
        )
        for key in keys
    ]


@pytest.fixture
def file(tmp_path: Path, pairs: list[tuple[str, bytes]]) -> Path:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "b.pub").write_text(pairs[1][0] + " somebody@device\n")
    path = tmp_path / "agents.txt"
    path.write_text(f"# who is who\n\n0 {pairs[0][0]} comment\n1   keys/b.pub\n")
    return path


def test_only_the_key_of_the_file_is_let_in(file: Path, pairs: list[tuple[str, bytes]]) -> None:
    identities = Identities(read_agent_keys(file))
    identities.look(Node(10 + place, key) for place, (_, key) in enumerate(pairs))
    identities.check(10, 0, online={10})
    identities.check(11, 1, online={11})
    with pytest.raises(RosterError, match="agent 0 has another key there"):
        identities.check(11, 0, online={11})
    with pytest.raises(RosterError, match="agent 2 is not in it"):
        identities.check(12, 2, online={12})
    with pytest.raises(RosterError, match="agent 0 has another key there"):
        identities.check(99, 0, online={99})  # Flower knows no key of it


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("x ecdsa-sha2-nistp384 AAAA", "line 1 must be an agent's number and its public key"),
        ("0 ecdsa-sha2-nistp384 AAAA", "line 1 must be"),
        ("0 no/such.pub", r"line 1 must be .* got '0 no/such\.pub'"),
        ("0", "line 1 must be"),
        ("0 keys/b.pub\n0 keys/b.pub", "line 2: each agent and each key may stand there once"),
        ("0 keys/b.pub\n1 keys/b.pub", "line 2: each agent and each key may stand there once"),
    ],
)
def test_a_line_that_is_wrong_is_named(text: str, match: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_agent_keys(file)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run-config key agents\) cannot be read .*nowhere"):
        gossip(agent_grid(2), agents=str(tmp_path / "nowhere"))


# --- in a run ---


class KeyedGrid(InProcessGrid):
    """Nodes with keys that Flower tells."""

    keys: Mapping[int, bytes] = {}

    def get_nodes(self) -> Iterator[Any]:  # type: ignore[override]
        return (Node(n, self.keys.get(n, b"")) for n in self.get_node_ids())


def test_an_impostor_gets_no_place_while_its_agent_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def play(folder: Path, *, impostor: bool) -> InProcessGrid:
        grid = agent_grid(4)

        def leave() -> None:
            grid.down.add(1002)
            if impostor:
                grid.add_node(1099, 2)

        gossip(grid, rounds=6, record=folder, before={3: leave, 4: grid.down.clear})
        return grid

    with caplog.at_level(logging.WARNING, logger="flwr"):
        with_one = play(tmp_path / "with", impostor=True)
    without = play(tmp_path / "without", impostor=False)
    assert "node 1099 says it is agent 2, with the key node 1099; but agent 2 is" in caplog.text
    one, other = only_run(tmp_path / "with"), only_run(tmp_path / "without")
    assert [line["frames"] for line in one.relay] == [line["frames"] for line in other.relay]
    assert one.relay[3]["answered"] == 4  # the honest one has come back
    sent = [m.metadata.dst_node_id for m in with_one.log]
    assert sent.count(1099) <= 2
    assert sent.count(1002) == [m.metadata.dst_node_id for m in without.log].count(1002)


def test_by_the_file_the_right_node_plays_the_agent(
    file: Path, pairs: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = agent_grid(3)
    grid.__class__ = KeyedGrid
    monkeypatch.setattr(
        KeyedGrid, "keys", {1000: pairs[0][1], 1001: pairs[2][1], 1002: pairs[1][1]}
    )
    grid.add_node(1002, 1)  # node 1001 says the same, first
    strategy = gossip(grid, Topology.ring(2), agents=str(file))
    assert strategy.roster.node_of == {0: 1000, 1: 1002}


# --- quarantine ---


class SpoilingGrid(InProcessGrid):
    """Node 1003 answers, while `bad`, with a loss that is not finite."""

    bad = False

    def _work(self, node: int, message: Message) -> Message:
        reply = super()._work(node, message)
        if self.bad and node == 1003:
            reply.content["metrics"]["train-loss"] = math.inf
        return reply


def test_a_node_of_bad_answers_is_in_quarantine_for_some_rounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = agent_grid(4)
    grid.__class__ = SpoilingGrid
    begin, end = 2, 2 + BAD_ANSWERS - 1

    def spoil(bad: bool) -> None:
        grid.bad = bad  # type: ignore[attr-defined]

    steps = {begin: lambda: spoil(True), end + QUARANTINE: lambda: spoil(False)}
    with caplog.at_level(logging.WARNING, logger="flwr"):
        gossip(grid, rounds=18, record=tmp_path, before=steps)
    assert (
        f"round {end}: agent 3 gave {BAD_ANSWERS} bad answers in a row and is in quarantine up to "
        f"round {end + QUARANTINE}"
    ) in caplog.text
    asked = [m.content["order"]["server-round"] for m in grid.log if m.metadata.dst_node_id == 1003]
    assert asked == [*range(1, end + 1), *range(end + QUARANTINE + 1, 20)]
    states = {line["round"]: line["states"].get("agent 3") for line in only_run(tmp_path).relay}
    assert states[begin].startswith("failed: agent 3 does not answer as an agent (metric train-lo")
    assert (states[end + 1], states[end + QUARANTINE + 1]) == ("quarantined", "running")
