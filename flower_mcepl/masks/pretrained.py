"""Pretrained weights: a state dict from a file or a hub in place of a module's own."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from flower_mcepl.config.checks import check
from flower_mcepl.config.patterns import best_key, matches_any
from flower_mcepl.errors import ConfigError
from flower_mcepl.masks.copying import own_copy

FILE, TORCHVISION, TIMM = "file", "torchvision", "timm"
SCHEMES = (FILE, TORCHVISION, TIMM)
SAFETENSORS, PICKLED = (".safetensors",), (".pt", ".pth", ".bin")
NAMED = 5  # tensors of each kind that an error names
WRAPPED = "module."  # what DataParallel puts before every name

State = Mapping[str, Tensor]


def check_source(source: str) -> None:
    """Raise ConfigError unless ``source`` says where weights come from.

    ``"file:/absolute/path.safetensors"`` (or ``.pt``, ``.pth``, ``.bin``),
    ``"torchvision:resnet18/IMAGENET1K_V1"``, or ``"timm:NAME"``.
    """
    scheme, _, name = source.partition(":")
    check(
        scheme in SCHEMES and bool(name),
        'weights must be "file:/path/to/state_dict.safetensors", '
        '"torchvision:NAME/WEIGHTS" or "timm:NAME"',
        source,
    )
    if scheme == FILE:
        path = Path(name)
        check(
            path.is_absolute() or name.startswith("~"),
            "the file of weights must be an absolute path, as each run has a working directory of "
            "its own",
            source,
        )
        check(
            path.suffix in SAFETENSORS + PICKLED,
            f"the file of weights must end in {', '.join(SAFETENSORS + PICKLED)}",
            source,
        )
    else:
        # timm would take "hf-hub:any/repository", which is no name of its own
        check(
            ":" not in name and name.count("/") <= (scheme == TORCHVISION),
            f"weights of {scheme} are named as it lists them",
            source,
        )


def load_weights(
    module: nn.Module, source: str, *, excepted: Sequence[str] = ()
) -> tuple[nn.Module, str]:
    """Copy of a module with the tensors of a state dict, and where they come from.

    Every parameter and buffer is replaced by the tensor of its name, cast to its dtype.

    Parameters
    ----------
    module : nn.Module
        The network as from `shared_module`; it stays as it is.
    source : str
        See `check_source`.
    excepted : sequence of str (default: none)
        Names or patterns, such as ``"fc*"``, of tensors that stay as the module has
        them, whatever the state dict holds of that name.

    Returns
    -------
    tuple
        The copy; and a text such as ``"file 5d41402abc4b2a76"``, the same wherever the
        same weights lie: for a file the first 16 hex characters of its blake2b digest
        of 128 bits (``b2sum -l 128``).

    Raises
    ------
    ConfigError
        If the source cannot be read, a tensor is missing, unexpected or has another
        shape, kind or no finite values, or a pattern fits no name.
    """
    check_source(source)
    scheme, _, name = source.partition(":")
    state, origin = _read_file(name) if scheme == FILE else _fetch(scheme, name)
    return with_state(module, state, source=source, excepted=excepted), origin


def with_state(
    module: nn.Module, state: State, *, source: str, excepted: Sequence[str] = ()
) -> nn.Module:
    """Copy of a module with the tensors of ``state``; see `load_weights`."""
    made = own_copy(module)
    own = {k: v for k, v in made.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    state = _unwrapped(state, own)
    for pattern in excepted:
        check(
            matches_any(pattern, [*own, *state]),
            "each pattern of weights-except must fit a tensor of the network or of the weights",
            pattern,
            f"The network's are {_some([*own])}.",
        )
    wanted = {k: v for k, v in own.items() if best_key(k, excepted) is None}
    given = {k: v for k, v in state.items() if best_key(k, excepted) is None}
    _check_same_tensors(wanted, given, source)
    with torch.no_grad():
        for name, tensor in given.items():
            wanted[name].copy_(tensor)
    _check_values(wanted, given, source)
    return made


def _unwrapped(state: State, own: State) -> State:
    """Take away what DataParallel puts before every name."""
    if not state or any(name.startswith(WRAPPED) for name in own):
        return state
    if not all(name.startswith(WRAPPED) for name in state):
        return state
    return {name.removeprefix(WRAPPED): tensor for name, tensor in state.items()}


def _check_same_tensors(wanted: State, given: State, source: str) -> None:
    both = wanted.keys() & given.keys()
    # safetensors writes a tensor that two layers share once
    covered = {id(wanted[name]) for name in both}
    wrong = {
        "missing": [k for k, v in wanted.items() if k not in given and id(v) not in covered],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} for {tuple(wanted[name].shape)}"
            for name in wanted
            if name in both and given[name].shape != wanted[name].shape
        ],
        "of another kind": [
            f"{name} {given[name].dtype} for {wanted[name].dtype}"
            for name in wanted
            if name in both and _kind(given[name]) != _kind(wanted[name])
        ],
    }
    if any(wrong.values()):
        differences = "; ".join(f"{kind}: {_some(names)}" for kind, names in wrong.items() if names)
        raise ConfigError(
            f"weights must hold every tensor of the network by name and shape, and no other; "
            f"{source!r} does not: {differences}. Use the weights of this network, or let what is "
            "to stay random, such as a head for other classes, out by name or pattern: "
            'weights-except = "fc*".'
        )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _check_values(wanted: State, given: State, source: str) -> None:
    """Check the network's tensors as they are now, after the cast to its dtypes."""
    for name, tensor in given.items():
        own = wanted[name].detach()
        check(
            bool(own.isfinite().all()),
            f"weights must be finite in the network's dtype, {own.dtype}; some of {name} are "
            "infinite or not a number",
            source,
        )
        check(
            torch.equal(own, tensor.to(own.device, own.dtype)),
            f"weights must agree where layers share a tensor; {name} has another value than its "
            "other name",
            source,
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _read_file(name: str) -> tuple[State, str]:
    path = Path(name).expanduser()
    check(path.is_file(), "the file of weights must exist, on each device", str(path))
    try:
        content = path.read_bytes()
        state = (
            safetensors.torch.load(content)
            if path.suffix in SAFETENSORS
            # weights_only: a pickle can run code
            else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        )
    except Exception as error:  # whatever the readers raise on a file that is none of theirs
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{path} must be a state dict, as safetensors or saved by torch with tensors alone; "
            f"reading it raised {type(error).__name__}: {reason[:200]}. Write it with "
            "safetensors.torch.save_file(module.state_dict(), path)."
        ) from error
    return _checked_state(state, str(path)), f"{FILE} {_digest(content)}"


