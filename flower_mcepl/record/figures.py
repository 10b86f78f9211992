"""Figures of one run record: bytes over links, training images, worst accuracies."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flower_mcepl.errors import ConfigError
from flower_mcepl.record.metric import ACCURACY, MainMetric
from flower_mcepl.record.reading import Run


def one_metric(runs: Sequence[Run]) -> MainMetric:
    """Main metric of several runs.

    Raises
    ------
    ConfigError
        If they have several: there is no table or picture of both.
    """
    names: dict[MainMetric, list[str]] = {}
    for run in runs:
        names.setdefault(run.metric, []).append(run.path.name)
    if len(names) > 1:
        got = (f"{metric.name} ({_some(of)})" for metric, of in names.items())
        raise ConfigError(
            f"runs side by side must have one main metric; got {' and '.join(got)}. Compare those "
            "of one task, and without runs in which no agent has a value of its metric."
        )
    return next(iter(names))


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def link_bytes(run: Run) -> int | None:
    """Payload over links: between agents, or both ways between agents and server.

    What agents send to a relay is not in it: it stands for nothing but the links that
    the relay serves.
    """
    links: int | None = run.totals.get("links_total")
    if links is None or run.server is None:
        return links
    uplinks: int | None = run.totals.get("uplink_total")
    return None if uplinks is None else links + uplinks


def sends_nothing(run: Run) -> bool:
    """Whether a run, as far as it got, sent nothing; False where that is unknown."""
    return [run.totals.get(key) for key in ("links_total", "uplink_total")] == [0, 0]


def worst_tenth(values: Iterable[float | None], metric: MainMetric = ACCURACY) -> float | None:
    """Mean of the worst tenth of the agents' values, at least of one; None of none."""
    known = metric.sorted(value for value in values if value is not None)
    return statistics.fmean(known[: math.ceil(len(known) / 10)]) if known else None


def full_curve(run: Run) -> list[tuple[int, float]]:
    """Mean by evaluated round, of rounds with no fewer agents than the last.

    A mean over few survivors is no point of the curve of all.
    """
    least, partial = len(run.last_evaluated()), run.partial_rounds()
    points = [(round, mean) for round, mean, *_ in run.curve()]
    return [(t, mean) for t, mean in points if partial.get(t, run.num_agents) >= least]


def bytes_to(run: Run, target: float) -> int | None:
    """Bytes over links up to the first round whose mean reaches the target."""
    metric = run.metric
    reached = next((t for t, mean in full_curve(run) if metric.reaches(mean, target)), None)
    return None if reached is None else bytes_by_round(run)[reached]


def bytes_by_round(run: Run) -> dict[int, int]:
    """Bytes over links (`link_bytes`) from the start to each evaluated round.

    They are of all agents, whoever was evaluated. What a round's evaluation has heard
    went out with the next round's messages. Without a barrier each agent has rounds of
    its own, and counts by what its last line says.
    """
    lines = {} if run.events else {int(line["round"]): line for line in run.relay}
    keys = ("received_bytes",) if run.server is None else ("received_bytes", "uplink_bytes")
    last: dict[int, int] = {}  # by agent
    counts = {}
    for round, rows in run.by_round().items():
        last |= {row["agent"]: sum(int(row.get(key) or 0) for key in keys) for row in rows}
        links = lines.get(round + 1, {}).get("link_bytes")
        uplinks = 0 if run.server is None else lines.get(round, {}).get("uplink_bytes")
        if links is None or uplinks is None:
            counts[round] = sum(last.values())
        else:
            counts[round] = int(links) + int(uplinks)
    return counts


def curve_by_clock(run: Run) -> list[tuple[float, float]]:
    """Mean over all agents of the last value that each had, by the run's clock.

    It begins when every agent has one. Empty where the run had no clock.
    """
    metric, num_agents = run.metric, run.num_agents
    rows = [row for row in run.rounds if row.get("clock") is not None]
    values: dict[int, float] = {}
    points: dict[float, float] = {}
    for row in sorted(rows, key=lambda row: (row["clock"], row["round"])):
        if (value := metric.value(row)) is not None:
            values[row["agent"]] = value
            if len(values) == num_agents:
                points[float(row["clock"])] = statistics.fmean(values.values())
    return [*points.items()]


def clock_to(run: Run, target: float) -> float | None:
    """Seconds on the run's clock until the mean over all agents reaches the target."""
    metric = run.metric
    return next((t for t, mean in curve_by_clock(run) if metric.reaches(mean, target)), None)


def training_images(run: Run) -> float | None:
    """Training images of an agent, if all trained in every round; else None."""
    trained = [line for line in run.relay if line["round"] <= run.num_rounds]
    counts = [_images_a_round(handshake) for handshake in run.handshakes.values()]
    known = [count for count in counts if count is not None]
    whole = [line for line in trained if line.get("answered") == line.get("agents")]
    if not known or len(known) < len(counts) or len(whole) < run.num_rounds:
        return None
    return run.num_rounds * statistics.fmean(known)


def _images_a_round(handshake: Mapping[str, Any]) -> int | None:
    """Images of a round as `flower_mcepl.data` deals them out, in shuffled passes.

    A single last image joins the batch before it.
    """
    parameters = handshake["parameters"]
    size, batch = handshake.get("num_examples"), parameters.get("batch_size")
    steps, epochs = parameters.get("local_steps"), parameters.get("local_epochs")
    # parameters are an agent's own: whatever it said
    counts = [count for count in (size, batch, steps, epochs) if count is not None]
    if any(type(count) is not int or count < 0 for count in counts):
        return None
    if not size or not batch or steps is None:
        return None
    if epochs:
        return int(epochs * size)
    in_a_pass = math.ceil(size / batch) - (size % batch == 1 and size > batch > 1)
    passes, rest = divmod(steps, in_a_pass)
    return int(passes * size + rest * batch)
