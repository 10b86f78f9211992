"""A comparison as a table: for people, as Markdown, and as CSV with plain numbers."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flower_mcepl.record.metric import of_agents
from flower_mcepl.record.values import human_bytes
from flower_mcepl.report.compare import LASSO, Comparison, Row

Column = tuple[str, Callable[[Row], str]]  # title and cell
_ACTIVE = re.compile(r"[\\`*<>\[\]|$~&]|(?<!\w)_|_(?!\w)")  # what Markdown would not show
_EXPLAINED = (
    "{main}: mean over the agents of their personalized {main} in the last evaluated round; "
    "then mean ± sample standard deviation over the seeds, of which one seed has none. All other "
    "columns are means over the seeds.",
    "sd over agents: population standard deviation. worst tenth: mean of the worst tenth of the "
    "agents, at least one.",
    "best: the best mean {main} ({direction}) of any evaluated round; picked on the evaluated "
    "splits, so it is no result.",
    "links: bytes of payload from agent to agent, or both ways between agents and server. busiest "
    "agent: all that it sent up, each frame once, and received.",
    "images: training images that an agent processed; told where every agent trained in every "
    "round.",
)


def titles(comparison: Comparison) -> list[str]:
    """Titles of the columns that `cells` fills: the varied keys, then the measures."""
    return [*comparison.keys, *(title for title, _ in _columns(comparison))]


def cells(comparison: Comparison) -> Iterator[list[str]]:
    """Cells of each row, for people."""
    for row in comparison.rows:
        settings = [_text(row.settings[key]) for key in comparison.keys]
        yield [*settings, *(cell(row) for _, cell in _columns(comparison))]


def footnotes(comparison: Comparison) -> list[str]:
    """Footnotes that a reader of the table needs."""
    metric = comparison.metric
    words = {"{main}": metric.name, "{direction}": metric.direction}
    notes = [_filled(note, words) for note in _EXPLAINED]
    if comparison.target is not None:
        notes.append(
            f"to {comparison.target:g}: bytes over the links until the mean {metric.name} was "
            "first that good."
        )
    if LASSO in comparison.keys:
        notes.append(
            "filters off: share of output filters and neurons (of transposed convolutions, of "
            "input channels) whose weights are all masked out, at the end."
        )
    if any(title == "agents" for title, _ in _columns(comparison)):
        notes.append(
            f"agents: of how many agents of the graph the {metric.name} is, at least; the others "
            "were not evaluated in that round. best and links to a target leave out rounds with "
            "fewer."
        )
    return [*notes, *comparison.notes]


def markdown(comparison: Comparison) -> str:
    """The table as Markdown."""
    heads = [_escaped(title) for title in titles(comparison)]
    rules = ["---"] * len(comparison.keys) + ["---:"] * (len(heads) - len(comparison.keys))
    lines = [heads, rules, *([_escaped(cell) for cell in row] for row in cells(comparison))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"- {_escaped(note)}" for note in footnotes(comparison))
    return f"{table}\n\n{notes}\n"


def write_markdown(comparison: Comparison, path: Path) -> None:
    """Write the table as a Markdown file."""
    path.write_text(markdown(comparison), encoding="utf-8")


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write the table as CSV of plain numbers; what is not known is empty.

    A setting that is called as a measure is, such as ``agents``, is ``config.agents``.
    """
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        numbers = [_numbers(row, comparison.target) for row in comparison.rows]
        keys = [f"config.{key}" if key in numbers[0] else key for key in comparison.keys]
        writer.writerow([*keys, *numbers[0]])
        for row, values in zip(comparison.rows, numbers, strict=True):
            writer.writerow([*(row.settings[key] for key in comparison.keys), *values.values()])


def _columns(comparison: Comparison) -> list[Column]:
    target, lasso = comparison.target, LASSO in comparison.keys
    to_target: list[Column] = [] if target is None else [(f"to {target:g}", _reached)]
    off: Column = ("filters off", lambda row: _number(row.mean("filters_off"), ".1%"))
    partial = any(run.agents < run.num_agents for row in comparison.rows for run in row.runs)
    fewer: list[Column] = [("agents", _agents)] if partial else []
    return [
        ("seeds", lambda row: str(len(row.runs))),
        (comparison.metric.name, _result),
        *fewer,
        ("sd over agents", lambda row: _number(row.mean("agent_sd"), ".4f")),
        ("worst tenth", lambda row: _number(row.mean("worst_tenth"), ".4f")),
        ("best (round)", _best),
        ("links", lambda row: human_bytes(row.mean("link_bytes"))),
        *to_target,
        *([off] if lasso else []),
        ("bits per weight", lambda row: _number(row.mean("bits_per_weight"), ".3g")),
        ("busiest agent", lambda row: human_bytes(row.mean("busiest_bytes"))),
        ("images", lambda row: _number(row.mean("images"), ",.0f")),
        ("seconds", lambda row: _number(row.mean("seconds"), ".1f")),
    ]


def _filled(note: str, words: dict[str, str]) -> str:
    for word, text in words.items():
        note = note.replace(word, text)
    return note


def _result(row: Row) -> str:
    sd = row.sd("result")
    return _number(row.mean("result"), ".4f") + ("" if sd is None else f" ± {sd:.4f}")


def _agents(row: Row) -> str:
    least = min(row.runs, key=lambda run: run.agents - run.num_agents)
    return of_agents(least.agents, least.num_agents).removesuffix(" agents")


def _best(row: Row) -> str:
    best = row.best()
    return "-" if best is None else f"{best[1]:.4f} ({best[0]})"


def _reached(row: Row) -> str:
    reached = [run.target_bytes for run in row.runs if run.target_bytes is not None]
    if len(reached) == len(row.runs):
        return human_bytes(row.mean("target_bytes"))
    return (
        f"not reached ({len(reached)} of {len(row.runs)} seeds did)" if reached else "not reached"
    )


def _numbers(row: Row, target: float | None) -> dict[str, Any]:
    best_round, best = row.best() or (None, None)
    reached = sum(run.target_bytes is not None for run in row.runs)
    main = row.runs[0].metric.name.replace("-", "_")
    return {
        "seeds": len(row.runs),
        f"{main}_mean": row.mean("result"),
        f"{main}_sd": row.sd("result"),
        "agents": min(run.agents for run in row.runs),
        "num_agents": max(run.num_agents for run in row.runs),
        "agent_sd": row.mean("agent_sd"),
        "worst_tenth": row.mean("worst_tenth"),
        f"best_{main}": best,
        "best_round": best_round,
        "link_bytes": row.mean("link_bytes"),
        "target_bytes": row.mean("target_bytes"),
        "seeds_reaching_target": None if target is None else reached,
        "filters_off": row.mean("filters_off"),
        "bits_per_weight": row.mean("bits_per_weight"),
        "busiest_agent_bytes": row.mean("busiest_bytes"),
        "images_per_agent": row.mean("images"),
        "seconds": row.mean("seconds"),
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _escaped(text: str) -> str:
    return _ACTIVE.sub(r"\\\g<0>", text).replace("\n", " ")
