"""A run record as plain text: a table of the agents, and what the run cost in bytes."""

import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flower_mcepl.config.extras import report_extra
from flower_mcepl.record.frozen import frozen_line
from flower_mcepl.record.layout import Row
from flower_mcepl.record.metric import ACCURACY, of_agents
from flower_mcepl.record.reading import Run
from flower_mcepl.record.values import human_bytes

# What each byte count is called, in the order in which it is shown.
BYTE_NAMES = {
    "links_total": "payload over all directed links",
    "local_total": "payload between agents of one node",
    "fp32_total": "fp32 weights over the same deliveries",
    "uplink_total": "uplink, each frame counted once",
    "paper_convention_bytes": "paper's convention: 1 bit per kept weight",
}

_CLOSED = ("finished", "incomplete")  # runs that came to their closing exchange
_MOST_NAMED = 100  # agents of a list


def agent_table(run: Run) -> str:
    """Agents' last evaluations, then what the run cost in bytes, as plain text."""
    with report_extra():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    noun = examples(run)
    tested, main = f"{run.evaluated_on}\n{noun}", run.metric.name
    deep = any("depth" in handshake for handshake in run.handshakes.values())
    depth = ("depth",) if deep else ()
    for title in (
        "agent",
        "retention",
        *depth,
        "classes",
        f"train\n{noun}",
        tested,
        main,
        "density",
    ):
        table.add_column(Text(title), justify="left" if title == "classes" else "right")
    for title in ("sent", "received"):
        table.add_column(title, justify="right", no_wrap=True)
    for cells in _agent_cells(run, with_depth=deep):
        table.add_row(*map(Text, cells))  # Text: brackets in a class name are no markup

    sink = io.StringIO()
    Console(
        file=sink, width=100, color_system=None, force_terminal=False, force_jupyter=False
    ).print(table)
    lines = [headline(run), "", *sink.getvalue().splitlines(), "", *_result_lines(run)]
    lines += [line for line in (_best_line(run), frozen_line(run.handshakes.values())) if line]
    lines.append("")
    return "\n".join(line.rstrip() for line in [*lines, *_byte_lines(run.totals)]) + "\n"


