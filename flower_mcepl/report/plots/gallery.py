"""All pictures that run records can give, and why the others are missing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flower_mcepl.config.extras import report_extra
from flower_mcepl.record.figures import one_metric
from flower_mcepl.record.metric import MainMetric
from flower_mcepl.record.pools import pool
from flower_mcepl.record.reading import Run
from flower_mcepl.report.final_masks import Masks, all_layers, common_layers, final_masks
from flower_mcepl.report.plots.agreement import agreement_of, classes_of
from flower_mcepl.report.plots.charts import (
    draw_by_bytes,
    draw_by_round,
    draw_spread,
    draw_sweep,
)
from flower_mcepl.report.plots.curves import SEEDS, Curve, curve_of, final_values
from flower_mcepl.report.plots.filter_charts import (
    MOST_LAYERS,
    draw_filters,
    draw_live_filters,
    off_text,
)
from flower_mcepl.report.plots.filters import LayerDensity, filter_densities
from flower_mcepl.report.plots.graph import draw_graphs
from flower_mcepl.report.plots.heat_maps import draw_agreement
from flower_mcepl.report.plots.holding_charts import draw_holdings
from flower_mcepl.report.plots.holdings import Holdings, holdings_of
from flower_mcepl.report.plots.subjects import Subject, subjects_of
from flower_mcepl.report.plots.sweep import Sweep, sweeps_of
from flower_mcepl.streams import torch_threads

_GRAPHS = 12  # graphs in one picture
_MASKS = 12  # combinations whose masks are drawn


@dataclass(frozen=True)
class Picture:
    """One picture."""

    file: str  # name of its PNG
    title: str
    caption: str  # what it shows, and how to read it
    png: bytes
    # place of the subject it is about, where it is not about all of them
    subject: int | None = None


@dataclass
class Gallery:
    """The pictures of some run records."""

    subjects: list[Subject]
    pictures: list[Picture] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # which pictures there are not, and why
    notes: tuple[str, ...] = ()  # which records were left out, and why


def draw_gallery(runs: Sequence[Run]) -> Gallery:
    """Draw everything that the records allow.

    Raises
    ------
    ConfigError
        If there are several records, and none is finished; or if matplotlib is missing.
    """
    with report_extra():
        import matplotlib  # noqa: F401 (missing it is told at once)

    subjects, notes = subjects_of(runs)
    gallery = Gallery(subjects, notes=notes)
    _curves(gallery)
    if len(runs) > 1:
        for sweep in sweeps_of(pool(runs)):
            _sweep(gallery, sweep)
    _spread(gallery)
    _graphs(gallery)
    _holdings(gallery)
    gallery.missing += [
        f"masks of {subject.label}: they are drawn for the first {_MASKS} combinations"
        for subject in subjects[_MASKS:]
    ]
    # more of them gain nothing here, and fight with what else the machine does
    with torch_threads(1):
        for place in range(min(len(subjects), _MASKS)):
            _masks(gallery, place)
    return gallery


def write_gallery(gallery: Gallery, folder: Path) -> list[Path]:
    """Write the pictures as PNGs into a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / picture.file for picture in gallery.pictures]
    for file, picture in zip(files, gallery.pictures, strict=True):
        file.write_bytes(picture.png)
    return files


def _curves(gallery: Gallery) -> None:
    alone = len(gallery.subjects) == 1
    every = [curve_of(subject, alone=alone) for subject in gallery.subjects]
    curves = [curve for curve in every if curve.rounds]
    gallery.missing += [
        f"curves of {curve.label}: no evaluated round that all its seeds have"
        for curve in every
        if not curve.rounds
    ]
    if not curves:
        return
    band, metric = _band(curves), _metric(gallery)
    title = metric.name[:1].upper() + metric.name[1:]
    caption = f"A line for each combination of settings, at the evaluated rounds. {band}"
    gallery.pictures.append(
        Picture(
            f"{_file_name(metric.name)}-rounds.png",
            f"{title} by round",
            caption,
            draw_by_round(curves, metric),
        )
    )
    if not any(any(curve.bytes) for curve in curves):
        gallery.missing.append(f"{metric.name} by bytes: the records tell of no bytes over links")
        return
    caption = (
        "The same against the bytes of payload that had gone over all links by then, or both ways "
        f"between agents and server. A level dotted line sends nothing. {band}"
    )
    gallery.pictures.append(
        Picture(
            f"{_file_name(metric.name)}-bytes.png",
            f"{title} by bytes",
            caption,
            draw_by_bytes(curves, metric),
        )
    )


