"""Names in settings and what they stand for, built-in or added by installed packages.

A package of somebody else adds an entry by an entry point in its ``pyproject.toml``::

    [project.entry-points."flower_mcepl.topologies"]
    lattice = "my_package.lattice:LATTICE"

No app has to import it: the name works wherever the package is installed, in every
process. ``docs/extending.md`` shows one example of each group.
"""

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from typing import Generic, TypeVar, final

from flower_mcepl.errors import ConfigError, FlowerMceplError

T = TypeVar("T")


@final
class Registry(Mapping[str, T], Generic[T]):
    """The entries of one group by name; each is loaded when it is first asked for.

    Iterating gives the names and loads nothing.

    Parameters
    ----------
    group : str
        The group of entry points, such as ``"flower_mcepl.algorithms"``.
    kind : type
        What every entry must be an instance of.
    built_in : mapping
        Name to an object reference ``"module:attribute"``, in the order of the list.
    noun : str
        What an entry is called in an error, such as ``"algorithm"``.
    error : type of FlowerMceplError (default: ConfigError)
        The error of a name that is unknown, or whose entry cannot be used.
    """

    def __init__(
        self,
        group: str,
        kind: type[T],
        built_in: Mapping[str, str],
        *,
        noun: str,
        error: type[FlowerMceplError] = ConfigError,
    ) -> None:
        self.group, self.noun = group, noun
        self._kind, self._error = kind, error
        self._built_in = {
            name: metadata.EntryPoint(name, reference, group)
            for name, reference in built_in.items()
        }
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise KeyError(name)
        return self.find(name)

    def find(self, name: str) -> T:
        """Return the entry of that name.

        Raises
        ------
        ConfigError (or the registry's own error)
            If there is no such name, two packages give it, or what it stands for cannot
            be loaded or is something else.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def package(self, name: str) -> str | None:
        """Name of the package that adds an entry; None for a built-in one.

        Raises
        ------
        ConfigError (or the registry's own error)
            If there is no such name, or two packages give it.
        """
        entry = self._entry_point(name)
        return None if entry.dist is None else entry.dist.name

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in _installed(self.group)

    def __iter__(self) -> Iterator[str]:
        installed = sorted(_installed(self.group).keys() - self._built_in.keys())
        return iter((*self._built_in, *installed))

    def __len__(self) -> int:
        return len(self._built_in.keys() | _installed(self.group).keys())

    def _load(self, name: str) -> T:
        entry = self._entry_point(name)
        try:
            value = entry.load()
        except Exception as error:  # whatever the other package's import raises
            raise self._error(
                f"the {self.noun} {name!r} cannot be loaded from {_origin(entry)}: "
                f"{type(error).__name__}: {error}. Mend or uninstall that package."
            ) from error
        if not isinstance(value, self._kind):
            raise self._error(
                f"an entry of {self.group} must be a {self._kind.__name__}; {name!r} from "
                f"{_origin(entry)} is a {type(value).__name__}. Mend that package "
                "(docs/extending.md)."
            )
        return value

    def _entry_point(self, name: str) -> metadata.EntryPoint:
        """The one entry point of that name; two of them are refused."""
        own = [self._built_in[name]] if name in self._built_in else []
        candidates = [*own, *_installed(self.group).get(name, ())]
        if not candidates:
            close = difflib.get_close_matches(str(name).lower(), self, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise self._error(
                f"unknown {self.noun} {name!r}; known: {', '.join(self) or 'none'}.{hint}"
            )
        if len(candidates) > 1:
            raise self._error(
                f"{self.noun} names must be unique; {name!r} comes from "
                f"{' and from '.join(sorted(map(_origin, candidates)))}. "
                "Uninstall one of these packages."
            )
        return candidates[0]


@cache
def _installed(group: str) -> dict[str, tuple[metadata.EntryPoint, ...]]:
    """The entry points of installed packages by name, read once in a process."""
    entries: dict[str, tuple[metadata.EntryPoint, ...]] = {}
    for entry in metadata.entry_points(group=group):
        if entry not in entries.get(entry.name, ()):  # one package may be on the path twice
            entries[entry.name] = (*entries.get(entry.name, ()), entry)
    return entries


def _origin(entry: metadata.EntryPoint) -> str:
    package = f"package {entry.dist.name}" if entry.dist is not None else "flower_mcepl"
    return f"{package} ({entry.value})"
