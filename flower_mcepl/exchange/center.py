"""The center of a star: a server opens what agents send, and frames what they get."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, final

import numpy as np
import torch

from flower_mcepl.agents.agent import AgentState, Payload
from flower_mcepl.agents.server import Server
from flower_mcepl.config.schedules import ROUNDS
from flower_mcepl.errors import ForeignFrameError, FrameError, ReplayedFrameError
from flower_mcepl.exchange.exchange import check_rounds
from flower_mcepl.exchange.ledger import Ledger
from flower_mcepl.exchange.mailbox import Mailbox
from flower_mcepl.exchange.outbox import Outbox
from flower_mcepl.exchange.parcels import (
    Answer,
    FrameT,
    Parcel,
    Posted,
    by_number,
    post_facts,
    shipments,
)
from flower_mcepl.exchange.turn import refusal
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.topology import Topology


@final
class Center(Generic[FrameT]):
    """The exchange around a server, which is participant number N.

    An answer of round t counts if its agent began from the newest model that the server
    has made; all begin round 1 from what they have in common. Agents that are missing,
    whose frame is refused, or that began from something else are left out of the round.
    When the parcels of round t+1 are asked for, the server aggregates round t.

    Parameters
    ----------
    server : Server
        Aggregates.
    open_frame : callable
        Gives the bytes of a frame as it came; may raise FrameError.
    wrap_frame : callable
        Gives the frame as it goes out, from its bytes.
    evaluate_every : int (default: 10)
        Personal models are evaluated after each such number of rounds, and after the
        last one.
    max_staleness : int (default: 5)
        For how many rounds an agent goes on from the last model that it got when no
        newer one came.

    Notes
    -----
    In the ledger an agent's answers are its uplink, and what the server sends is the
    link from N to the agent. Every frame is counted where Flower carries it, once up or
    once down, in the terms of its agent: the weights it has and keeps. ``topology`` is
    over the agents alone and has no link: they do not hear each other.
    """

    key_interval = 0  # no agent ever needs a whole frame of another one
    age_decay = 1.0  # nobody hears a neighbor
    schedule = ROUNDS

    def __init__(
        self,
        server: Server,
        *,
        open_frame: Callable[[FrameT], bytes],
        wrap_frame: Callable[[bytes], FrameT],
        evaluate_every: int = 10,
        max_staleness: int = 5,
    ) -> None:
        check_rounds(evaluate_every=evaluate_every, max_staleness=max_staleness)
        self.server, self.evaluate_every, self.max_staleness = server, evaluate_every, max_staleness
        self.topology = replace(
            Topology.from_edges([], num_agents=server.num_agents), name="server"
        )
        self.ledger = Ledger()
        self._open, self._wrap = open_frame, wrap_frame
        self._run = ""
        self._mailbox = Mailbox(
            owner=server.index,
            fingerprint=server.fingerprint,
            layers=server.layers,
            max_staleness=0,
            dtype=None,
        )
        self._outboxes: dict[int, Outbox] = {}
        self._facts: dict[int, Mapping[str, Any]] = {}
        # agent -> round of the model that it holds, as it last said; 0: the common one
        self._held: dict[int, int] = {}
        self._newest = 0  # round of the newest model
        self._inbox: dict[int, Payload] = {}  # of the round that is under way
        # the frame that all get, and its model's round
        self._for_all: tuple[int, Posted[FrameT]] | None = None

    def begin(self, run: str) -> None:
        """Take the id of the run, which frames then belong to."""
        self._run = self._mailbox.run = run
        for outbox in self._outboxes.values():
            outbox.run = run

    def parcel(self, agent: int, *, round: int, closing: bool = False) -> Parcel[FrameT]:
        """Return the agent's parcel for ``round`` and count its frames as sent."""
        previous = round - 1
        self._close(previous)
        if not (self._newest or agent in self._held or closing):
            return Parcel(round, None)
        posts = self._missing(agent)
        if posts:
            self.ledger.add_delivery(
                self.server.index, agent, shipments(posts, self._facts.get(agent, {}))
            )
        return Parcel(
            round,
            (self.server.index,),
            {self.server.index: [post.frame for post in posts]} if posts else {},
            evaluate=closing or previous % self.evaluate_every == 0,
            train=not closing,
            acknowledged=self._mailbox.rounds().get(agent),
        )

    def take(self, agent: int, answer: Answer[FrameT], *, round: int) -> list[str]:
        """Take in an answer, open its frame of ``round``, and say why it is refused."""
        self._facts[agent] = answer.facts
        self._held[agent] = answer.held.get(self.server.index, 0)
        if not answer.posts:
            return []
        self.ledger.add_uplink(agent, shipments(answer.posts, answer.facts))
        frames = answer.posts
        try:
            self._mailbox.put(agent, [self._open(p.frame) for p in frames], latest_round=round)
            current = self._mailbox.current([agent], round=round)
            self._inbox[agent] = self._checked(current, agent, round)
        except FrameError as error:
            return [refusal(agent, error)]
        return []

    def state(self, *, round: int) -> Bundle:
        """Everything that must survive ``round``.

        The server aggregates the round first if it has not.
        """
        self._close(round)
        server = self.server.state()
        groups = {"server": server.arrays, "mailbox": self._mailbox.arrays()}
        groups |= {f"outbox-{place}": box.arrays() for place, box in self._outboxes.items()}
        facts: dict[str, Any] = {
            "server": server.facts,
            "outboxes": list(self._outboxes),
            "facts": {agent: dict(facts) for agent, facts in self._facts.items()},
            "held": dict(self._held),
            "newest": self._newest,
            "for-all": None,
            "ledger": self.ledger.state(),
        }
        if self._for_all is not None:
            newest, post = self._for_all
            facts["for-all"] = [newest, *post_facts(post)]
            groups["for-all"] = {"frame": np.frombuffer(self._open(post.frame), np.uint8)}
        return Bundle.joined(facts, groups)

    def restore(self, state: Bundle) -> None:
        """Continue exactly where `state` was taken.

        The server must be one of the same algorithm, run and fleet.

        Raises
        ------
        StateError
            If the server's state is of another one, or something in it is damaged.
        """
        facts = state.facts
        # a copy: the server goes on in these very arrays
        own = {name: array.copy() for name, array in state.group("server").items()}
        self.server.restore(AgentState(facts["server"], own))
        self._mailbox.restore(state.group("mailbox"))
        self._outboxes = {}
        for place in facts["outboxes"]:
            self._outbox(place).restore(state.group(f"outbox-{place}"))
        self._facts, self._held = by_number(facts["facts"]), by_number(facts["held"])
        self._newest, self._inbox, self._for_all = facts["newest"], {}, None
        if facts["for-all"] is not None:
            newest, *rest = facts["for-all"]
            frame = self._wrap(state.group("for-all")["frame"].tobytes())
            self._for_all = (newest, Posted(frame, *rest))
        self.ledger.restore(facts["ledger"])

    def _checked(self, payloads: Mapping[int, Payload], agent: int, round: int) -> Payload:
        """Return the payload that came if the server can make use of it."""
        if agent not in payloads:
            raise ReplayedFrameError(
                f"the server takes frames of the present round, {round}; agent {agent} sent one "
                f"of round {self._mailbox.rounds().get(agent)}. Nothing is lost: it sends a new "
                "one every round."
            )
        for name, tensor in payloads[agent].items():
            is_mask = name in self.server.mask_layers
            if (tensor.dtype == torch.bool) != is_mask:
                raise ForeignFrameError(
                    f"layer {name!r} must hold {'a mask' if is_mask else 'floats'} in algorithm "
                    f"{self.server.algorithm}; agent {agent} sent {tensor.dtype}. Run the same "
                    "release on both sides."
                )
        return payloads[agent]

    def _close(self, round: int) -> None:
        """Let the server aggregate what came in ``round``, once."""
        timely = {
            agent: self._inbox[agent]
            for agent in sorted(self._inbox)
            if self._held.get(agent, 0) == self._newest
        }
        for agent in sorted(self._inbox.keys() - timely.keys()):
            self.server.note(agent, self._inbox[agent])
        if timely:
            sizes = {agent: int(self._facts[agent].get("num-examples", 1)) for agent in timely}
            self.server.receive(timely, round=round, num_examples=sizes)
            self._newest = round
        self._inbox = {}

    def _missing(self, agent: int) -> list[Posted[FrameT]]:
        """Frame of the newest model, unless the agent holds it or has none to get."""
        held = self._held.get(agent, 0)
        if held == self._newest:
            return []
        if self.server.shared and self._for_all is not None and self._for_all[0] == self._newest:
            return [self._for_all[1]]
        payload = self.server.payload_for(agent, round=self._newest)
        if payload is None:
            return []
        (frame,) = self._outbox(agent).write(
            payload, round=self._newest, acknowledged=self._builds_on(held)
        )
        post = Posted(self._wrap(frame.data), len(frame.data), frame.header_bytes, frame.reference)
        if self.server.shared:
            self._for_all = (self._newest, post)
        return [post]

    def _builds_on(self, held: int) -> int | None:
        """Round that the frame may build on; a frame for all stands alone."""
        return None if self.server.shared else held

    def _outbox(self, agent: int) -> Outbox:
        server = self.server
        place = server.index if server.shared else agent
        if place not in self._outboxes:
            self._outboxes[place] = Outbox(
                owner=server.index,
                fingerprint=server.fingerprint,
                layers=server.layers_down,
                run=self._run,
            )
        return self._outboxes[place]
