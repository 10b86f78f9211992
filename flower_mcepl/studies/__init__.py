"""Studies: many runs of one app from one file, and tables over their run records."""

from flower_mcepl.record.pools import find_records
from flower_mcepl.report.compare import Comparison, compare
from flower_mcepl.studies.chosen import evaluate_best
from flower_mcepl.studies.runner import Outcome, run_study
from flower_mcepl.studies.study import PlannedRun, Study, read_study

__all__ = [
    "Comparison",
    "Outcome",
    "PlannedRun",
    "Study",
    "compare",
    "evaluate_best",
    "find_records",
    "read_study",
    "run_study",
]
