"""Check of the share of filters that a device would choose (`filters = "auto"`)."""

from collections.abc import Iterator

from flower_mcepl.agents import Agent, MceplAgent
from flower_mcepl.agents.parts.step_times import cache_folder
from flower_mcepl.doctor.findings import Examination, Finding


def check_pace(agent: Agent) -> Iterator[Finding]:
    """Finding on step times by share, and the share; none where it is not chosen."""
    if not isinstance(agent, MceplAgent) or agent.pacer is None:
        return
    with Examination("filters-auto", remedy="Empty the cache of step times.") as check:
        seconds, pace = agent.pacer.measured(agent.step_seconds)
        budget = agent.pacer.budget
        predicted = agent.pacer.predicted(pace)
        times = ", ".join(f"{1000 * s:.3g} ms at {share:g}" for share, s in seconds.items())
        line = (
            f"a local step takes {times} of the filters; within step-budget {1000 * budget:.3g} "
            f"ms a run begins at {pace.share:g} (measured once, kept in {cache_folder()})"
        )
        values = {
            "step_seconds": {f"{share:g}": s for share, s in seconds.items()},
            "step_budget": budget,
            "filters": pace.share,
        }
        if predicted > budget:
            check.warn(
                f"{line}; even there it takes {1000 * predicted:.3g} ms",
                "Raise step-budget, lower batch-size, or take a smaller network.",
                **values,
            )
        else:
            check.ok(line, **values)
    yield check.finding
