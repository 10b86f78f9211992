"""Copies of networks, whatever they keep in their attributes."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, final

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flower_mcepl.errors import UnsupportedLayerError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def own_copy(module: ModuleT, memo: dict[int, Any] | None = None) -> ModuleT:
    """A deep copy of a network; ``memo`` then holds the copies by ``id``.

    What it keeps of a forward pass, such as feature or attention maps, is copied
    without its history, which torch refuses to copy.

    Raises
    ------
    UnsupportedLayerError
        If it holds something that Python cannot copy.
    """
    try:
        with _WithoutHistory():
            return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedLayerError(
            f"a network must be one that Python can copy, as each agent has its own; copying "
            f"{type(module).__name__} raised {type(error).__name__}: {error!s:.200}. Keep files, "
            "locks, iterators and the like out of its attributes."
        ) from error


@final
class _WithoutHistory(TorchFunctionMode):
    """Context in which a tensor with a history is copied as it is detached."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))
