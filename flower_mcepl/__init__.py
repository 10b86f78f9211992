"""Personal models by mask gossip: decentralized learning in few bytes, on Flower.

Every agent holds the same frozen random network and learns a binary mask over it;
agents exchange masks with their neighbors in a graph, far less than one bit per weight,
fuse them, and fine-tune towards their own data.

The Flower sides are imported on their own: ``flower_mcepl.strategies`` (the relay) and
``flower_mcepl.clients`` (one agent inside a ClientApp). This package never loads
Flower, Ray or torchvision, and torch with the first name that needs it.
"""

import importlib
from typing import TYPE_CHECKING

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
    IncompleteRunError,
    LaunchError,
    LostWorkerError,
    MissingReferenceError,
    RecordError,
    ReplayedFrameError,
    RosterError,
    StateError,
    TopologyError,
    TruncatedFrameError,
    UnsupportedLayerError,
)

if TYPE_CHECKING:
    from flower_mcepl.agents import Agent, MceplAgent, MceplConfig
    from flower_mcepl.data.batches import AgentData
    from flower_mcepl.masks.formulas import aggregate_scores, group_lasso, neighbor_step, topk_mask
    from flower_mcepl.masks.model import MaskedModel, shared_module
    from flower_mcepl.models import Staged
    from flower_mcepl.personal.reading import load_personal
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
    "IncompleteRunError",
    "LaunchError",
    "LostWorkerError",
    "MaskedModel",
    "MceplAgent",
    "MceplConfig",
    "MissingReferenceError",
    "RecordError",
    "ReplayedFrameError",
    "RosterError",
    "RunRecord",
    "Staged",
    "StateError",
    "Topology",
    "TopologyError",
    "TruncatedFrameError",
    "UnsupportedLayerError",
    "aggregate_scores",
    "decode_frame",
    "encode_frame",
    "group_lasso",
    "load_personal",
    "neighbor_step",
    "read_run",
    "shared_module",
    "simulate",
    "topk_mask",
]

__version__: str

# names that load torch, or are not needed by a command: imported when first asked for
_LAZY = {
    "agents": ("Agent", "MceplAgent", "MceplConfig"),
    "data.batches": ("AgentData",),
    "masks.formulas": ("aggregate_scores", "group_lasso", "neighbor_step", "topk_mask"),
    "masks.model": ("MaskedModel", "shared_module"),
    "models": ("Staged",),
    "personal.reading": ("load_personal",),
    "record.reading": ("read_run",),
    "record.writing": ("RunRecord",),
    "runs.simulation": ("simulate",),
    "topology": ("Topology",),
    "wire": ("decode_frame", "encode_frame"),
}

if not TYPE_CHECKING:  # a type checker would take every name for one that is here

    def __getattr__(name: str) -> object:
        """Import a public name or its room when it is first asked for (PEP 562)."""
        if name == "__version__":
            from importlib.metadata import version

            return version("flower-mcepl")
        for module, names in _LAZY.items():
            if name in names:
                value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
                return globals().setdefault(name, value)
            if name == module.partition(".")[0]:
                return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
