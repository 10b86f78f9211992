"""The run record: writing, reading, and its figures."""

from flower_mcepl.record.metric import MainMetric, metric_summary
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.writing import RunRecord

__all__ = ["MainMetric", "Run", "RunRecord", "metric_summary", "read_run"]
