"""Pictures of run records: their numbers against a slow recount, and what is drawn."""

import builtins
import itertools
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flower_mcepl import Topology, simulate
from flower_mcepl.cli import app
from flower_mcepl.errors import ConfigError
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report import overview
from flower_mcepl.report.final_masks import Masks, common_layers, final_masks
from flower_mcepl.report.plots import graph
from flower_mcepl.report.plots.agreement import agreement_of, classes_of
from flower_mcepl.report.plots.canvas import new_figure, plain, wrapped
from flower_mcepl.report.plots.charts import _stacked, draw_by_bytes, draw_by_round, draw_spread
from flower_mcepl.report.plots.curves import AGENTS, SEEDS, curve_of, final_values
from flower_mcepl.report.plots.degrees import draw_degrees
from flower_mcepl.report.plots.filter_charts import draw_live_filters, off_text
from flower_mcepl.report.plots.filters import filter_densities
from flower_mcepl.report.plots.gallery import (
    Gallery,
    _holdings,
    _masks,
    draw_gallery,
    write_gallery,
)
from flower_mcepl.report.plots.graph import draw_graph, draw_graphs
from flower_mcepl.report.plots.holding_charts import draw_holdings
from flower_mcepl.report.plots.holdings import Holdings, holdings_of
from flower_mcepl.report.plots.subjects import Subject, subjects_of
from flower_mcepl.studies.sources import read_source, read_sources
from tests.fleet.agents import make_agent, small_net, split
from tests.oracles.baselines import fleet_of, server_of

pytest.importorskip("matplotlib")

SIZE, ROUNDS = 4, 3
RATIOS = (0.1, 0.5, {"conv": 0.3, "linear": 0.9}, 0.5)
MASKED = ("mcepl", "mcepl-no-finetuning", "local-masks", "mask-averaging", "dispfl")


def record_run(path: Path, agents: list[Any], *, name: str = "ring", **run_config: Any) -> Run:
    config = {"run_config": run_config} if run_config else {}
    record = RunRecord.create(name=name, config=config, path=path)
    simulate(agents, Topology.ring(len(agents)), num_rounds=ROUNDS, evaluate_every=1, record=record)
    return read_run(path)


