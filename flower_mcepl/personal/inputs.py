"""Inputs of a network from files: arrays as they are, images by mean and deviation."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.config.extras import needs_extra
from flower_mcepl.errors import DataError

PIXELS = "pixels"  # fact of a file: mean and std, by which images become inputs
ARRAYS = (".npy", ".npz")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_MODES = ("L", "RGB", "P")  # whose values are 0..255, or name such
Shape = tuple[int, ...]


def examples(
    paths: Iterable[Path], shape: Shape | None, pixels: Mapping[str, Any] | None
) -> Iterator[tuple[str, Tensor]]:
    """Name and input of each example of files and folders.

    Parameters
    ----------
    paths : paths
        Files, or folders of them.
    shape : tuple of int or None
        Shape of one example, without the batch; None: nobody knows it, and the first
        axis of an array is the batch.
    pixels : mapping or None
        ``mean`` and ``std`` of images, as numbers for each channel or one for all.

    Raises
    ------
    DataError
        If a file is of no known kind, cannot be read, or has another shape.
    """
    for path in _files(paths):
        if path.suffix.lower() in IMAGES:
            yield str(path), _image(path, shape, pixels)
        else:
            for name, array in _arrays(path):
                yield from _rows(name, array, shape)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    known = (*ARRAYS, *IMAGES)
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
            if not inside:
                raise DataError(f"{path} holds no file ending in {', '.join(known)}. Name another.")
            yield from inside
        elif path.suffix.lower() in known:
            yield path
        else:
            raise DataError(f"inputs are files ending in {', '.join(known)}; got {path.name}.")


def _arrays(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    try:
        with path.open("rb") as file:  # which NumPy leaves open if an archive is damaged
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                yield str(path), loaded
                return
            for name in loaded.files:
                yield f"{path}:{name}", loaded[name]
    except (OSError, ValueError, EOFError, MemoryError, BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is no readable array of numbers ({error}).") from error


def _rows(name: str, array: NDArray[Any], shape: Shape | None) -> Iterator[tuple[str, Tensor]]:
    """Examples of an array, which is one or a batch of them."""
    if array.dtype.kind not in "fiub" or (shape is None and not array.ndim):
        raise DataError(f"{name} must hold numbers; got {array.dtype}.")
    tensor = torch.from_numpy(np.ascontiguousarray(array, _known_to_torch(array.dtype)))
    if shape is not None:
        tensor = tensor if tensor.is_floating_point() else tensor.float()
        if tuple(tensor.shape) == shape:
            yield name, tensor
            return
        if tuple(tensor.shape[1:]) != shape:
            raise DataError(
                f"{name} must be one input of shape {shape}, or a batch of them; got "
                f"{tuple(tensor.shape)}. Prepare it as the app's data function does."
            )
    for number, row in enumerate(tensor):
        yield f"{name}[{number}]", row


def _known_to_torch(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The same numbers in this machine's byte order, floats in 64 bits at most."""
    wide = dtype.kind == "f" and dtype.itemsize > 8
    return np.dtype(np.float64) if wide else dtype.newbyteorder("=")


# What a network learned from are not pixels but what its data function made of them.
# Nobody but the user knows; a guess would give confident nonsense.
def _image(path: Path, shape: Shape | None, pixels: Mapping[str, Any] | None) -> Tensor:
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(
            f"an image becomes an input of 1 or 3 channels; the network takes {shape}. Save "
            f"{path.name} as an array (.npy), as the app's data function prepares it."
        )
    if not pixels:
        raise DataError(
            "the pixels of an image must become what the network learned from, and the file does "
            "not say how. Say it with --mean and --std, as the app's data function has them: "
            "(pixel in 0..1 - mean) / std; or pass arrays (.npy) that it prepared."
        )
    with needs_extra("vision", what="images"):
        from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            _check_pixels(path, image)
            upright = ImageOps.exif_transpose(image)
            values = np.asarray(upright.convert("RGB" if shape[0] == 3 else "L"), np.float32) / 255
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable image ({error}).") from error
    size = values.shape[:2]
    if size != shape[1:]:
        raise DataError(
            f"an image must have the network's size, {shape[1]} x {shape[2]} pixels; {path.name} "
            f"has {size[0]} x {size[1]}. Scale it first."
        )
    mean, std = (_by_channel(pixels, key, shape[0]) for key in ("mean", "std"))
    tensor = torch.from_numpy(values).reshape(*size, shape[0]).permute(2, 0, 1)
    return (tensor - mean) / std


# Pillow converts any mode to any other: 16 bits and floats by cutting them off at 255,
# transparent pixels to the color that happens to lie below.
def _check_pixels(path: Path, image: Any) -> None:
    """Refuse images that are not one picture of opaque pixels of 8 bits a channel."""
    pages = getattr(image, "n_frames", 1)
    if image.mode not in _MODES:
        what = f"of Pillow's mode {image.mode}"
    elif "transparency" in image.info:
        what = f"of mode {image.mode} with transparent pixels"
    elif pages > 1:
        what = f"a file of {pages} pages"
    else:
        return
    raise DataError(
        "an image must be one picture of opaque pixels of 8 bits, gray, in color or with a palette "
        f"(Pillow's modes {', '.join(_MODES)}); {path.name} is {what}. Save it as an array (.npy), "
        "as the app's data function prepares it."
    )


def _by_channel(pixels: Mapping[str, Any], key: str, channels: int) -> Tensor:
    try:
        numbers = [float(number) for number in pixels[key]]
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"the file says how pixels become inputs by no lists of numbers, mean and std "
            f"({error!r:.200}). Say it with --mean and --std."
        ) from error
    if len(numbers) not in (1, channels):
        raise DataError(f"the {key} of pixels is 1 number or {channels}; got {len(numbers)}.")
    return torch.tensor(numbers).reshape(-1, 1, 1)
