"""An agent's state as groups of tensors: ``group/layer`` are the names in an `AgentState`."""

from collections.abc import Mapping

from torch import Tensor

from flower_mcepl.errors import StateError

Shapes = Mapping[str, tuple[int, ...]]


def join_groups(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return copies on the CPU of all tensors, under names such as ``scores/fc.weight``."""
    return {
        f"{group}/{name}": tensor.detach().cpu().clone()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def split_groups(tensors: Mapping[str, Tensor], *, device: str) -> dict[str, dict[str, Tensor]]:
    """Undo `join_groups`, with all tensors on ``device``; a group without tensors is absent."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor.to(device)
    return groups


def check_group(
    groups: Mapping[str, Mapping[str, Tensor]],
    group: str,
    full: Shapes,
    *,
    whose: str,
    may_be_absent: bool,
) -> None:
    """Check that a group holds exactly the tensors that it must hold.

    Raises
    ------
    StateError
        If a tensor is missing, superfluous or has another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in groups.get(group, {}).items()}
    if shapes != full and (shapes or not may_be_absent):
        raise StateError(
            f"the saved state of {whose} is incomplete: its {group} must hold {full}; "
            f"got {shapes}. Use another copy, or start afresh without it."
        )
