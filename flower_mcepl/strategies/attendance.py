"""Attendance: waiting for nodes, asking who they are, and the state of every agent."""

import math
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from logging import INFO, WARNING, getLogger

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flower_mcepl.errors import LostWorkerError, RosterError, first_line, same_reason
from flower_mcepl.messages.identity import question, read_identity
from flower_mcepl.runs.simulated import in_simulation
from flower_mcepl.strategies.launcher import heed_stop_request
from flower_mcepl.strategies.roster import Roster

logger = getLogger("flwr")
# Rounds on end after which a run ends in which nodes fail for one reason: two at least,
# and a tenth of all, as a few devices of a large fleet must not end it.
SAME_ROUNDS, SAME_NODES, SAME_SHARE = 3, 2, 0.1
# How Ray says that a process is gone. It stays in the simulation's pool and fails every
# message that it is given, at once: later rounds would go on with a few agents.
# Code 0 is none that an app's own exception gets. Looked for at the start alone: what
# follows may be anybody's text, made to be searched for hours.
_LOST_WORKER = re.compile(
    r"error 0: .{0,300}?\b(actor|worker)\b.{0,300}?\b(died|dead|crashed)", re.I | re.S
)
ASK_TIMEOUT = 60.0  # seconds for a node to say who it is, where only an error message needs it
RUNNING, LATE, GONE, FAILED, QUARANTINED = "running", "late", "gone", "failed", "quarantined"
# what says that nothing came of a message, not why: `min_agents` is the rule for that
NO_ANSWER = "no answer to the message"
_ABSENT = re.compile(rf"error [345]:|{NO_ANSWER}")


