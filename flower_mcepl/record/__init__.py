"""The run record: writing, reading, and its figures."""

from flower_mcepl.record.writing import Run, RunRecord, accuracy_summary, read_run

__all__ = ["Run", "RunRecord", "accuracy_summary", "read_run"]
