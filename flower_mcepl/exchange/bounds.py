"""Bounds of what an evaluation may say; who reads them need load nothing else."""

MOST_METRIC = 1e100  # magnitude of a metric; sums of squares stay finite
MOST_EXAMPLES = 10**15  # readers of a record take no larger number
