"""An agent and its mail as they were after one round, as bytes."""

from dataclasses import dataclass, field

from flower_mcepl.agents import Agent, AgentState
from flower_mcepl.errors import StateError
from flower_mcepl.exchange.turn import Mail
from flower_mcepl.files.bundle import Arrays, Bundle


@dataclass(frozen=True)
class Generation:
    """Everything from which an agent plays the next round.

    Parameters
    ----------
    run : str
        Which run it is of, see `Order.run`.
    round : int
        The round after which it was taken.
    agent : int
        The agent's number in the graph.
    state : AgentState
        What `Agent.state` gave.
    inbox, outbox : arrays by name
        What `Mailbox.arrays` and `Outbox.arrays` gave.
    best : AgentState, optional
        The best state so far, where one is kept.
    source : str (default: "")
        Where it was read, for messages.
    """

    run: str
    round: int
    agent: int
    state: AgentState
    inbox: Arrays
    outbox: Arrays
    best: AgentState | None = None
    source: str = field(default="", compare=False)

    @classmethod
    def of(cls, agent: Agent, mail: Mail, *, run: str, round: int) -> "Generation":
        """Take it from an agent and its mail."""
        return cls(
            run,
            round,
            agent.index,
            agent.state(),
            mail.inbox.arrays(),
            mail.outbox.arrays(),
            None if mail.keeper is None else mail.keeper.state,
        )

    def restore(self, agent: Agent, mail: Mail) -> None:
        """Let agent and mail continue from here.

        Raises
        ------
        StateError
            If it is of another agent, algorithm, seed or model. Agent and mail are then
            of no further use.
        """
        try:
            agent.restore(self.state)
            mail.inbox.restore(self.inbox)
            mail.outbox.restore(self.outbox)
            if mail.keeper is not None:
                mail.keeper.state = self.best
        except StateError as error:
            raise StateError(f"{self.source}: {error}" if self.source else str(error)) from error

    def encode(self) -> bytes:
        """Bytes that `decode` takes back."""
        facts = {name: getattr(self, name) for name in ("run", "round", "agent")}
        facts["facts"] = self.state.facts
        groups = {"agent": self.state.arrays, "inbox": self.inbox, "outbox": self.outbox}
        if self.best is not None:
            facts["best"], groups["best"] = self.best.facts, self.best.arrays
        return Bundle.joined(facts, groups).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Generation":
        """Generation from what `encode` gave.

        Raises
        ------
        StateError
            If the bytes are anything else.
        """
        saved = Bundle.decode(data)
        try:
            return cls(
                str(saved.facts["run"]),
                int(saved.facts["round"]),
                int(saved.facts["agent"]),
                Bundle(dict(saved.facts["facts"]), saved.group("agent")),
                saved.group("inbox"),
                saved.group("outbox"),
                Bundle(dict(saved.facts["best"]), saved.group("best"))
                if "best" in saved.facts
                else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"a saved state must say of which run, round and agent it is ({error!r}). Use "
                "another copy, or start afresh without it."
            ) from error
