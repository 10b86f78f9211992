"""Picture of a run's communication graph, every agent in the color of its result.

Of a large graph, the results by degree.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flower_mcepl.record.figures import sends_nothing
from flower_mcepl.record.reading import Run
from flower_mcepl.report.plots.canvas import (
    columns,
    new_figure,
    plain,
    png,
    say,
    value_scale,
    wrapped,
)
from flower_mcepl.report.plots.curves import final_values
from flower_mcepl.report.plots.degrees import draw_degrees

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# up to here nodes stand on a circle; above, a spring layout leaves more room for each
_RING_LIMIT = 24
_ARROW_LIMIT = 400  # more arrowheads than this hide the graph
_MOST_AGENTS = 300  # of more, nodes and links hide each other: their degrees are drawn
_NO_VALUE = (0.85, 0.85, 0.85, 1.0)
_UNIT_POINTS = 135  # what one unit of the graph panel measures in the picture


def draw_graphs(named: Sequence[tuple[str, Run]]) -> bytes:
    """Draw the graphs of several runs side by side, on one scale of colors."""
    across = columns(len(named))
    down = -(-len(named) // across)
    figure = new_figure(5.4 * across, 5.8 * down)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    scale = value_scale(
        (score for _, run in named for score in final_values(run).values()),
        bounded=all(run.metric.bounded for _, run in named),
    )
    for axes in panels[len(named) :]:
        axes.set_axis_off()
    for axes, (name, run) in zip(panels, named, strict=False):
        draw_graph(axes, run, scale=scale)
        if len(named) > 1:
            axes.set_title(wrapped(f"{name} (sends nothing)" if sends_nothing(run) else name))
    return png(figure)


def draw_graph(axes: "Axes", run: Run, *, scale: tuple[float, float] | None = None) -> None:
    """Draw a run's graph into axes; without a scale, colors are for it alone."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    links, directed, title = _links(run)
    ends = itertools.chain.from_iterable(links)
    numbers = {*range(run.topology.get("num_agents") or 0), *run.final(), *ends}
    agents = sorted(numbers - {run.server})
    axes.set_title(title)
    scores = final_values(run)
    if len(agents) > _MOST_AGENTS:
        axes.set_title(f"{title} ({len(agents):,} agents, {len(links):,} links)")
        draw_degrees(axes, agents, links, scores, directed=directed, metric=run.metric.name)
        return
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.06)
    axes.set_axis_off()
    if not agents:
        say(axes, "no graph recorded")
        return
    points = 22.0 if len(agents) <= 12 else min(18.0, 110 / math.sqrt(len(agents)))
    spots, points = _layout(agents, links, points=points)
    _draw_links(axes, spots, links, directed=directed, reach=points)
    if run.server is not None:
        _draw_server(axes, spots)

    colors = ScalarMappable(
        Normalize(*(scale or value_scale(scores.values(), bounded=run.metric.bounded))), "viridis"
    )
    for agent in agents:
        fill = colors.to_rgba(np.asarray(scores[agent])) if agent in scores else _NO_VALUE
        _draw_node(axes, spots[agent], str(agent), fill, points=points)
    if scores:
        # where the other panels have their axis and legend
        strip = axes.inset_axes((0.2, -0.1, 0.6, 0.03))
        bar = axes.figure.colorbar(
            colors, cax=strip, orientation="horizontal", ticks=MaxNLocator(5)
        )
        bar.set_label(
            f"last {plain(run.metric.name)}"
            + (" (gray: none)" if len(scores) < len(agents) else "")
        )


def _links(run: Run) -> tuple[list[tuple[int, int]], bool, str]:
    """Links between agents, whether they have a direction, and the picture's title."""
    if run.server is not None:
        return [], False, "Agents and their server"
    if sends_nothing(run):
        return [], False, "Agents without links: nothing is sent"
    if "edges" in run.topology:
        edges = [(int(a), int(b)) for a, b in run.topology["edges"]]
        directed = bool(run.topology.get("directed"))
        title = "Communication graph" if edges else "Communication graph: it has no links"
    else:
        used = [*run.links, *run.local]
        edges = [(int(link["sender"]), int(link["receiver"])) for link in used]
        known = set(edges)
        directed = any((b, a) not in known for a, b in edges)
        title = (
            "Communication graph, all links used in the run"
            if edges
            else "Agents (no fixed graph recorded)"
        )
    if not directed:
        edges = [(min(pair), max(pair)) for pair in edges]
    return sorted(set(edges)), directed, title