def _sweep(gallery: Gallery, sweep: Sweep) -> None:
    metric = _metric(gallery)
    gallery.pictures.append(
        Picture(
            f"{_file_name(metric.name)}-by-{_file_name(sweep.key)}.png",
            f"{metric.name[:1].upper() + metric.name[1:]} by {sweep.key}",
            f"The last evaluated round of every run, a line for each combination of the other "
            f"settings, mean over the seeds. The values of {sweep.axis} are equally spaced.",
            draw_sweep(sweep, metric),
        )
    )


def _metric(gallery: Gallery) -> MainMetric:
    return one_metric([run for subject in gallery.subjects for run in subject.runs])


def _band(curves: Sequence[Curve]) -> str:
    over = {curve.over for curve in curves}
    if SEEDS in over:
        return "Mean over the seeds; bands: sample standard deviation over them" + (
            ", where there are several." if None in over else "."
        )
    return "" if over == {None} else "Band: population standard deviation over the agents."


def _spread(gallery: Gallery) -> None:
    spread = []
    for subject in gallery.subjects:
        values = [value for run in subject.runs for value in final_values(run).values()]
        if values:
            spread.append((subject.label, values))
        else:
            gallery.missing.append(
                f"spread over the agents of {subject.label}: no agent was evaluated"
            )
    if spread:
        metric = _metric(gallery)
        caption = (
            f"Every agent's last {metric.name}, of all seeds together. Black: median; box: "
            "quartiles; whiskers: the outermost within 1.5 box widths of it."
        )
        gallery.pictures.append(
            Picture(
                "spread.png",
                "Spread over the agents",
                caption,
                draw_spread(spread, metric),
            )
        )


def _graphs(gallery: Gallery) -> None:
    shown = gallery.subjects[:_GRAPHS]
    gallery.missing += [
        f"graph of {subject.label}: {_GRAPHS} graphs fit into one picture"
        for subject in gallery.subjects[_GRAPHS:]
    ]
    several = len(gallery.subjects) > 1
    caption = f"Agents and links, colored by last {_metric(gallery).name}" + (
        " on one scale; the first seed of each." if several else "."
    )
    picture = draw_graphs([(subject.label, subject.run) for subject in shown])
    gallery.pictures.append(Picture("graph.png", "Communication graph", caption, picture))


def holdings_by_subject(subjects: Sequence[Subject]) -> list[tuple[Holdings | None, list[int]]]:
    """Holdings in the subjects' first runs, each once, with its subjects' places."""
    groups: list[tuple[Holdings | None, list[int]]] = []
    for place, subject in enumerate(subjects):
        holdings = holdings_of(subject.run.handshakes.values())
        alike = [places for other, places in groups if other == holdings]
        if alike:
            alike[0].append(place)
        else:
            groups.append((holdings, [place]))
    return groups


def _holdings(gallery: Gallery) -> None:
    for holdings, places in holdings_by_subject(gallery.subjects):
        labels = [gallery.subjects[place].label for place in places]
        if holdings is None:
            gallery.missing += [
                f"who holds what of {label}: the record does not tell examples by class"
                for label in labels
            ]
            continue
        everyone = len(places) == len(gallery.subjects)
        first = gallery.subjects[places[0]]
        if places[0] >= _MASKS:
            gallery.missing.append(
                f"who holds what of {labels[0]}: it is drawn for the first {_MASKS} combinations"
            )
            continue
        also = f" The same in {', '.join(labels[1:])}." if len(labels) > 1 and not everyone else ""
        caption = (
            f"The agents' {holdings.legend()}{_about(first)}; a disc's area is their number.{also}"
        )
        file = "holdings.png" if everyone else f"holdings{_suffix(gallery, places[0])}.png"
        subject = None if everyone else places[0]
        gallery.pictures.append(
            Picture(file, "Who holds what", caption, draw_holdings(holdings), subject)
        )


