"""The run record: writing, reading, and its figures."""

from flower_mcepl.record.accuracy import accuracy_summary
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.writing import RunRecord

__all__ = ["Run", "RunRecord", "accuracy_summary", "read_run"]
