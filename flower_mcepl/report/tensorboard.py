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
        self._rounds: dict[int, int] = {}  # lines of each round that was written
        self._relay = 0
        writer = _event_writer()
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = writer(folder)

    def update(self) -> Run:
        """Write what is new, and return the record; a started evaluation waits.

        A round's evaluation is over when the relay's line of the next round is there.
        An answer that comes later than that has the round's means written once more.
        """
        run = read_run(self.record)
        # time of the answers that the evaluations came with
        ends = {int(line["round"]) - 1: float(line.get("seconds") or 0) for line in run.relay}
        for round, rows in run.by_round().items():
            is_over = round in ends or run.summary is not None
            if is_over and self._rounds.get(round) != len(rows):
                self._rounds[round] = len(rows)
                when = ends.get(round, max(ends.values(), default=0.0))
                self._write_round({"round": round, "seconds": when}, rows, run.metric)
        for row in run.relay[self._relay :]:
            for key, name in BYTES.items():
                self._add(f"bytes/{name}", row.get(key), row)
        # a run that is resumed writes its last lines again
        self._relay = max(self._relay, len(run.relay))
        self._events.flush()
        return run

    def close(self) -> None:
        """Close the event file."""
        self._events.close()

    def _write_round(self, place: Row, rows: list[Row], metric: MainMetric) -> None:
        whole = metric_summary(rows, metric)
        for name in SPREAD:
            self._add(f"{metric.name}/{name}", whole[name], place)
        further = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
        for name in ("loss", *further):
            values = [MainMetric(name).value(row) for row in rows]
            known = [value for value in values if value is not None]
            if known and name != metric.name:
                self._add(f"{name}/mean", sum(known) / len(known), place)
        for row in rows:
            self._add(f"agents/{row['agent']}", metric.value(row), place)

    def _add(self, tag: str, value: Any, place: Row) -> None:
        """Write a value at a round, and the seconds since the run's start."""
        if value is not None:
            when = self._began + float(place.get("seconds") or 0)
            self._events.add_scalar(tag, value, global_step=int(place["round"]), walltime=when)


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
