"""Networks of the reference setting, in plain torch, and networks in stages."""

import copy
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl.errors import ConfigError

LRN_SIZE = 4
LRN_ALPHAS = (2e-5, 1e-4, 1e-4)


class AlexNetCifar(nn.Module):
    """The "AlexNet-CIFAR" of the paper: images [batch, 3, 32, 32] to 10 logits.

    It has 1,227,328 maskable weights at width 1.

    Parameters
    ----------
    num_classes : int (default: 10)
        Number of logits.
    width : float (default: 1.0)
        Factor on the number of channels and hidden units.
    """

    def __init__(self, *, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        first, second, third, hidden = (max(1, round(width * size)) for size in (64, 128, 256, 192))
        self.conv1 = nn.Conv2d(3, first, 5, padding=1, bias=False)
        self.conv2 = nn.Conv2d(first, second, 5, padding=1, bias=False)
        self.conv3 = nn.Conv2d(second, third, 5, padding=1, bias=False)
        self.fc1 = nn.Linear(third * 4, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes]; the paper's network puts an ELU on them, too."""
        for conv, alpha, pad in zip(
            (self.conv1, self.conv2, self.conv3), LRN_ALPHAS, (0, 0, 1), strict=True
        ):
            x = local_response_norm(nn.functional.elu(conv(x)), size=LRN_SIZE, alpha=alpha)
            x = nn.functional.max_pool2d(x, 3, stride=2, padding=pad)
        return nn.functional.elu(self.fc2(nn.functional.elu(self.fc1(x.flatten(1)))))


@final
class Staged(nn.Module):
    """A network of stages in a row, each with a small exit head of its own.

    Agents of different depth hold different first parts of it (key ``depth``). An agent
    of depth D has the stages 1 to D and the exit of the last of them; the outputs are
    those of that exit.

    Parameters
    ----------
    stages : sequence of nn.Module
        Each takes what the one before it gives, the first one the network's input.
    exits : sequence of nn.Module
        One for each stage: from what the stage gives to the network's outputs.

    Raises
    ------
    ConfigError
        Unless there are as many exits as stages, and at least one.

    Examples
    --------
    >>> net = Staged(
    ...     [nn.Linear(8, 4), nn.Linear(4, 4)], exits=[nn.Linear(4, 3), nn.Linear(4, 3)]
    ... )
    >>> [name for name, _ in net.at_depth(1).named_parameters() if "weight" in name]
    ['stages.0.weight', 'exits.0.weight']
    """

    def __init__(self, stages: Sequence[nn.Module], exits: Sequence[nn.Module]) -> None:
        super().__init__()
        if not stages or len(stages) != len(exits):
            raise ConfigError(
                "a staged network has one exit for each stage, and at least one stage; got "
                f"{len(stages)} stages and {len(exits)} exits. Give each stage a head."
            )
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleDict({str(place): head for place, head in enumerate(exits)})

    @property
    def num_stages(self) -> int:
        """Number of its stages."""
        return len(self.stages)

    @property
    def is_part(self) -> bool:
        """Whether it comes from `at_depth`, without the exits of other depths."""
        return len(self.exits) < len(self.stages)

    def forward(self, x: Any) -> Any:
        """Outputs of the last stage's exit."""
        for stage in self.stages:
            x = stage(x)
        return self.exits[str(len(self.stages) - 1)](x)

    # Names are the same at every depth, so that a weight is known by its name to all
    # who hold it: the exit of stage D is called exits.D-1 whether others are there or
    # not.
    def at_depth(self, depth: int) -> "Staged":
        """Network of the first ``depth`` stages and their exit, of the same modules.

        Raises
        ------
        ConfigError
            If there are fewer stages, or it has no exit there.
        """
        name, part = str(depth - 1), copy.copy(self)
        if name not in self.exits:
            raise ConfigError(
                f"depth is a number of stages, and this network has {self.num_stages}, with exits "
                f"of {', '.join(str(int(place) + 1) for place in self.exits)}; got {depth}. Use "
                "one of these, or 0 for all stages."
            )
        exits = nn.ModuleDict({name: self.exits[name]})
        part._modules = {"stages": self.stages[:depth], "exits": exits}
        return part


def local_response_norm(x: Tensor, *, size: int, alpha: float) -> Tensor:
    """Local response norm over channels: ``x * (1 + alpha/size * Σ x²)^(-3/4)``.

    x is [batch, channels, *space].

    The window of channel c covers ``c - size//2 .. c + (size-1)//2``:
    torch.nn.LocalResponseNorm with k = 1 and beta = 0.75, to float32 rounding (not bit
    for bit), in a tenth of its time on a CPU (benchmarks/).
    """
    result: Tensor = _LocalResponseNorm.apply(x, size, alpha)[0]
    return result


class _LocalResponseNorm(torch.autograd.Function):
    """Local response norm with its gradient; d = 1 + alpha/size * window(x²)."""

    @staticmethod
    def forward(x: Tensor, size: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        d = (
            _window_sum(x.square(), before=size // 2, after=(size - 1) // 2)
            .mul_(alpha / size)
            .add_(1.0)
        )
        root = d.rsqrt()
        scale = root.sqrt().mul_(root)  # d^(-3/4)
        return x * scale, d, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.size, ctx.alpha = inputs
        _, d, scale = output
        ctx.save_for_backward(x, d, scale)
        ctx.mark_non_differentiable(d, scale)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        x, d, scale = ctx.saved_tensors
        if grads[0] is None:
            return None, None, None
        through_x = grads[0] * scale
        pull = (through_x * x).div_(d)  # dL/dd up to the factor -3/4
        # the window, mirrored
        pull = _window_sum(pull, before=(ctx.size - 1) // 2, after=ctx.size // 2)
        return through_x.addcmul_(x, pull, value=-1.5 * ctx.alpha / ctx.size), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, size: int, alpha: float) -> Any:
        """Take the agents of a stack as more examples of one batch."""
        stack = x.movedim(in_dims[0], 0)
        parts = _LocalResponseNorm.apply(stack.flatten(0, 1), size, alpha)
        return tuple(part.unflatten(0, stack.shape[:2]) for part in parts), (0, 0, 0)


def _window_sum(values: Tensor, *, before: int, after: int) -> Tensor:
    total = values.clone()
    for shift in range(1, before + 1):
        total[:, shift:] += values[:, :-shift]
    for shift in range(1, after + 1):
        total[:, :-shift] += values[:, shift:]
    return total
