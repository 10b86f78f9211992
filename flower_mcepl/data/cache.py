"""Decoded data on disk, so that not every process decodes them anew.

On a device each message is a process of its own, and in simulation there are several
workers; what they all need, such as images as tensors, is made once and read from then
on.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from flower_mcepl.errors import ConfigError, DataError, StateError
from flower_mcepl.files.atomic import remove_leftovers
from flower_mcepl.files.sealed import DamagedError, Kind, file_lock, read_sealed, write_sealed

TENSORS = Kind(b"FMCETENS", 1, "a cache of tensors")
PATIENCE = 600.0  # seconds to wait for another process that makes the same

_BUSY = "process {process} has been making them for too long."


def cached_tensors(
    folder: str | Path, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors that ``make`` gives, from disk if they were made before.

    Either way they come sorted by name. Other processes that want the same wait until
    they are made, for ten minutes at most. A damaged file is made anew; where nothing
    can be written, what was made is returned all the same. The log says either.

    Parameters
    ----------
    folder : str | Path
        Where the files lie, one for each ``settings``; it is made when needed, and may
        be emptied at any time.
    settings : mapping
        Everything on which the result depends, JSON-able: where the data come from, the
        split, the seed, and a version that you raise when ``make`` changes. Files of
        other settings stay.
    make : callable
        Returns tensors by name; called only where there is no file.

    Raises
    ------
    ConfigError
        If ``settings`` is not JSON-able.
    DataError
        If ``make`` gives anything but tensors by name.

    Examples
    --------
    >>> def decode() -> dict[str, Tensor]: ...
    >>> key = {"data": "cifar10", "split": "test", "version": 1}
    >>> cached_tensors("~/.cache/my-app", key, decode)  # doctest: +SKIP
    """
    try:
        name = json.dumps(dict(settings), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "the settings of cached tensors must be numbers, text, lists and dicts; got "
            f"{dict(settings)!r:.200} ({error}). Give what stands for them, such as a path as "
            "text."
        ) from error
    file = f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.tensors"
    path = Path(folder).expanduser() / file
    tensors = _read(path, name)
    if tensors is not None:
        return tensors
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(
                file_lock(path.with_name(f".{file}.lock"), wait=PATIENCE, busy=_BUSY)
            )
        except (OSError, StateError) as error:
            _warn_unwritten(path, error)
            return _checked(make())
        tensors = _read(path, name)  # another process may have been faster
        if tensors is None:
            tensors = _checked(make())
            _write(path, name, tensors)
    return tensors


def _read(path: Path, name: str) -> dict[str, Tensor] | None:
    try:
        if not path.exists():
            return None
        return _in_order(safetensors.torch.load(bytes(read_sealed(path, TENSORS))))
    except DamagedError as error:
        trouble = f"are damaged: {error}"
    except (OSError, StateError) as error:
        trouble = f"are of no use: {error}"
    getLogger(__name__).warning(
        "the cached tensors %s %s. They are made anew (%s).", path, trouble, name
    )
    return None


def _write(path: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(
            path, safetensors.torch.save(dict(tensors), metadata={"settings": name}), TENSORS
        )
        remove_leftovers(path.parent, path.name)
    except OSError as error:
        _warn_unwritten(path, error)


def _warn_unwritten(path: Path, error: Exception) -> None:
    getLogger(__name__).warning(
        "tensors are not kept in %s, so every process makes them anew: %s", path, error
    )


def _checked(made: object) -> dict[str, Tensor]:
    if not isinstance(made, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in made.items()
    ):
        raise DataError(
            "tensors to be cached must come as a dict of name to tensor; got "
            f"{type(made).__name__}."
        )
    # Copies: no two of them may share memory in the file.
    return _in_order(
        {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in made.items()
        }
    )


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors sorted by name, made or read: a file keeps no order of them."""
    return dict(sorted(tensors.items()))