def _layout(
    agents: list[int], links: list[tuple[int, int]], *, points: float
) -> tuple[dict[int, tuple[float, float]], float]:
    """Places of the agents within [-1, 1]², and the node diameter that fits them."""
    import networkx as nx

    angles = 2 * np.pi * np.arange(len(agents)) / len(agents)
    spots = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    graph = nx.Graph(links)
    graph.add_nodes_from(agents)
    # springs let go of what is not connected
    if len(agents) > _RING_LIMIT and nx.is_connected(graph):
        # From the circle on: a ring stays a ring, and the same graph always gives the
        # same picture.
        start = dict(zip(agents, spots, strict=True))
        sprung = nx.spring_layout(
            graph, pos=start, k=2.2 / math.sqrt(len(agents)), iterations=150, seed=0
        )
        spots = _apart(
            np.array([sprung[agent] for agent in agents]), gap=1.2 * points / _UNIT_POINTS
        )
    if len(agents) > 1:
        points = max(3.0, min(points, float(_distances(spots).min()) * _UNIT_POINTS))
    return {
        agent: (float(x), float(y)) for agent, (x, y) in zip(agents, spots, strict=True)
    }, points


def _apart(spots: "NDArray[np.float64]", *, gap: float) -> "NDArray[np.float64]":
    """Places that fill [-1, 1]², pushed apart where they are closer than `gap`."""
    for _ in range(80):
        middle, half = (spots.max(0) + spots.min(0)) / 2, (spots.max(0) - spots.min(0)) / 2
        spots = (spots - middle) / np.maximum(half, 1e-9)
        apart = _distances(spots)
        push = np.clip(gap - apart, 0, None) / np.maximum(apart, 1e-9) / 2
        spots = spots + ((spots[:, None] - spots[None]) * push[..., None]).sum(1)
    return np.clip(spots, -1, 1)


def _distances(spots: "NDArray[np.float64]") -> "NDArray[np.float64]":
    apart = np.linalg.norm(spots[:, None] - spots[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    return np.asarray(apart, dtype=np.float64)


def _draw_links(
    axes: "Axes",
    spots: Mapping[int, tuple[float, float]],
    links: list[tuple[int, int]],
    *,
    directed: bool,
    reach: float,
) -> None:
    from matplotlib.collections import LineCollection

    faint = max(0.15, min(0.7, 60 / max(len(links), 1)))
    if directed and len(links) <= _ARROW_LIMIT:
        style = {"arrowstyle": "-|>", "color": "0.45", "alpha": max(faint, 0.35), "lw": 0.9}
        for sender, receiver in links:
            arrow = {**style, "shrinkA": reach / 2, "shrinkB": reach / 2 + 1}
            axes.annotate("", xy=spots[receiver], xytext=spots[sender], arrowprops=arrow)
        return
    segments = [[spots[a], spots[b]] for a, b in links]
    axes.add_collection(
        LineCollection(segments, colors="0.45", linewidths=0.9, alpha=faint, zorder=1)
    )


def _draw_server(axes: "Axes", spots: Mapping[int, tuple[float, float]]) -> None:
    """Put the server into the middle of the circle, with a link to every agent."""
    from matplotlib.collections import LineCollection

    middle = (0.0, 0.0)
    links = [[middle, spot] for spot in spots.values()]
    axes.add_collection(LineCollection(links, colors="0.45", linewidths=0.9, alpha=0.5, zorder=1))
    box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": "0.2"}
    axes.text(*middle, "server", ha="center", va="center", fontsize=10, bbox=box, zorder=3)


def _draw_node(
    axes: "Axes", spot: tuple[float, float], label: str, fill: Any, *, points: float
) -> None:
    dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 0.55
    axes.plot(*spot, "o", ms=points, mfc=fill, mec="0.2", mew=0.6, zorder=2)
    if points < 6:
        return  # no room for a number
    size = points * (0.5 if len(label) < 3 else 0.38)
    ink = "white" if dark else "black"
    axes.text(*spot, label, color=ink, fontsize=size, ha="center", va="center_baseline", zorder=3)
