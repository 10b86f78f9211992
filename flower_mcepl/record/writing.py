"""The run record: a folder that says how to repeat a run and what came of it.

::

    runs/20260131-141500-ring/
    ├── config.json    everything needed to repeat the run, versions included
    ├── rounds.jsonl   one line per agent and evaluated round
    ├── relay.jsonl    one line per round: what the relay saw
    ├── traffic.jsonl  one line per round: frames and bytes over every link and uplink
    ├── summary.json   written once, at the end; a killed run has none
    ├── agents/        agent-0003.safetensors ...: final states, in simulation only
    ├── checkpoint/    what a run that breaks off is resumed from; gone when it has finished
    └── frames/        00017-agent-0003.frame ...: every frame, where that was asked for

Every file is standard JSON: a number that is not finite is written as ``null``. Lines
are flushed one by one, whole files replaced in one step, so a killed run leaves a
record that :func:`read_run` still reads. All counters (bytes, seconds) are totals since
the start of the run. ``docs/run-record.md`` lists every field.
"""

import json
import math
import platform
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, final

from flower_mcepl.errors import ConfigError, RecordError
from flower_mcepl.files.atomic import replace_file

CONFIG, SUMMARY, AGENTS, FRAMES = "config.json", "summary.json", "agents", "frames"
ROUNDS, RELAY, TRAFFIC = "rounds.jsonl", "relay.jsonl", "traffic.jsonl"
STATUSES = ("finished", "interrupted", "failed")
_COUNTERS = ("sent_bytes", "received_bytes", "uplink_bytes", "seconds")
AGENT_KEYS = ("round", "agent", "accuracy", "loss", "num_examples", "density", *_COUNTERS)
TRAFFIC_KEYS = ("round", "links", "uplinks")
RELAY_KEYS = (
    "round",
    "answered",
    "agents",
    "failed",
    "missing",
    "link_bytes",
    "uplink_bytes",
    "seconds",
)
_PACKAGES = (
    *("flower-mcepl", "torch", "numpy", "networkx", "safetensors", "flwr", "ray"),
    # where they are installed, they may draw the data
    *("torchvision", "flwr-datasets", "datasets", "scikit-learn"),
)

Row = dict[str, Any]


