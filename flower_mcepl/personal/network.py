"""The network of a personal model: its tensors, its structure, who builds it."""

import hashlib
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, final

from torch import Tensor, nn

from flower_mcepl.errors import ConfigError
from flower_mcepl.masks.model import shared_module
from flower_mcepl.models import Staged
from flower_mcepl.streams import SEEDS

# facts of a file: who builds its network, and how many stages of that it is
NETWORK, DEPTH = "network", "depth"
_WAY_OUT = "Pass the model function: load_personal(path, model_fn)."


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a network, each once, by name, names ascending."""
    both = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: both[name] for name in sorted(both)}


def part_of(module: nn.Module, facts: Mapping[str, Any]) -> nn.Module:
    """The part of a network that a file is of: of one in stages the first few."""
    if not isinstance(module, Staged):
        return module
    depth = facts.get(DEPTH, module.num_stages)
    fits = isinstance(depth, int) and 1 <= depth <= module.num_stages
    return module.at_depth(depth) if fits else module


# What a network draws besides parameters and buffers, such as an order of its inputs in
# a plain attribute, is in no file; the run's seed draws it again.
def seed_of(facts: Mapping[str, Any]) -> int:
    """The seed to build a file's network with: that of its run, where it says one."""
    seed = facts.get("seed")
    return seed if type(seed) is int and 0 <= seed < SEEDS else 0


def structure(module: nn.Module) -> str:
    """16 hex digits that stand for the names and types of all submodules."""
    digest = hashlib.blake2b(digest_size=8)
    for name, submodule in module.named_modules():
        digest.update(f"{name}|{type(submodule).__qualname__}|".encode())
    return digest.hexdigest()


def reference_to(
    build: Callable[..., Any],
    config: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fact of a file that names who builds its network; empty if no file may name it.

    That needs a global name, and to be seen to build networks: a class of them, or a
    function that is called ``model_fn`` or annotated to return one.

    Parameters
    ----------
    build : callable
        A class of networks, or a function that returns one.
    config : mapping, optional
        Arguments by name; values that JSON knows.
    context : mapping, optional
        ``run_config`` and ``node_config`` of a Flower context, the first argument of an
        app's model function.
    """
    module, name = getattr(build, "__module__", ""), getattr(build, "__qualname__", "")
    if not module or "<" in name or module == "__main__" or not _builds_networks(build, module):
        return {}
    known = {"reference": f"{module}:{name}", "config": dict(config or {})}
    return known if context is None else {**known, "context": dict(context)}


def reference_to_app(
    model_fn: Callable[..., Any],
    run_config: Mapping[str, Any],
    node_config: Mapping[str, Any],
) -> dict[str, Any]:
    """Fact of a file that names a Flower app's model function, and what that reads.

    Settings that it does not read stay out: they are of the run and its machine. Empty
    where `reference_to` is, or the function needs more of a context than settings.
    """
    run, node = _Read(run_config), _Read(node_config)
    try:
        shared_module(lambda: model_fn(SimpleNamespace(run_config=run, node_config=node)), seed=0)
    except Exception:  # it needs a context of Flower
        return {}
    return reference_to(model_fn, context={"run_config": run.read(), "node_config": node.read()})


@final
class _Read(dict[str, Any]):
    """Settings that know which of them were read."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._keys: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._keys.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._keys.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._keys.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._keys.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        return self._all().keys()

    def items(self) -> Any:
        return self._all().items()

    def values(self) -> Any:
        return self._all().values()

    def copy(self) -> dict[str, Any]:
        return self._all()

    def __or__(self, other: Any) -> Any:
        return self._all() | other

    def _all(self) -> dict[str, Any]:
        """Plain settings, for who may read any of them."""
        self._keys.update(super().keys())
        return {key: super(_Read, self).__getitem__(key) for key in super().keys()}

    def read(self) -> dict[str, Any]:
        """Those that were read."""
        return {key: value for key, value in super().items() if key in self._keys}


def network_of(facts: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Find the model function that a file names.

    Raises
    ------
    ConfigError
        If it names none, or one that cannot be imported or builds no network.
    """
    fact = facts.get(NETWORK)
    if not isinstance(fact, dict) or not fact.get("reference"):
        raise ConfigError(f"the file does not say who builds its network. {_WAY_OUT}")
    reference, config, context = fact["reference"], fact.get("config", {}), fact.get("context")
    build = _imported(str(reference))
    if not isinstance(config, dict) or not isinstance(context, dict | None):
        raise ConfigError(f"the file's arguments for {reference} are no table. {_WAY_OUT}")
    first = () if context is None else (SimpleNamespace(**context),)
    return partial(_called, build, first, config, str(reference))


def _called(
    build: Callable[..., Any], first: tuple[Any, ...], config: dict[str, Any], reference: str
) -> nn.Module:
    try:
        module = build(*first, **config)
    except Exception as error:  # whatever a stranger's function meets
        raise ConfigError(
            f"{reference}, which the file names, cannot build the network "
            f"({type(error).__name__}: {error}). {_WAY_OUT}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{reference} must return a network; got {type(module)!r}. {_WAY_OUT}")
    return module


# A file names code that is then called with what the file says. `os:system` must not be
# such a name. So it has to be a class of networks, or a function that stands in the
# module named, is called model_fn or is annotated to return a network. What is imported
# must be installed here already, or lie on the path.
def _imported(reference: str) -> Callable[..., Any]:
    module_name, _, name = reference.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
        for part in name.split("."):
            value = getattr(value, part)
    except Exception as error:
        raise ConfigError(
            f"the network of the file is built by {reference}, which cannot be imported here "
            f"({type(error).__name__}: {error}). Put its folder on the path, as predict --app "
            f"FOLDER does, or: {_WAY_OUT}"
        ) from error
    if not _builds_networks(value, module_name):
        raise ConfigError(
            "a file may name a class of torch networks, or a function that is called model_fn or "
            f"is annotated to return one; {reference} is neither. {_WAY_OUT}"
        )
    build: Callable[..., Any] = value
    return build


def _builds_networks(value: object, module_name: str) -> bool:
    if inspect.isclass(value):
        return issubclass(value, nn.Module)
    if not inspect.isfunction(value) or value.__module__ != module_name:
        return False
    try:
        returned = typing.get_type_hints(value).get("return")
    except Exception:  # annotations may name what is not there
        returned = None
    is_network = inspect.isclass(returned) and issubclass(returned, nn.Module)
    return is_network or value.__name__ == "model_fn"
