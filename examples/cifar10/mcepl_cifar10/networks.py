"""The networks of the study of architectures: images [batch, 3, 32, 32] to 10 logits.

Masks lie over weights that stay random, so each keeps its signal alive by norms, and
none begins at zero where it has to learn: see `vit`.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import Tensor, nn
from torchvision.models import MobileNetV2, VisionTransformer
from torchvision.models.resnet import BasicBlock

from flower_mcepl import Staged
from flower_mcepl.errors import ConfigError
from flower_mcepl.models import AlexNetCifar

GROUPS = 8  # of channels, for the group norm
HEAD_DIM = 32  # of an attention head
# (expansion, channels, blocks, stride of the first): the paper's, less four halvings of
# the image
MOBILE_BLOCKS = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]

Norm = Callable[[int], nn.Module]


class Shortcut(nn.Module):
    """Every second pixel, and zeros for new channels: a shortcut without weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, 2 * channels, height / 2, width / 2]."""
        half = x.shape[1] // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, x.shape[1] - half))


def resnet20(norm: Norm, width: float = 1.0) -> nn.Module:
    """ResNet-20 in its form for CIFAR (He et al. 2016, arXiv:1512.03385)."""
    planes = GROUPS * max(1, round(2 * width))

    def stage(planes: int, *, first: bool = False) -> nn.Sequential:
        entry = (
            BasicBlock(planes, planes, norm_layer=norm)
            if first
            else BasicBlock(planes // 2, planes, 2, Shortcut(), norm_layer=norm)
        )
        rest = (BasicBlock(planes, planes, norm_layer=norm) for _ in range(2))
        return nn.Sequential(entry, *rest)

    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, planes, 3, padding=1, bias=False),
            norm=norm(planes),
            relu=nn.ReLU(),
            stage1=stage(planes, first=True),
            stage2=stage(2 * planes),
            stage3=stage(4 * planes),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(4 * planes, 10),
        )
    )


def mobilenet(width: float = 1.0) -> nn.Module:
    """MobileNetV2 (arXiv:1801.04381) that halves 32 pixels three times, not five."""
    net = MobileNetV2(num_classes=10, width_mult=width, inverted_residual_setting=MOBILE_BLOCKS)
    net.features[0][0].stride = (1, 1)
    return net


def vit(width: float = 1.0) -> nn.Module:
    """A small vision transformer: 64 patches of 4 pixels, four layers.

    torchvision begins the head at zero, over which no mask can learn, and positions at
    a size that only learning makes visible: here both are drawn at the size of what
    they meet.
    """
    heads = max(1, round(4 * width))
    net = VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=4,
        num_heads=heads,
        hidden_dim=HEAD_DIM * heads,
        mlp_dim=2 * HEAD_DIM * heads,
        num_classes=10,
    )
    nn.init.kaiming_uniform_(net.heads.head.weight, nonlinearity="linear")
    nn.init.normal_(net.encoder.pos_embedding, std=0.5)
    return net


def staged(width: float = 1.0) -> Staged:
    """The paper's three convolutions and a fourth as stages, with linear exits.

    Agents of any depth, 1 to 4, hold a part of it.
    """
    sizes = [GROUPS * max(1, round(width * size / GROUPS)) for size in (64, 128, 256, 256)]
    stages, exits = [], []
    for place, (inputs, planes) in enumerate(pairwise([3, *sizes])):
        stage = nn.Sequential(
            nn.Conv2d(inputs, planes, 5 if place < 3 else 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, planes, affine=False),
            nn.ELU(),
        )
        if place < 3:
            stage.append(nn.MaxPool2d(3, stride=2, padding=1))
        stages.append(stage)
        exits.append(
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * planes, 10))
        )
    return Staged(stages, exits)


def group_norm(channels: int) -> nn.GroupNorm:
    """A group norm of `GROUPS` groups."""
    return nn.GroupNorm(GROUPS, channels)


NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "alexnet": lambda width: AlexNetCifar(width=width),
    "resnet20-groupnorm": partial(resnet20, group_norm),
    "resnet20-batchnorm": partial(resnet20, nn.BatchNorm2d),
    "mobilenetv2": mobilenet,
    "vit": vit,
    "staged": staged,
}


def make_network(name: str, width: float) -> nn.Module:
    """Make a network by its name; ``width`` is a factor on channels."""
    if name not in NETWORKS:
        raise ConfigError(f"network must be one of {', '.join(NETWORKS)}; got {name!r}.")
    return NETWORKS[name](width)
