"""Text in any encoding: characters that it lacks are spelled otherwise.

A Windows console that is redirected writes cp1252 or cp437, a C locale ASCII. Python's
own answer to a character that these lack is a UnicodeEncodeError in the middle of a
table.
"""

import codecs
import io
import sys
from collections.abc import Callable

_SPELLED = {
    "±": "+/-",
    "…": "...",
    "×": "x",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    **dict.fromkeys("–—─━", "-"),
    **dict.fromkeys("│┃├┤", "|"),
    **dict.fromkeys("┌┐└┘┬┴┼", "+"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
}
_HANDLER = "flower_mcepl.spelled"


def spell_unknown() -> None:
    r"""Spell what the standard streams lack: ``±`` as ``+/-``, ``ä`` as ``\xe4``.

    For programs, whose streams are their own; a library leaves its caller's streams
    alone (`any_encoding`).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's are not, and write everything
            stream.reconfigure(errors=_HANDLER)


def any_encoding(log: Callable[[str], object]) -> Callable[[str], None]:
    """Return `log` for any encoding: a line that it cannot write comes in ASCII."""

    def write(line: str) -> None:
        try:
            log(line)
        except UnicodeEncodeError:  # which names a code page "charmap", whichever it is
            log(spelled(line))

    return write


def spelled(text: str) -> str:
    """Return a text in ASCII, with everything else spelled."""
    return text.encode("ascii", _HANDLER).decode("ascii")


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Spell the first character that cannot be encoded; a handler for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    escaped = character.encode("ascii", "backslashreplace").decode()
    return _SPELLED.get(character, escaped), error.start + 1


codecs.register_error(_HANDLER, _spell)
