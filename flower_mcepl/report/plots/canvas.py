"""What all pictures share: colors, figures without global state, PNG.

Needs the extra ``report`` (matplotlib), which is imported only when something is drawn.
"""

import io
import textwrap
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flower_mcepl.config.extras import report_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart with every kind of color vision, and in grey.
BLUE, ORANGE, SKY, VERMILION, GREY = "#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#8C8C8C"
# the palette's yellow is left out: too faint for a line on white
GREEN, _PURPLE = "#009E73", "#CC79A7"
COLORS = (BLUE, VERMILION, GREEN, ORANGE, _PURPLE, SKY, "#000000")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX"


def line_style(place: int) -> dict[str, str]:
    """Color, dashes and marker of a picture's line `place`; 28 of them differ."""
    color, again = place % len(COLORS), place // len(COLORS)
    return {
        "color": COLORS[color],
        "linestyle": _DASHES[again % len(_DASHES)],
        "marker": _MARKERS[place % len(_MARKERS)],
    }


def new_figure(width: float, height: float) -> "Figure":
    """Empty white figure, sizes in inches, without pyplot and its global state."""
    with report_extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.1, wspace=0.04)
    return figure


def png(figure: "Figure") -> bytes:
    """PNG of a figure."""
    sink = io.BytesIO()
    with warnings.catch_warnings():
        # a name in another script shows boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(sink, format="png")
    return sink.getvalue()


def columns(panels: int) -> int:
    """Number of panels side by side."""
    return panels if panels < 4 else 2 if panels == 4 else 3


def value_scale(scores: Iterable[float], *, bounded: bool) -> tuple[float, float]:
    """Ends of the scale of colors; of values in 0..1 they are not close together."""
    known = list(scores)
    if not bounded:
        low, high = min(known, default=0.0), max(known, default=1.0)
        return (low, high) if high > low else (low - 0.5, high + 0.5)
    low, high = min(known, default=0.0), max(known, default=1.0)
    # so that a difference of one point does not look like the whole scale
    low = max(0.0, min(low, high - 0.2))
    return low, max(high, low + 0.2)


def plain(text: str) -> str:
    """A record's text as matplotlib shows it unchanged: no formula, no hidden label."""
    shown = text.encode("utf-8", "replace").decode().replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def wrapped(text: str, width: int = 46) -> str:
    """A record's text in lines of at most `width` characters."""
    return (
        "\n".join(plain(line) for line in textwrap.wrap(text, width, max_lines=3, placeholder=" …"))
        or "-"
    )


def say(axes: "Axes", text: str) -> None:
    """Write a text into the middle of axes that have nothing else to show."""
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4", fontsize=12
    )
