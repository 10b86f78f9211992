"""The relay: which frames go to which agent. It never opens a frame."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic

import numpy as np

from flower_mcepl.agents.handshake import KEPT_BY_LAYER
from flower_mcepl.config.schedules import ASYNC, ROUNDS
from flower_mcepl.exchange.ages import OwnAges, check_graph
from flower_mcepl.exchange.exchange import check_rounds
from flower_mcepl.exchange.ledger import Ledger
from flower_mcepl.exchange.parcels import (
    Answer,
    FrameT,
    Parcel,
    Posted,
    by_number,
    post_facts,
    shipments,
)
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.topology import Topology

# Answers without the whole frame that was asked for, after which an agent is silent:
# what it sends is kept for nobody, until a whole frame comes.
OVERDUE = 3


class Relay(Generic[FrameT]):
    """Exchange over a graph: each neighbor gets just those frames that it lacks.

    Parameters
    ----------
    topology : Topology
        Who is whose neighbor in which round.
    open_frame, wrap_frame : callable (default: frames are bytes)
        A frame's bytes from the frame as it came, and back, for `state` and `restore`.
    evaluate_every : int (default: 10)
        Personal models are evaluated after each such number of rounds, and after the
        last one.
    max_staleness : int (default: 5)
        For how many rounds a neighbor's last mask stays in use when no newer one came;
        0 uses fresh ones alone.
    key_interval : int (default: 0)
        Rounds after which an agent sends a whole frame beside its delta; 0: only when
        the deltas since the last whole frame have as many bytes as that.
    age_decay : float (default: 1.0)
        What a neighbor's vote is multiplied by for each round of its age.
    schedule : str (default: "rounds")
        With "async" each agent has rounds of its own; ages are those of `OwnAges`.
    agents_per_node : int (default: 1)
        As in `Ledger`.

    Notes
    -----
    Frames are opaque: in `simulate` they are bytes, in Flower the received Array
    objects, handed on as they came.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        # what comes is bytes unless it is said how to open and wrap it
        open_frame: Callable[[FrameT], bytes] = bytes,  # type: ignore[assignment]
        wrap_frame: Callable[[bytes], FrameT] = bytes,  # type: ignore[assignment]
        evaluate_every: int = 10,
        max_staleness: int = 5,
        key_interval: int = 0,
        age_decay: float = 1.0,
        schedule: str = ROUNDS,
        agents_per_node: int = 1,
    ) -> None:
        check_rounds(
            evaluate_every=evaluate_every,
            max_staleness=max_staleness,
            key_interval=key_interval,
            age_decay=age_decay,
        )
        check_graph(schedule, topology)
        self.topology, self.key_interval = topology, key_interval
        self.evaluate_every, self.max_staleness = evaluate_every, max_staleness
        self.age_decay, self.schedule = age_decay, schedule
        self._own_ages = OwnAges(max_staleness) if schedule == ASYNC else None
        self._open, self._wrap = open_frame, wrap_frame
        self.ledger = Ledger(agents_per_node=agents_per_node)
        # with the round, oldest first
        self._posted: dict[int, list[tuple[int, Posted[FrameT]]]] = {}
        self._facts: dict[int, Mapping[str, Any]] = {}
        self._held: dict[int, Mapping[int, int]] = {}  # agent -> sender -> round, as it last said
        # agent -> senders whose chain in its parcel began with a key
        self._began_whole: dict[int, set[int]] = {}
        self._broken: set[int] = set()  # senders of whom even such a chain could not be decoded
        # (agent, sender) -> how often that was believed, and in which round last
        self._believed: dict[tuple[int, int], tuple[int, int]] = {}
        # agent -> round in which a whole frame was asked for; answers without one since
        self._asked: dict[int, int] = {}
        self._overdue: dict[int, int] = {}

    def begin(self, run: str) -> None:
        """Do nothing: a relay opens no frame, and need not know the run."""

    def parcel(self, agent: int, *, round: int, closing: bool = False) -> Parcel[FrameT]:
        """Return the agent's parcel for ``round`` and count its frames as sent."""
        parcel = self._parcel(agent, round, closing=closing)
        if self._own_ages is not None and parcel.neighbors is not None:
            self._own_ages.note_parcel(agent)
        return parcel

    def _parcel(self, agent: int, round: int, *, closing: bool) -> Parcel[FrameT]:
        if agent not in self._held and not closing:
            return Parcel(round, None)
        previous = round - 1
        neighbors = self.topology.in_neighbors(agent, round=previous)
        chains = {j: self._missing(agent, j, previous) for j in neighbors}
        chains = {j: chain for j, chain in chains.items() if chain}
        self._began_whole[agent] = {j for j, chain in chains.items() if chain[0].is_key}
        for j, chain in chains.items():
            self.ledger.add_delivery(j, agent, shipments(chain, self._facts.get(j, {})))
        whole = not closing and self._whole_is_due(agent, round)
        if whole:
            self._asked[agent] = round
        return Parcel(
            round,
            neighbors,
            {j: [post.frame for post in chain] for j, chain in chains.items()},
            evaluate=closing or previous % self.evaluate_every == 0,
            train=not closing,
            acknowledged=self._newest(agent),
            whole=whole,
            kept=self._kept_by(self._began_whole[agent]),
            ages=None
            if self._own_ages is None
            else {j: self._age(agent, j, previous) for j in chains},
        )

    def _age(self, agent: int, sender: int, previous: int) -> int:
        """Age of the sender's newest frame in a parcel after the round ``previous``."""
        if self._own_ages is not None:
            return self._own_ages.age(agent, sender)
        newest = self._newest(sender)
        assert newest is not None
        return previous - newest

    def take(self, agent: int, answer: Answer[FrameT], *, round: int) -> tuple[()]:
        """Take in the answer to the parcel of ``round``; no frame is ever refused.

        Frames that come late count as those of their own round; they never replace
        newer ones.
        """
        self._facts[agent], self._held[agent] = answer.facts, answer.held
        undecoded = self._began_whole.pop(agent, set()) & set(answer.lacking)
        self._broken |= {sender for sender in undecoded if self._believe(agent, sender, round)}
        self._keep(agent, answer.posts, round)
        return ()

    def _keep(self, agent: int, posts: Sequence[Posted[FrameT]], round: int) -> None:
        """Keep the frames, each of which suffices, for the neighbors' next parcels."""
        if not posts:
            return
        self.ledger.add_uplink(agent, shipments(posts, self._facts.get(agent, {})))
        kept = self._posted.get(agent, [])
        if kept and kept[-1][0] >= round:
            return
        whole = any(post.is_key for post in posts)
        if self._is_silent(agent, round, whole=whole):
            self._posted.pop(agent, None)
            return
        # who lacks more than a few rounds gets the whole frame from now on
        if whole:
            kept = [
                (r, post) for r, post in kept if not post.is_key and round - r <= self.max_staleness
            ]
            self._broken.discard(agent)
        self._posted[agent] = [*kept, *((round, post) for post in posts)]
        if self._own_ages is not None:
            self._own_ages.note_frame(agent)

    def _is_silent(self, agent: int, round: int, *, whole: bool) -> bool:
        """Whether the agent never sends the whole frame that it is asked for.

        Deltas without end would be kept for ever, for whoever holds none of them.
        """
        if whole:
            self._overdue.pop(agent, None)
        elif self._asked.get(agent) == round:
            self._overdue[agent] = self._overdue.get(agent, 0) + 1
        return self._overdue.get(agent, 0) >= OVERDUE

    def _believe(self, agent: int, sender: int, round: int) -> bool:
        """Whether to believe that the agent could not decode a whole frame.

        One agent that says so in every round must not make its neighbors send a whole
        frame in each: what it says is believed in the first round, and then after ever
        longer times, each twice the one before.
        """
        times, last = self._believed.get((agent, sender), (0, 0))
        if times and round - last < 2**times:
            return False
        self._believed[agent, sender] = (times + 1, round)
        return True

    def _kept_by(self, senders: Iterable[int]) -> dict[int, list[int]]:
        """Weights that the masks of each sender keep, where its handshake says so."""
        told = {j: self._facts.get(j, {}).get(KEPT_BY_LAYER) for j in sorted(senders)}
        return {j: kept for j, kept in told.items() if kept}

    def state(self, *, round: int) -> Bundle:
        """Everything that must survive ``round``, before any parcel of the next one."""
        posted = {
            agent: [[r, *post_facts(post)] for r, post in posts]
            for agent, posts in self._posted.items()
        }
        facts = {
            "posted": posted,
            "facts": {agent: dict(facts) for agent, facts in self._facts.items()},
            "held": {agent: dict(held) for agent, held in self._held.items()},
            "began-whole": {agent: sorted(senders) for agent, senders in self._began_whole.items()},
            "broken": sorted(self._broken),
            "believed": [[*pair, *when] for pair, when in self._believed.items()],
            "asked": dict(self._asked),
            "overdue": dict(self._overdue),
            "ledger": self.ledger.state(),
            **({} if self._own_ages is None else {"own-ages": self._own_ages.state()}),
        }
        frames = {
            f"{agent}/{place}": np.frombuffer(self._open(post.frame), np.uint8)
            for agent, posts in self._posted.items()
            for place, (_, post) in enumerate(posts)
        }
        return Bundle(facts, frames)

    def restore(self, state: Bundle) -> None:
        """Continue exactly where `state` was taken.

        Topology and settings must be the same.
        """
        facts = state.facts
        frames = {place: self._wrap(array.tobytes()) for place, array in state.arrays.items()}
        self._posted = {
            int(agent): [
                (r, Posted(frames[f"{agent}/{place}"], *rest))
                for place, (r, *rest) in enumerate(posts)
            ]
            for agent, posts in facts["posted"].items()
        }
        self._facts = by_number(facts["facts"])
        self._held = {int(agent): by_number(held) for agent, held in facts["held"].items()}
        self._began_whole = {
            int(agent): set(senders) for agent, senders in facts["began-whole"].items()
        }
        self._broken = set(facts["broken"])
        self._believed = {(a, j): (times, last) for a, j, times, last in facts["believed"]}
        self._asked, self._overdue = by_number(facts["asked"]), by_number(facts["overdue"])
        self.ledger.restore(facts["ledger"])
        if self._own_ages is not None:
            self._own_ages.restore(facts["own-ages"])

    def _missing(self, agent: int, sender: int, previous: int) -> list[Posted[FrameT]]:
        """Chain with the fewest bytes that brings the agent to the newest frame."""
        # A shortest path over frames: rounds are nodes, a frame is an edge from the
        # round it builds on to its own, a whole frame one from nowhere, and bytes are
        # lengths. Frames stand in the order of their rounds, so one pass finds every
        # shortest chain. What the agent holds is a start of length zero. Where it says
        # that it holds a round that no kept frame leads on from, only a whole frame
        # helps, and `_whole_is_due` asks the sender for one if there is none.
        newest = self._newest(sender)
        held = self._held.get(agent, {}).get(sender)
        if newest is None or held == newest:
            return []
        if self._age(agent, sender, previous) > self.max_staleness:
            return []
        chains: dict[int, list[Posted[FrameT]]] = {} if held is None else {held: []}
        for round, post in self._posted[sender]:
            start = [] if post.is_key else chains.get(post.builds_on or 0)
            if start is not None:
                chain = [*start, post]
                if round not in chains or _num_bytes(chain) < _num_bytes(chains[round]):
                    chains[round] = chain
        return chains.get(newest, [])

    def _newest(self, agent: int) -> int | None:
        posted = self._posted.get(agent)
        return posted[-1][0] if posted else None

    def _whole_is_due(self, agent: int, round: int) -> bool:
        posted = self._posted.get(agent, [])
        keys = [(r, post.num_bytes) for r, post in posted if post.is_key]
        if not keys or agent in self._broken:
            return bool(posted) or agent in self._overdue
        last, size = keys[-1]
        if self.key_interval and round - last >= self.key_interval:
            return True
        return sum(post.num_bytes for r, post in posted if r > last) >= size


def _num_bytes(chain: Sequence[Posted[Any]]) -> int:
    return sum(post.num_bytes for post in chain)
