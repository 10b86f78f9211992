"""Roster: which Flower node is which agent."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from flower_mcepl.agents.handshake import check_common_ground, common_ground
from flower_mcepl.errors import RosterError
from flower_mcepl.strategies.identities import Identities


class Roster:
    """Agents of the graph by Flower's node ids, which change with every restart.

    Every answer carries a handshake; `admit` checks it: against the others, who must
    have the shared weights in common, and against what is known of the agent's node.
    """

    def __init__(self, num_agents: int, identities: Identities | None = None) -> None:
        self.num_agents = num_agents
        self.identities = identities or Identities()
        self.node_of: dict[int, int] = {}  # agent -> node id
        self._agent_of: dict[int, int] = {}  # node id -> agent, former nodes included
        self._facts: dict[int, Mapping[str, Any]] = {}  # handshake of each agent
        # node and handshake of an agent with what all must have in common
        self._founder: tuple[int, Mapping[str, Any]] | None = None
        self._met: set[int] = set()  # nodes whose handshake was checked, unless in doubt

    def agent_of(self, node: int) -> int | None:
        """Agent that the node plays now, or None."""
        agent = self._agent_of.get(node)
        return agent if agent is not None and self.node_of.get(agent) == node else None

    def facts(self, agent: int) -> Mapping[str, Any]:
        """Handshake of an agent that was admitted."""
        return self._facts[agent]

    def has_met(self, node: int) -> bool:
        """Whether the node's handshake was checked, and nothing happened since."""
        return node in self._met

    def state(self) -> dict[str, Any]:
        """Handshakes of the agents, which a resumed run needs; not their nodes."""
        founder = None if self._founder is None else [self._founder[0], dict(self._founder[1])]
        return {
            "facts": {agent: dict(facts) for agent, facts in self._facts.items()},
            "founder": founder,
            "keys": self.identities.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know the agents as in `state`; which nodes they are must be learned anew."""
        self.identities.restore(state.get("keys", {}))
        self._facts = {int(agent): facts for agent, facts in state["facts"].items()}
        self._founder = (
            None if state["founder"] is None else (state["founder"][0], state["founder"][1])
        )

    def expect(self, node: int, agent: int, *, online: Iterable[int] | None = None) -> None:
        """Believe that the node plays the agent, until its handshake is checked.

        ``online`` are the nodes that are there; None: all that are known.

        Raises
        ------
        RosterError
            If the graph has no such agent, or it is another node.
        """
        if agent not in self._facts and 0 <= agent < self.num_agents:
            return  # it joins now: nothing is known that it could go on from
        known = {node, *self.node_of.values()}
        self._check_place(node, agent, online=known if online is None else online)
        self._seat(node, agent)

    def found(self, handshakes: Mapping[int, Mapping[str, Any]]) -> None:
        """Let most of the nodes say what all agents have in common.

        Parameters
        ----------
        handshakes : mapping
            Of the first nodes to answer, by node. Of equally many the lowest agent's
            count. Once the common ground is found it stays.
        """
        if self._founder is not None or not handshakes:
            return
        counts = Counter(map(common_ground, handshakes.values()))
        most = max(counts.values())
        self._founder = min(
            (entry for entry in handshakes.items() if counts[common_ground(entry[1])] == most),
            key=lambda entry: int(entry[1]["agent"]),
        )

    def absent(self, here: Collection[int]) -> list[int]:
        """Agents of the graph that are not among those ``here``."""
        return [agent for agent in range(self.num_agents) if agent not in here]

    def doubt(self, nodes: Iterable[int]) -> None:
        """Want these nodes' handshakes again: a restart may bring another config."""
        self._met -= set(nodes)

    def admit(self, node: int, facts: Mapping[str, Any], *, online: Iterable[int]) -> int:
        """Take the node in as the agent that its handshake names; return that agent.

        Raises
        ------
        RosterError
            If the graph has no such agent, it is another node (`Identities`), or this
            node plays another.
        FingerprintError
            If its model, frozen weights or first mask are not those of the agents
            already here.
        """
        agent = int(facts["agent"])
        self._check_place(node, agent, online=online)
        played = self.agent_of(node)
        if played is not None and played != agent:
            raise RosterError(
                f"node {node} is agent {played} and now says it is agent {agent}. A node plays "
                "one agent: restart its SuperNode with one partition-id."
            )
        self.found({node: facts})
        assert self._founder is not None
        first_node, first_facts = self._founder
        check_common_ground(
            f"agent {agent} (node {node})",
            facts,
            f"agent {first_facts['agent']} (node {first_node})",
            first_facts,
        )
        self._seat(node, agent)
        self._facts[agent] = facts
        self._met.add(node)
        return agent

    def _check_place(self, node: int, agent: int, *, online: Iterable[int]) -> None:
        if not 0 <= agent < self.num_agents:
            raise RosterError(
                f"node {node} says it is agent {agent}, but the graph has agents "
                f"0..{self.num_agents - 1}. Start nodes for as many agents as the graph has "
                "(num-supernodes = num-agents over agents-per-node), with partition-id from 0 "
                "upwards, or use a larger graph."
            )
        self.identities.check(node, agent, online=set(online))

    def _seat(self, node: int, agent: int) -> None:
        self.node_of[agent], self._agent_of[node] = node, agent
        self.identities.bind(node, agent)
