"""Checkpoints of a run without a barrier under Flower.

A checkpoint holds the parcels that are under way, which a resumed run sends again; each
agent must then have the state that it had before its parcel. A device keeps it on its
own disk. A simulated agent hands its state over, but only when it is asked to: so once
a checkpoint is due, agents hand over the state of every round that they begin, and the
checkpoint is written as soon as the last answer of each came with one.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, final

from flwr.app import Array

from flower_mcepl.exchange.parcels import Answer, Parcel
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.runs.own_rounds import OwnRounds
from flower_mcepl.runs.own_state import parcels_of, parcels_state
from flower_mcepl.strategies.answers import frame_array, frame_bytes

_PARCELS, _CLOCK = "parcels", "clock"  # keys of a checkpoint


@final
class OwnCheckpoints:
    """Last parcels, states that were handed over, and when both are written.

    Parameters
    ----------
    own : OwnRounds
        Bookkeeper of the run.
    num_rounds : int
        Rounds of each agent.
    handed : callable
        Whether agents are simulated, and hand their states over; it is known once an
        agent has answered.
    state : callable
        What of the strategy belongs into a checkpoint.

    Attributes
    ----------
    again : dict
        Of a resumed run: by agent, parcels that are to be sent again.
    """

    def __init__(
        self,
        own: OwnRounds[Array],
        *,
        num_rounds: int,
        handed: Callable[[], bool],
        state: Callable[[], Bundle],
    ) -> None:
        self._own, self._num_rounds, self._handed, self._state = own, num_rounds, handed, state
        self.again: dict[int, Parcel[Array]] = {}
        self._sent: dict[int, Parcel[Array]] = {}  # by agent, its last one
        self._stored: set[int] = set()  # agents whose last answer came with its state
        self._wanted = False  # whether states are, for a checkpoint that is due

    def wants_state(self, parcel: Parcel[Array]) -> bool:
        """Whether a simulated agent is to hand over its state after this parcel."""
        # who has played its last round gets no other parcel that could ask for it
        last = parcel.round == self._num_rounds and self._own.keeps
        return self._wanted or last or not parcel.train

    def look(self, *, absent: Collection[int]) -> None:
        """See whether the next parcels are to ask for states; see `keep_if_due`."""
        self._wanted = self._own.due() is not None and self._lacks(absent)

    def _lacks(self, absent: Collection[int]) -> bool:
        agents = range(len(self._own.rounds))
        return self._handed() and not all(a in self._stored or a in absent for a in agents)

    def note_sent(self, parcels: Mapping[int, Parcel[Array]]) -> None:
        """Parcels go out, by agent."""
        if self._own.keeps:
            self._sent |= parcels

    def note_answers(self, answers: Mapping[int, Answer[Array]]) -> None:
        """Answers were taken in."""
        self._stored -= answers.keys()
        self._stored |= {agent for agent, answer in answers.items() if answer.state}

    def keep_if_due(self, clock: float, *, absent: Collection[int]) -> None:
        """Write a checkpoint if one is due, and all states that it needs are there.

        It does not wait for agents that are ``absent``: they go on from the last state
        that they stored.
        """
        self._keep(self._own.due(), clock, absent)

    def keep_last(self, clock: float, *, absent: Collection[int]) -> None:
        """Write one after which nobody plays, if all states that it needs are there."""
        self._keep(self._own.last_due(), clock, absent)

    def _keep(self, round: int | None, clock: float, absent: Collection[int]) -> None:
        if round is None or self._lacks(absent):
            return
        last, under_way = {**self.again, **self._sent}, sorted(self._own.under_way)
        parcels = parcels_state({agent: last[agent] for agent in under_way}, frame_bytes)
        more = self._state()
        facts = {**more.facts, _PARCELS: parcels.facts, _CLOCK: clock}
        groups = {**more.groups(), _PARCELS: parcels.arrays}
        self._own.keep(round, Bundle.joined(facts, groups))

    def restore(self, checkpoint: Bundle) -> float:
        """Go on from a checkpoint; returns its clock."""
        facts: Mapping[str, Any] = checkpoint.facts
        self._own.restore(checkpoint)
        parcels = Bundle(facts[_PARCELS], checkpoint.group(_PARCELS))
        self.again = parcels_of(parcels, frame_array)
        self._stored = set(range(len(self._own.rounds)))  # in the record, as were all
        return float(facts[_CLOCK])
