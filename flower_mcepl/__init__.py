"""Personal models by mask gossip: decentralized, communication-efficient learning on Flower (MCE-PL).

Every agent holds the same frozen random network and learns a binary mask over it;
agents exchange masks with their neighbors in a graph, far less than one bit per weight,
fuse them, and fine-tune towards their own data.

The Flower sides are imported on their own: ``flower_mcepl.strategies`` (the relay) and
``flower_mcepl.clients`` (one agent inside a ClientApp). This package never loads
Flower, Ray or torchvision.
"""

from flower_mcepl.agents import Agent, MceplAgent, MceplConfig
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import (
    AnswerError,
    ConfigError,
    CorruptFrameError,
    DataError,
    DivergedError,
    FingerprintError,
    FlowerMceplError,
    ForeignFrameError,
    FrameError,
    FutureFrameError,
    LaunchError,
    MissingReferenceError,
    RecordError,
    ReplayedFrameError,
    RosterError,
    StateError,
    TopologyError,
    TruncatedFrameError,
    UnsupportedLayerError,
)
from flower_mcepl.masks.formulas import aggregate_scores, group_lasso, neighbor_step, topk_mask
from flower_mcepl.masks.model import MaskedModel, shared_module
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.simulation import simulate
from flower_mcepl.topology import Topology
from flower_mcepl.wire import decode_frame, encode_frame

__all__ = [
    "Agent",
    "AgentData",
    "AnswerError",
    "ConfigError",
    "CorruptFrameError",
    "DataError",
    "DivergedError",
    "FingerprintError",
    "FlowerMceplError",
    "ForeignFrameError",
    "FrameError",
    "FutureFrameError",
    "LaunchError",
    "MaskedModel",
    "MceplAgent",
    "MceplConfig",
    "MissingReferenceError",
    "RecordError",
    "ReplayedFrameError",
    "RosterError",
    "RunRecord",
    "StateError",
    "Topology",
    "TopologyError",
    "TruncatedFrameError",
    "UnsupportedLayerError",
    "aggregate_scores",
    "decode_frame",
    "encode_frame",
    "group_lasso",
    "neighbor_step",
    "read_run",
    "shared_module",
    "simulate",
    "topk_mask",
]
