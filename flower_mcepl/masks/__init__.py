"""The mathematics of masks, and the network that lives under one."""

from flower_mcepl.masks.formulas import (
    aggregate_scores,
    group_lasso,
    neighbor_mean,
    neighbor_step,
    topk_mask,
)
from flower_mcepl.masks.fusion import FUSIONS, Fusion
from flower_mcepl.masks.layers import CONV, LINEAR, LayerSpec, find_maskable, maskable
from flower_mcepl.masks.model import MaskedModel, shared_module
from flower_mcepl.masks.pretrained import load_weights

__all__ = [
    "CONV",
    "FUSIONS",
    "LINEAR",
    "Fusion",
    "LayerSpec",
    "MaskedModel",
    "aggregate_scores",
    "find_maskable",
    "group_lasso",
    "load_weights",
    "maskable",
    "neighbor_mean",
    "neighbor_step",
    "shared_module",
    "topk_mask",
]