def _agent_cells(run: Run, *, with_depth: bool) -> Iterator[list[str]]:
    handshakes, last, metric = run.handshakes, run.final(), run.metric
    # what goes to a server is over no link between agents
    sent = "sent_bytes" if run.server is None else "uplink_bytes"
    for agent in sorted({*handshakes, *last}):
        handshake, row = handshakes.get(agent, {}), last.get(agent, {})
        yield [
            str(agent),
            _cell(handshake.get("retention")),
            *([_cell(handshake.get("depth"))] if with_depth else []),
            _cell(handshake.get("classes")),
            _cell(handshake.get("num_examples")),
            _cell(row.get("num_examples")),
            _cell(metric.value(row), ".4f"),
            _cell(row.get("density"), ".4f"),
            human_bytes(row.get(sent)),
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
    """Name of the run, how it ended, and how large it was."""
    status = f"{run.status or 'no summary (killed or still running)'}{_stopped(run)}"
    agents = of_agents(len(run.final()), run.num_agents)
    result = run.result()
    status += f" [DAMAGED: {run.damage}]" if run.damage else ""
    if result["mean"] is None or (len(run.final()) == result["agents"] == run.num_agents):
        return f"{run.name}: {status}, {agents}, {_rounds(run)}"
    return (
        f"{run.name}: {status}, {of_agents(run.num_agents, run.num_agents)}, {_rounds(run)}; "
        f"{run.metric.name} of {run.coverage()} after round {result['round']}"
    )


def _rounds(run: Run) -> str:
    """Rounds of a run: of one that broke off, how many of them were played."""
    played, planned = run.rounds_played, run.planned_rounds
    if run.status in _CLOSED or planned is None:
        played = planned = run.num_rounds
    of = "" if played == planned else f" of {planned}"
    return f"{played}{of} {'round' if planned == 1 else 'rounds'}"


def _stopped(run: Run) -> str:
    """Why a run is shorter than planned, behind its status."""
    if not (stopped := run.stopped_early):
        return ""
    if "fewest" in stopped and stopped.get("round") == stopped.get("planned"):
        return f" (the slowest agent played {stopped['fewest']} rounds)"
    if "fewest" in stopped:
        return (
            f" (of {stopped.get('planned')} rounds, when its time was over; the slowest agent "
            f"played {stopped.get('fewest')})"
        )
    return (
        f" (stopped early, of {stopped.get('planned')} rounds: no better {run.metric.name} in the "
        f"{stopped.get('patience')} evaluations after round {stopped.get('best_round')})"
    )


def examples(run: Run) -> str:
    """What the examples are called: images in a picture task, else examples."""
    tasks = {facts.get("task", "classification") for facts in run.handshakes.values()}
    return "images" if tasks <= {"classification", "segmentation"} else "examples"


def _result_lines(run: Run) -> Iterator[str]:
    result, metric = run.result(), run.metric
    if result["mean"] is None:
        yield f"personalized {metric.name}: no agent was evaluated"
        return
    on = "" if run.evaluated_on == "test" else f", on the {run.evaluated_on} split"
    yield (
        f"personalized {metric.axis} {result['mean']:.4f} ± {result['std']:.4f} (mean ± sd over "
        f"{run.coverage()}, round {result['round']}{on}{_better(run)}); "
        f"worst: agent {result['worst_agent']} with {result['worst']:.4f}"
    )
    if _is_older(run):
        yield f"no evaluation came after the last round, {run.num_rounds}: this one is earlier"
    if further := ", ".join(_further_lines(run)):
        yield f"also, means of that round: {further}"
    last, final = run.last_evaluated(), run.final()
    others = {agent: row for agent, row in final.items() if agent not in last}
    if without := [str(a) for a, row in others.items() if metric.value(row) is None]:
        yield f"without a value of {metric.name} when last evaluated: agent {', '.join(without)}"
    late = [f"{a} (round {r['round']})" for a, r in others.items() if str(a) not in without]
    if late:
        yield f"last evaluated in an earlier round, and not in the mean: agent {', '.join(late)}"
    if never := [str(agent) for agent in range(run.num_agents) if agent not in final]:
        more = f", ... ({len(never)} agents)" if len(never) > _MOST_NAMED else ""
        yield f"never evaluated: agent {', '.join(never[:_MOST_NAMED])}{more}"


def _is_older(run: Run) -> bool:
    """Whether a run came to its closing exchange, and has no result of it."""
    if run.status not in _CLOSED or any(row.get("closing") for row in run.rounds):
        return False
    return (run.result()["round"] or 0) < run.num_rounds


def _best_line(run: Run) -> str:
    """Line on the best states that the agents kept; empty where they kept none."""
    best = run.best_states()
    values = [entry["value"] for entry in best if entry["value"] is not None]
    if not values:
        return ""
    rounds = [entry["round"] for entry in best]
    span = (
        f"round {rounds[0]}" if len(set(rounds)) == 1 else f"rounds {min(rounds)} to {max(rounds)}"
    )
    return (
        f"best states kept: {run.metric.axis} {statistics.fmean(values):.4f} (mean over "
        f"{of_agents(len(values), run.num_agents)}, {span}, on the {run.evaluated_on} split, by "
        "which they were chosen)"
    )


def _better(run: Run) -> str:
    return "" if run.metric == ACCURACY else f", {run.metric.direction}"


def _further_lines(run: Run) -> Iterator[str]:
    """Means of the other metrics of the last evaluated round."""
    rows = list(run.last_evaluated().values())
    for name in dict.fromkeys(name for row in rows for name in row.get("metrics") or {}):
        known = [(row.get("metrics") or {}).get(name) for row in rows]
        values = [value for value in known if value is not None]
        if values and name != run.metric.name:
            fewer = "" if len(values) == len(rows) else f" of {len(values)} agents"
            yield f"{name} {statistics.fmean(values):.4f}{fewer}"


def _byte_lines(counts: Row) -> Iterator[str]:
    notes = {
        "links_total": against_fp32(counts),
        "local_total": "over no link",
        "paper_convention_bytes": "per delivery; not bytes on the wire",
    }
    for key, name in BYTE_NAMES.items():
        if counts.get(key) is not None:
            yield f"{name:<43}{human_bytes(counts[key]):>8}   {notes.get(key, '')}"
    total = counts.get("busiest_agent_total")
    if counts.get("busiest_agent") is not None and total != 0:  # nobody sent anything
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
    """Payload compared with fp32 weights; empty where the counts do not suffice."""
    full, sent = counts.get("fp32_total"), counts.get("links_total")
    if not full or not sent:
        return ""
    ratio = full / sent
    return f"{ratio:.1f} times less than fp32" if ratio >= 1.05 else f"{1 / ratio:.2f} times fp32"
