"""Accuracy against a swept setting: its axis and lines against a slow recount."""

import itertools
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl.record.pools import LABEL, Pool, Pooled, varied
from flower_mcepl.record.reading import read_run
from flower_mcepl.report.plots.gallery import draw_gallery
from flower_mcepl.report.plots.sweep import FEWEST_VALUES, Sweep, sweeps_of
from tests.report.test_plots import fleet, record_run

pytest.importorskip("matplotlib")


def pooled(
    settings: list[dict[str, Any]], results: list[list[float | None]], *, agents: int = 4
) -> Pooled:
    keys = varied(settings)
    pools = [
        Pool(
            {key: one.get(key) for key in keys},
            tuple(
                SimpleNamespace(  # type: ignore[misc]
                    name="run",
                    num_agents=4,
                    result=lambda mean=mean: {"mean": mean, "agents": agents},
                )
                for mean in means
            ),
        )
        for one, means in zip(settings, results, strict=True)
    ]
    return Pooled(keys, tuple(pools))


def sweep_of(records: Pooled) -> Sweep | None:
    """The only sweep of records, or None."""
    sweeps = sweeps_of(records)
    assert len(sweeps) <= 1
    return sweeps[0] if sweeps else None


VALUES = st.lists(st.integers(-9, 9), min_size=FEWEST_VALUES, max_size=6, unique=True)
METHODS = st.lists(st.sampled_from(["mcepl", "local", "dsgd"]), min_size=1, unique=True)


@given(VALUES, METHODS, st.booleans(), st.data())
def test_a_line_holds_the_means_and_deviations_of_its_method(
    values: list[int], methods: list[str], text: bool, data: st.DataObject
) -> None:
    grid = list(itertools.product(values, methods))
    order = data.draw(st.permutations(grid))
    settings = [
        {"width": str(value) if text else value, "algorithm": method} for value, method in order
    ]
    means = st.lists(st.floats(0, 1), min_size=1, max_size=3)
    results = [data.draw(means) for _ in order]

    sweep = sweep_of(pooled(settings, results))  # type: ignore[arg-type]

    assert sweep is not None
    assert sweep.key == "width"
    assert sweep.rising
    assert sweep.values == tuple(map(str, sorted(values)))
    by_point = dict(zip(order, results, strict=True))
    if len(methods) == 1:  # a setting that is the same everywhere names no line
        assert [line.label for line in sweep.lines] == ["all runs"]
    for line in sweep.lines:
        method = methods[0] if len(methods) == 1 else line.label
        assert line.at == tuple(range(len(values)))
        for place, mean, sd in zip(line.at, line.mean, line.sd, strict=True):
            seeds = by_point[sorted(values)[place], method]
            assert mean == statistics.fmean(seeds)
            assert sd == (statistics.stdev(seeds) if len(seeds) > 1 else None)


def test_texts_stay_in_the_order_of_the_study() -> None:
    texts = ["iid", "dirichlet:alpha=1", "classes=2"]
    sweep = sweep_of(pooled([{"partition": text} for text in texts], [[0.5]] * 3))
    assert sweep is not None
    assert sweep.values == tuple(texts)
    assert not sweep.rising


def test_what_follows_from_names_on_the_axis_parts_no_line() -> None:
    shared = {"alexnet": "conv*", "resnet": "stage*", "vit": "conv_proj*, encoder*"}
    grid = [
        {"share": share, "network": network, "algorithm": algorithm}
        for network, share in shared.items()
        for algorithm in ("mcepl", "local")
    ]
    sweep = sweep_of(pooled(grid, [[0.5]] * 6))
    assert sweep is not None
    assert (sweep.axis, sweep.values) == ("network (and with it share)", tuple(shared))
    assert [line.label for line in sweep.lines] == ["mcepl", "local"]


def test_numbers_that_change_together_are_no_sweep() -> None:
    both = [{"width": n, "degree": n, "algorithm": a} for n in (1, 2, 3) for a in ("a", "b")]
    assert sweeps_of(pooled(both, [[0.5]] * 6)) == []


def test_two_values_names_of_runs_and_single_points_are_no_sweep() -> None:
    assert sweep_of(pooled([{"width": 1}, {"width": 2}], [[0.5]] * 2)) is None
    names = [{LABEL: name, "algorithm": name} for name in ("a", "b", "c")]
    assert sweep_of(pooled(names, [[0.5]] * 3)) is None
    alone = [{"width": width, "algorithm": "mcepl"} for width in (1, 2, 3)]
    alone.append({"width": 1, "algorithm": "local"})
    assert sweep_of(pooled(alone, [[0.5]] * 4)) is None


def test_of_two_swept_settings_the_one_with_fewer_lines_is_the_axis() -> None:
    grid = [{"width": w, "degree": d} for w in (1, 2, 3) for d in (1, 2, 3, 4)]
    sweep = sweep_of(pooled(grid, [[0.5]] * 12))
    assert sweep is not None
    assert (sweep.key, len(sweep.lines)) == ("degree", 3)


@given(VALUES, VALUES)
def test_settings_that_vary_one_at_a_time_have_a_sweep_each(
    widths: list[int], degrees: list[int]
) -> None:
    star = [{"width": width, "degree": degrees[0]} for width in widths]
    star += [{"width": widths[0], "degree": degree} for degree in degrees[1:]]
    by_width, by_degree = sweeps_of(pooled(star, [[0.5]] * len(star)))
    assert (by_width.key, by_width.values) == ("width", tuple(map(str, sorted(widths))))
    assert (by_degree.key, by_degree.values) == ("degree", tuple(map(str, sorted(degrees))))
    assert [line.label for line in by_width.lines] == [f"degree {degrees[0]}"]


def test_a_record_outside_of_every_line_leaves_no_sweep() -> None:
    star = [{"width": w, "degree": 1} for w in (1, 2, 3)]
    star += [{"width": 1, "degree": d} for d in (2, 3)]
    assert len(sweeps_of(pooled(star, [[0.5]] * 5))) == 2
    star.append({"width": 9, "degree": 9})
    assert sweeps_of(pooled(star, [[0.5]] * 6)) == []


def test_a_run_that_was_never_evaluated_leaves_a_gap() -> None:
    settings = [{"width": width} for width in (1, 2, 3)]
    sweep = sweep_of(pooled(settings, [[0.5], [None], [0.7]]))
    assert sweep is not None
    assert sweep.lines[0].at == (0, 2)


def test_a_line_whose_means_are_of_few_agents_says_so() -> None:
    settings = [{"width": width} for width in (1, 2, 3)]
    whole, part = (sweep_of(pooled(settings, [[0.5]] * 3, agents=n)) for n in (4, 3))
    assert whole is not None
    assert part is not None
    assert whole.lines[0].label == "all runs"
    assert part.lines[0].label == "all runs (in part of 3 of 4 agents)"


def test_the_gallery_draws_a_sweep_of_records(tmp_path: Path) -> None:
    runs = []
    for number, rounds in enumerate((1, 2, 10)):
        path = tmp_path / str(number)
        config: dict[str, Any] = {"local-steps": rounds}
        record_run(path, fleet("dsgd"), algorithm="dsgd", **config)
        runs.append(read_run(path))
    gallery = draw_gallery(runs)
    (picture,) = (one for one in gallery.pictures if "-by-" in one.file)
    assert picture.file == "accuracy-by-local-steps.png"
    assert picture.png.startswith(b"\x89PNG")
    assert not [one for one in draw_gallery(runs[:2]).pictures if "-by-" in one.file]
