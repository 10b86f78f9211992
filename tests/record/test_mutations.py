"""Records whose JSON somebody changed: every command reads them, or names the file."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from flower_mcepl import FlowerMceplError, RunRecord, Topology, read_run, simulate
from flower_mcepl.cli.show import show
from flower_mcepl.errors import RecordError
from flower_mcepl.launch.restarts import plan_of_resumption, status_of
from flower_mcepl.report import tensorboard
from flower_mcepl.report.overview import plot_run
from flower_mcepl.report.page.report_page import report_page
from flower_mcepl.report.plots.gallery import draw_gallery
from flower_mcepl.report.tables import cells, markdown, write_csv
from flower_mcepl.runs.resumption import how_to_resume
from flower_mcepl.studies import compare
from flower_mcepl.studies.sources import read_source
from tests.fleet.agents import make_fleet

FILES = ("config.json", "summary.json", "rounds.jsonl", "relay.jsonl")
ESCAPE = "\x1b]52;c;Zm9v\x07\u202e\n"
OTHERS = st.sampled_from(
    [None, True, -1, 0, 7, 2**70, 10**9, 1.5, -1e99, 1e300, "", "x", "²", "../../x", ESCAPE,
     "$\\frac", "9" * 30, "0:1", [], {}, [[]], [ESCAPE], [1, 2], {"a": 1}, {ESCAPE: {"b": [None]}}]
)  # fmt: skip
Json = Any


def places(value: Json, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Way to every value within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [
        place
        for key, item in items
        for place in (
            [(*path, key), *places(item, (*path, key))]
            if isinstance(item, dict | list)
            else [(*path, key)]
        )
    ]
    return inner


@st.composite
def changed(draw: st.DrawFn, value: Json) -> Json:
    """A value with one to three changes at any place: replaced, removed or nested."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        ways = places(value)
        if not ways:
            break
        *way, key = draw(st.sampled_from(ways))
        holder = value
        for step in way:
            holder = holder[step]
        how = draw(st.sampled_from(["replaced", "removed", "nested", "renamed"]))
        if how == "removed":
            del holder[key]
        elif how == "renamed" and isinstance(holder, dict):
            holder[draw(st.sampled_from([ESCAPE, "main-metric", "metrics"]))] = holder.pop(key)
        else:
            holder[key] = [holder[key]] if how == "nested" else copy.deepcopy(draw(OTHERS))
    return value


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished record, and one of a run that broke off."""
    folder = tmp_path_factory.mktemp("records")

    def stop(round: int, agent: int, _: object) -> None:
        if round == 3:
            raise KeyboardInterrupt

    whole = RunRecord.create(name="whole", config={"seed": 1}, path=folder / "whole")
    simulate(make_fleet(3), Topology.ring(3), num_rounds=3, evaluate_every=2, record=whole)
    part = RunRecord.create(name="part", config={"seed": 1}, path=folder / "part")
    with pytest.raises(KeyboardInterrupt):
        simulate(make_fleet(3), Topology.ring(3), num_rounds=3, evaluate_every=1, record=part,
                 checkpoint_every=1, on_reply=stop)  # fmt: skip
    return {"whole": whole.path, "part": part.path}


def mutate(data: st.DataObject, source: Path, target: Path) -> None:
    """Copy a record, and change what one of its files holds."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    file = target / data.draw(st.sampled_from(FILES))
    if file.suffix == ".json":
        file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())))))
        return
    lines = file.read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    lines[number] = json.dumps(data.draw(changed(json.loads(lines[number]))))
    file.write_text("\n".join(lines) + "\n")


def survives(look: Callable[[Path], object], path: Path) -> None:
    """A command does its work, or says what is wrong."""
    said = ""
    try:
        look(path)
    except RecordError as error:
        said = str(error)
        named = str(path) in said
    except FlowerMceplError as error:
        said, named = str(error), True
    assert not said or (named and said.isprintable())


def compared(path: Path) -> None:
    source = read_source(path.parent)
    comparison = compare(source.runs, target=0.5)
    assert all(cell.isprintable() for row in cells(comparison) for cell in row)
    assert ESCAPE not in markdown(comparison)
    write_csv(comparison, path.parent / "table.csv")


def resumed(path: Path) -> None:
    simulate(make_fleet(3), Topology.ring(3), num_rounds=3, evaluate_every=1, checkpoint_every=1,
             resume=path)  # fmt: skip


def launched(path: Path) -> None:
    status_of(path)
    plan_of_resumption(None, path)  # type: ignore[arg-type]
    how_to_resume(path)


class Events:
    """Writer of scalars that only looks at what it gets."""

    def add_scalar(self, tag: str, value: float, *, global_step: int, walltime: float) -> None:
        assert tag.isprintable()
        assert float(value) + global_step + walltime is not None

    def flush(self) -> None: ...


def in_tensorboard(path: Path) -> None:
    tensorboard.ScalarWriter(path, path.parent).update()


def drawn(path: Path) -> None:
    run = read_run(path)
    plot_run(run)
    for picture in draw_gallery([run]).pictures:
        assert "/" not in picture.file


def as_page(path: Path) -> None:
    assert "\x1b" not in report_page(read_source(path))


QUICK = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(data=st.data())
@QUICK
def test_a_changed_record_is_shown_or_named(
    data: st.DataObject,
    records: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tensorboard, "_event_writer", lambda: lambda folder: Events())
    mutate(data, records["whole"], tmp_path / "run")
    for look in (show, compared, in_tensorboard, launched):
        survives(look, tmp_path / "run")
    shown = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in shown)


@pytest.mark.slow
@given(data=st.data())
@settings(QUICK, max_examples=15)
def test_a_changed_record_is_drawn_or_named(
    data: st.DataObject,
    records: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the pixels take most of the time, and are of no interest
    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: None)
    mutate(data, records["whole"], tmp_path / "run")
    survives(drawn, tmp_path / "run")
    survives(as_page, tmp_path / "run")


@given(data=st.data())
@settings(QUICK, max_examples=25)
def test_a_changed_record_is_resumed_or_named(
    data: st.DataObject, records: dict[str, Path], tmp_path: Path
) -> None:
    mutate(data, records["part"], tmp_path / "run")
    survives(resumed, tmp_path / "run")


@pytest.mark.slow
def test_the_changes_can_be_noticed(records: dict[str, Path], tmp_path: Path) -> None:
    """As long as nothing is changed, all of them work."""
    for look in (show, compared, launched, as_page):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(records["whole"], tmp_path / "run")
        look(tmp_path / "run")
    shutil.copytree(records["part"], tmp_path / "part")
    resumed(tmp_path / "part")
    assert read_run(tmp_path / "part").finished
