"""Cutting of layers: without some of their outputs, or of their inputs.

What a layer computes for the outputs that stay is the same. Every function changes the
module that it is given.
"""

import torch
from torch import Tensor, fx, nn

from flower_mcepl.personal.liveness import Value
from flower_mcepl.personal.operations import columns_of
from flower_mcepl.personal.places import PlacedNorm, Refilled


def features_of(channels: list[int], factor: int) -> list[int]:
    """Features of these channels, so many each."""
    return [channel * factor + k for channel in channels for k in range(factor)]


def keep_rows(layer: nn.Module, keep: list[int]) -> None:
    """Make these outputs alone."""
    assert isinstance(layer.weight, Tensor)
    layer.weight = fixed(layer.weight[keep])
    if isinstance(layer.bias, Tensor):
        layer.bias = fixed(layer.bias[keep])
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(keep))


def keep_columns(layer: nn.Module, value: Value, keep: list[int], carrier: int | None) -> None:
    """Read these inputs alone; what the others were goes into the bias.

    With a carrier, an input that is constant and stays, it goes into that one's
    weights: at the border of an image, where zeros lie around, a bias would not do.
    """
    assert isinstance(layer.weight, Tensor)
    gone = torch.ones(len(value.constant), dtype=torch.bool)
    gone[keep] = False
    constant = torch.where(gone, value.constant.nan_to_num(0.0), 0.0)
    columns = columns_of(layer)
    if carrier is None:
        _add_to_bias(layer, (columns.sum(2) * constant).sum(1))
    else:
        carried = (columns * constant[:, None]).sum(1) / value.constant[carrier]
        kernel = columns[:, carrier] + carried
        layer.weight = fixed(layer.weight)
        layer.weight[:, carrier] = kernel.to(layer.weight.dtype).view_as(layer.weight[:, carrier])
    layer.weight = fixed(layer.weight[:, keep])
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(keep))


def _add_to_bias(layer: nn.Module, added: Tensor) -> None:
    if bool((added != 0).any()):
        assert isinstance(layer.weight, Tensor)
        bias = layer.bias.double() if isinstance(layer.bias, Tensor) else 0.0
        layer.bias = fixed((bias + added).to(layer.weight.dtype))


def keep_passed(module: nn.Module, keep: list[int]) -> None:
    """Let these features alone through a norm or a grouped convolution."""
    if isinstance(module, nn.GroupNorm):
        _keep_group_norm(module, keep)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        _keep_batch_norm(module, keep)
    else:
        _keep_groups(module, keep)


def _keep_group_norm(norm: nn.GroupNorm, keep: list[int]) -> None:
    norm.num_groups = norm.num_groups * len(keep) // norm.num_channels
    norm.num_channels = len(keep)
    _keep_affine(norm, keep)


def _keep_batch_norm(norm: nn.Module, keep: list[int]) -> None:
    _keep_affine(norm, keep)
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[keep].clone())
    norm.num_features = len(keep)  # type: ignore[assignment]


def _keep_affine(norm: nn.Module, keep: list[int]) -> None:
    for name in ("weight", "bias"):
        tensor = getattr(norm, name)
        if tensor is not None:
            setattr(norm, name, fixed(tensor[keep]))


def _keep_groups(layer: nn.Module, keep: list[int]) -> None:
    """Groups of a convolution: with their inputs, which are whole, go their outputs."""
    inputs, outputs, groups = (
        int(getattr(layer, name)) for name in ("in_channels", "out_channels", "groups")
    )
    stay = sorted({feature // (inputs // groups) for feature in keep})
    keep_rows(layer, features_of(stay, outputs // groups))
    layer.in_channels, layer.groups = len(keep), len(stay)  # type: ignore[assignment]


def put_norm(traced: fx.GraphModule, node: fx.Node, placed: PlacedNorm) -> None:
    """Let a node call this norm."""
    name = str(node.target) if node.op == "call_module" else f"placed_{node.name}"
    traced.add_submodule(name, placed)
    source = node.all_input_nodes[0]
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}


def refill(traced: fx.GraphModule, node: fx.Node, layer: nn.Module, constant: Tensor) -> None:
    """Make the outputs alone that are not constant, and put the others back."""
    stay = constant.isnan().nonzero().flatten().tolist() or [0]
    keep_rows(layer, stay)
    name = f"refilled_{node.name}"
    assert isinstance(layer.weight, Tensor)
    traced.add_submodule(name, Refilled(stay, constant.to(layer.weight.dtype)))
    with traced.graph.inserting_after(node):
        whole = traced.graph.call_module(name, (node,))
    node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)


def fixed(tensor: Tensor) -> nn.Parameter:
    """A parameter of its own, without a gradient."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
