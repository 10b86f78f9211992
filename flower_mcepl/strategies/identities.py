"""Identities: which node may be which agent, by the keys of the nodes."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol, final

from flower_mcepl.errors import ConfigError, RosterError


class NodeInfo(Protocol):
    """What Flower tells of a node."""

    node_id: int
    public_key: bytes


@final
class Identities:
    """Binds the number of each agent to the key of the node that is it at first sight.

    A node's key is its public one, which Flower tells; it lasts where the SuperNode has
    a key file and is registered. A node of which no key is known, as in tests, is
    itself the key.

    Parameters
    ----------
    keys : mapping, optional
        Key of each agent, known beforehand, as from `read_agent_keys`. No other agent
        is let in then.
    takeover : bool (default: False)
        Let a node with another key be an agent whose node is not online.
    """

    def __init__(self, keys: Mapping[int, str] | None = None, *, takeover: bool = False) -> None:
        self._fixed = None if keys is None else dict(keys)
        self._takeover = takeover
        self._keys: dict[int, str] = {}  # by node
        self._bound: dict[int, tuple[str, int]] = {}  # agent -> key, and its node of late
        self._before: dict[int, str] = {}  # agent -> key, before the run was resumed

    def knows(self, nodes: Iterable[int]) -> bool:
        """Whether the keys of all these nodes were asked for."""
        return all(node in self._keys for node in nodes)

    def look(self, nodes: Iterable[NodeInfo]) -> None:
        """Learn the keys of nodes."""
        for node in nodes:
            self._keys.setdefault(int(node.node_id), _key(node.public_key, int(node.node_id)))
        if set(self._before.values()) & set(self._keys.values()):
            # Keys last here: one has come back, so they all mean what they meant.
            self._bound = {agent: (key, 0) for agent, key in self._before.items()} | self._bound
            self._before = {}

    def check(self, node: int, agent: int, *, online: Collection[int]) -> None:
        """Raise RosterError if the node cannot be the agent."""
        key = self._key_of(node)
        if self._fixed is not None and self._fixed.get(agent) != key:
            known = "has another key there" if agent in self._fixed else "is not in it"
            raise RosterError(
                f"node {node} says it is agent {agent}, with the key {short(key)}; by the file of "
                f"agents' keys (run-config key agents), agent {agent} {known}. Give the "
                "SuperNode the partition-id of its key, or mend the file."
            )
        bound, holder = self._bound.get(agent, (key, node))
        if bound == key or (self._takeover and holder not in online):
            return
        if holder in online:
            raise RosterError(
                f"nodes {holder} and {node} both say they are agent {agent}. Give each SuperNode a "
                "partition-id of its own in --node-config."
            )
        raise RosterError(
            f"node {node} says it is agent {agent}, with the key {short(key)}; but agent {agent} "
            f"is the node with the key {short(bound)}, for this run. Start its SuperNode with the "
            "key that it had (--auth-supernode-private-key). Where SuperNodes have no keys that "
            "last and all are trusted, set takeover = true."
        )

    def bind(self, node: int, agent: int) -> None:
        """Note that the node is the agent."""
        self._bound[agent] = self._key_of(node), node

    def state(self) -> dict[int, str]:
        """Key of each agent whose node has one, for a resumed run."""
        keys = {agent: key for agent, (key, _) in self._bound.items()} | self._before
        return {agent: key for agent, key in sorted(keys.items()) if not key.startswith(_NODE)}

    def restore(self, state: Mapping[int, str]) -> None:
        """Know the keys from before a resumption.

        They count if one of them comes back. If none does, keys do not last: simulated
        nodes, and SuperNodes without a key file, have new ones after every start.
        """
        self._bound, self._before = {}, {int(agent): key for agent, key in state.items()}

    def _key_of(self, node: int) -> str:
        return self._keys.get(node, _key(b"", node))


def read_agent_keys(path: str | Path, *, per_key: int = 1) -> dict[int, str]:
    """Key of each agent from a file of lines: its number, and its public key.

    The key is as in the ``.pub`` file that belongs to ``--auth-supernode-private-key``
    (``ecdsa-sha2-nistp384 AAAA...``), or the path of that file, from the folder of this
    one. Empty lines, and those that begin with ``#``, say nothing.
    The agents of one node have its key: ``per_key`` of them.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a line is no number and key, or one comes twice.
    """
    file, keys = Path(path).expanduser(), dict[int, str]()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the file of agents' keys (run-config key agents) cannot be read ({error})."
        ) from error
    for place, line in enumerate(lines, start=1):
        number, _, text = line.strip().partition(" ")
        if not number or number.startswith("#"):
            continue
        try:
            agent, key = int(number), _read_key(text.strip(), file.parent)
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"{file}, line {place} must be an agent's number and its public key, as in a .pub "
                f"file, or the path of one; got {line!r:.80} ({error})."
            ) from error
        if agent in keys or [*keys.values()].count(key) >= per_key:
            often = "once" if per_key == 1 else f"once and {per_key} times"
            raise ConfigError(
                f"{file}, line {place}: each agent and each key may stand there {often}; got "
                f"{line!r:.80} again."
            )
        keys[agent] = key
    return keys


def short(key: str) -> str:
    """Name of a key in a message."""
    return key if key.startswith(_NODE) else key[:12]


_NODE = "node "


def _key(public_key: bytes, node: int) -> str:
    return hashlib.sha256(public_key).hexdigest() if public_key else f"{_NODE}{node}"


def _read_key(text: str, folder: Path) -> str:
    from cryptography.hazmat.primitives import serialization as formats  # 50 ms

    if not text.startswith(("ecdsa-", "ssh-")):
        text = (folder / Path(text).expanduser()).read_text(encoding="utf-8")
    key = formats.load_ssh_public_key(text.encode())
    # as Flower stores it
    pem = key.public_bytes(formats.Encoding.PEM, formats.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()
