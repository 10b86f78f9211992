"""Check of the share of filters that a device would choose (`filters = "auto"`)."""

from collections.abc import Iterator

from flower_mcepl.agents import Agent, MceplAgent
from flower_mcepl.agents.parts.meters import JOULES
from flower_mcepl.doctor.findings import Examination, Finding
from flower_mcepl.streams import torch_threads


def check_pace(agent: Agent, *, threads: int = 1) -> Iterator[Finding]:
    """Finding on step times by share, and the share; none where it is not chosen."""
    if not isinstance(agent, MceplAgent) or agent.pacer is None:
        return
    with Examination("filters-auto", remedy="Correct the settings.") as check:
        with torch_threads(threads):
            costs, pace = agent.pacer.measured(agent.step_cost)
        budget = agent.pacer.budget
        predicted = agent.pacer.predicted(pace)
        joules = agent.config.step_budget_unit == JOULES
        times = ", ".join(f"{_shown(s, joules)} at {share:g}" for share, s in costs.items())
        line = (
            f"a local step takes {times} of the filters; within step-budget "
            f"{_shown(budget, joules)} a run begins at {pace.share:g} (measured once)"
        )
        values = {
            "step_costs": {f"{share:g}": s for share, s in costs.items()},
            "step_budget": budget,
            "filters": pace.share,
        }
        if predicted > budget:
            check.warn(
                f"{line}; even there it takes {_shown(predicted, joules)}",
                "Raise step-budget, lower batch-size, or take a smaller network.",
                **values,
            )
        else:
            check.ok(line, **values)
    yield check.finding


def _shown(spent: float, joules: bool) -> str:
    return f"{spent:.3g} J" if joules else f"{1000 * spent:.3g} ms"
