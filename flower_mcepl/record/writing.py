"""Writing of run records: lines are flushed, whole files replaced in one step."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, final

from flower_mcepl.errors import ConfigError, RecordError
from flower_mcepl.files.atomic import replace_file
from flower_mcepl.record.layout import (
    AGENT_KEYS,
    AGENTS,
    CONFIG,
    EVENT_KEYS,
    EVENTS,
    FAILURES,
    FRAMES,
    RELAY,
    RELAY_KEYS,
    ROUNDS,
    STATUSES,
    SUMMARY,
    TRAFFIC,
    TRAFFIC_KEYS,
)
from flower_mcepl.record.parsing import read_raw
from flower_mcepl.record.traffic import GroupedTraffic, read_traffic
from flower_mcepl.record.values import package_versions, to_json, utc_now


@final
class RunRecord:
    """Writer of a run record while the run goes on; :meth:`create` makes one."""

    def __init__(self, path: Path, *, with_frames: bool = False) -> None:
        self.path, self.with_frames = path, with_frames
        self._began = time.monotonic()
        self._traffic: GroupedTraffic | None = None  # until the first line is written

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
        """Add to ``config.json`` what is known later, such as ``agents``."""
        with _writing(self.path / CONFIG):
            config = read_raw(self.path / CONFIG)
            _replace(self.path / CONFIG, to_json({**config, **more}, indent=2))

    def refuse_used(self) -> None:
        """Raise RecordError if a run has been written here: a record is of one run."""
        lines = [self.path / file for file in (ROUNDS, RELAY, TRAFFIC, EVENTS)]
        with _writing(self.path):
            used = any(file.exists() and file.stat().st_size for file in lines)
            used = used or (self.path / SUMMARY).exists()
        if used:
            raise RecordError(
                f"a run record is of one run; {self.path} holds one already. Make another with "
                "RunRecord.create, or go on with its run (resume)."
            )

    @property
    def agents_dir(self) -> Path:
        """Folder of the final states, made with the first: devices write none."""
        return self.path / AGENTS

    def log_agents(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append a line an agent to ``rounds.jsonl``, with all of ``AGENT_KEYS``."""
        self._append(ROUNDS, rows, AGENT_KEYS)

    def log_round(self, row: Mapping[str, Any]) -> None:
        """Append a round's line to ``relay.jsonl``, with all of ``RELAY_KEYS``."""
        self._append(RELAY, [row], RELAY_KEYS)

    def log_traffic(self, row: Mapping[str, Any]) -> None:
        """Append a round's line to ``traffic.jsonl``, with all ``TRAFFIC_KEYS``.

        ``links`` and ``local`` are rows as of `Run.traffic`.
        """
        if self._traffic is None:  # of a resumed run: after the lines that there are
            self._traffic = GroupedTraffic()
            for line in read_traffic(self.path):
                self._traffic.packed(line)
        self._append(TRAFFIC, [self._traffic.packed(row)], TRAFFIC_KEYS)

    def log_event(self, row: Mapping[str, Any]) -> None:
        """Append an event's line to ``events.jsonl``, with all of ``EVENT_KEYS``."""
        self._append(EVENTS, [row], EVENT_KEYS)

    def log_failure(self, text: str) -> None:
        """Append the whole text of a failure to ``failures.txt``.

        Its lines after the first are indented: none looks like another failure.
        """
        with _writing(self.path / FAILURES), open(self.path / FAILURES, "ab") as sink:
            indented = text.rstrip().replace("\n", "\n    ")
            sink.write(f"{indented}\n\n".encode(errors="backslashreplace"))

    def failures(self) -> list[str]:
        """First lines of the failures that were written, without round and name."""
        file = self.path / FAILURES
        with _writing(file):
            lines = file.read_bytes().decode(errors="replace").split("\n") if file.exists() else []
        return [line.partition(": ")[2] for line in lines if line and line[0] != " "]

    def keep_frames(self, round: int, agent: int, frames: Sequence[bytes]) -> None:
        """Write an agent's frames of a round under ``frames/``, if they are kept."""
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
            One of `STATUSES`.
        **summary
            The other fields; ``seconds`` counts from :meth:`create` where it is not
            given. ``lines`` is added: how many lines the files have by then, so that it
            shows if one loses some.
        """
        if status not in STATUSES:
            raise ConfigError(f"a run ends with one of {', '.join(STATUSES)}; got {status!r}.")
        seconds = time.monotonic() - self._began
        about = {"status": status, "seconds": seconds, "ended": utc_now(), **summary}
        with _writing(self.path / SUMMARY):
            lines = {file: _count_lines(self.path / file) for file in (ROUNDS, RELAY)}
            text = to_json({**about, "lines": lines}, indent=2)
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
            open(self.path / file, "a", encoding="utf-8", newline="\n", buffering=1) as sink,
        ):
            sink.writelines(lines)


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
    open(folder / ROUNDS, "xb").close()  # exclusive: a second run with the same path stops here


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _replace(path: Path, text: str) -> None:
    replace_file(path, text.encode(), b"\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(f"cannot write the run record at {path}: {error}") from error
