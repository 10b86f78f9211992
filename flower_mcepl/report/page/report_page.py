"""Page of a study or a run: settings, results as table and pictures, and run by run."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flower_mcepl.record.reading import Run
from flower_mcepl.record.sources import Source
from flower_mcepl.report.compare import compare
from flower_mcepl.report.page.elements import Html, document, element, image, joined, style
from flower_mcepl.report.page.style import CSS
from flower_mcepl.report.plots.gallery import Gallery, Picture, draw_gallery, holdings_by_subject
from flower_mcepl.report.table import agent_table
from flower_mcepl.report.tables import cells, footnotes, titles

_SHORT = 24  # characters of a name or number that stays on one line, though it may have hyphens
_DEFINED = (
    (
        "personalized",
        "of an agent's own model on its own test split (validation split, where the settings say "
        "so). Accuracy: the share of it that is classified correctly",
    ),
    (
        "bytes",
        "payload that crossed the wire, counted on every directed link; headers and key frames "
        "included",
    ),
    ("mask", "one bit for each maskable weight: kept or not. Density: the share of kept weights"),
    (
        "Jaccard index",
        "of two sets: the size of what both hold, divided by the size of what either holds",
    ),
    ("filter off", "an output filter, or neuron, of whose weights the mask keeps none"),
)


def report_page(source: Source) -> str:
    """Page with all pictures that the records allow.

    Raises
    ------
    ConfigError
        If there are several records, and none is finished; or if matplotlib is missing.
    """
    gallery = draw_gallery(source.runs)
    body = joined(
        element("h1", source.name),
        element("p", _lead(source, gallery), class_="lead"),
        *_results(source, gallery),
        *_pictures(gallery),
        *_what_was_run(source),
        *_who_held_what(gallery),
        *_runs(source.runs),
        element("h2", "How the numbers are defined"),
        element(
            "dl",
            *(
                part
                for term, text in _DEFINED
                for part in (element("dt", term), element("dd", text))
            ),
        ),
    )
    return document(
        title=f"{source.name} - flower-mcepl", head=style(CSS), body=element("main", body)
    )


def _lead(source: Source, gallery: Gallery) -> str:
    runs = sum(len(subject.runs) for subject in gallery.subjects)
    days = sorted({run.started[:10] for run in source.runs} - {""})
    when = f", of {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days else ""
    subjects = _count(len(gallery.subjects), "combination")
    return f"{_count(runs, 'run')} of {subjects} of settings{when}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- results ---


def _results(source: Source, gallery: Gallery) -> Iterator[Html]:
    yield element("h2", "Results")
    if len(source.runs) == 1 and not source.runs[0].finished:
        yield element("p", "The run is not finished; what follows is as far as it got.")
        return
    comparison = compare(source.runs, target=source.target)
    yield _table(titles(comparison), cells(comparison), names=len(comparison.keys))
    yield _notes([*footnotes(comparison), *source.notes])


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 0, texts: int = 0
) -> Html:
    """Table whose first columns hold names, the next ones texts, all others numbers."""

    def line(name: str, cells: Sequence[str]) -> Html:
        kinds = ["short" if len(cell) <= _SHORT else "long" for cell in cells]
        kinds[names : names + texts] = ["long"] * texts
        kinds[names + texts :] = [f"number {kind}" for kind in kinds[names + texts :]]
        return element(
            "tr",
            *(element(name, cell, class_=kind) for cell, kind in zip(cells, kinds, strict=True)),
        )

    head = element("thead", line("th", heads))
    body = element("tbody", joined(*(line("td", row) for row in rows)))
    return element("div", element("table", head, body), class_="scroll", tabindex="0")


def _notes(notes: Sequence[str]) -> Html:
    return element("ul", *(element("li", note) for note in notes), class_="notes")


# --- pictures ---


def _pictures(gallery: Gallery) -> Iterator[Html]:
    yield element("h2", "Pictures")
    alone = len(gallery.subjects) == 1
    for picture in gallery.pictures:
        if alone or picture.subject is None:
            yield _figure(picture)
    for place, subject in () if alone else enumerate(gallery.subjects):
        own = [_figure(picture) for picture in gallery.pictures if picture.subject == place]
        if own:
            yield element("details", element("summary", f"Data and masks: {subject.label}"), *own)
    if gallery.missing:
        yield element("h3", "What is not here")
        yield _notes(gallery.missing)


def _figure(picture: Picture) -> Html:
    return element(
        "figure",
        element("h3", picture.title),
        element("div", image(picture.png, alt=f"{picture.title}. {picture.caption}")),
        element("figcaption", picture.caption),
    )


# --- what was run ---


def _what_was_run(source: Source) -> Iterator[Html]:
    yield element("h2", "What was run")
    if source.study is not None:
        yield element("h3", "Study file")
        yield element("pre", source.study, tabindex="0")
    settings = [run.settings for run in source.runs]
    yield _pairs("Settings", ("key", "value", "values in the runs"), settings)
    versions = [run.versions for run in source.runs]
    yield _pairs("Versions", ("package", "version", "versions in the runs"), versions)


def _pairs(title: str, words: tuple[str, str, str], tables: Sequence[Mapping[str, Any]]) -> Html:
    """Value of each key in the runs; all its values where they differ."""
    keys = dict.fromkeys(str(key) for table in tables for key in table)
    values = [list(dict.fromkeys(_text(table.get(key)) for table in tables)) for key in keys]
    if not keys:
        return element("p", f"{title}: the records do not tell.")
    heads = (words[0], words[2] if any(len(texts) > 1 for texts in values) else words[1])
    rows = zip(keys, map(" | ".join, values), strict=True)
    table = _table(heads, rows, names=1, texts=1)
    return element("details", element("summary", title), table)


def _text(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _who_held_what(gallery: Gallery) -> Iterator[Html]:
    for holdings, places in holdings_by_subject(gallery.subjects):
        if holdings is None:
            continue
        everyone = len(places) == len(gallery.subjects)
        of = "" if everyone else f": {'; '.join(gallery.subjects[place].label for place in places)}"
        titles, rows = holdings.table()
        yield element(
            "details",
            element("summary", f"Who held what{of}"),
            _table(titles, rows),
            _notes([holdings.legend()]),
        )


# --- run by run ---


def _runs(runs: Sequence[Run]) -> Iterator[Html]:
    yield element("h2", "Run by run")
    for run in runs:
        config = {
            key: value
            for key, value in run.config.items()
            if key not in ("agents", "topology", "versions")
        }
        yield element(
            "details",
            element("summary", run.path.name),
            element("pre", agent_table(run), tabindex="0"),
            element("pre", json.dumps(config, indent=2, ensure_ascii=False), tabindex="0"),
            open=len(runs) == 1,
        )
