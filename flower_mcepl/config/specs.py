"""Settings of one line, ``name`` or ``name:key=value,key=value``.

Topologies and partitions are named so.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from flower_mcepl.errors import FlowerMceplError

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What the value of one option may be.

    Attributes
    ----------
    read : callable
        Makes the value of its text; raises ``ValueError`` where it cannot.
    noun : str
        What it must be, as in "must be a whole number".
    """

    read: Callable[[str], Any]
    noun: str


@dataclass(frozen=True)
class Spec(Generic[T]):
    """One known name: how to build what it stands for, and which options it has.

    Attributes
    ----------
    build : callable
        Called as ``build(num_agents, seed=seed, **options)`` with the options that were
        given, in snake_case.
    needs, takes : mapping of str to Kind
        The options that must be given, and those that may; names in kebab-case.
    """

    build: Callable[..., T]
    needs: Mapping[str, Kind] = field(default_factory=dict)
    takes: Mapping[str, Kind] = field(default_factory=dict)

    def options(self, name: str, text: str, *, error: type[FlowerMceplError]) -> dict[str, Any]:
        """Read what stands after the colon into keyword arguments of ``build``."""
        pairs = [part.partition("=")[::2] for part in text.split(",")] if text else []
        if text and PATH in self.needs.values():
            pairs = [(key, text) for key in self.needs]  # a path may hold , and =
        options: dict[str, Any] = {}
        for key, value in ((key.strip(), value.strip()) for key, value in pairs):
            kind = lookup({**self.needs, **self.takes}, key, f"parameter of {name}", error=error)
            if key in options:
                raise error(f"{name} takes {key} once; got {text!r}. Leave one out.")
            options[key] = _convert(kind, value, f"{name}:{key}", error)
        if missing := [key for key in self.needs if key not in options]:
            example = ",".join(f"{key}=..." for key in self.needs)
            raise error(
                f"{name} needs {' and '.join(missing)}; got {text!r}. Write '{name}:{example}'."
            )
        return {key.replace("-", "_"): value for key, value in options.items()}


def parse_spec(
    text: str, known: Mapping[str, Spec[T]], *, noun: str, error: type[FlowerMceplError]
) -> tuple[str, Spec[T], dict[str, Any]]:
    """Return the name, its entry in ``known`` and the options of one line.

    ``noun`` says in an error what the line names. An unknown name, an unknown or
    missing option and a value of the wrong kind raise ``error``.
    """
    name, _, rest = str(text).partition(":")
    name = name.strip()
    entry = lookup(known, name, noun, error=error)
    return name, entry, entry.options(name, rest.strip(), error=error)


def lookup(known: Mapping[str, T], name: str, what: str, *, error: type[FlowerMceplError]) -> T:
    """Look up a name; an unknown one is refused with the closest as a hint."""
    if name in known:
        return known[name]
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise error(f"unknown {what} {name!r}; known: {', '.join(sorted(known)) or 'none'}.{hint}")


def one_of(*values: str) -> Kind:
    """Return the kind of a text that is one of several."""

    def read(text: str) -> str:
        if text not in values:
            raise ValueError(text)
        return text

    return Kind(read, f"one of {', '.join(values)}")


def _convert(kind: Kind, text: str, what: str, error: type[FlowerMceplError]) -> Any:
    try:
        return kind.read(text)
    except ValueError:
        raise error(f"{what} must be {kind.noun}; got {text!r}. Write it as key=value.") from None


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(text)
    return number


WHOLE, NUMBER, PATH = Kind(int, "a whole number"), Kind(float, "a number"), Kind(Path, "a path")
COUNT, POSITIVE = Kind(_count, "a whole number >= 1"), Kind(_positive, "a finite number > 0")
