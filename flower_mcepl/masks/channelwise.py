"""Layers and functions of torch that treat every channel alone.

Their output at a channel depends on that channel's input, so a channel may be left out
before them.
"""

import operator
from typing import Any

import torch
from torch import nn

_F = nn.functional

ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Identity),
)
# elementwise, but which random number an element gets depends on the others
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
# with zeros around what they average: a constant channel does not stay constant
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ELEMENTWISE_CALLS: set[Any] = {
    *(_F.relu, _F.relu6, _F.leaky_relu, _F.elu, _F.selu, _F.celu, _F.gelu, _F.silu, _F.mish),
    *(_F.tanh, _F.sigmoid, _F.hardtanh, _F.hardswish, _F.hardsigmoid, _F.softplus),
    *(torch.relu, torch.tanh, torch.sigmoid),
    *("relu", "relu_", "tanh", "sigmoid", "contiguous"),
}
DROPOUT_CALLS: set[Any] = {_F.dropout}
POOL_CALLS: set[Any] = {
    *(_F.max_pool1d, _F.max_pool2d, _F.max_pool3d),
    *(_F.adaptive_avg_pool1d, _F.adaptive_avg_pool2d, _F.adaptive_avg_pool3d),
}
AVERAGE_POOL_CALLS: set[Any] = {_F.avg_pool1d, _F.avg_pool2d, _F.avg_pool3d}
# each channel by numbers of its own, which are the layer's
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FLATTENS: set[Any] = {torch.flatten, "flatten"}
MEANS: set[Any] = {torch.mean, "mean"}
BINARY: set[Any] = {
    *(operator.add, operator.iadd, torch.add, "add", "add_"),
    *(operator.mul, operator.imul, torch.mul, "mul", "mul_"),
}
