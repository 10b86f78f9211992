"""Pretrain the network on the digits 0 to 4, all in one place, in half a minute.

    python examples/pretrained/pretrain.py [FILE]

The same torch release writes the same file, bit for bit.
"""

import sys
from pathlib import Path

import safetensors.torch
import torch
from mcepl_pretrained.task import FIRST_NEW, Net, digits
from torch import Tensor, nn

from flower_mcepl import shared_module

FILE = "~/.cache/flower_mcepl/digits-0-4.safetensors"
TURNS = 4  # quarters by which a digit may be turned


def pretrain(path: Path, *, steps: int = 600) -> float:
    """Write the state dict of a trained network; return its accuracy in the end.

    A turned digit is a class of its own, so that the body learns more of shapes than
    what tells five digits apart; the head is not used again.
    """
    torch.set_num_threads(1)
    net = shared_module(lambda: Net(num_classes=TURNS * FIRST_NEW), seed=0)
    images, labels = digits(new=False)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    right = []
    for _ in range(steps):
        chosen = torch.randint(len(labels), (64,), generator=generator)
        turns = torch.randint(TURNS, (64,), generator=generator)
        inputs = turned(shifted(images[chosen], generator), turns)
        targets = labels[chosen] + FIRST_NEW * turns
        outputs = net(inputs)
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs, targets).backward()
        optimizer.step()
        schedule.step()
        right.append((outputs.argmax(1) == targets).float().mean().item())
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(net.state_dict(), path)
    return sum(right[-50:]) / 50


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images shifted by at most one pixel, all alike."""
    left, top = torch.randint(3, (2,), generator=generator).tolist()
    framed = nn.functional.pad(images, (1, 1, 1, 1), value=-1)
    return framed[..., left : left + 8, top : top + 8]


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Images turned by so many quarters."""
    pairs = zip(images, turns.tolist(), strict=True)
    return torch.stack([image.rot90(turn, (1, 2)) for image, turn in pairs])


def main() -> None:
    """Write the file that the command names, or `FILE`."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else FILE).expanduser()
    accuracy = pretrain(path)
    print(f"{path}: {accuracy:.2f} of the last batches, turned digits of 0 to 4, right")


if __name__ == "__main__":
    main()