@final
class RunRecord:
    """Write a run record while the run goes on; make one with :meth:`create`."""

    def __init__(self, path: Path, *, with_frames: bool = False) -> None:
        self.path, self.with_frames = path, with_frames
        self._began = time.monotonic()

    @classmethod
    def create(
        cls,
        root: str | Path = "runs",
        *,
        name: str,
        config: Mapping[str, Any],
        path: str | Path | None = None,
        with_frames: bool = False,
    ) -> "RunRecord":
        """Make the folder of a new run and write its ``config.json``.

        Parameters
        ----------
        root
            Folder that collects runs; the record becomes
            ``root/<YYYYmmdd-HHMMSS>-<name>``, with ``-2``, ``-3`` and so on behind it
            where that is taken (default: ``"runs"``).
        name
            What the run is called.
        config
            Everything needed to repeat the run. ``name``, ``started`` and ``versions``
            are added; they replace what is there, so the config of an earlier record
            can be passed as it is.
        path
            Exactly this folder instead of one below `root`; it must be new or empty
            (default: ``None``).
        with_frames
            Keep every frame under ``frames/``, for study (default: ``False``).

        Raises
        ------
        RecordError
            `path` is taken, the folder cannot be written, or `config` holds something
            JSON cannot.
        """
        stamped = {**config, "name": name, "started": utc_now(), "versions": package_versions()}
        text = to_json(stamped, indent=2)
        folder = Path(path).absolute() if path is not None else Path(root).absolute()
        with _writing(folder):
            if path is None:
                folder = _new_folder(folder, name)
            else:
                _claim(folder)
            (folder / RELAY).touch()
            (folder / TRAFFIC).touch()
            _replace(folder / CONFIG, text)
        return cls(folder, with_frames=with_frames)

    def amend_config(self, **more: Any) -> None:
        """Add to ``config.json`` what is known only after the start, such as ``agents``; in one step."""
        with _writing(self.path / CONFIG):
            config = _read_object(self.path / CONFIG)
            _replace(self.path / CONFIG, to_json({**config, **more}, indent=2))

    @property
    def agents_dir(self) -> Path:
        """Folder of the agents' final states; who writes the first one makes it, as a run on devices has none."""
        return self.path / AGENTS

    def log_agents(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append one line per agent to ``rounds.jsonl``; `rows` need every key of ``AGENT_KEYS``."""
        self._append(ROUNDS, rows, AGENT_KEYS)

    def log_round(self, row: Mapping[str, Any]) -> None:
        """Append what the relay saw in one round to ``relay.jsonl``; needs every key of ``RELAY_KEYS``."""
        self._append(RELAY, [row], RELAY_KEYS)

    def log_traffic(self, row: Mapping[str, Any]) -> None:
        """Append one round's frames and bytes to ``traffic.jsonl``; needs every key of ``TRAFFIC_KEYS``."""
        self._append(TRAFFIC, [row], TRAFFIC_KEYS)

    def keep_frames(self, round: int, agent: int, frames: Sequence[bytes]) -> None:
        """Write an agent's frames of one round under ``frames/``, if this record keeps frames."""
        if not self.with_frames or not frames:
            return
        with _writing(self.path / FRAMES):
            (self.path / FRAMES).mkdir(exist_ok=True)
            for kind, frame in zip(("", "-key"), frames, strict=False):
                (self.path / FRAMES / f"{round:05d}-agent-{agent:04d}{kind}.frame").write_bytes(
                    frame
                )

    def finish(self, status: str, **summary: Any) -> None:
        """Write ``summary.json`` in one step; a later call replaces it.

        Parameters
        ----------
        status
            ``"finished"``, ``"interrupted"`` or ``"failed"``.
        **summary
            The other fields; ``seconds`` counts from :meth:`create` where it is not
            given.
        """
        if status not in STATUSES:
            raise ConfigError(f"a run ends with one of {', '.join(STATUSES)}; got {status!r}.")
        seconds = time.monotonic() - self._began
        text = to_json(
            {"status": status, "seconds": seconds, "ended": utc_now(), **summary}, indent=2
        )
        with _writing(self.path / SUMMARY):
            _replace(self.path / SUMMARY, text)

    def _append(self, file: str, rows: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> None:
        lines = []
        for row in rows:
            if absent := [key for key in keys if key not in row]:
                raise RecordError(
                    f"a line of {file} needs {', '.join(keys)}; missing: {', '.join(absent)}."
                )
            lines.append(to_json(row) + "\n")
        # Opened per call: a record holds no handle, so it can be copied into another
        # process.
        with (
            _writing(self.path / file),
            open(self.path / file, "a", encoding="utf-8", buffering=1) as sink,
        ):
            sink.writelines(lines)


@dataclass(frozen=True)
class Run:
    """A run record as it was read."""

    path: Path
    config: Row
    rounds: list[Row]  # lines of rounds.jsonl, in the order they were written
    relay: list[Row]  # lines of relay.jsonl
    summary: Row | None  # None: the run was killed, or is still going on
    agents: dict[int, Path]  # final state of each agent that left one
    truncated: bool = False  # an incomplete last line was dropped

    @property
    def name(self) -> str:
        """What the run is called; the folder's name where the config does not say."""
        return str(self.config.get("name", self.path.name))

    def final(self) -> dict[int, Row]:
        """Last line of each agent, by agent."""
        return _last_rows(self.rounds)

    def curve(self) -> list[tuple[int, float, float, float, float]]:
        """Accuracy over the agents: ``(round, mean, std, worst, best)`` per evaluated round, in order."""
        by_round: dict[int, list[Row]] = {}
        for row in self.rounds:
            by_round.setdefault(row["round"], []).append(row)
        points = ((number, accuracy_summary(by_round[number])) for number in sorted(by_round))
        return [
            (t, s["mean"], s["std"], s["worst"], s["best"])
            for t, s in points
            if s["mean"] is not None
        ]


def read_run(path: str | Path) -> Run:
    """Read a run record, of a finished, a killed or a running run.

    An incomplete last line, as a killed run leaves it, is dropped and shows in
    ``Run.truncated``.

    Raises
    ------
    RecordError
        `path` is no run record, or one of its files is damaged; the message names file
        and line.
    """
    folder = Path(path).absolute()
    if not (folder / CONFIG).is_file():
        raise RecordError(
            f"a run record is a folder with {CONFIG} and {ROUNDS}; {folder} has no {CONFIG}."
        )
    rounds, cut_rounds = _read_lines(folder / ROUNDS, ("round", "agent", "accuracy"))
    relay, cut_relay = _read_lines(folder / RELAY, ("round",))
    return Run(
        path=folder,
        config=_read_object(folder / CONFIG),
        rounds=rounds,
        relay=relay,
        summary=_read_object(folder / SUMMARY) if (folder / SUMMARY).is_file() else None,
        agents=_agent_states(folder / AGENTS),
        truncated=cut_rounds or cut_relay,
    )


def accuracy_summary(rows: Iterable[Mapping[str, Any]]) -> Row:
    """Mean, population standard deviation and extremes over the agents' last lines in `rows`.

    Agents whose accuracy is ``None`` or not finite do not count; with none left every
    value is ``None``. Of equal agents the lowest number is named. ``round`` is the
    latest one among the lines that count.
    """
    last = _last_rows(rows)
    scores = {
        agent: float(row["accuracy"])
        for agent, row in sorted(last.items())
        if _is_finite(row["accuracy"])
    }
    if not scores:
        return dict.fromkeys(("mean", "std", "worst", "worst_agent", "best", "best_agent", "round"))
    worst, best = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    return {
        "mean": statistics.fmean(scores.values()),
        "std": statistics.pstdev(scores.values()),
        "worst": scores[worst],
        "worst_agent": worst,
        "best": scores[best],
        "best_agent": best,
        "round": max(int(last[agent]["round"]) for agent in scores),
    }


def _last_rows(rows: Iterable[Mapping[str, Any]]) -> dict[int, Row]:
    last: dict[int, Row] = {}
    for row in rows:
        agent = int(row["agent"])
        if agent not in last or row["round"] >= last[agent]["round"]:
            last[agent] = dict(row)
    return dict(sorted(last.items()))


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


# --- folders and files ---


def _new_folder(root: Path, name: str) -> Path:
    # mkdir is atomic: of two runs that start in the same second, one gets the suffix.
    label = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{label}"
    root.mkdir(parents=True, exist_ok=True)
    attempt = 1
    while True:
        folder = root / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            attempt += 1
            continue
        _claim(folder)
        return folder


def _claim(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise RecordError(
            f"a run record needs a new or empty folder; {folder} is not empty. Choose another path."
        )
    open(folder / ROUNDS, "x").close()  # exclusive: a second run with the same path stops here


def _replace(path: Path, text: str) -> None:
    replace_file(path, text.encode(), b"\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(f"cannot write the run record at {path}: {error}") from error


def _read_lines(path: Path, keys: Sequence[str]) -> tuple[list[Row], bool]:
    if not path.exists():
        return [], False
    # tail: what follows the last line's end, usually nothing
    *lines, tail = path.read_bytes().split(b"\n")
    rows = [
        _parse(line, f"{path}, line {number}", keys) for number, line in enumerate(lines, start=1)
    ]
    if tail:
        try:
            rows.append(_parse(tail, str(path), keys))
        except RecordError:
            return rows, True
    return rows, False


def _read_object(path: Path) -> Row:
    return _parse(path.read_bytes(), str(path), ())


def _parse(text: bytes, where: str, keys: Sequence[str]) -> Row:
    try:
        value = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise RecordError(f"{where} is damaged: {error}") from error
    if not isinstance(value, dict) or any(key not in value for key in keys):
        needed = f" with {', '.join(keys)}" if keys else ""
        raise RecordError(f"{where} is damaged: expected a JSON object{needed}, got {text[:60]!r}.")
    return value


def _agent_states(folder: Path) -> dict[int, Path]:
    names = {
        file: re.fullmatch(r"agent-(\d+)\.safetensors", file.name)
        for file in folder.glob("agent-*")
    }
    return dict(sorted((int(match[1]), file) for file, match in names.items() if match))


# --- values ---


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Write a value of a run record as standard JSON; a number that is not finite becomes ``null``."""
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """Turn `value` into what standard JSON can hold."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays, tensors
        return _plain(value.tolist())
    raise RecordError(f"a run record holds JSON values; got {type(value).__name__}: {value!r:.60}.")


def utc_now() -> str:
    """Return the time as records tell it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that matter to a run."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
