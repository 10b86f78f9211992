"""Run records side by side: a row a combination of settings, its seeds pooled."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flower_mcepl.errors import ConfigError
from flower_mcepl.record.figures import (
    bytes_to,
    full_curve,
    link_bytes,
    one_metric,
    training_images,
    worst_tenth,
)
from flower_mcepl.record.metric import MainMetric
from flower_mcepl.record.pools import pool
from flower_mcepl.record.reading import Run

LASSO = "group-lasso"  # where it varies, the share of filters that are off is measured, too


@dataclass(frozen=True)
class Measures:
    """Figures of one finished run; None is what its record does not hold."""

    seed: Any
    metric: MainMetric
    # mean over the agents of their main metric in the last evaluated round
    result: float | None
    agents: int  # that it is the mean of
    num_agents: int  # of the graph
    agent_sd: float | None  # population standard deviation over the agents
    worst_tenth: float | None  # mean of the worst tenth of the agents, at least one
    # mean main metric by evaluated round, of rounds with no fewer agents than the last
    curve: dict[int, float]
    link_bytes: int | None  # see `link_bytes`
    # the same up to the first evaluated round whose mean reaches the target
    target_bytes: int | None
    # share of output filters without a kept weight at the end; None also where not
    # asked
    filters_off: float | None
    bits_per_weight: float | None  # mean over all frames
    busiest_bytes: int | None  # up and down, of the agent with most
    images: float | None  # training images processed by an agent, mean over the agents
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """All runs of one combination of settings."""

    settings: dict[str, Any]  # by varied key
    runs: tuple[Measures, ...]  # one a seed

    def values(self, name: str) -> list[float]:
        """Values of a measure, one a seed; none where a seed lacks it."""
        values = [getattr(run, name) for run in self.runs]
        return [] if None in values else values

    def mean(self, name: str) -> float | None:
        """Mean of a measure over the seeds."""
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def sd(self, name: str) -> float | None:
        """Sample standard deviation of a measure over the seeds; one seed has none."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else None

    def best(self) -> tuple[int, float] | None:
        """Round of all seeds with the best mean of the main metric, and that mean."""
        common = set.intersection(*(set(run.curve) for run in self.runs))
        means = {
            round: statistics.fmean(run.curve[round] for run in self.runs)
            for round in sorted(common)
        }
        sign = 1 if self.runs[0].metric.higher_is_better else -1
        return max(means.items(), key=lambda item: sign * item[1]) if means else None


@dataclass(frozen=True)
class Comparison:
    """A table over run records."""

    keys: tuple[str, ...]  # settings that are not the same in all of them
    rows: tuple[Row, ...]  # in the order of the records
    target: float | None
    metric: MainMetric  # of all of them
    notes: tuple[str, ...] = ()  # which records were left out, and why


def compare(runs: Sequence[Run], *, target: float | None = None) -> Comparison:
    """Put run records side by side.

    Which settings vary is found from the records. Runs that are not finished are left
    out; of two runs with the same settings and seed the newer one counts. The notes
    name them.

    Raises
    ------
    ConfigError
        If no run is finished, the runs have several main metrics, or `target` is no
        value of theirs.
    """
    pooled = pool(runs)
    metric = one_metric([run for one in pooled.pools for run in one.runs])
    if target is not None and (problem := metric.target_problem(target)) is not None:
        raise ConfigError(f"the {problem}")
    lasso = LASSO in pooled.keys
    rows = [
        Row(one.settings, tuple(_measure(run, target, lasso) for run in one.runs))
        for one in pooled.pools
    ]
    without = [run for one in pooled.pools for run in one.runs if run.result()["mean"] is None]
    unknown = [
        f"WARNING: {run.path.name}: no agent has a value of {metric.name}, so its row has no mean"
        for run in without
    ]
    return Comparison(pooled.keys, tuple(rows), target, metric, (*pooled.notes, *unknown))


# --- one run ---


def _measure(run: Run, target: float | None, lasso: bool) -> Measures:
    assert run.summary is not None
    last, totals, metric = run.result(), run.totals, run.metric
    return Measures(
        seed=run.seed,
        metric=metric,
        result=last["mean"],
        agents=last["agents"] or 0,
        num_agents=run.num_agents,
        agent_sd=last["std"],
        worst_tenth=worst_tenth(map(metric.value, run.last_evaluated().values()), metric),
        curve={round: mean for round, mean in full_curve(run)},
        link_bytes=link_bytes(run),
        target_bytes=None if target is None else bytes_to(run, target),
        filters_off=_filters_off(run) if lasso else None,
        bits_per_weight=totals.get("bits_per_weight"),
        busiest_bytes=totals.get("busiest_agent_total"),
        images=training_images(run),
        seconds=run.summary.get("seconds"),
    )


def _filters_off(run: Run) -> float | None:
    """Share of all agents' filters that keep no weight, from the final states."""
    from flower_mcepl.report.final_masks import final_masks  # this alone needs torch

    masks, _ = final_masks(run)
    layers = [mask.reshape(len(mask), -1) for layers in masks.values() for mask in layers.values()]
    filters = sum(map(len, layers))
    return sum(int((~layer.any(axis=1)).sum()) for layer in layers) / filters if filters else None
