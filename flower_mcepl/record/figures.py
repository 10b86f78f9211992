"""Figures of one run record: bytes over links, training images, accuracy of the worst."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flower_mcepl.record.layout import Row
from flower_mcepl.record.reading import Run


def link_bytes(run: Run) -> int | None:
    """Return the bytes of payload that went over links: from agent to agent, or both ways between agents and server.

    What agents send to a relay is not in it: it stands for nothing but the links that
    the relay serves.
    """
    counts = (run.summary or {}).get("bytes") or {}
    found: int | None = counts.get("links_total")
    return found + counts["uplink_total"] if found is not None and has_server(run) else found


def sends_nothing(run: Run) -> bool:
    """Tell whether a run, as far as it got, sent no payload at all; False where its record does not say."""
    counts = (run.summary or {}).get("bytes") or {}
    sent = [counts.get("links_total"), counts.get("uplink_total")]
    if run.summary is None and run.relay:
        sent = [run.relay[-1].get("link_bytes"), run.relay[-1].get("uplink_bytes")]
    return sent == [0, 0]


def worst_tenth(accuracies: Iterable[float | None]) -> float | None:
    """Mean of the lowest tenth of the accuracies, at least of one; None where there is none."""
    known = sorted(accuracy for accuracy in accuracies if accuracy is not None)
    return statistics.fmean(known[: math.ceil(len(known) / 10)]) if known else None


def bytes_to(run: Run, target: float) -> int | None:
    """Bytes over the links up to the first evaluated round whose mean accuracy reaches the target."""
    for round, mean, *_ in run.curve():
        if mean >= target:
            return bytes_by_round(run)[round]
    return None


def bytes_by_round(run: Run) -> dict[int, int]:
    """Return the bytes over the links, as in `link_bytes`, from the start to each evaluated round."""
    keys = ("received_bytes", "uplink_bytes") if has_server(run) else ("received_bytes",)
    counts: dict[int, int] = {}
    for row in run.rounds:
        counts[row["round"]] = counts.get(row["round"], 0) + sum(
            int(row.get(key) or 0) for key in keys
        )
    return counts


def has_server(run: Run) -> bool:
    """Whether the run was of a server-based algorithm."""
    return "server" in run.config


def training_images(run: Run) -> float | None:
    """Return how many training images an agent processed, if every agent trained in every round and tells how."""
    rounds = int((run.summary or {}).get("num_rounds", 0))
    trained = [line for line in run.relay if line["round"] <= rounds]
    if len(trained) != rounds or any(
        line.get("answered") != line.get("agents") for line in trained
    ):
        return None
    agents = run.config.get("agents") or []
    counts = [_images_a_round(agent) for agent in agents]
    known = [count for count in counts if count is not None]
    return rounds * statistics.fmean(known) if known and len(known) == len(agents) else None


def _images_a_round(agent: Mapping[str, Any]) -> int | None:
    """Count what `flower_mcepl.data` deals out: shuffled passes; a single last image joins the batch before it."""
    told: Callable[[str], Any] = (agent.get("parameters") or {}).get
    size, batch, steps, epochs = (
        agent.get("num_examples"),
        told("batch_size"),
        told("local_steps"),
        told("local_epochs"),
    )
    if not size or not batch or steps is None:
        return None
    if epochs:
        steps = epochs * math.ceil(size / batch)
    in_a_pass = math.ceil(size / batch) - (size % batch == 1 and size > batch > 1)
    passes, rest = divmod(steps, in_a_pass)
    return int(passes * size + rest * batch)


def evaluated_on(run: Run) -> str:
    """Return which of the agents' splits accuracy and loss are of."""
    return str((run.config.get("run_config") or {}).get("evaluate-on", "test"))


def byte_counts(run: Run) -> Row:
    """Byte counts of the summary; of a run without one, what its last lines say."""
    if run.summary is not None:
        return dict(run.summary.get("bytes") or {})
    last = run.final().values()
    counts = {"links_total": sum(row.get("sent_bytes") or 0 for row in last)}
    counts["uplink_total"] = sum(row.get("uplink_bytes") or 0 for row in last)
    if run.relay:  # the relay writes after every round, the agents only after an evaluated one
        relay = run.relay[-1]
        counts = {"links_total": relay.get("link_bytes"), "uplink_total": relay.get("uplink_bytes")}
    return {key: value for key, value in counts.items() if value}
