"""Picture of a run record: main metric over the rounds, graph and bytes in one PNG.

Needs the extra ``report`` (matplotlib), which is imported only when something is drawn.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from flower_mcepl.record.layout import Row
from flower_mcepl.record.reading import Run
from flower_mcepl.record.values import human_bytes
from flower_mcepl.report.plots.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILION,
    new_figure,
    plain,
    png,
    say,
)
from flower_mcepl.report.plots.graph import draw_graph
from flower_mcepl.report.table import BYTE_NAMES, against_fp32, headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Tracks = dict[int, tuple[list[float], list[float]]]  # agent to rounds and values
_MOST_LINES = 300  # drawn one by one


def plot_run(run: Run, out: Path | None = None) -> Path:
    """Draw the main metric by round, the graph and the bytes side by side into one PNG.

    Parameters
    ----------
    run
        What :func:`flower_mcepl.record.reading.read_run` gave. Of a run that was
        killed, what is there is drawn.
    out
        The PNG to write (default: ``overview.png`` in the record).

    Returns
    -------
    Path
        The PNG.
    """
    target = run.path / "overview.png" if out is None else Path(out)
    figure = new_figure(16, 5.8)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.05, 1.1, 1))
    figure.suptitle(plain(headline(run)), fontsize=14, fontweight="bold")
    _draw_result(left, run)
    draw_graph(middle, run)
    title = "Payload so far" if run.summary is None else "Payload of the run"
    _draw_bytes(right, run.totals, title=title)
    target.write_bytes(png(figure))
    return target


def _draw_result(axes: "Axes", run: Run) -> None:
    from matplotlib.ticker import MaxNLocator

    metric = run.metric
    better = "" if metric.higher_is_better else f" ({metric.direction})"
    axes.set(title=f"Personalized {plain(metric.name)}{better}", xlabel="round")
    axes.set_ylabel(plain(f"{metric.axis} on the agent's own {run.evaluated_on} split"))
    if metric.bounded:
        axes.set_ylim(0, 1)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    curve, result = run.curve(), run.result()
    if not curve:
        say(axes, "no agent was evaluated")
        return
    tracks, mark = _tracks(run), "o" if len(curve) == 1 else ""
    lines = tracks.values() if len(tracks) <= _MOST_LINES else [_joined(tracks)]
    for track in lines:
        axes.plot(
            *track, color=GREY, lw=0.8, alpha=max(0.15, 0.5 - len(tracks) / 200), marker=mark, ms=5
        )
    axes.plot([], [], color=GREY, lw=0.8, marker=mark, label="each agent")
    if len(curve) == 1:  # one round: its agents stand side by side, mean and band run across
        ((number, *rest),) = curve
        curve = [(number - 0.4, *rest), (number + 0.4, *rest)]  # type: ignore[list-item]
        axes.set_xlim(number - 1, number + 1)
        axes.set_xticks([number])
    rounds, mean, std = ([point[k] for point in curve] for k in range(3))
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    axes.fill_between(rounds, low, high, color=SKY, alpha=0.4, lw=0, label="± 1 sd over agents")
    axes.plot(rounds, mean, color=BLUE, lw=2.5, label=mean_label(run))
    worst = result["worst_agent"]
    label = f"agent {worst}, worst at the end: {result['worst']:.3f}"
    axes.plot(*tracks[worst], color=VERMILION, lw=1.6, ls="--", marker=mark, ms=8, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _joined(tracks: _Tracks) -> tuple[list[float], list[float]]:
    """All agents' tracks as one with gaps: hundreds of lines are slow to draw."""
    rounds = [x for own, _ in tracks.values() for x in (*own, math.nan)]
    return rounds, [y for _, own in tracks.values() for y in (*own, math.nan)]


def mean_label(run: Run) -> str:
    """Label of the line of means: of how many agents they are, and the last value."""
    result, partial = run.result(), run.partial_rounds()
    if not partial:
        return f"mean, at the end {result['mean']:.3f}"
    least, most = min(partial.values()), max(partial.values())
    fewer = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"mean of {run.coverage()} after round {result['round']}: {result['mean']:.3f} "
        f"(of {fewer} agents in {len(partial)} of {len(run.curve())} rounds)"
    )


def _tracks(run: Run) -> _Tracks:
    tracks: _Tracks = {}
    metric = run.metric
    for row in run.rounds:
        value = metric.value(row)
        if value is not None:
            rounds, values = tracks.setdefault(int(row["agent"]), ([], []))
            rounds.append(row["round"])
            values.append(value)
    if len({number for rounds, _ in tracks.values() for number in rounds}) == 1:
        for place, (rounds, _) in enumerate(tracks.values()):
            rounds[0] += 0.35 * (2 * (place + 0.5) / len(tracks) - 1)
    return tracks


def _draw_bytes(axes: "Axes", counts: Row, *, title: str) -> None:
    shown = [(key, float(counts[key])) for key in BYTE_NAMES if counts.get(key)]
    ratio = against_fp32(counts)
    axes.set(title=f"{title}: {ratio}" if ratio else title)
    if not shown:
        axes.set_axis_off()
        say(axes, "nothing was sent" if counts.get("links_total") == 0 else "no bytes recorded")
        return
    colors = {"links_total": BLUE, "local_total": GREEN, "fp32_total": GREY, "uplink_total": SKY}
    for place, (key, value) in enumerate(shown):
        paper = key == "paper_convention_bytes"
        hatched: Row = {"color": "white", "edgecolor": ORANGE, "hatch": "///"}
        style = hatched if paper else {"color": colors[key]}
        axes.barh(-place, value, height=0.45, lw=1.2, **style)
        axes.text(
            value, -place, f"  {human_bytes(value)}", va="center", fontsize=11, fontweight="bold"
        )
        name = f"{BYTE_NAMES[key]}\n(not bytes on the wire)" if paper else BYTE_NAMES[key]
        axes.text(0.01, -place + 0.26, name, transform=axes.get_yaxis_transform(), va="bottom")
    values = [value for _, value in shown]
    start, end = 10 ** math.floor(math.log10(min(values)) - 0.5), max(values)
    axes.set(xscale="log", xlim=(start, end * (end / start) ** 0.35), yticks=[])
    axes.set_ylim(min(-3.5, 0.5 - len(shown)), 0.7)
    axes.xaxis.set_major_formatter(lambda value, _: re.sub(r"\.0+ ", " ", human_bytes(value)))
    bits = counts.get("link_bits_per_weight")
    axes.set_xlabel(
        "bytes, logarithmic" + (f"; a frame on a link: {bits:.2g} bit per weight" if bits else "")
    )
    axes.spines[["top", "right"]].set_visible(False)
