"""Files and keys of a run record: how to repeat a run, and what came of it.

::

    runs/20260131-141500-ring/
    ├── config.json    everything needed to repeat the run, versions included
    ├── rounds.jsonl   one line per agent and evaluated round
    ├── relay.jsonl    one line per round: what the relay saw
    ├── events.jsonl   one line per event of a run without a barrier; only there
    ├── traffic.jsonl  one line per round: frames and bytes over every link and uplink
    ├── summary.json   written once, at the end; a killed run has none
    ├── failures.txt  whole text of each failure, once; only where there was one
    ├── agents/        agent-0003.safetensors ...: final states, in simulation only;
    │                  agent-0003.mask ...: personal models, where that was asked for
    ├── checkpoint/    what a run is resumed from; gone when it has finished
    └── frames/        00017-agent-0003.frame ...: every frame, where that was asked for

Every file is standard JSON: a number that is not finite is written as ``null``. Lines
are flushed one by one, whole files replaced in one step, so a killed run leaves a
record that `read_run` still reads. All counters (bytes, seconds) are totals since
the start of the run. ``docs/run-record.md`` lists every field.
"""

import re
from pathlib import Path
from typing import Any

CONFIG, SUMMARY, AGENTS, FRAMES = "config.json", "summary.json", "agents", "frames"
FAILURES = "failures.txt"
ROUNDS, RELAY, TRAFFIC = "rounds.jsonl", "relay.jsonl", "traffic.jsonl"
EVENTS = "events.jsonl"
CHECKPOINT = "checkpoint"
STATUSES = ("finished", "incomplete", "interrupted", "failed")

# personal models, by the run-config key ``export``: endings of their files
EXPORTS = {"mask": ".mask", "pt2": ".pt2", "onnx": ".onnx"}

_COUNTERS = ("sent_bytes", "received_bytes", "uplink_bytes", "seconds")
AGENT_KEYS = (
    *("round", "agent", "accuracy", "loss", "num_examples", "density"),
    *_COUNTERS,
)
TRAFFIC_KEYS = ("round", "links", "uplinks")
EVENT_KEYS = ("clock", "answered", "given")
RELAY_KEYS = (
    *("round", "answered", "agents", "failed", "missing"),
    *("link_bytes", "uplink_bytes", "seconds"),
)

Row = dict[str, Any]

_CHECKPOINT_FILE = re.compile(r"round-(\d{6,})\.checkpoint")


def checkpoint_file(round: int) -> str:
    """Name of the file that holds the checkpoint of a round."""
    return f"round-{round:06d}.checkpoint"


def checkpoint_rounds(folder: Path) -> list[int]:
    """Return the rounds of which ``folder`` holds a checkpoint, ascending."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(m[1]) for file in files if (m := _CHECKPOINT_FILE.fullmatch(file.name)))
