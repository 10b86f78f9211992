"""Convolutions of 5 x 5 by Winograd's minimal filtering: a third of the products.

An output tile of 4 x 4 takes 8 x 8 products in place of 4 x 4 x 5 x 5 for each pair of
channels, at the price of transforms of input, filter and output. All three are small
matrices, so everything is a matrix product.

Source: Lavin and Gray 2016, arXiv:1509.09308; the matrices are those of Toom and Cook
at the points 0, ±1, ±2, ±1/2 and infinity.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

TILE, KERNEL = 4, 5
_SIDE = TILE + KERNEL - 1  # of the input of a tile, two blocks of TILE
_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)  # and infinity
# below so many channels on either side the transforms cost more than they save
FEWEST_CHANNELS = 32


def fits(x: Tensor, weight: Tensor, *, stride: Any, dilation: Any, groups: int) -> bool:
    """Whether `conv5` computes this convolution, and faster than torch."""
    return (
        x.ndim == 4
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and tuple(weight.shape[2:]) == (KERNEL, KERNEL)
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and _is_one(stride)
        and _is_one(dilation)
        and groups == 1
        and min(x.shape[2:]) >= KERNEL
    )


def conv5(x: Tensor, weight: Tensor, *, padding: tuple[int, int]) -> Tensor:
    """Convolve ``x`` [batch, in, height, width] with ``weight`` [out, in, 5, 5].

    Stride 1, no bias; the result is in channels-last memory. It differs from torch's by
    some 4e-5 times the outputs' deviation, where torch differs from the exact value by
    1e-5.
    """
    result: Tensor = _Conv5.apply(x, weight, padding)
    return result


def _is_one(value: Any) -> bool:
    return bool(value == 1) or value == (1, 1)


# Polynomials of degree 3 and 4 are multiplied by their values at eight points; the
# transpose of that product is the sliding dot product of a filter over a tile's input.
@lru_cache
def _matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms of output [16, 64], filter [64, 25] and input [64, 64], both axes."""
    out, kernel = _powers(TILE).T, _powers(KERNEL)
    tile = torch.linalg.inv(_powers(_SIDE)).T
    scale = tile.abs().sum(dim=1, keepdim=True)  # moved to the filters: less rounding
    return tuple(  # type: ignore[return-value]
        torch.kron(m, m).to(dtype) for m in (out, kernel * scale, tile / scale)
    )


def _powers(size: int) -> Tensor:
    """Values of the monomials ``x^0 .. x^(size - 1)`` at the eight points."""
    rows = [[float(point**power) for power in range(size)] for point in _POINTS]
    return torch.tensor([*rows, [0.0] * (size - 1) + [1.0]], dtype=torch.float64)


# Memory: tiles overlap by half, so an input is cut into blocks of TILE x TILE, and a
# tile's input is 2 x 2 of them. The 64 places of a tile come first, then the tiles,
# then the channels: 64 matrix products of [tiles, in] by [in, out].
class _Conv5(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        out, kernel, tile = _matrices(x.dtype)
        batch, channels, height, width = x.shape
        sizes = (height + 2 * padding[0] - KERNEL + 1, width + 2 * padding[1] - KERNEL + 1)
        rows, columns = (-(-size // TILE) for size in sizes)
        bottom = (rows + 1) * TILE - height - padding[0]
        right = (columns + 1) * TILE - width - padding[1]
        padded = nn.functional.pad(
            x.permute(0, 2, 3, 1), (0, 0, padding[1], right, padding[0], bottom)
        )
        blocks = padded.view(batch, rows + 1, TILE, columns + 1, TILE, channels)
        blocks = blocks.permute(2, 4, 0, 1, 3, 5)
        tiles = x.new_empty(2, TILE, 2, TILE, batch, rows, columns, channels)
        for down in (0, 1):
            for across in (0, 1):
                tiles[down, :, across] = blocks[
                    :, :, :, down : down + rows, across : across + columns
                ]
        inputs = (tile @ tiles.view(_SIDE**2, -1)).view(_SIDE**2, -1, channels)
        filters = (kernel @ weight.reshape(-1, KERNEL**2).T).view(_SIDE**2, -1, channels)
        products = torch.bmm(inputs, filters.transpose(1, 2))
        y = (out @ products.view(_SIDE**2, -1)).view(TILE, TILE, batch, rows, columns, -1)
        y = y.permute(2, 3, 0, 4, 1, 5).reshape(batch, rows * TILE, columns * TILE, -1)
        ctx.save_for_backward(inputs, filters)
        ctx.shape, ctx.padding, ctx.tiles = x.shape, padding, (rows, columns)
        return y[:, : sizes[0], : sizes[1]].permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor, None]:
        (inputs, filters), (rows, columns) = ctx.saved_tensors, ctx.tiles
        out, kernel, _ = _matrices(inputs.dtype)
        grad = grads[0].permute(0, 2, 3, 1)
        batch, height, width, channels_out = grad.shape
        grad = nn.functional.pad(grad, (0, 0, 0, columns * TILE - width, 0, rows * TILE - height))
        grad = grad.reshape(batch, rows, TILE, columns, TILE, channels_out)
        grad = grad.permute(2, 4, 0, 1, 3, 5).reshape(TILE**2, -1)
        products = (out.T @ grad).view(_SIDE**2, -1, channels_out)
        per_filter = torch.bmm(products.transpose(1, 2), inputs)
        weight_grad = (per_filter.view(_SIDE**2, -1).T @ kernel).view(
            channels_out, -1, KERNEL, KERNEL
        )
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _input_gradient(
                torch.bmm(products, filters), ctx.shape, ctx.padding, ctx.tiles
            )
        return x_grad, weight_grad, None


def _input_gradient(
    per_tile: Tensor, shape: torch.Size, padding: tuple[int, int], tiles: tuple[int, int]
) -> Tensor:
    """Add up the gradients of overlapping tiles' inputs [64, tiles, in]."""
    (batch, channels, height, width), (rows, columns) = shape, tiles
    tile = _matrices(per_tile.dtype)[2]
    pieces = (tile.T @ per_tile.view(_SIDE**2, -1)).view(
        2, TILE, 2, TILE, batch, rows, columns, channels
    )
    blocks = per_tile.new_zeros(TILE, TILE, batch, rows + 1, columns + 1, channels)
    for down in (0, 1):
        for across in (0, 1):
            blocks[:, :, :, down : down + rows, across : across + columns] += pieces[
                down, :, across
            ]
    padded = blocks.permute(2, 3, 0, 4, 1, 5).reshape(
        batch, (rows + 1) * TILE, (columns + 1) * TILE, channels
    )
    top, left = padding
    return padded[:, top : top + height, left : left + width].permute(0, 3, 1, 2)
