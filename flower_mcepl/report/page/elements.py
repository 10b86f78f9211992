"""HTML in which every text is escaped, unless it was made here."""

import base64
import html
import re
from typing import final

_VOID = frozenset({"img", "meta", "br"})
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]"
)  # what no HTML document may hold


@final
class Html(str):
    """A text that is HTML already; only this module makes any."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | bool) -> Html:
    """HTML element; children that are not `Html`, and all attributes, are escaped.

    An attribute that is True stands without a value, one that is False is left out;
    ``class_`` is ``class``.
    """
    shown = (
        f" {key.rstrip('_')}" + ("" if value is True else f'="{_escaped(str(value))}"')
        for key, value in attributes.items()
        if value is not False
    )
    start = f"<{name}{''.join(shown)}>"
    if name in _VOID:
        return Html(start)
    return Html(f"{start}{''.join(map(_escaped, children))}</{name}>")


def joined(*parts: str) -> Html:
    """Parts one after the other, a line each."""
    return Html("\n".join(map(_escaped, parts)))


def image(png: bytes, *, alt: str) -> Html:
    """PNG that travels inside the page."""
    return element("img", src=f"data:image/png;base64,{base64.b64encode(png).decode()}", alt=alt)


def style(css: str) -> Html:
    """Style sheet; it is our own text, and holds nothing of any record."""
    assert "<" not in css
    return Html(f"<style>\n{css}</style>")


def document(*, title: str, head: Html, body: Html) -> str:
    """Whole HTML5 document."""
    meta = joined(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        head,
    )
    page = element(
        "html",
        Html("\n"),
        element("head", meta),
        Html("\n"),
        element("body", body),
        Html("\n"),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _escaped(text: str) -> str:
    return (
        text
        if isinstance(text, Html)
        else html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))
    )