def fleet(algorithm: str, *, seed: int = 7) -> list[Any]:
    if algorithm == "mcepl":  # every agent with ratios of its own
        return [
            make_agent(i, seed=seed, retention=ratio, first_retention=0.3)
            for i, ratio in enumerate(RATIOS)
        ]
    return fleet_of(algorithm, SIZE, model_fn=small_net, split=split, seed=seed)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three algorithms, the first with two seeds."""
    folder = tmp_path_factory.mktemp("study")
    for algorithm, seed in (("mcepl", 7), ("mcepl", 8), ("local-masks", 7), ("dsgd", 7)):
        agents = fleet(algorithm, seed=seed)
        record_run(
            folder / f"{algorithm}-{seed}", agents, name="study", algorithm=algorithm, seed=seed
        )
    return folder


@pytest.fixture(scope="module")
def gallery(study: Path) -> Gallery:
    return draw_gallery(read_source(study).runs)


@pytest.fixture
def copied(study: Path, tmp_path: Path) -> Path:
    """A record of MCE-PL that a test may change."""
    return Path(shutil.copytree(study / "mcepl-7", tmp_path / "copied"))


def change_config(record: Path, change: Callable[[dict[str, Any]], object]) -> Run:
    config = json.loads((record / "config.json").read_text())
    change(config)
    (record / "config.json").write_text(json.dumps(config))
    return read_run(record)


# --- masks from states ---


@pytest.mark.parametrize("algorithm", MASKED)
def test_final_masks_are_those_of_the_agents(algorithm: str, tmp_path: Path) -> None:
    agents = fleet(algorithm)
    masks, problem = final_masks(record_run(tmp_path / "run", agents))
    assert problem is None
    assert list(masks) == list(range(SIZE))
    for agent in agents:
        own = agent.masks if algorithm == "dispfl" else agent.model.masks()
        assert masks[agent.index].keys() == own.keys()
        for name, mask in own.items():
            np.testing.assert_array_equal(masks[agent.index][name], mask.numpy())


def test_final_masks_have_the_density_that_the_record_tells(study: Path) -> None:
    run = read_run(study / "mcepl-8")
    for agent, layers in final_masks(run)[0].items():
        density = sum(mask.sum() for mask in layers.values()) / sum(
            mask.size for mask in layers.values()
        )
        assert density == pytest.approx(run.final()[agent]["density"])


def test_layers_are_in_their_natural_order() -> None:
    from flower_mcepl.report.final_masks import _natural

    assert sorted(["l.11.w", "l.4.w", "fc.w", "l.4.0"], key=_natural) == [
        "fc.w",
        "l.4.0",
        "l.4.w",
        "l.11.w",
    ]


def test_why_there_are_no_masks_is_told(study: Path, copied: Path) -> None:
    assert final_masks(read_run(study / "dsgd-7")) == ({}, "agents of dsgd hold no mask at the end")

    run = change_config(
        copied, lambda config: [entry.pop("parameters") for entry in config["agents"]]
    )
    assert "retention ratios" in str(final_masks(run)[1])

    shutil.rmtree(copied / "agents")
    assert "no agents/" in str(final_masks(read_run(copied))[1])


def test_a_damaged_state_is_told(copied: Path) -> None:
    (copied / "agents" / "agent-0002.safetensors").write_bytes(b"noise")
    assert "agent-0002.safetensors is no readable agent state" in str(
        final_masks(read_run(copied))[1]
    )


# --- agreement ---


def kept(layers: Masks) -> set[tuple[str, int]]:
    return {
        (name, place)
        for name, mask in layers.items()
        for place, bit in enumerate(mask.reshape(-1))
        if bit
    }


def test_agreement_is_that_of_a_slow_count(study: Path) -> None:
    run = read_run(study / "mcepl-7")
    masks, _ = final_masks(run)
    agreement = agreement_of(
        masks, {0: frozenset("02"), 1: frozenset("9"), 2: frozenset("01"), 3: frozenset("0")}
    )
    assert agreement.agents == (3, 2, 0, 1)  # by classes
    assert agreement.classes is not None
    held = {3: {"0"}, 2: {"0", "1"}, 0: {"0", "2"}, 1: {"9"}}
    slow: list[float] = []
    for (row, a), (column, b) in itertools.product(enumerate(agreement.agents), repeat=2):
        left, right = kept(masks[a]), kept(masks[b])
        assert agreement.masks[row, column] == pytest.approx(len(left & right) / len(left | right))
        assert agreement.classes[row, column] == pytest.approx(
            len(held[a] & held[b]) / len(held[a] | held[b])
        )
        if row < column:
            slow.append(agreement.masks[row, column])
    assert agreement.range == (min(slow), max(slow))
    pairs = [agreement.classes[a, b] for a, b in itertools.combinations(range(SIZE), 2)]
    assert agreement.correlation == pytest.approx(statistics.correlation(slow, pairs))


def test_agreement_by_chance_is_that_of_masks_drawn_at_random() -> None:
    draw = np.random.default_rng(1)
    shapes, densities = (
        {"a": (60, 500), "b": (200, 500)},
        {"a": (0.1, 0.7, 0.4), "b": (0.5, 0.2, 0.9)},
    )
    masks = {
        i: {name: draw.random(shape) < densities[name][i] for name, shape in shapes.items()}
        for i in range(3)
    }
    agreement = agreement_of(masks, {})
    measured = agreement.masks[np.triu_indices(3, 1)].mean()
    assert agreement.by_chance == pytest.approx(measured, abs=0.005)


def test_agreement_without_classes_or_kept_weights() -> None:
    empty = {agent: {"a": np.zeros((2, 3), dtype=bool)} for agent in range(2)}
    agreement = agreement_of(empty, {0: frozenset("1")})
    assert agreement.classes is None
    assert agreement.correlation is None
    np.testing.assert_array_equal(agreement.masks, np.ones((2, 2)))
    assert agreement.by_chance == 1.0


def test_classes_are_read_from_text_and_lists(copied: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        for entry, told in zip(config["agents"], ("1 2", [2, 3], None, ""), strict=True):
            entry["classes"] = told

    assert classes_of(change_config(copied, change)) == {
        0: frozenset({"1", "2"}),
        1: frozenset({"2", "3"}),
    }


# --- filters ---


def test_filter_densities_are_those_of_a_slow_count(study: Path) -> None:
    masks, _ = final_masks(read_run(study / "mcepl-7"))
    layers = filter_densities(masks)
    assert [layer.name for layer in layers] == list(masks[0])
    for layer in layers:
        for row, agent in enumerate(layer.agents):
            mask = masks[agent][layer.name]
            slow = [sum(one.reshape(-1).tolist()) / one.size for one in mask]
            assert layer.shares[row].tolist() == pytest.approx(sorted(slow, reverse=True))
            assert layer.off[row] == sum(share == 0 for share in slow)
            assert layer.density[row] == pytest.approx(mask.sum() / mask.size)


def test_filters_that_are_off_are_counted() -> None:
    mask = np.zeros((4, 2, 3), dtype=bool)
    mask[1, 0, 2] = True
    both = filter_densities({0: {"a": mask}, 1: {"a": ~mask}})
    assert both[0].off.tolist() == [3, 0]
    assert off_text(both[0]) == "0 to 3 of 4 filters off, 1.5 on average"
    assert off_text(filter_densities({0: {"a": mask}})[0]) == "3 of 4 filters off in every agent"
    assert off_text(filter_densities({0: {"a": ~mask}})[0]) == "0 of 4 filters off"


def test_live_filters_are_drawn_where_there_are_gates(copied: Path, tmp_path: Path) -> None:
    def files(run: Path) -> list[str]:
        return [picture.file for picture in draw_gallery([read_run(run)]).pictures]

    assert "live-filters.png" not in files(copied)

    def change(config: Any) -> None:
        config["agents"][0]["live_filters"] = [2]

    change_config(copied, change)
    assert files(copied)[-2:] == ["filters.png", "live-filters.png"]


def test_numbers_of_live_filters_change_the_picture() -> None:
    mask = np.zeros((4, 2, 3), dtype=bool)
    mask[1, 0, 2] = True
    pictures = {
        draw_live_filters(filter_densities({0: {"a": one}, 1: {"a": ~mask}}))
        for one in (mask, ~mask)
    }
    assert len(pictures) == 2


def unequal_masks() -> dict[int, Masks]:
    """Three agents, of which one holds a layer more, and another lacks the last."""
    generator = np.random.default_rng(0)
    shapes = {"stages.0": (4, 3), "stages.1": (6, 4), "exits.1": (3, 6)}
    held = {0: ["stages.0"], 1: [*shapes], 2: [*shapes]}
    return {
        agent: {name: generator.random(shapes[name]) < 0.5 for name in names}
        for agent, names in held.items()
    }


def test_layers_that_not_all_agents_hold_are_drawn_of_those_who_do() -> None:
    masks = unequal_masks()
    layers = filter_densities(masks)
    assert {layer.name: layer.agents for layer in layers} == {
        "exits.1": (1, 2),
        "stages.0": (0, 1, 2),
        "stages.1": (1, 2),
    }
    assert layers[2].shares.shape == (2, 6)
    assert draw_live_filters(layers) != draw_live_filters(layers[1:])


def test_agreement_is_of_the_layers_that_all_agents_hold() -> None:
    masks = unequal_masks()
    alike = common_layers(masks)
    assert [[*layers] for layers in alike.values()] == [["stages.0"]] * 3
    one, other = masks[0]["stages.0"], masks[1]["stages.0"]
    due = (one & other).sum() / (one | other).sum()
    assert agreement_of(alike, {}).masks[0, 1] == pytest.approx(due)


# --- who holds what ---


def test_holdings_are_those_of_the_agents_labels(study: Path) -> None:
    holdings = holdings_of(read_run(study / "dsgd-7").config["agents"])
    assert holdings is not None
    assert (holdings.agents, holdings.classes, holdings.silent) == (
        tuple(range(SIZE)),
        (0, 1, 2),
        (),
    )
    assert list(holdings.counts) == ["train", "test"]
    for agent in range(SIZE):
        slow = [
            [labels.tolist().count(name) for name in range(3)]
            for labels in (split(agent)[1], split(1000 + agent)[1])
        ]
        assert [list(holdings.counts[name][agent]) for name in ("train", "test")] == slow
        cells = [" / ".join(map(str, pair)) for pair in zip(*slow, strict=True)]
        assert holdings.table()[1][agent] == [str(agent), *cells, "24 / 24"]
    assert holdings.table()[0] == ["agent", "0", "1", "2", "all"]


def test_holdings_are_read_from_handshakes_and_from_records() -> None:
    whole = {"agent": 5, "train_counts": "-1:2 7:3", "validation-counts": "7:1", "test-counts": ""}
    damaged = [{"agent": 6, "train-counts": text} for text in ("7", "7:x", "7:1,8:2", 3, None)]
    for entry in damaged:
        holdings = holdings_of([whole, entry, {"train-counts": "9:9"}])
        assert holdings is not None
        assert holdings.silent == (6,)
        assert holdings.classes == (-1, 7)
        assert holdings.table()[1] == [["5", "2 / 0 / 0", "3 / 1 / 0", "5 / 1 / 0"]]
        assert holdings.legend() == (
            "training / validation / test examples of each class; agents 6 do not tell"
        )
    assert holdings_of(damaged) is None
    assert holdings_of([]) is None


def test_discs_have_areas_in_proportion(tmp_path: Path) -> None:
    from matplotlib.image import imread

    def ink(count: int) -> float:
        counts = {"train": ((400, 0), (0, count))}
        (tmp_path / "who.png").write_bytes(draw_holdings(Holdings((0, 1), (0, 1), counts, ())))
        image = np.asarray(imread(tmp_path / "who.png"))[..., :3]
        return float(((image.max(axis=-1) - image.min(axis=-1)) > 0.4).sum())

    one, both = ink(0), ink(400)
    assert both == pytest.approx(2 * one, rel=0.03)
    assert ink(200) == pytest.approx(1.5 * one, rel=0.03)


@pytest.mark.parametrize(("agents", "classes"), [(1, 1), (20, 100), (21, 2), (300, 10)])
def test_any_number_of_agents_and_classes_is_drawn(agents: int, classes: int) -> None:
    row = tuple(range(1, classes + 1))
    counts = {name: (row,) * agents for name in ("train", "validation", "test")}
    width, height = size_of(
        draw_holdings(Holdings(tuple(range(agents)), tuple(range(classes)), counts, ()))
    )
    assert 300 <= width <= 3000
    assert 300 <= height <= 3000


def test_combinations_with_other_data_have_pictures_of_their_own(study: Path, copied: Path) -> None:
    run = change_config(copied, lambda config: config["agents"][2].update(train_counts="0:1 9:50"))
    subjects = [Subject(name, (read_run(study / "dsgd-7"),)) for name in ("a", "b")]
    gallery = Gallery([subjects[0], Subject("other", (run,)), subjects[1]])
    _holdings(gallery)
    assert [(picture.file, picture.subject) for picture in gallery.pictures] == [
        ("holdings-01-a.png", 0),
        ("holdings-02-other.png", 1),
    ]
    assert gallery.pictures[0].caption.endswith("The same in b.")
    assert "The same" not in gallery.pictures[1].caption


# --- curves ---


def lines(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (record / "rounds.jsonl").read_text().splitlines()]


def test_a_curve_is_that_of_a_slow_recount(study: Path) -> None:
    folders = [study / "mcepl-7", study / "mcepl-8"]
    curve = curve_of(Subject("mcepl", tuple(map(read_run, folders))), alone=False)
    assert curve.over == SEEDS
    assert curve.sd is not None
    assert curve.rounds == (1, 2, 3)
    for place, number in enumerate(curve.rounds):
        rows = [[row for row in lines(folder) if row["round"] == number] for folder in folders]
        means = [sum(row["accuracy"] for row in one) / SIZE for one in rows]
        assert curve.mean[place] == pytest.approx(sum(means) / 2)
        assert curve.sd[place] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
        assert curve.bytes[place] == sum(row["received_bytes"] for one in rows for row in one) / 2
    totals = [
        json.loads((folder / "summary.json").read_text())["bytes"]["links_total"]
        for folder in folders
    ]
    assert curve.bytes[-1] == sum(totals) / 2


def test_the_band_of_one_record_is_over_its_agents(study: Path) -> None:
    run = read_run(study / "mcepl-7")
    curve = curve_of(Subject("x", (run,)), alone=True)
    assert curve.over == AGENTS
    assert curve.sd is not None
    accuracies = [row["accuracy"] for row in lines(run.path) if row["round"] == 2]
    assert curve.sd[1] == pytest.approx(statistics.pstdev(accuracies))
    assert curve_of(Subject("x", (run,)), alone=False).sd is None
    last = [row["accuracy"] for row in lines(run.path) if row["round"] == 3]
    assert list(final_values(run).values()) == last


def test_bytes_of_a_server_count_both_ways(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    simulate(
        fleet_of("fedpm"), server=server_of("fedpm"), num_rounds=2, evaluate_every=1, record=record
    )
    run = read_run(record.path)
    curve = curve_of(Subject("x", (run,)), alone=True)
    assert run.summary is not None
    counts = run.summary["bytes"]
    assert curve.bytes[-1] == counts["links_total"] + counts["uplink_total"]
    assert final_masks(run) == ({}, "agents of fedpm hold no mask at the end")


# --- labels ---


def test_labels_name_what_varies(study: Path) -> None:
    subjects, notes = subjects_of(read_source(study).runs)
    assert [(subject.label, len(subject.runs)) for subject in subjects] == [
        ("dsgd", 1),
        ("local-masks", 1),
        ("mcepl", 2),
    ]
    assert notes == ()


def test_a_label_that_would_be_long_is_the_folder(study: Path, copied: Path) -> None:
    run = change_config(copied, lambda config: config["run_config"].update(data="x" * 99))
    subjects, _ = subjects_of([run, read_run(study / "dsgd-7")])
    assert [subject.label for subject in subjects] == ["copied", "dsgd-7"]
    run = change_config(copied, lambda config: config["run_config"].update(data="0.1, 0.3"))
    assert subjects_of([run, read_run(study / "mcepl-8")])[0][0].label == 'data "0.1, 0.3"'


def test_a_label_is_what_the_study_calls_the_runs(study: Path, copied: Path) -> None:
    def named(path: Path, label: str | None) -> Run:
        return change_config(path, lambda config: config.update(study={"label": label}))

    other = Path(shutil.copytree(study / "dsgd-7", copied.parent / "other"))
    runs = [named(copied, "masks, r = 0.1"), named(other, "weights")]
    assert [subject.label for subject in subjects_of(runs)[0]] == ["masks, r = 0.1", "weights"]
    # not a name for each
    for name, labels in (("weights", ["mcepl", "dsgd"]), (None, ["mcepl", "dsgd, weights"])):
        runs[0] = named(copied, name)
        assert [subject.label for subject in subjects_of(runs)[0]] == labels


# --- graphs ---


def graph_of(run: Run) -> Any:
    """Axes with the graph of a run."""
    axes = new_figure(5, 5).subplots()
    draw_graph(axes, run)
    return axes


def links_of(axes: Any) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, end)) for end in link]
        for lines in axes.collections
        for link in lines.get_segments()
    ]


def names_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_graph_has_its_links(study: Path) -> None:
    axes = graph_of(read_run(study / "dsgd-7"))
    assert len(links_of(axes)) == SIZE
    assert names_of(axes) == ["0", "1", "2", "3"]
    assert axes.get_title() == "Communication graph"


def test_a_graph_without_links_is_called_one(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    simulate(fleet_of("dsgd")[:1], Topology.complete(1), num_rounds=1, record=record)
    assert graph_of(read_run(record.path)).get_title() == "Communication graph: it has no links"


def test_who_sends_nothing_has_no_links(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, dsgd = read_run(study / "local-masks-7"), read_run(study / "dsgd-7")
    killed = Path(shutil.copytree(silent.path, tmp_path / "killed"))
    (killed / "summary.json").unlink()
    for run in (silent, read_run(killed)):
        axes = graph_of(run)
        assert links_of(axes) == []
        assert names_of(axes) == ["0", "1", "2", "3"]
        assert axes.get_title() == "Agents without links: nothing is sent"

    figures = []
    monkeypatch.setattr(
        "flower_mcepl.report.plots.graph.png", lambda figure: figures.append(figure) or b""
    )
    draw_graphs([("a", silent), ("b", dsgd)])
    assert [axes.get_title() for axes in figures[0].axes] == ["a (sends nothing)", "b"]


def test_the_server_stands_in_the_middle(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    simulate(fleet_of("fedpm"), server=server_of("fedpm"), num_rounds=1, record=record)
    axes = graph_of(read_run(record.path))
    assert names_of(axes) == ["server", "0", "1", "2", "3"]
    middle, *spots = [text.get_position() for text in axes.texts]
    assert middle == (0, 0)
    assert links_of(axes) == [[(0, 0), spot] for spot in spots]
    (strip,) = axes.child_axes
    assert strip.get_xlabel() == "last accuracy"  # nobody is grey


def test_of_a_large_graph_results_stand_by_degree(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_MOST_AGENTS", SIZE - 1)
    monkeypatch.setattr(graph, "_layout", None)  # no places are looked for
    axes = graph_of(read_run(study / "dsgd-7"))
    assert axes.get_title() == "Communication graph (4 agents, 4 links)"
    assert axes.get_xlabel() == "neighbors of an agent"
    (dots,) = axes.collections
    places, values = dots.get_offsets().T
    assert values.tolist() == list(final_values(read_run(study / "dsgd-7")).values())
    assert np.round(places).tolist() == [2] * SIZE
    assert len(set(places.tolist())) == SIZE  # equal results stand beside each other
    (means,) = axes.lines
    assert means.get_xydata().tolist() == [[2, pytest.approx(values.mean())]]

    silent = graph_of(read_run(study / "local-masks-7"))
    assert silent.get_title() == "Agents without links: nothing is sent (4 agents, 0 links)"
    assert np.round(silent.collections[0].get_offsets()[:, 0]).tolist() == [0] * SIZE


def degrees_of(scores: dict[int, float], *, directed: bool) -> Any:
    axes = new_figure(5, 5).subplots()
    links = [(0, 1), (0, 2), (2, 1)]
    draw_degrees(axes, range(4), links, scores, directed=directed, metric="f1")
    return axes


def test_a_degree_is_of_neighbors_or_of_those_that_are_heard() -> None:
    scores = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
    for directed, wanted in ((True, [0, 2, 1, 0]), (False, [2, 2, 2, 0])):
        axes = degrees_of(scores, directed=directed)
        assert np.round(axes.collections[0].get_offsets()[:, 0]).tolist() == wanted
        means = dict(axes.lines[0].get_xydata().tolist())
        for degree, mean in means.items():
            of_degree = [scores[agent] for agent in range(4) if wanted[agent] == degree]
            assert mean == pytest.approx(statistics.fmean(of_degree))
        assert set(means) == set(wanted)
        assert axes.get_ylabel() == "last f1"


def test_who_has_no_value_is_counted_and_degrees_alone_are_shown_without_any() -> None:
    axes = degrees_of({1: 0.5}, directed=True)
    assert axes.get_xlabel() == "agents that an agent hears (3 agents without a value)"
    assert len(axes.collections[0].get_offsets()) == 1
    axes = degrees_of({}, directed=False)
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
    assert bars == {2: 3, 0: 1}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("neighbors of an agent", "agents")


def test_many_lines_are_drawn_as_one(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[Any]:
        axes = new_figure(5, 5).subplots()
        overview._draw_result(axes, read_run(study / "dsgd-7"))
        return list(axes.lines)

    each = drawn()
    monkeypatch.setattr(overview, "_MOST_LINES", SIZE - 1)
    joined = drawn()
    assert len(joined) == len(each) - SIZE + 1
    points = np.concatenate([line.get_xydata() for line in each[:SIZE]])
    together = joined[0].get_xydata()
    gaps = np.isnan(together).all(axis=1)
    assert gaps.sum() == SIZE
    assert np.array_equal(together[~gaps], points)


# --- the spread ---


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_no_dot_hides_another(accuracies: list[int]) -> None:
    dots = sorted(number / 40 for number in accuracies)
    heights = _stacked(dots, closer=0.013)
    assert len(set(zip(dots, heights, strict=True))) == len(dots)
    assert max(map(abs, heights)) <= 0.27 + 1e-9
    for dot in set(dots):
        rows = [height for other, height in zip(dots, heights, strict=True) if other == dot]
        assert sum(rows) == pytest.approx(0)


def test_dots_that_are_close_stand_above_each_other() -> None:
    assert _stacked([0.1, 0.5, 0.505, 0.52], closer=0.013) == pytest.approx([0, -0.07, 0.07, 0])


# --- pictures ---


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def assert_drawn(gallery: Gallery, folder: Path) -> None:
    from matplotlib.image import imread

    files = write_gallery(gallery, folder)
    assert len({file.name for file in files}) == len(files)
    for file in files:
        width, height = size_of(file.read_bytes())
        assert 600 <= width <= 3000, file
        assert 200 <= height <= 3000, file
        ink = np.asarray(imread(file))[..., :3].min(axis=-1) < 0.9
        assert 0.002 < ink.mean() < 0.9, file


@pytest.mark.slow
def test_a_study_gives_pictures_of_sane_size(gallery: Gallery, tmp_path: Path) -> None:
    assert_drawn(gallery, tmp_path / "made" / "here")
    assert [picture.file for picture in gallery.pictures] == [
        *("accuracy-rounds.png", "accuracy-bytes.png", "spread.png", "graph.png", "holdings.png"),
        *("agreement-02-local-masks.png", "filters-02-local-masks.png"),
        *("agreement-03-mcepl.png", "filters-03-mcepl.png"),
    ]
    assert gallery.missing == [
        "mask agreement and filter densities of dsgd: agents of dsgd hold no mask at the end",
    ]
    assert "the first of 2 seeds" in gallery.pictures[-1].caption
    assert "unequal shares" in gallery.pictures[-2].caption


def test_every_panel_of_the_filters_is_filled(gallery: Gallery, tmp_path: Path) -> None:
    from matplotlib.image import imread

    file = tmp_path / "filters.png"
    file.write_bytes(gallery.pictures[-1].png)
    image = np.asarray(imread(file))[..., :3]
    for panel in np.array_split(image[image.shape[0] // 4 :], 2, axis=1):
        colored = (panel.max(axis=-1) - panel.min(axis=-1)) > 0.3
        assert colored.mean() > 0.002


def test_the_same_records_give_the_same_pictures(gallery: Gallery) -> None:
    again = draw_by_round([curve_of(subject, alone=False) for subject in gallery.subjects])
    assert again == gallery.pictures[0].png


def test_what_is_missing_is_told_and_the_rest_drawn(copied: Path, tmp_path: Path) -> None:
    (copied / "summary.json").unlink()
    shutil.rmtree(copied / "agents")
    gallery = draw_gallery([read_run(copied)])
    assert_drawn(gallery, tmp_path / "plots")
    assert len(gallery.pictures) == 5
    assert len(gallery.missing) == 1
    assert "no agents/" in gallery.missing[0]


def test_a_record_without_classes_shows_masks_alone(copied: Path, tmp_path: Path) -> None:
    run = change_config(copied, lambda config: config["agents"][1].pop("classes"))
    gallery = Gallery([Subject("study", (run,))])
    _masks(gallery, 0)
    assert_drawn(gallery, tmp_path / "plots")
    assert [line.partition(":")[0] for line in gallery.missing] == ["overlap of classes of study"]
    assert (
        "in the order of their numbers"
        in {p.file: p.caption for p in gallery.pictures}["agreement.png"]
    )


def test_a_record_that_says_nothing_is_drawn_as_far_as_it_goes(tmp_path: Path) -> None:
    run = read_run(RunRecord.create(name="x", config={}, path=tmp_path / "run").path)
    gallery = draw_gallery([run])
    assert [picture.file for picture in gallery.pictures] == ["graph.png"]
    assert len(gallery.missing) == 4
    assert "who holds what of x: the record does not tell examples by class" in gallery.missing


@pytest.mark.slow
def test_any_name_can_be_drawn(copied: Path) -> None:
    from flower_mcepl.report.overview import plot_run

    names = ["_hidden", "$\\frac{", "$a$ <b>", "\ud800", "名前", "x" * 300, "\n\t"]
    run = read_run(copied)
    curves = [curve_of(Subject(name, (run,)), alone=False) for name in names]
    pictures = (
        draw_by_round(curves),
        draw_by_bytes(curves),
        draw_spread([(name, [0.5, 0.6]) for name in names]),
    )
    for picture in (*pictures, draw_graphs([(name, run) for name in names])):
        assert min(size_of(picture)) > 300
    assert (
        plot_run(change_config(copied, lambda config: config.update(name="$\\frac{")))
        .stat()
        .st_size
        > 0
    )


def test_names_are_shown_as_they_are() -> None:
    assert plain("$a_1$") == r"\$a_1\$"
    assert plain("_hidden") == " _hidden"
    assert wrapped("x " * 200).count("\n") == 2


def test_a_missing_extra_names_the_remedy(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_extra(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_extra)
    with pytest.raises(ConfigError, match="extra 'report'"):
        draw_gallery([read_run(study / "dsgd-7")])


# --- where records come from ---


def test_a_folder_knows_its_study_file(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(study / "dsgd-7", folder / "dsgd-7")
    assert read_source(folder).study is None
    (folder / "study.toml").write_text("target = 0.5\nname = 'näme'\n")
    source = read_source(folder)
    assert (source.name, source.target, source.study) == (
        "out",
        0.5,
        "target = 0.5\nname = 'näme'\n",
    )
    (folder / "study.toml").write_text("target = [")
    assert read_source(folder).target is None


def test_records_given_twice_count_once(study: Path) -> None:
    source = read_sources([study, study / "dsgd-7"])
    assert len(source.runs) == 4
    assert source.folder == Path()


# --- the command ---


def test_the_command_draws_and_tells(study: Path, tmp_path: Path) -> None:
    arguments = [
        "plot",
        str(study / "dsgd-7"),
        str(study / "local-masks-7"),
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    files = [
        tmp_path / "out" / name for name in ("accuracy-rounds.png", "filters-02-local-masks.png")
    ]
    assert all(file.is_file() and str(file) in result.output for file in files)
    assert (
        "not drawn: mask agreement and filter densities of dsgd: agents of dsgd hold no mask"
        in result.output
    )


def test_the_command_puts_pictures_into_the_record(copied: Path) -> None:
    shutil.rmtree(copied / "agents")
    CliRunner().invoke(app, ["plot", str(copied)], catch_exceptions=False)
    assert (copied / "plots" / "graph.png").is_file()
    help_text = CliRunner().invoke(app, ["plot", "--help"]).output
    assert "flower-mcepl plot runs/ablation --out pictures\n" in help_text
