"""Chart of holdings: a disc for each agent and class, its area the examples."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.report.plots.canvas import BLUE, ORANGE, VERMILION, new_figure, png
from flower_mcepl.report.plots.holdings import SPLITS, Holdings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {"train": BLUE, "validation": ORANGE, "test": VERMILION}
_CELL = 0.3  # inches for an agent or class, where there is room
_ABREAST = 20  # up to so many agents panels stand side by side
_LABELS = 25  # agents or classes that are named; of more, every second, third, ...


def draw_holdings(holdings: Holdings) -> bytes:
    """Draw a panel for each split, agents along and classes up, areas on one scale."""
    agents, classes, panels = len(holdings.agents), len(holdings.classes), len(holdings.counts)
    below = agents > _ABREAST  # panels stand below each other, so that they can be wide
    across, down = (1, panels) if below else (panels, 1)
    width = float(np.clip(_CELL * agents, 2.6, 14.0))
    height = float(np.clip(_CELL * classes, 2.0, 6.0))
    figure = new_figure(width * across + 2.4, (height + 0.8) * down + 0.5)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    numbers = {split: np.array(counts) for split, counts in holdings.counts.items()}
    most = max(int(counts.max()) for counts in numbers.values())
    # area of a disc, in square points
    largest = (0.9 * 72 * min(width / agents, height / classes, _CELL)) ** 2
    for axes, (split, counts) in zip(grid.flat, numbers.items(), strict=True):
        _draw_split(axes, holdings, counts / most * largest, _COLORS[split])
        axes.set_title(f"{SPLITS[split]}: {counts.sum():,} examples", fontsize=11)
    for axes in grid[:, 0]:
        axes.set_ylabel("class")
    for axes in grid[-1]:
        axes.set_xlabel("agent")
    for count in sorted({most, -(-most // 2), -(-most // 8)}, reverse=True):
        grid[-1, -1].scatter([], [], s=count / most * largest, color="0.5", label=f"{count:,}")
    figure.legend(loc="outside right upper", title="examples", frameon=False, labelspacing=1.0)
    return png(figure)


def _draw_split(axes: "Axes", holdings: Holdings, areas: NDArray[np.float64], color: str) -> None:
    rows, columns = np.nonzero(areas)
    axes.scatter(rows, columns, s=areas[rows, columns], color=color, alpha=0.85, lw=0)
    axes.set(xlim=(-0.6, len(holdings.agents) - 0.4), ylim=(-0.6, len(holdings.classes) - 0.4))
    for set_ticks, names in (
        (axes.set_xticks, holdings.agents),
        (axes.set_yticks, holdings.classes),
    ):
        places = range(0, len(names), -(-len(names) // _LABELS))
        set_ticks(list(places), [str(names[place]) for place in places], fontsize=8)
    axes.grid(color="0.93", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
