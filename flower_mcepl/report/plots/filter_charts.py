"""Charts of the share of kept weights in every filter, layer by layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flower_mcepl.report.plots.canvas import COLORS, columns, new_figure, plain, png
from flower_mcepl.report.plots.filters import LayerDensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LAYERS = 12  # panels in one picture
_MOST_NUMBERS = 400  # cells in which there is room for the numbers themselves
_GROUPS = 5  # more different densities than this get one color


def draw_filters(layers: Sequence[LayerDensity]) -> bytes:
    """Draw a panel for each of the first layers: sorted densities, a line an agent."""
    shown = layers[:MOST_LAYERS]
    across = columns(len(shown))
    down = -(-len(shown) // across)
    figure = new_figure(max(4.4 * across, 6), 3.6 * down)
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for place, (axes, layer) in enumerate(zip(panels, shown, strict=False)):
        _draw_layer(axes, layer)
        if place % across == 0:
            axes.set_ylabel("share of kept weights in a filter")
    return png(figure)


def draw_live_filters(layers: Sequence[LayerDensity]) -> bytes:
    """Draw a cell for each agent and layer: its number of live filters.

    It is empty where the agent does not hold the layer.
    """
    agents = sorted({agent for layer in layers for agent in layer.agents})
    live = np.full((len(agents), len(layers)), np.nan)
    for place, layer in enumerate(layers):
        holders = [agents.index(agent) for agent in layer.agents]
        live[holders, place] = layer.num_filters - layer.off
    shares = live / [layer.num_filters for layer in layers]
    figure = new_figure(max(1.1 * len(layers) + 3, 6), min(0.35 * len(agents) + 2.5, 14))
    axes = figure.subplots()
    image = axes.imshow(
        shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
    )
    axes.set_xticks(range(len(layers)), [plain(layer.name) for layer in layers], rotation=30)
    every = -(-len(agents) // 30)
    places = list(range(0, len(agents), every))
    axes.set_yticks(places, [str(agents[place]) for place in places])
    axes.set_ylabel("agent")
    for (row, column), number in np.ndenumerate(live) if live.size <= _MOST_NUMBERS else ():
        ink = "black" if shares[row, column] > 0.6 else "white"
        text = "" if np.isnan(number) else f"{number:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=axes, label="share of the layer's filters")
    return png(figure)


def off_text(layer: LayerDensity) -> str:
    """Number of a layer's filters that are entirely off, in words."""
    fewest, most = int(layer.off.min()), int(layer.off.max())
    if fewest == most:
        return f"{most} of {layer.num_filters} filters off" + (" in every agent" if most else "")
    return (
        f"{fewest} to {most} of {layer.num_filters} filters off, {layer.off.mean():.1f} on average"
    )


def _draw_layer(axes: "Axes", layer: LayerDensity) -> None:
    from matplotlib.ticker import MaxNLocator

    places = np.arange(1, layer.num_filters + 1)
    densities = np.round(layer.density, 2)
    levels = sorted(set(densities.tolist()))
    grouped = len(levels) <= _GROUPS
    for agent, shares in enumerate(layer.shares):
        color = COLORS[levels.index(densities[agent])] if grouped else COLORS[0]
        axes.plot(
            places, shares, color=color, lw=1.2, alpha=max(0.25, 0.8 - len(layer.agents) / 60)
        )
    for place, level in enumerate(levels if grouped else ()):
        number = int((densities == level).sum())
        label = f"{level:g} of the layer: {number} agent{'s' * (number > 1)}"
        axes.plot([], [], color=COLORS[place], lw=2, label=label)
    if grouped:
        axes.legend(loc="best", frameon=False, fontsize=8)
    axes.set_title(f"{plain(layer.name)}\n{off_text(layer)}", fontsize=10)
    axes.set(xlabel="filter, by its density", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
