"""A run record as plain text: a table of the agents, and what the run cost in bytes."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flower_mcepl.config.extras import report_extra
from flower_mcepl.record.accuracy import accuracy_summary
from flower_mcepl.record.figures import byte_counts, evaluated_on
from flower_mcepl.record.layout import Row
from flower_mcepl.record.reading import Run
from flower_mcepl.record.values import human_bytes

# What each byte count is called, in the order in which it is shown.
BYTE_NAMES = {
    "links_total": "payload over all directed links",
    "fp32_total": "fp32 weights over the same deliveries",
    "uplink_total": "uplink, each frame counted once",
    "paper_convention_bytes": "paper's convention: 1 bit per kept weight",
}


def agent_table(run: Run) -> str:
    """Tabulate the agents' last evaluation, then what the run cost in bytes, as plain text."""
    with report_extra():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    tested = f"{evaluated_on(run)}\nimages"
    for title in ("agent", "retention", "classes", "train\nimages", tested, "accuracy", "density"):
        table.add_column(title, justify="left" if title == "classes" else "right")
    for title in ("sent", "received"):
        table.add_column(title, justify="right", no_wrap=True)
    for cells in _agent_cells(run):
        table.add_row(*map(Text, cells))  # Text: brackets in a class name are no markup

    console = Console(
        file=io.StringIO(), width=100, color_system=None, force_terminal=False, force_jupyter=False
    )
    console.print(headline(run), markup=False, highlight=False, soft_wrap=True)
    console.print()
    console.print(table)
    console.print()
    for line in [*_accuracy_lines(run), "", *_byte_lines(byte_counts(run))]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _agent_cells(run: Run) -> Iterator[list[str]]:
    known = {int(entry["agent"]): entry for entry in run.config.get("agents") or []}
    last = run.final()
    for agent in sorted({*known, *last}):
        # An agent's entry may be its handshake, whose keys are kebab-case.
        setup = {key.replace("-", "_"): value for key, value in known.get(agent, {}).items()}
        row = last.get(agent, {})
        yield [
            str(agent),
            _cell(setup.get("retention")),
            _cell(setup.get("classes")),
            _cell(setup.get("num_examples")),
            _cell(row.get("num_examples")),
            _cell(row.get("accuracy"), ".4f"),
            _cell(row.get("density"), ".4f"),
            human_bytes(row.get("sent_bytes")),
            human_bytes(row.get("received_bytes")),
        ]


def _cell(value: Any, form: str = "") -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (
            " ".join(map(str, value))
            if len(value) <= 8
            else f"{value[0]} … {value[-1]} ({len(value)})"
        )
    return format(value, form or "g") if form or isinstance(value, float) else str(value)


def headline(run: Run) -> str:
    """Say how the run ended, and how large it was."""
    status = (
        "no summary (killed or still running)"
        if run.summary is None
        else run.summary.get("status", "-")
    )
    agents = len(run.final())
    rounds = max((row["round"] for row in [*run.rounds, *run.relay]), default=0)
    if run.summary is not None:
        rounds = run.summary.get("num_rounds", rounds)
    return f"{run.name}: {status}, {agents} agents, {rounds} rounds"


def _accuracy_lines(run: Run) -> Iterator[str]:
    result = accuracy_summary(run.rounds)
    if result["mean"] is None:
        yield "personalized accuracy: no agent was evaluated"
        return
    on = "" if evaluated_on(run) == "test" else f", on the {evaluated_on(run)} split"
    yield (
        f"personalized accuracy {result['mean']:.4f} ± {result['std']:.4f} (mean ± sd over "
        f"agents, round {result['round']}{on}); worst: agent {result['worst_agent']} with "
        f"{result['worst']:.4f}"
    )
    late = [
        f"{a} (round {r['round']})" for a, r in run.final().items() if r["round"] < result["round"]
    ]
    if late:
        yield f"last evaluated in an earlier round: agent {', '.join(late)}"


def _byte_lines(counts: Row) -> Iterator[str]:
    notes = {
        "links_total": against_fp32(counts),
        "paper_convention_bytes": "per delivery; not bytes on the wire",
    }
    for key, name in BYTE_NAMES.items():
        if counts.get(key) is not None:
            yield f"{name:<43}{human_bytes(counts[key]):>8}   {notes.get(key, '')}"
    if counts.get("busiest_agent") is not None:
        total = counts.get("busiest_agent_total")
        note = f"   {human_bytes(total)} up and down" if total else ""
        yield f"{'busiest agent':<43}{_cell(counts['busiest_agent']):>8}{note}"
    if counts.get("relay_total") is not None:
        yield f"{'relay, up and down':<43}{human_bytes(counts['relay_total']):>8}"
    if counts.get("bits_per_weight"):
        keys = (counts.get("link_keys") or 0) + (counts.get("uplink_keys") or 0)
        frames = (counts.get("link_frames") or 0) + (counts.get("uplink_frames") or 0)
        yield (
            f"{'bits per weight, mean over all frames':<43}{counts['bits_per_weight']:>8.4f}   "
            f"{frames:,} frames, {keys:,} of them whole; "
            f"{human_bytes(counts.get('header_total'))} of headers"
        )


def against_fp32(counts: Row) -> str:
    """Compare the payload with fp32 weights; of a run that says too little, nothing."""
    full, sent = counts.get("fp32_total"), counts.get("links_total")
    if not full or not sent:
        return ""
    ratio = full / sent
    return f"{ratio:.1f} times less than fp32" if ratio >= 1.05 else f"{1 / ratio:.2f} times fp32"