def _checked_state(state: Any, source: str) -> State:
    """The state dict, where it is one of tensors."""
    check(isinstance(state, Mapping), "weights must be a state dict", type(state).__name__)
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ConfigError(
            f"weights must be tensors by name; {source} has other entries: {_some(others)}. Save "
            "the network's state_dict() itself, not what it stands in."
        )
    return dict(state)


def _fetch(scheme: str, name: str) -> tuple[State, str]:
    """State dict of a hub's network."""
    try:
        state = _from_torchvision(name) if scheme == TORCHVISION else _from_timm(name)
    except ModuleNotFoundError as error:
        way = 'pip install "flower-mcepl[vision]"' if scheme == TORCHVISION else "pip install timm"
        raise ConfigError(
            f'weights = "{scheme}:..." need {error.name}, which is not installed: {way}.'
        ) from error
    except Exception as error:  # unknown names, and whatever a download raises
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the weights {scheme}:{name} cannot be had: {type(error).__name__}: {reason[:200]}. "
            "Check the name and the network, or give a file."
        ) from error
    tensors = {key: tensor.contiguous() for key, tensor in _checked_state(state, name).items()}
    return tensors, f"{scheme}:{name} {_digest(safetensors.torch.save(tensors))}"


def _from_torchvision(name: str) -> Any:
    from torchvision import models

    network, _, weights = name.partition("/")
    return models.get_model_weights(network)[weights or "DEFAULT"].get_state_dict(
        progress=False, check_hash=True
    )


def _from_timm(name: str) -> Any:
    import timm  # type: ignore[import-not-found,unused-ignore]

    return timm.create_model(name, pretrained=True).state_dict()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()[:16]
