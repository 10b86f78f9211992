"""Picture of a large graph: every agent's result by its number of neighbors.

Some hundred agents with their links are a tangle that shows nothing, and places for
them take quadratic time. What a reader looks for are those that do badly, and whether
the few or many neighbors of an agent matter: both stand on an axis here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from flower_mcepl.report.plots.canvas import BLUE, ORANGE, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_GOLDEN = 0.6180339887  # multiples of it, without their whole part, lie apart
_WIDTH = 0.6  # of the dots of one degree, where the next degree is 1 away


def draw_degrees(
    axes: "Axes",
    agents: Sequence[int],
    links: Sequence[tuple[int, int]],
    scores: Mapping[int, float],
    *,
    directed: bool,
    metric: str,
) -> None:
    """Draw each agent's value of the metric by its degree, and the mean of each degree.

    Without a value of anybody, the number of agents of each degree. In a directed graph
    an agent's degree is the number of agents that it hears.
    """
    from matplotlib.ticker import MaxNLocator

    counts = Counter(end for _, end in links) if directed else Counter(chain.from_iterable(links))
    degrees = {agent: counts[agent] for agent in agents}
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    known = [agent for agent in agents if agent in scores]
    without = f" ({len(agents) - len(known):,} agents without a value)"
    more = without if known and len(known) < len(agents) else ""
    axes.set_xlabel(("agents that an agent hears" if directed else "neighbors of an agent") + more)
    if not known:
        heights = Counter(degrees.values())
        axes.bar(list(heights), list(heights.values()), color=BLUE)
        axes.set_ylabel("agents")
        return
    at, values = _places(degrees, known), np.array([scores[agent] for agent in known])
    axes.scatter(at, values, s=9, color=BLUE, alpha=0.5, linewidths=0)
    of_degree = np.array([degrees[agent] for agent in known])
    each = sorted({*of_degree.tolist()})
    means = [float(values[of_degree == degree].mean()) for degree in each]
    axes.plot(each, means, "D", color=ORANGE, mec="white", ms=7, label="mean of a degree")
    axes.set_xlim(min(each) - 0.75, max(each) + 0.75)
    axes.set_ylabel(f"last {plain(metric)}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def _places(degrees: Mapping[int, int], known: Sequence[int]) -> "NDArray[np.float64]":
    """Degree of each agent, a little aside, so that equal results do not hide."""
    aside = (np.arange(len(known)) * _GOLDEN) % 1 - 0.5
    return np.array([degrees[agent] for agent in known], np.float64) + _WIDTH * aside
