"""Networks of the reference setting, in plain torch."""

from typing import Any

import torch
from torch import Tensor, nn

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


def local_response_norm(x: Tensor, *, size: int, alpha: float) -> Tensor:
    """Local response norm over channels: ``x * (1 + alpha/size * Σ x²)^(-3/4)``.

    x is [batch, channels, *space].

    The window of channel c covers ``c - size//2 .. c + (size-1)//2``:
    torch.nn.LocalResponseNorm with k = 1 and beta = 0.75, to float32 rounding (not bit
    for bit), in a tenth of its time on a CPU (benchmarks/).
    """
    result: Tensor = _LocalResponseNorm.apply(x, size, alpha)
    return result


class _LocalResponseNorm(torch.autograd.Function):
    """Local response norm with its gradient; d = 1 + alpha/size * window(x²)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float) -> Tensor:
        d = (
            _window_sum(x.square(), before=size // 2, after=(size - 1) // 2)
            .mul_(alpha / size)
            .add_(1.0)
        )
        root = d.rsqrt()
        scale = root.sqrt().mul_(root)  # d^(-3/4)
        ctx.save_for_backward(x, d, scale)
        ctx.size, ctx.alpha = size, alpha
        return x * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        x, d, scale = ctx.saved_tensors
        through_x = grads[0] * scale
        pull = (through_x * x).div_(d)  # dL/dd up to the factor -3/4
        # the window, mirrored
        pull = _window_sum(pull, before=(ctx.size - 1) // 2, after=ctx.size // 2)
        return through_x.addcmul_(x, pull, value=-1.5 * ctx.alpha / ctx.size), None, None


def _window_sum(values: Tensor, *, before: int, after: int) -> Tensor:
    total = values.clone()
    for shift in range(1, before + 1):
        total[:, shift:] += values[:, :-shift]
    for shift in range(1, after + 1):
        total[:, :-shift] += values[:, shift:]
    return total
