"""Virtual time of a simulated fleet: what each agent's rounds take."""

from collections.abc import Sequence
from typing import final

from flower_mcepl.agents import Agent
from flower_mcepl.agents.parts.local_steps import local_steps
from flower_mcepl.agents.parts.pacing import Pacer, StepSeconds
from flower_mcepl.config.checks import check
from flower_mcepl.runs.speeds import Speeds


@final
class VirtualTimes:
    """Seconds of the agents' rounds: local steps times what each takes, and messages.

    An agent that does not count its local steps takes one. Evaluation takes no time.
    Where agents choose their share of filters by ``step_seconds``, a step takes what
    that says times the agent's own seconds, and that is what they go by.

    Parameters
    ----------
    agents : sequence of Agent
        Agent i at place i.
    speeds : Speeds
        What a step and a message take.
    step_seconds : StepSeconds, optional
        As in `simulate`.
    replayed : bool (default: False)
        Whether agents repeat decisions, and go by no clock.

    Attributes
    ----------
    now : float
        Virtual time at which rounds begin that are being played.

    Raises
    ------
    ConfigError
        If speeds name agents that are not there, or agents would go by the machine's
        clock beside the virtual one.
    """

    def __init__(
        self,
        agents: Sequence[Agent],
        speeds: Speeds,
        step_seconds: StepSeconds | None,
        *,
        replayed: bool = False,
    ) -> None:
        speeds.check_agents(len(agents))
        self.now = 0.0
        self._agents, self._speeds, self._own = agents, speeds, step_seconds
        paced = [agent.index for agent in agents if _pacer(agent) is not None]
        check(
            step_seconds is not None or replayed or not paced,
            'agents with filters = "auto" choose by what a step takes at a share of the filters; '
            "on a virtual clock they need step_seconds",
            None,
            "Pass step_seconds, such as lambda agent, round, share: .2 + .8 * share; or decisions.",
        )

    @property
    def step_seconds(self) -> StepSeconds | None:
        """What agents go by that choose their share of filters."""
        return None if self._own is None else self._step

    def __call__(self, agent: int, round: int, begin: float) -> float:
        """Seconds of an agent's round that was played, from parcel to answer."""
        pacer = _pacer(self._agents[agent])
        step = self._speeds.step(agent, round, at=begin, seed=self._agents[agent].seed)
        if self._own is not None and pacer is not None and pacer.pace is not None:
            step *= self._own(agent, round, pacer.pace.share)
        return 2 * self._speeds.latency + (local_steps(self._agents[agent]) or 1) * step

    def _step(self, agent: int, round: int, share: float) -> float:
        assert self._own is not None
        seed = self._agents[agent].seed
        return self._own(agent, round, share) * self._speeds.step(
            agent, round, at=self.now, seed=seed
        )


def _pacer(agent: Agent) -> Pacer | None:
    pacer = getattr(agent, "pacer", None)
    return pacer if isinstance(pacer, Pacer) else None