class Attendance:
    """Agents and nodes that are there, round by round.

    Parameters
    ----------
    roster : Roster
        Which node is which agent.
    min_agents : int
        Agents that must take part in every round; 0: all in the first one, more than
        half of them in later ones.
    wait_timeout : float
        Seconds to wait for the nodes of these agents.
    agents_per_node : int (default: 1)
        Number k of agents of each node: node p plays ``p * k`` to ``p * k + k - 1``.
    """

    def __init__(
        self, roster: Roster, *, min_agents: int, wait_timeout: float, agents_per_node: int = 1
    ) -> None:
        self.roster, self.wait_timeout, self._per_node = roster, wait_timeout, agents_per_node
        self.at_first = min_agents or roster.num_agents  # agents that must take part in round 1
        self.later = min_agents or roster.num_agents // 2 + 1  # the same in any later round
        self._reasons: list[set[str]] = []  # of the last rounds: those of several agents
        self.online: list[int] = []  # nodes, as of the last look
        self._states: dict[str, str] = {}  # by agent or node, as of the last round

    def wait_for_nodes(self, grid: Grid, *, first: bool) -> list[int]:
        """Nodes online, once there are enough for the round.

        Raises
        ------
        RosterError
            If there are too few for the first round within the time; it names the
            agents that are missing. A later round goes on, and `check` ends it.
        """
        needed = self.at_first if first else self.later
        deadline = time.monotonic() + self.wait_timeout
        logged = -1
        while len(nodes := sorted(grid.get_node_ids())) < needed:
            heed_stop_request()
            if len(nodes) != logged:
                logger.log(
                    INFO, "waiting for nodes: those of %d of %d agents are here", len(nodes), needed
                )
                logged = len(nodes)
            if time.monotonic() > deadline:
                if first:
                    raise self._toofew(grid, nodes)
                break
            time.sleep(0.2)
        self._look(grid, nodes)
        return nodes

    def newcomers(self, grid: Grid, *, until: float) -> list[int]:
        """Nodes that come for an agent that is missing in the first round.

        Empty when ``until`` (monotonic seconds) is over, and at once in a simulation,
        to which none can come.
        """
        while not in_simulation() and time.monotonic() < until:
            heed_stop_request()
            nodes = sorted(grid.get_node_ids())
            if new := sorted(set(nodes) - set(self.online)):
                self._look(grid, nodes)
                return new
            time.sleep(0.2)
        return []

    def _look(self, grid: Grid, nodes: list[int]) -> None:
        """Note who is online, and the keys of those that are new."""
        self.online = nodes
        if not self.roster.identities.knows(nodes):
            self.roster.identities.look(grid.get_nodes())

    def identify(self, grid: Grid, *, timeout: float) -> None:
        """Ask the nodes who they are, before a run goes on from a checkpoint.

        What each gets depends on it. They have ``timeout`` seconds, as for a round:
        these are their first messages, and processes start.

        A node that cannot be the agent that it says it is is left out. For the right
        ones the run waits as it does for nodes.

        Raises
        ------
        RosterError
            If too few agents are there; it names who was left out, and why.
        """
        until = time.monotonic() + timeout + self.wait_timeout
        here, refused = set[int](), dict[str, str]()
        nodes = self.online
        while nodes:
            for node, agent in sorted(self.ask(grid, nodes, timeout=timeout).items()):
                try:
                    self.roster.expect(node, agent)
                    here.add(agent)
                except RosterError as error:
                    refused[f"node {node}"] = str(error)
                    logger.log(WARNING, "%s", error)
            if len(here) >= self.at_first:
                return
            nodes = self.newcomers(grid, until=until)
        raise RosterError(
            f"{self.at_first} agents must be there for the run to go on, but of "
            f"{len(self.online)} whose nodes are here {len(here)} said within {timeout:g} s which "
            f"agent they are; missing agents: {self._absent(here)}. {_listed(refused)}. Look at "
            "the logs of their nodes, or let the run go on with fewer (min_agents, run-config key "
            "min-agents)."
        )

    def check(
        self,
        round: int,
        answered: Collection[int],
        failed: Mapping[str, str],
        busy: Collection[int] = (),
        *,
        first: bool,
        closing: bool = False,
    ) -> None:
        """Check that a round had enough agents, and that no cause stops them for good.

        After the first round, an agent whose node is ``busy`` takes part: its answer
        may still come. Of the closing exchange only lost workers are checked.

        Raises
        ------
        LostWorkerError
            If a process of the simulation died.
        RosterError
            If too few took part, or several fail for the same reason, round after
            round.
        """
        self.check_workers(round, failed)
        if closing:
            return
        here = set(answered)
        if not first:
            here |= {agent for agent, node in self.roster.node_of.items() if node in busy}
        needed = self.at_first if first else self.later
        if len(here) < needed:
            raise RosterError(
                f"round {round} needs {needed} agents, but {len(here)} took part; "
                f"missing: {self._absent(here)}. {_listed(failed)}. "
                "Mend these nodes; where they need longer for a round, raise the timeout "
                "(run-config key round-timeout); or let the run go on with fewer (min_agents, "
                "run-config key min-agents)."
            )
        self._check_reasons(round, failed)

    def gone(self) -> list[int]:
        """Agents in quarantine or without a node online, as of the last round."""
        numbers = range(self.roster.num_agents)
        out = (GONE, QUARANTINED)
        return [agent for agent in numbers if self._states.get(f"agent {agent}") in out]

    def check_workers(self, round: int, failed: Mapping[str, str]) -> None:
        """Raise LostWorkerError if a process of the simulation died."""
        lost = {name: why for name, why in failed.items() if _LOST_WORKER.match(why)}
        if lost and in_simulation():  # a device may send any code and text
            raise LostWorkerError(
                f"round {round}: a process of Flower's simulation died, and Flower gives its "
                f"messages to no other. {_listed(lost)}. Too little memory is the usual cause. "
                "A new simulation has all its processes: resume the run if it has a checkpoint."
            )

    def _check_reasons(self, round: int, failed: Mapping[str, str]) -> None:
        """Raise RosterError if many nodes fail for one reason, round after round."""
        reasons = {name: same_reason(w) for name, w in failed.items() if not _ABSENT.match(w)}
        # one node fails with all of its agents, and is still one
        nodes = {(self._node(name), why) for name, why in reasons.items()}
        counts = Counter(why for _, why in nodes)
        num_nodes = self.roster.num_agents // self._per_node
        least = max(SAME_NODES, math.ceil(SAME_SHARE * num_nodes))
        several = {why for why, count in counts.items() if count >= least}
        self._reasons = [*self._reasons[1 - SAME_ROUNDS :], several]
        if len(self._reasons) == SAME_ROUNDS and (lasting := set.intersection(*self._reasons)):
            why = min(lasting)
            alike = {name: failed[name] for name in reasons if reasons[name] == why}
            raise RosterError(
                f"several agents failed for the same reason in {SAME_ROUNDS} rounds up to round "
                f"{round} ({len(alike)} of them in this one): {_listed(alike)}. Mend it, and "
                "resume the run if it has a checkpoint."
            )

    def _node(self, name: str) -> str:
        """Node of who failed, an agent or, of a stranger, a seat."""
        kind, _, number = name.partition(" ")
        own = str(int(number) // self._per_node) if kind == "agent" else number.partition("/")[0]
        return f"{kind} {own}"

    def changes(
        self,
        round: int,
        answered: Collection[int],
        failed: Mapping[str, str],
        busy: Collection[int],
        barred: Collection[int] = (),
    ) -> dict[str, str]:
        """States of agents and nodes that changed since the last round; log them.

        An agent is ``late`` if its node owes an answer (also where an earlier one has
        just come), ``running`` if it answered, ``quarantined`` if its node is among the
        ``barred``, ``failed`` with the reason, or ``gone``: no node that is online
        plays it.
        """
        states = {
            f"agent {agent}": self._state(agent, answered, busy, barred)
            for agent in range(self.roster.num_agents)
        }
        states |= {
            f"node {node}": QUARANTINED for node in barred if self.roster.agent_of(node) is None
        }
        states |= {
            f"node {node}": LATE for node in sorted(busy) if self.roster.agent_of(node) is None
        }
        states |= {name: f"{FAILED}: {first_line(reason)}" for name, reason in failed.items()}
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

    def _state(
        self,
        agent: int,
        answered: Collection[int],
        busy: Collection[int],
        barred: Collection[int],
    ) -> str:
        node = self.roster.node_of.get(agent)
        if node in barred:
            return QUARANTINED
        if node in busy:
            return LATE
        if agent in answered:
            return RUNNING
        return f"{FAILED}: no message reached it" if node in self.online else GONE

    def _absent(self, here: Collection[int]) -> str:
        return ", ".join(map(str, self.roster.absent(here))) or "none"

    def ask(
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

    def _toofew(self, grid: Grid, nodes: Sequence[int]) -> RosterError:
        """Error that names who is absent: the nodes that are here are asked."""
        here = self.ask(grid, nodes).values()
        return RosterError(
            f"the graph has {self.roster.num_agents} agents and {self.at_first} of them must be "
            f"there, but after {self.wait_timeout:g} s there are nodes of {len(nodes)} agents; "
            f"missing agents: {self._absent(here)}. Start their nodes (in simulation: "
            "num-supernodes in --federation-config), use a smaller graph, or let the run begin "
            "with fewer (min_agents, run-config key min-agents)."
        )


def _listed(failed: Mapping[str, str]) -> str:
    """Reasons with the names that they are of; the same one is told once."""
    names: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for name, reason in sorted(failed.items()):
        names.setdefault(same_reason(reason), []).append(name)
        texts.setdefault(same_reason(reason), first_line(reason).rstrip("."))
    parts = (f"{few(names[key])}: {reason}" for key, reason in texts.items())
    return "; ".join(parts) or "no reason given"


def few(names: Sequence[str]) -> str:
    """Names in a list; of many, the first and their number."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"
