"""``flower-mcepl frame``: explain a frame that a run has kept."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flower_mcepl.errors import ConfigError, FrameError, visible
from flower_mcepl.record.values import human_bytes

if TYPE_CHECKING:
    from flower_mcepl.wire import FrameHeader, LayerEntry

_KINDS = {
    0: "every weight",
    1: "1 bit a weight",
    2: "range-coded, on its own",
    3: "range-coded flips",
}


def frame(
    file: Annotated[
        Path,
        typer.Argument(help="A frame, as a run with keep-frames = true leaves it under frames/."),
    ],
    like: Annotated[
        Path | None,
        typer.Option(
            help="A whole frame of the same model, for the names of the layers (default: one "
            "beside FILE)."
        ),
    ] = None,
) -> None:
    """Explain a frame: its sender, layers and bits.

    A delta frame does not repeat the names and shapes of its layers; they are taken
    from a whole frame of the same model. Nothing is decoded. The format stands in
    docs/wire-format.md.
    """
    from flower_mcepl.wire import read_header  # loads torch

    if file.is_dir():
        raise ConfigError(
            f"a frame is a file, RECORD/frames/*.frame of a run with keep-frames = true; {file} "
            "is a folder. Name one of the files in it."
        )
    data = file.read_bytes()
    header = read_header(data)
    source = None
    if header.fingerprint is None:
        described = _described(header, [like] if like else sorted(file.parent.glob("*.frame")))
        if described is not None:
            source, layers = described
            header = read_header(data, layers)
    console = Console(width=120, highlight=False, markup=False, soft_wrap=True)
    for line in _lines(header, source):
        console.print(line)
    console.print(_table(header))


def _described(
    header: "FrameHeader", files: list[Path]
) -> tuple[Path, dict[str, tuple[int, ...]]] | None:
    """First file that describes this model, and its layers."""
    from flower_mcepl.wire import read_header

    for file in files:
        try:
            other = read_header(file.read_bytes())
        except FrameError:
            continue
        if other.model == header.model and other.fingerprint is not None:
            return file, {str(entry.name): entry.shape or () for entry in other.layers}
    return None


def _lines(header: "FrameHeader", source: Path | None) -> Iterator[str]:
    if header.reference is None:
        kind = "whole: it stands alone"
    elif header.reference == 0:
        kind = "whole: it builds on the common first payload, which everyone knows"
    else:
        kind = f"delta: it builds on the frame of round {header.reference}"
    raw = header.total - header.header_bytes - header.coded_bytes
    yield f"agent {header.sender}, round {header.round}, wire version {header.version}"
    yield kind
    yield (
        f"{human_bytes(header.total)}: {header.header_bytes} bytes of header and checksum, "
        f"{human_bytes(raw)} as they are, {human_bytes(header.coded_bytes)} range-coded"
    )
    weights = sum(_numel(entry) for entry in header.layers)
    if weights:
        bits = 8 * header.total / weights
        less = f"{32 / bits:,.0f} times less than fp32"
        yield f"{bits:.4g} bit per weight, {less} ({weights:,} weights)"
    if header.fingerprint is not None:
        yield f"frozen weights {header.fingerprint}, model {header.model}, content {header.content}"
    else:
        yield f"model {header.model}, content {header.content}"
    if source is not None:
        yield f"names and shapes from {source.name}"
    elif not weights and header.layers:
        yield (
            "names and shapes are not in this frame: pass a whole frame of the same model with "
            "--like"
        )


def _table(header: "FrameHeader") -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title, justify in (
        ("layer", "left"),
        ("shape", "left"),
        ("weights", "right"),
        ("told as", "left"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    table.add_column("weights told", justify="right")
    table.add_column("their entropy*", justify="right")
    table.caption = (
        "* of so many among the layer's weights, if all were equally likely; groups bring it below"
    )
    table.caption_justify = "left"
    for number, entry in enumerate(header.layers):
        name = visible(entry.name) if entry.name is not None else f"layer {number}"
        shape = "?" if entry.shape is None else "x".join(map(str, entry.shape)) or "scalar"
        weights = "?" if entry.shape is None else f"{_numel(entry):,}"
        coded = entry.kind >= 2
        listed = f"{entry.num_listed:,}" if coded else ""
        entropy = human_bytes(_entropy(entry) / 8) if coded and entry.shape is not None else ""
        table.add_row(*map(Text, (name, shape, weights, _how(entry), listed, entropy)))
    return table


def _how(entry: "LayerEntry") -> str:
    parts = [_KINDS[entry.kind]] if entry.kind or entry.precision is None else []
    if entry.with_classes:
        parts.append("by classes")
    if entry.with_recent:
        parts.append("recent flips apart")
    if entry.precision is not None:
        parts.append(
            f"{entry.num_values:,} {entry.precision.name} values"
            if entry.is_sparse
            else entry.precision.name
        )
    return ", ".join(parts)


def _numel(entry: "LayerEntry") -> int:
    return 0 if entry.shape is None else math.prod(entry.shape)


def _entropy(entry: "LayerEntry") -> float:
    share = entry.num_listed / max(_numel(entry), 1)
    if not 0 < share < 1:
        return 0.0
    return -_numel(entry) * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
