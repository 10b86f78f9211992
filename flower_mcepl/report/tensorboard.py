"""Run records as TensorBoard scalars, of finished runs and of those that go on."""

from datetime import datetime
from pathlib import Path
from typing import Any, final

from flower_mcepl.errors import ConfigError
from flower_mcepl.record.layout import Row
from flower_mcepl.record.metric import MainMetric, metric_summary
from flower_mcepl.record.reading import Run, read_run

SPREAD = ("mean", "std", "worst", "best")
BYTES = {"link_bytes": "links", "local_bytes": "local", "uplink_bytes": "uplinks"}


@final
class ScalarWriter:
    """Writer of a record's scalars into an event folder; `update` adds the new rounds.

    The step is the round. Written are ``accuracy/mean``, ``std``, ``worst``, ``best``
    over the agents, ``loss/mean``, ``agents/3`` (accuracy of agent 3), and
    ``bytes/links`` and ``bytes/uplinks`` (and ``bytes/local``, between agents of one
    node), totals since the start. Of another task its main metric stands in place of
    the accuracy, and the others as ``mae/mean``.

    Parameters
    ----------
    record : Path
        A run record.
    folder : Path
        Folder of its event file; event files of an earlier call in it are replaced.

    Raises
    ------
    ConfigError
        If tensorboard is not installed.
    RecordError
        If `record` is no run record.
    """

    def __init__(self, record: Path, folder: Path) -> None:
        self.record = record
        self._began = _timestamp(read_run(record).started)
        self._rounds: set[int] = set()
        self._relay = 0
        writer = _event_writer()
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = writer(folder)

    def update(self) -> Run:
        """Write what is new, and return the record; a started evaluation waits."""
        run = read_run(self.record)
        rounds = run.by_round()
        newest = max(rounds, default=0)
        for round in sorted(rounds.keys() - self._rounds):
            if round < newest or run.summary is not None:
                self._rounds.add(round)
                self._write_round(round, rounds[round], run.metric)
        for row in run.relay[self._relay :]:
            for key, name in BYTES.items():
                self._add(f"bytes/{name}", row.get(key), row)
        self._relay = len(run.relay)
        self._events.flush()
        return run

    def close(self) -> None:
        """Close the event file."""
        self._events.close()

    def _write_round(self, round: int, rows: list[Row], metric: MainMetric) -> None:
        whole = metric_summary(rows, metric)
        last = max(rows, key=lambda row: float(row.get("seconds") or 0))
        for name in SPREAD:
            self._add(f"{metric.name}/{name}", whole[name], last)
        further = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
        for name in ("loss", *further):
            values = [MainMetric(name).value(row) for row in rows]
            known = [value for value in values if value is not None]
            if known and name != metric.name:
                self._add(f"{name}/mean", sum(known) / len(known), last)
        for row in rows:
            self._add(f"agents/{row['agent']}", metric.value(row), row)

    def _add(self, tag: str, value: Any, row: Row) -> None:
        if value is not None:
            when = self._began + float(row.get("seconds") or 0)
            self._events.add_scalar(tag, value, global_step=int(row["round"]), walltime=when)


def _timestamp(started: str) -> float:
    return datetime.fromisoformat(started).timestamp() if started else 0.0


def _event_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "TensorBoard scalars need the package tensorboard. Install it: pip install "
            '"flower-mcepl[tensorboard]".'
        ) from None
    return SummaryWriter
