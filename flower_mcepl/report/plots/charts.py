"""Charts of the main metric: curves, and its spread over the agents."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flower_mcepl.record.metric import ACCURACY, MainMetric
from flower_mcepl.record.values import human_bytes
from flower_mcepl.report.plots.canvas import (
    line_style,
    new_figure,
    plain,
    png,
    say,
    value_scale,
    wrapped,
)
from flower_mcepl.report.plots.curves import Curve
from flower_mcepl.report.plots.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _mean_of(metric: MainMetric) -> str:
    better = "" if metric.higher_is_better else f"\n({metric.direction})"
    return f"personalized {plain(metric.axis)}, mean over the agents{better}"


def draw_by_round(curves: Sequence[Curve], metric: MainMetric = ACCURACY) -> bytes:
    """Draw the main metric against rounds, one line a curve."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9, 4.6 + _legend_height(_labels(curves)))
    axes = figure.subplots()
    axes.set(xlabel="round", ylabel=_mean_of(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    for place, curve in enumerate(curves):
        _draw_curve(axes, curve, curve.rounds, place)
    _finish(axes, curves, metric)
    return png(figure)


def draw_by_bytes(curves: Sequence[Curve], metric: MainMetric = ACCURACY) -> bytes:
    """Draw the main metric by bytes over links, log scale; silent runs are level."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(9, 4.6 + _legend_height(_labels(curves)))
    axes = figure.subplots()
    axes.set(xlabel="payload over all links since the start, logarithmic")
    axes.set_ylabel(_mean_of(metric))
    sends = [place for place, curve in enumerate(curves) if any(curve.bytes)]
    for place, curve in enumerate(curves):
        if place not in sends:
            style = {**line_style(place), "marker": "", "linestyle": (0, (1, 2))}
            label = wrapped(f"{curve.label} (sends nothing)")
            axes.axhline(curve.mean[-1], lw=1.8, label=label, **style)  # type: ignore[arg-type]
            continue
        start = next(number for number, count in enumerate(curve.bytes) if count)
        _draw_curve(axes, curve, curve.bytes, place, start=start)
    axes.set_xscale("log")
    counts = [count for curve in curves for count in curve.bytes if count]
    axes.set_xlim(min(counts) / 1.3, max(counts) * 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=_ticks(max(counts) / min(counts)), numticks=12))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: _short_bytes(value))
    _finish(axes, curves, metric)
    return png(figure)


_TICKS = 96  # characters of all ticks of a sweep, side by side


def draw_sweep(sweep: Sweep, metric: MainMetric = ACCURACY) -> bytes:
    """Draw the last main metric against a swept setting, its values equally spaced.

    Points of numbers are joined, those of names are not.
    """
    figure = new_figure(9, 4.6 + _legend_height([line.label for line in sweep.lines]))
    axes = figure.subplots()
    axes.set(xlabel=plain(sweep.axis), ylabel=_mean_of(metric))
    for place, line in enumerate(sweep.lines):
        style: dict[str, Any] = {**line_style(place), "label": wrapped(line.label)}
        if not sweep.rising:
            style["linestyle"] = ""
        errors = [sd or 0.0 for sd in line.sd] if any(line.sd) else None
        axes.errorbar(line.at, line.mean, errors, lw=2, ms=6, capsize=4, **style)
    # narrower the more there are; a spec may break behind its name
    width = max(8, _TICKS // len(sweep.values))
    texts = [wrapped(value.replace(":", ": "), width) for value in sweep.values]
    axes.set_xticks(range(len(texts)), texts)
    _frame(axes, metric)
    several = any(any(line.sd) for line in sweep.lines)
    _legend(axes, len(sweep.lines), "bars: ± 1 sd over the seeds" if several else None)
    return png(figure)


def draw_spread(
    spread: Sequence[tuple[str, Sequence[float]]], metric: MainMetric = ACCURACY
) -> bytes:
    """Draw each agent's last value as a dot over a box plot, a row a label."""
    labels = [wrapped(label) for label, _ in spread]
    figure = new_figure(
        9, 1.1 + (0.45 + 0.15 * max(label.count("\n") + 1 for label in labels)) * len(spread)
    )
    axes = figure.subplots()
    every = [value for _, values in spread for value in values]
    low, high = value_scale(every, bounded=metric.bounded)
    margin = 0.03 * (high - low)
    for place, (_, values) in enumerate(spread):
        color = line_style(place)["color"]
        axes.boxplot(
            [list(values)],
            positions=[-place],
            orientation="horizontal",
            widths=0.66,
            showfliers=False,
            boxprops={"color": "0.6"},
            whiskerprops={"color": "0.6"},
            capprops={"color": "0.6"},
            medianprops={"lw": 0},
        )
        # its ends show behind dots
        axes.vlines(np.median(values), -place - 0.43, -place + 0.43, color="black", lw=2)
        dots = sorted(values)
        rows = np.array(_stacked(dots, closer=0.013 * (high - low))) - place
        axes.plot(dots, rows, "o", ms=5.5, mfc=color, mec="white", mew=0.5, alpha=0.8, zorder=3)
    axes.set(
        xlabel=f"personalized {plain(metric.axis)} at the end, a dot for each agent",
        ylim=(0.5 - len(spread), 0.5),
    )
    axes.set_xlim(low - margin, high + margin)
    axes.set_yticks([-place for place in range(len(spread))], labels)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def _stacked(dots: Sequence[float], *, closer: float) -> list[float]:
    """Height of each sorted dot over the middle of its row, so that none hides another.

    Dots that are `closer` to each other stand above each other, within ± 0.27; who has
    no such neighbor, in the middle.
    """
    heights: list[float] = []
    while len(heights) < len(dots):
        first = dots[len(heights)]
        number = sum(first <= dot < first + closer for dot in dots)
        step = min(0.14, 0.54 / max(number - 1, 1))
        heights += [step * (k - (number - 1) / 2) for k in range(number)]
    return heights


def _draw_curve(
    axes: "Axes", curve: Curve, at: Sequence[float], place: int, *, start: int = 0
) -> None:
    style = line_style(place)
    x, mean = np.asarray(at[start:], dtype=float), np.asarray(curve.mean[start:])
    if curve.sd is not None:
        sd = np.asarray(curve.sd[start:])
        axes.fill_between(x, mean - sd, mean + sd, color=style["color"], alpha=0.18, lw=0)
    axes.plot(x, mean, lw=2, ms=5, label=wrapped(curve.label), **style)  # type: ignore[arg-type]


def _finish(axes: "Axes", curves: Sequence[Curve], metric: MainMetric) -> None:
    if not any(curve.rounds for curve in curves):
        say(axes, "no agent was evaluated")
        return
    _frame(axes, metric)
    over = {curve.over for curve in curves} - {None}
    _legend(axes, len(curves), f"bands: ± 1 sd over the {over.pop()}" if over else None)


def _frame(axes: "Axes", metric: MainMetric) -> None:
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    if metric.bounded:
        axes.set_ylim(max(-0.02, low), min(1.02, high))


def _legend(axes: "Axes", lines: int, title: str | None) -> None:
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=_legend_columns(lines),
        frameon=False,
        handlelength=3.2,  # long enough to show dashes beside the marker
        title=title,
        title_fontsize="medium",
    )


def _legend_columns(lines: int) -> int:
    return 1 if lines == 1 else 2


def _labels(curves: Sequence[Curve]) -> list[str]:
    return [curve.label for curve in curves]


def _legend_height(labels: Sequence[str]) -> float:
    rows = -(-len(labels) // _legend_columns(len(labels)))
    lines = max(wrapped(label).count("\n") + 1 for label in labels)
    return 0.21 * (rows * lines + 1)


def _ticks(width: float) -> tuple[float, ...]:
    """Ticks between powers of ten on an axis whose end is `width` times its start."""
    if width > 100:
        return (1,)
    return (1, 2, 5) if width > 6 else (1, 2, 3, 4, 5, 6, 8)


def _short_bytes(count: float) -> str:
    number, unit = human_bytes(count).split(" ")
    return f"{float(number):g} {unit}"
