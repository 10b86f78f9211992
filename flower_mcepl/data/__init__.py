"""What an agent learns from: batches, splits, who holds what."""

from flower_mcepl.data.batches import EVALUATED, AgentData, BatchSource, class_counts
from flower_mcepl.data.cache import cached_tensors
from flower_mcepl.data.partition import Indices, Partition
from flower_mcepl.data.splits import DATA_KEYS, DataSettings, OwnSplits, own_splits, own_tests

__all__ = [
    "DATA_KEYS",
    "EVALUATED",
    "AgentData",
    "BatchSource",
    "DataSettings",
    "Indices",
    "OwnSplits",
    "Partition",
    "cached_tensors",
    "class_counts",
    "own_splits",
    "own_tests",
]
