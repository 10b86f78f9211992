"""Which Flower node is which agent."""

from collections.abc import Iterable, Mapping
from typing import Any

from flower_mcepl.errors import FingerprintError, RosterError


class Roster:
    """Maps Flower's node ids, which change with every restart, to the agents of the graph.

    Every answer carries a handshake; `admit` checks it. The first agent admitted sets the fingerprint of the
    shared weights for all.
    """

    def __init__(self, num_agents: int) -> None:
        self.num_agents = num_agents
        self.node_of: dict[int, int] = {}  # agent -> node id
        self._agent_of: dict[int, int] = {}  # node id -> agent, former nodes included
        self._founder: Mapping[str, Any] | None = None  # handshake of the first agent

    def agent_of(self, node: int) -> int | None:
        """Return the agent that the node plays now, or None."""
        agent = self._agent_of.get(node)
        return agent if agent is not None and self.node_of.get(agent) == node else None

    def missing(self) -> list[int]:
        """Return the agents of the graph that no node has ever claimed."""
        return [agent for agent in range(self.num_agents) if agent not in self.node_of]

    def admit(self, node: int, facts: Mapping[str, Any], *, online: Iterable[int]) -> int:
        """Take the node in as the agent that its handshake names, and return that agent.

        A node may take over an agent whose former node is no longer online (a SuperNode that restarted without
        a key of its own comes back under a new id).

        Raises
        ------
        RosterError
            If the graph has no such agent, or another node that is online plays it.
        FingerprintError
            If its frozen weights are not those of the agents already here.
        """
        agent = int(facts["agent"])
        if not 0 <= agent < self.num_agents:
            raise RosterError(
                f"node {node} says it is agent {agent}, but the graph has agents 0..{self.num_agents - 1}. "
                "Start as many nodes as the graph has agents (num-supernodes = num-agents), with partition-id "
                "from 0 upwards, or use a larger graph."
            )
        holder = self.node_of.get(agent)
        if holder is not None and holder != node and holder in set(online):
            raise RosterError(
                f"nodes {holder} and {node} both say they are agent {agent}. "
                "Give each SuperNode a partition-id of its own in --node-config."
            )
        self._check_weights(node, agent, facts)
        self.node_of[agent] = node
        self._agent_of[node] = agent
        return agent

    def _check_weights(self, node: int, agent: int, facts: Mapping[str, Any]) -> None:
        if self._founder is None:
            self._founder = {**facts, "node": node}
        first = self._founder
        if facts["fingerprint"] == first["fingerprint"]:
            return
        who = f"agent {agent} (node {node}) and agent {first['agent']} (node {first['node']})"
        sizes = facts.get("num-weights"), first.get("num-weights")
        if sizes[0] != sizes[1]:
            raise FingerprintError(
                f"{who} have different models: {sizes[0]} and {sizes[1]} maskable weights. "
                "Use the same model function and its settings on all devices."
            )
        raise FingerprintError(
            f"{who} hold different frozen weights: fingerprints {facts['fingerprint']} and {first['fingerprint']}. "
            "Use the same seed, model function and torch release on all devices; every random draw of the model "
            "function must come from torch, NumPy or Python's random module."
        )
