"""Other networks for images [batch, 1, 8, 8]: small relatives of the known ones.

As in the first network, weights stay random under masks: norms keep the signal alive,
and nothing begins at zero where it has to learn.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import Tensor, nn
from torchvision.models import MobileNetV2, VisionTransformer
from torchvision.models.resnet import BasicBlock

from flower_mcepl import Staged
from flower_mcepl.errors import ConfigError

GROUPS = 8  # of channels, for the group norm
MOBILE_BLOCKS = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 2, 1]]

Norm = Callable[[int], nn.Module]


class Shortcut(nn.Module):
    """Every second pixel, and zeros for new channels: a shortcut without weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, 2 * channels, height / 2, width / 2]."""
        half = x.shape[1] // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, x.shape[1] - half))


def resnet8(norm: Norm, width: float = 1.0) -> nn.Module:
    """ResNet-20's little brother: one block of two convolutions a stage."""
    planes = GROUPS * max(1, round(2 * width))
    body = nn.Sequential(
        nn.Conv2d(1, planes, 3, padding=1, bias=False),
        norm(planes),
        nn.ReLU(),
        BasicBlock(planes, planes, norm_layer=norm),
        BasicBlock(planes, 2 * planes, 2, Shortcut(), norm_layer=norm),
        BasicBlock(2 * planes, 4 * planes, 2, Shortcut(), norm_layer=norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    net = nn.Sequential()
    net.body, net.head = body, nn.Linear(4 * planes, 10)
    return net


def mobilenet(width: float = 1.0) -> nn.Module:
    """MobileNetV2 of seven blocks, for small gray images."""
    net = MobileNetV2(num_classes=10, width_mult=width, inverted_residual_setting=MOBILE_BLOCKS)
    stem = net.features[0]
    stem[0] = nn.Conv2d(1, stem[0].out_channels, 3, padding=1, bias=False)
    return net


def vit(width: float = 1.0) -> nn.Module:
    """A vision transformer of two layers over 16 patches of 2 pixels.

    torchvision begins the head at zero, over which no mask can learn, and positions at
    a size that only learning makes visible: here both are drawn at the size of what
    they meet.
    """
    heads = max(1, round(2 * width))
    dim = 32 * heads
    net = VisionTransformer(
        image_size=8,
        patch_size=2,
        num_layers=2,
        num_heads=heads,
        hidden_dim=dim,
        mlp_dim=2 * dim,
        num_classes=10,
    )
    net.conv_proj = nn.Conv2d(1, dim, 2, stride=2)
    nn.init.kaiming_uniform_(net.heads.head.weight, nonlinearity="linear")
    nn.init.normal_(net.encoder.pos_embedding, std=0.5)
    return net


def staged(width: float = 1.0) -> Staged:
    """Four stages of a convolution each, with linear exits, for agents of any depth."""
    sizes = [GROUPS * max(1, round(width * size / GROUPS)) for size in (32, 64, 64, 128)]
    stages, exits = [], []
    for place, (inputs, planes) in enumerate(pairwise([1, *sizes])):
        stage = nn.Sequential(
            nn.Conv2d(inputs, planes, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, planes, affine=False),
            nn.ELU(),
        )
        if place % 2 == 0:
            stage.append(nn.MaxPool2d(2))
        stages.append(stage)
        exits.append(
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * planes, 10))
        )
    net = Staged(stages, exits)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    return net


def group_norm(channels: int) -> nn.GroupNorm:
    """A group norm of `GROUPS` groups."""
    return nn.GroupNorm(GROUPS, channels)


NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "resnet8-groupnorm": partial(resnet8, group_norm),
    "resnet8-batchnorm": partial(resnet8, nn.BatchNorm2d),
    "mobilenetv2": mobilenet,
    "vit": vit,
    "staged": staged,
}


def make_network(name: str, width: float) -> nn.Module:
    """Make a network by its name; ``width`` is a factor on channels."""
    if name not in NETWORKS:
        raise ConfigError(f"network must be one of net, {', '.join(NETWORKS)}; got {name!r}.")
    return NETWORKS[name](width)
