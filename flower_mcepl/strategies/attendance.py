"""Attendance: waiting for nodes, asking who they are, and the state of every agent."""

import time
from collections.abc import Collection, Mapping, Sequence
from logging import INFO, WARNING, getLogger

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flower_mcepl.errors import RosterError
from flower_mcepl.messages.identity import question, read_identity
from flower_mcepl.strategies.roster import Roster

logger = getLogger("flwr")
MAX_SILENT_ROUNDS = 3  # so many rounds in which nobody answers end the run
ASK_TIMEOUT = 60.0  # seconds for a node to say who it is, where only an error message needs it
RUNNING, LATE, GONE, FAILED = "running", "late", "gone", "failed"


class Attendance:
    """Agents and nodes that are there, round by round.

    Parameters
    ----------
    roster : Roster
        Which node is which agent.
    min_agents : int
        Agents that must take part in the first round, and in the first one after a
        resumption.
    wait_timeout : float
        Seconds to wait for nodes: for these agents, and in any later round in which no
        node is online.
    """

    def __init__(self, roster: Roster, *, min_agents: int, wait_timeout: float) -> None:
        self.roster, self.min_agents, self.wait_timeout = roster, min_agents, wait_timeout
        self.online: list[int] = []  # nodes, as of the last look
        self._states: dict[str, str] = {}  # by agent or node, as of the last round
        self._silent_rounds = 0

    def wait_for_nodes(self, grid: Grid, *, first: bool) -> list[int]:
        """Nodes online, once there are enough for the first round, or any later.

        Raises
        ------
        RosterError
            If there are too few for the first round within the time; it names the
            agents that are missing. A later round goes on without nodes, and `check`
            tells how often.
        """
        needed = self.min_agents if first else 1
        deadline = time.monotonic() + self.wait_timeout
        logged = -1
        while len(nodes := sorted(grid.get_node_ids())) < needed:
            if len(nodes) != logged:
                logger.log(INFO, "waiting for nodes: %d of %d are here", len(nodes), needed)
                logged = len(nodes)
            if time.monotonic() > deadline:
                if first:
                    raise self._too_few(grid, nodes)
                break
            time.sleep(0.2)
        self.online = nodes
        return nodes

    def identify(self, grid: Grid, *, timeout: float) -> None:
        """Ask the nodes who they are, before a run goes on from a checkpoint.

        What each gets depends on it. They have ``timeout`` seconds, as for a round:
        these are their first messages, and processes start.

        Raises
        ------
        RosterError
            If two say that they are the same agent, or too few agents are there.
        """
        agents = self._ask(grid, self.online, timeout=timeout)
        for node, agent in sorted(agents.items()):
            self.roster.expect(node, agent)
        if len(set(agents.values())) < self.min_agents:
            raise RosterError(
                f"{self.min_agents} agents must be there for the run to go on, but of "
                f"{len(self.online)} nodes {len(agents)} said within {timeout:g} s which agent "
                f"they are; missing agents: {self._absent(agents.values())}. Look at the logs of "
                "their nodes, or let the run go on with fewer (min_agents, run-config key "
                "min-agents)."
            )

    def check(
        self, round: int, answered: Collection[int], failed: Mapping[str, str], *, first: bool
    ) -> None:
        """Raise RosterError if too few begin, or nobody answers for some rounds."""
        reasons = (
            "; ".join(f"{name}: {reason}" for name, reason in sorted(failed.items()))
            or "no reason given"
        )
        if first and len(answered) < self.min_agents:
            raise RosterError(
                f"round {round} needs {self.min_agents} agents, but {len(answered)} took part; "
                f"missing: {self._absent(answered)}. {reasons}. Mend these nodes, or let the run "
                "begin with fewer (min_agents, run-config key min-agents)."
            )
        self._silent_rounds = 0 if answered else self._silent_rounds + 1
        if self._silent_rounds >= MAX_SILENT_ROUNDS:
            here = [agent for agent, node in self.roster.node_of.items() if node in self.online]
            raise RosterError(
                f"no agent has answered for {MAX_SILENT_ROUNDS} rounds; nodes online: "
                f"{len(self.online)}; agents without a node that is online: {self._absent(here)}. "
                f"Last reasons: {reasons}. Look at the nodes' logs; where they need longer for a "
                "round, raise the timeout (run-config key round-timeout)."
            )

    def changes(
        self,
        round: int,
        answered: Collection[int],
        failed: Mapping[str, str],
        busy: Collection[int],
    ) -> dict[str, str]:
        """States of agents and nodes that changed since the last round; log them.

        An agent is ``late`` if its node owes an answer (also where an earlier one has
        just come), ``running`` if it answered, ``failed`` with the reason, or ``gone``:
        no node that is online plays it.
        """
        states = {
            f"agent {agent}": self._state(agent, answered, busy)
            for agent in range(self.roster.num_agents)
        }
        states |= {
            f"node {node}": LATE for node in sorted(busy) if self.roster.agent_of(node) is None
        }
        states |= {name: f"{FAILED}: {reason}" for name, reason in failed.items()}
        changes = {name: state for name, state in states.items() if self._states.get(name) != state}
        for name, state in changes.items():
            before = self._states.get(name)
            if state == RUNNING and before is not None:
                logger.log(
                    INFO,
                    "round %d: %s is running again (was %s)",
                    round,
                    name,
                    before.partition(":")[0],
                )
            elif state in (LATE, GONE):
                logger.log(WARNING, "round %d: %s is %s", round, name, state)
        self._states = states
        return changes

    def _state(self, agent: int, answered: Collection[int], busy: Collection[int]) -> str:
        node = self.roster.node_of.get(agent)
        if node in busy:
            return LATE
        if agent in answered:
            return RUNNING
        return f"{FAILED}: no message reached it" if node in self.online else GONE

    def _absent(self, here: Collection[int]) -> str:
        return ", ".join(map(str, self.roster.absent(here))) or "none"

    def _ask(
        self, grid: Grid, nodes: Sequence[int], *, timeout: float = ASK_TIMEOUT
    ) -> dict[int, int]:
        """Agent that each node says it is.

        An app with `neighbor_average_mod` has no query function, or one of its own; its
        mod answers the train message.
        """
        agents: dict[int, int] = {}
        for message_type in ("query", "train"):
            content = RecordDict(question(ConfigRecord))
            ask = [
                Message(content, dst_node_id=n, message_type=message_type, ttl=timeout)
                for n in nodes
            ]
            replies = list(grid.send_and_receive(ask, timeout=timeout))
            for reply in replies:
                agent = None if reply.has_error() else read_identity(reply.content)
                if agent is not None:
                    agents[reply.metadata.src_node_id] = agent
            nodes = sorted(
                {reply.metadata.src_node_id for reply in replies} & set(nodes) - agents.keys()
            )
        return agents

    def _too_few(self, grid: Grid, nodes: Sequence[int]) -> RosterError:
        """Error that names who is absent: the nodes that are here are asked."""
        here = self._ask(grid, nodes).values()
        return RosterError(
            f"the graph has {self.roster.num_agents} agents and {self.min_agents} of them must be "
            f"there, but after {self.wait_timeout:g} s there are {len(nodes)} nodes; missing "
            f"agents: {self._absent(here)}. Start their nodes (in simulation: num-supernodes in "
            "--federation-config), use a smaller graph, or let the run begin with fewer "
            "(min_agents, run-config key min-agents)."
        )
