"""Heat maps: the agreement of masks beside the overlap of classes."""

from typing import TYPE_CHECKING

from flower_mcepl.report.plots.agreement import Agreement, Matrix
from flower_mcepl.report.plots.canvas import new_figure, png, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_NUMBERS = 12  # up to so many agents there is room for the numbers themselves


def draw_agreement(agreement: Agreement) -> bytes:
    """Draw both matrices in the same order and on the same scale."""
    figure = new_figure(12, 5.7)
    left, right = figure.subplots(1, 2)
    image = _draw_matrix(left, agreement.masks, agreement.agents)
    low, high = agreement.range
    left.set_title(f"Masks: {low:.2f} to {high:.2f} (drawn at random: {agreement.by_chance:.2f})")
    if agreement.classes is None:
        right.set_axis_off()
        say(right, "the record does not tell\nevery agent's classes")
    else:
        _draw_matrix(right, agreement.classes, agreement.agents)
        tie = agreement.correlation
        right.set_title(
            "Classes"
            + ("" if tie is None else f" (correlation with masks over all pairs: {tie:.2f})")
        )
    bar = figure.colorbar(image, ax=[left, right], shrink=0.85, pad=0.02)
    bar.set_label("Jaccard index: shared by both, of what one of them has")
    return png(figure)


def _draw_matrix(axes: "Axes", matrix: Matrix, agents: tuple[int, ...]) -> "AxesImage":
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set(xlabel="agent", ylabel="agent")
    every = -(-len(agents) // 25)
    places = list(range(0, len(agents), every))
    names = [str(agents[place]) for place in places]
    size = 10 if len(agents) <= 16 else 7.5
    axes.set_xticks(places, names, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    if len(agents) <= _NUMBERS:
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                ink = "black" if value > 0.6 else "white"
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink
                )
    return image