def _about(subject: Subject) -> str:
    several = len(subject.runs) > 1
    return f" of {subject.run.path.name}, the first of {len(subject.runs)} seeds" if several else ""


def _suffix(gallery: Gallery, place: int) -> str:
    """End of the name of a picture about one subject."""
    return (
        ""
        if len(gallery.subjects) == 1
        else f"-{place + 1:02d}-{_file_name(gallery.subjects[place].label)}"
    )


def _masks(gallery: Gallery, place: int) -> None:
    subject = gallery.subjects[place]
    suffix, about = _suffix(gallery, place), _about(subject)
    masks, problem = final_masks(subject.run)
    if problem is not None:
        gallery.missing.append(f"mask agreement and filter densities of {subject.label}: {problem}")
        return
    alike = common_layers(masks)
    if len(masks) > 1 and all(alike.values()):
        agreement = agreement_of(alike, classes_of(subject.run))
        if agreement.classes is None:
            gallery.missing.append(
                f"overlap of classes of {subject.label}: the record does not tell every agent's "
                "classes"
            )
        order = "of their classes" if agreement.classes is not None else "of their numbers"
        caption = (
            f"Final masks{about}. Jaccard index: of the weights that at least one of two agents "
            "keeps, the share that both keep, and for classes likewise. Masks with as many kept "
            f"weights in each layer, drawn at random, would have {agreement.by_chance:.2f} off "
            f"the diagonal; equal first scores make for more. Agents in the order {order}, both "
            f"matrices on one scale.{_unequal_depth(masks, alike)}{_uneven(alike)}"
        )
        png = draw_agreement(agreement)
        gallery.pictures.append(
            Picture(f"agreement{suffix}.png", "Agreement of masks", caption, png, place)
        )
    else:
        gallery.missing.append(
            f"mask agreement of {subject.label}: it takes two agents that hold the same layers"
        )
    layers = filter_densities(masks)
    left_out = (
        f" The first {MOST_LAYERS} of {len(layers)} layers." if len(layers) > MOST_LAYERS else ""
    )
    caption = (
        f"Share of kept weights in each output filter{about}, sorted, a line for each agent; one "
        "color for agents that keep the same share of the layer. Entirely off: "
        f"{'; '.join(f'{one.name} {off_text(one)}' for one in layers)}.{left_out}"
    )
    png = draw_filters(layers)
    gallery.pictures.append(
        Picture(f"filters{suffix}.png", "Density of filters", caption, png, place)
    )
    if any("live_filters" in facts for facts in subject.run.handshakes.values()):
        _add_live_filters(gallery, layers, place, suffix, about)


def _add_live_filters(
    gallery: Gallery, layers: Sequence[LayerDensity], place: int, suffix: str, about: str
) -> None:
    shown = layers[:MOST_LAYERS]
    caption = (
        f"Live filters{about}: the number of each layer's output filters that keep any weight, by "
        "agent; the others are off as a whole."
    )
    png = draw_live_filters(shown)
    gallery.pictures.append(
        Picture(f"live-filters{suffix}.png", "Live filters", caption, png, place)
    )


def _unequal_depth(masks: Mapping[int, Masks], alike: Mapping[int, Masks]) -> str:
    num_common, num_all = len(next(iter(alike.values()))), len(all_layers(masks))
    if num_common == num_all:
        return ""
    return f" Agents differ in depth: of the {num_common} of {num_all} layers that all hold."


def _uneven(masks: Mapping[int, Masks]) -> str:
    shares = [sum(int(one.sum()) for one in layers.values()) for layers in masks.values()]
    text = "The agents keep unequal shares of the weights, which alone lowers the agreement of some"
    return "" if max(shares) <= 1.01 * min(shares) else f" {text} pairs."


def _file_name(label: str) -> str:
    """A label as it may stand in the name of a file."""
    return re.sub(r"[^\w.+-]+", "-", label).strip("-.")[:60] or "run"
