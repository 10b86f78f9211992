"""Numbers behind the curves: main metric by round and bytes, and each agent's last."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flower_mcepl.record.figures import bytes_by_round
from flower_mcepl.record.reading import Run
from flower_mcepl.report.plots.subjects import Subject

SEEDS, AGENTS = "seeds", "agents"


@dataclass(frozen=True)
class Curve:
    """Main metric at the evaluated rounds that all seeds have."""

    label: str
    rounds: tuple[int, ...]
    bytes: tuple[float, ...]  # over the links since the start; mean over the seeds
    mean: tuple[float, ...]  # over the seeds of the mean over the agents
    sd: tuple[float, ...] | None  # of what `over` says
    # SEEDS: sample standard deviation; AGENTS: population standard deviation; None: no
    # band
    over: str | None


def curve_of(subject: Subject, *, alone: bool) -> Curve:
    """Curve of a subject; the band is over seeds, of one run `alone` over agents."""
    points = [
        {number: (mean, std) for number, mean, std, *_ in run.curve()} for run in subject.runs
    ]
    rounds = tuple(sorted(set.intersection(*map(set, points))))
    traffic = [bytes_by_round(run) for run in subject.runs]
    means = [[one[number][0] for one in points] for number in rounds]
    sd, over = None, None
    if len(points) > 1:
        sd, over = tuple(map(statistics.stdev, means)), SEEDS
    elif alone:
        sd, over = tuple(points[0][number][1] for number in rounds), AGENTS
    counts = tuple(statistics.fmean(one[number] for one in traffic) for number in rounds)
    return Curve(
        subject.label + _fewer(subject, rounds),
        rounds,
        counts,
        tuple(map(statistics.fmean, means)),
        sd,
        over,
    )


def _fewer(subject: Subject, rounds: tuple[int, ...]) -> str:
    """Of how many agents the means of a curve are, where they are not of all."""
    counts = [
        count
        for run in subject.runs
        for round, count in run.partial_rounds().items()
        if round in rounds
    ]
    return in_part(counts, subject.runs)


def in_part(counts: Sequence[int], runs: Sequence[Run]) -> str:
    """What a line's label says where means are of so few agents; none: of all."""
    if not counts:
        return ""
    return f" (in part of {min(counts)} of {max(run.num_agents for run in runs)} agents)"


def final_values(run: Run) -> dict[int, float]:
    """Main metric of each agent in the last evaluated round, if it is in it."""
    metric = run.metric
    values = {agent: metric.value(row) for agent, row in run.last_evaluated().items()}
    return {agent: value for agent, value in values.items() if value is not None}
