"""Studies: reading the file, carrying out its runs whatever happens, and the tables
over their records.
"""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl.cli.compare import compare as compare_command
from flower_mcepl.data.batches import _index_batches, batches_per_pass
from flower_mcepl.errors import ConfigError, RecordError
from flower_mcepl.files.sealed import file_lock
from flower_mcepl.record.figures import _images_a_round
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.final_masks import final_masks
from flower_mcepl.report.tables import cells, footnotes, markdown, titles, write_csv
from flower_mcepl.strategies import GossipStrategy
from flower_mcepl.studies import Study, compare, find_records, read_study, run_study, runner
from flower_mcepl.studies.attempts import UNFINISHED
from flower_mcepl.studies.engines import ENGINES, run_in_process
from flower_mcepl.studies.flower_app import FlowerApp, imported_client
from flower_mcepl.studies.lines import key_lines, line_of_error
from flower_mcepl.studies.processes import side_by_side
from flower_mcepl.studies.records import REPLACED, replace_record
from flower_mcepl.studies.runner import (
    CSV,
    MARKDOWN,
    STUDY_COPY,
    Outcome,
    finished_runs,
    strangers,
    tasks_of,
    waiting,
)
from flower_mcepl.studies.sources import read_source, read_sources
from tests.fleet.grid import InProcessGrid
from tests.fleet.study_app import write_app, write_study
from tests.fleet.twins import Twin


# One a worker: worksteal may come back to this file, and a process has one module of
# a name.
@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_app(tmp_path_factory.mktemp("apps"))


@pytest.fixture
def study(tmp_path: Path, app: Path) -> Callable[..., Study]:
    """Read a study over the small app; line 4 of its file is the first of `text`."""
    return lambda text, **options: read_study(write_study(tmp_path, app, text, **options))


# --- lines ---

TEXT = '''# comment
name = "a"  # 2

[config]
"dsgd.lr" = 0.1
text = """
grid = 1
[runs]
"""
many = [
  1,  # a = 3
  2,
]
[config.sub]
x.y = 1
[grid] # header
a = { b = 1, c = 2 }
[[runs]]
label = "one"
[[runs]]
[runs.dsgd]
lr = 1
'''


def test_every_key_has_the_line_of_its_statement() -> None:
    lines = key_lines(TEXT)
    assert lines == {
        ("name",): 2,
        ("config",): 4,
        ("config", "dsgd.lr"): 5,
        ("config", "text"): 6,
        ("config", "many"): 10,
        ("config", "sub"): 14,
        ("config", "sub", "x"): 15,
        ("config", "sub", "x", "y"): 15,
        ("grid",): 16,
        ("grid", "a"): 17,
        ("grid", "a", "b"): 17,
        ("grid", "a", "c"): 17,
        ("runs", 0): 18,
        ("runs", 0, "label"): 19,
        ("runs", 1): 20,
        ("runs", 1, "dsgd"): 21,
        ("runs", 1, "dsgd", "lr"): 22,
    }


@given(
    st.lists(
        st.tuples(st.sampled_from(["blank", "plain", "list", "text"]), st.integers(1, 4)),
        max_size=12,
    )
)
def test_lines_are_found_below_statements_of_any_height(blocks: list[tuple[str, int]]) -> None:
    written: list[str] = []
    expected = {}
    for number, (kind, height) in enumerate(blocks):
        key = f"k{number}"
        expected[(key,)] = len(written) + 1
        if kind == "blank":
            del expected[(key,)]
            written += [""] * height
        elif kind == "plain":
            written.append(f"{key} = {height}")
        elif kind == "list":
            written += [f"{key} = [", *["  1,"] * height, "]"]
        else:
            written += [f"{key} = '''", *[f"k{i} = 1" for i in range(height)], "'''"]
    assert key_lines("\n".join(written)) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = 1\nb = \n", 2), ("a = 1\n\nb = [1,\n2,\n", 3), ("a = 1\n[t]\nb = 1\n[t]\nc = 2\n", 4)],
)
def test_broken_toml_has_a_line(text: str, line: int) -> None:
    with pytest.raises(tomllib.TOMLDecodeError) as error:
        tomllib.loads(text)
    assert line_of_error(text, error.value) == line


# --- the grid ---


def test_grid_and_runs_stand_beside_each_other(study: Callable[..., Study]) -> None:
    plan = study("""
        [config]
        num-rounds = 3
        [config.dsgd]
        lr = 0.2
        [grid]
        algorithm = ["mcepl", "dsgd"]
        seed = [1, 2]
        [[runs]]
        label = "all to all"
        topology = "complete"
        seed = [1, 2]
        [[runs]]
        num-rounds = 4
        """)
    told = [
        (r.label, r.config["algorithm"], r.config["topology"], r.config["seed"]) for r in plan.runs
    ]
    assert told == [
        (None, "mcepl", "ring", 1),
        (None, "mcepl", "ring", 2),
        (None, "dsgd", "ring", 1),
        (None, "dsgd", "ring", 2),
        ("all to all", "mcepl", "complete", 1),
        ("all to all", "mcepl", "complete", 2),
        (None, "mcepl", "ring", 7),
    ]
    assert [run.config["num-rounds"] for run in plan.runs] == [3] * 6 + [4]
    assert all(run.config["dsgd.lr"] == 0.2 and run.config["batch-size"] == 8 for run in plan.runs)
    assert all("record-dir" not in run.config for run in plan.runs)
    assert set(plan.varied) == {"algorithm", "seed", "topology", "num-rounds"}


def test_slugs_are_readable_and_follow_the_whole_config(study: Callable[..., Study]) -> None:
    text = """
        [grid]
        algorithm = ["mcepl", "local-masks"]
        seed = [1, 2]
        [[runs]]
        label = "all to all!"
        topology = "complete"
        retention-conv = ["0.1, 0.3", "0.5"]
        """
    plan = study(text)
    assert [run.slug.rpartition("_")[0] for run in plan.runs] == [
        "mcepl_ring_seed-1_retention-conv-0.3",
        "mcepl_ring_seed-2_retention-conv-0.3",
        "local-masks_ring_seed-1_retention-conv-0.3",
        "local-masks_ring_seed-2_retention-conv-0.3",
        "all-to-all_mcepl_seed-7_retention-conv-0.1-0.3",
        "all-to-all_mcepl_seed-7_retention-conv-0.5",
    ]
    again, changed = study(text), study(f"[config]\nscale = 2\n{text}")
    assert [run.slug for run in again.runs] == [run.slug for run in plan.runs]
    assert not {run.slug for run in changed.runs} & {run.slug for run in plan.runs}


def test_a_slug_fits_into_the_name_of_a_file_in_any_script(study: Callable[..., Study]) -> None:
    text = "[[runs]]\nlabel = '{}'\nseed = [1, 2]\n"
    plans = [study(text.format(letter * 200)) for letter in "aß研"]
    slugs = [run.slug for plan in plans for run in plan.runs]
    assert all(100 < len(slug.encode()) <= 120 for slug in slugs)
    assert len(set(slugs)) == len(slugs)


def test_settings_of_the_command_line_win_over_the_file(tmp_path: Path, app: Path) -> None:
    path = write_study(
        tmp_path,
        app,
        "[config]\nnum-rounds = 3\n[grid]\nseed = [1, 2]\n[[runs]]\ntopology = 'path'\n",
    )
    plan = read_study(path, {"num-rounds": 5, "dsgd": {"lr": 0.3}})
    assert [(run.config["num-rounds"], run.config["dsgd.lr"]) for run in plan.runs] == [
        (5, 0.3)
    ] * 3
    assert {run.digest for run in plan.runs}.isdisjoint(
        {run.digest for run in read_study(path).runs}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num-round": 5}, r"^--run-config: 'num-round' is not in the app's config.*num-rounds"),
        ({"num-rounds": 0}, r"^--run-config: .*num-rounds must be >= 1"),
        ({"scale": "big"}, r"^--run-config: scale must be float"),
        ({"seed": 5}, r"^--run-config: seed varies in this study"),
        ({"topology": "ring"}, r"^--run-config: topology varies in this study"),
    ],
)
def test_wrong_settings_of_the_command_line_are_told_as_such(
    settings: dict[str, Any], message: str, tmp_path: Path, app: Path
) -> None:
    path = write_study(tmp_path, app, "[grid]\nseed = [1, 2]\n[[runs]]\ntopology = 'path'\n")
    with pytest.raises(ConfigError, match=message):
        read_study(path, settings)


@pytest.mark.parametrize("engine", ["flower", "in-process", "batched"])
@pytest.mark.parametrize(
    ("keys", "setting", "rule"),
    [
        ('export = ""', "export = 'mask'", "export writes models .* under Flower"),
        (
            'schedule = "rounds"\ncheckpoint-every = 0',
            "schedule = 'async'",
            'in process all agents of a study have one speed.* Use engine = "flower"',
        ),
    ],
    ids=["export", "schedule"],
)
def test_what_means_nothing_in_process_is_refused_before_the_first_run(
    engine: str, keys: str, setting: str, rule: str, tmp_path: Path
) -> None:
    app = write_app(tmp_path / "apps")
    pyproject = app / "pyproject.toml"
    config = "[tool.flwr.app.config]\n"
    text = pyproject.read_text(encoding="utf-8").replace(config, f"{config}{keys}\n")
    pyproject.write_text(text, encoding="utf-8")
    path = write_study(tmp_path, app, f"[config]\n{setting}\n", engine=engine)
    if engine == "flower":
        assert len(read_study(path).runs) == 1
        return
    with pytest.raises(ConfigError, match=rf"line \d+: {rule}"):
        read_study(path)


@pytest.mark.parametrize("engine", ["flower", "in-process"])
def test_one_resumption_for_all_runs_is_refused(engine: str, tmp_path: Path) -> None:
    app = write_app(tmp_path / "apps")
    pyproject = app / "pyproject.toml"
    config = "[tool.flwr.app.config]\n"
    text = pyproject.read_text(encoding="utf-8").replace(config, f'{config}resume = ""\n')
    pyproject.write_text(text, encoding="utf-8")
    assert read_study(write_study(tmp_path, app, "", engine=engine)).runs
    path = write_study(tmp_path, app, "[config]\nresume = 'runs/x'\n", engine=engine)
    with pytest.raises(ConfigError, match=r"line 5: a study goes on .* by itself"):
        read_study(path)


def test_nodes_of_several_agents_have_their_own_bytes(tmp_path: Path) -> None:
    """Pairs of a ring hand to each other over no link: half of its links are left."""
    app = write_app(tmp_path / "apps", "pairs")
    pyproject = app / "pyproject.toml"
    config = "[tool.flwr.app.config]\n"
    text = pyproject.read_text(encoding="utf-8").replace(config, f"{config}agents-per-node = 1\n")
    pyproject.write_text(text, encoding="utf-8")
    plan = read_study(write_study(tmp_path, app, "[grid]\nagents-per-node = [1, 2]\n"))
    assert [outcome.error for outcome in run_study(plan)] == [None, None]
    alone, pairs = (read_run(task.record) for task in tasks_of(plan))
    assert facts(alone.path)[0] == facts(pairs.path)[0]  # the same frames
    whole, counted = ((run.summary or {})["bytes"] for run in (alone, pairs))
    assert "local_total" not in whole
    assert counted["links_total"] + counted["local_total"] == whole["links_total"]
    assert 0 < counted["local_total"] < whole["links_total"]
    odd = write_study(tmp_path, app, "[config]\nagents-per-node = 3\n")
    with pytest.raises(ConfigError, match="4 agents must divide evenly over nodes"):
        read_study(odd)


def test_study_without_a_grid_is_one_run(study: Callable[..., Study]) -> None:
    (run,) = study("[config]\nseed = 3\n").runs
    assert run.slug == f"run_{run.digest[:8]}"


def test_defaults_come_from_the_files_name(
    tmp_path: Path, app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graphs.toml").write_text(f'app = "{os.path.relpath(app, tmp_path)}"\n')
    plan = read_study(Path("graphs.toml"))
    assert (plan.name, plan.engine, plan.out) == (
        "graphs",
        "flower",
        tmp_path / "studies" / "graphs",
    )


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("rounds = 3", 4, "unknown key 'rounds'"),
        ("gird = {}", 4, "Did you mean 'grid'"),
        ('target = "high"', 4, "must be a number; got 'high'"),
        ("target = true", 4, "must be a number; got True"),
        ("target = nan", 4, "accuracy in (0, 1]; got nan"),
        ("target = 90", 4, "accuracy in (0, 1]; got 90"),
        ("config = 3", 4, "must be a table"),
        ("[runs]\nseed = 1", 4, "array of tables"),
        ("runs = [1]", 4, "array of tables"),
        ("name = ' '", 4, "name must say something"),
        ("[config]\nseed = [1]", 5, "bool, int, float or str"),
        ("[config]\n\nsead = 1", 6, "Did you mean 'seed'"),
        ("[config]\nlr = 1.0", 5, "[tool.flwr.app.config]"),
        (
            "[config]\n'dsgd.lr' = 1.0\n[config.dsgd]\nlr = 2.0",
            7,
            "twice; the other time on line 5",
        ),
        ("[config]\nrecord-dir = 'here'", 5, "Say `out`"),
        ("[config]\nnum-rounds = 1.5", 5, "must be int"),
        ("[config]\ncrash = 1", 5, "must be bool, as in the app's config (False)"),
        ("[config]\nscale = 'big'", 5, "must be float"),
        ("[grid]\nseed = 1", 5, "Write [1]"),
        ("[grid]\nseed = []", 5, "at least one value"),
        ("[grid]\nseed = [\n  1,\n  2,\n  1,\n]", 5, "1 is there twice"),
        ("[config]\nseed = 1\n[grid]\nseed = [1, 2]", 7, "on line 5, in [config]"),
        ("[grid]\nseed = [1, 2]\nalgorithm = ['mcepl', 'mcelp']", 6, "Did you mean 'mcepl'"),
        ("[grid]\ntopology = ['ring', 'donut']", 5, "donut"),
        (
            "[config]\nnum-agents = 7\n[grid]\nseed = [1]\ntopology = ['ring', 'torus']",
            8,
            "num-agents = 7 on line 5",
        ),
        ("[config]\nnum-agents = 0\n", 5, "num-agents must be >= 1"),
        ("[config]\nnum-agents = 0\nnum-rounds = 0", 5, "num-agents must be >= 1"),
        ("[[runs]]\nseed = 1\n[[runs]]\nseed = [2, 1]", 6, "the table on line 4"),
        ("[grid]\nseed = [1, 2]\n[[runs]]\nlabel = 'x'\nseed = 2", 6, "the table on line 4"),
        ("[[runs]]\nlabel = 3", 5, "label must be a string"),
        ("[[runs]]\nbatch-size = [8, 0]", 5, "batch-size must be >= 1"),
        ("[config]\nx = [\n", 5, "no TOML"),
    ],
)
def test_bad_study_is_refused_with_its_line(
    text: str, line: int, words: str, study: Callable[..., Study]
) -> None:
    with pytest.raises(ConfigError) as error:
        study(text)
    assert f"study.toml, line {line}: " in str(error.value)
    assert words in str(error.value)


def test_bad_head_is_refused_with_its_line(
    tmp_path: Path, app: Path, study: Callable[..., Study]
) -> None:
    with pytest.raises(
        ConfigError, match=r"line 3: engine must be one of flower, in-process, batched; got 'ray'"
    ):
        study("", engine="ray")
    file = tmp_path / "other.toml"
    file.write_text("\nname = 'x'\n")
    with pytest.raises(ConfigError, match="line 1: a study needs app"):
        read_study(file)
    file.write_text("\napp = 'nowhere'\n")
    with pytest.raises(ConfigError, match=r"line 2: .*pyproject\.toml"):
        read_study(file)
    with pytest.raises(ConfigError, match=r"missing\.toml cannot be read"):
        read_study(tmp_path / "missing.toml")


def test_value_that_flower_cannot_be_told_is_refused_for_flower_only(
    study: Callable[..., Study],
) -> None:
    text = '[grid]\nretention-conv = [\'0.1\', """0.5,\n0.1"""]\n'
    assert len(study(text).runs) == 2
    with pytest.raises(ConfigError, match=r"line 5: .*one-line"):
        study(text, engine="flower")


def test_the_studies_that_ship_are_in_order() -> None:
    for path in sorted((Path(__file__).parents[2] / "examples" / "paper").glob("*.toml")):
        assert read_study(path).runs


# --- carrying it out ---

SEEDS = "[grid]\nseed = [1, 2, 3]\n"


def stamps(plan: Study) -> dict[str, int]:
    """When each record was finished."""
    return {p.parent.name: p.stat().st_mtime_ns for p in sorted(plan.out.glob("*/summary.json"))}


def facts(path: Path) -> tuple[Any, Any]:
    """What must not depend on how a run was carried out."""
    run = read_run(path)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in run.rounds]
    return [line["frames"] for line in run.relay], rows


def test_finished_runs_stay_and_half_ones_are_repeated(study: Callable[..., Study]) -> None:
    plan = study(SEEDS)
    assert [outcome.error for outcome in run_study(plan)] == [None] * 3
    before = stamps(plan)
    assert set(before) == {run.slug for run in plan.runs}
    assert not any((plan.out / UNFINISHED).iterdir())
    assert run_study(plan) == []
    assert stamps(plan) == before

    first, second, third = (task.record for task in tasks_of(plan))
    expected = facts(first)
    (first / "summary.json").unlink()  # killed
    RunRecord(second).finish("interrupted")
    RunRecord(third).amend_config(study={"digest": "of another config"})
    assert len(run_study(plan)) == 3
    assert facts(first) == expected
    assert run_study(plan) == []


def test_changed_study_runs_what_is_new_and_knows_what_is_old(study: Callable[..., Study]) -> None:
    old = study("[grid]\nseed = [1, 2]\n")
    run_study(old)
    before = stamps(old)
    new = study("[grid]\nseed = [2, 3]\n")
    assert [outcome.task.run.config["seed"] for outcome in run_study(new)] == [3]
    assert stamps(new).items() >= before.items()
    assert strangers(new) == [new.out / old.runs[0].slug]
    with open(new.out / CSV) as file:
        (row,) = csv.DictReader(file)
    assert row["seeds"] == "2"
    assert (new.out / MARKDOWN).read_text().startswith("| seeds |")


@pytest.mark.parametrize(
    "more",
    [
        "[grid]\nseed = [1, 2]\n",
        "[grid]\nseed = [1]\ntopology = ['ring', 'path']\n",
        "[[runs]]\nlabel = 'new'\nseed = 1\n",
        "[config]\nseed = 1\n",
    ],
    ids=["a seed", "a key", "a label", "no grid"],
)
def test_a_finished_run_is_known_whatever_the_study_now_calls_its_folder(
    more: str, study: Callable[..., Study]
) -> None:
    old = study("[grid]\nseed = [1]\n[[runs]]\ntopology = 'complete'\n")
    run_study(old)
    before = stamps(old)
    new = study(more)
    assert new.runs[0].digest == old.runs[0].digest
    assert new.runs[0].slug != old.runs[0].slug
    assert [task.run for task in waiting(new)] == list(new.runs[1:])
    assert all(outcome.error is None for outcome in run_study(new))
    assert stamps(new).items() >= before.items()
    assert strangers(new) == [old.out / old.runs[1].slug]
    assert finished_runs(new)[0].path == old.out / old.runs[0].slug
    known = [read_run(run.path).study["label"] for run in finished_runs(new)]
    assert known == [run.label for run in new.runs]


def failing(*_: object) -> Path:
    raise RuntimeError("CUDA out of memory")


def stopped(*_: object) -> Path:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [failing, stopped])
@pytest.mark.parametrize("damage", [True, False], ids=["unreadable", "of another engine"])
def test_an_old_record_stays_until_the_new_one_is_in_place(
    damage: bool,
    end: Callable[..., Path],
    study: Callable[..., Study],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = study("", engine="in-process" if damage else "batched")
    run_study(plan)
    (task,) = tasks_of(plan)
    rounds = task.record / "rounds.jsonl"
    if damage:
        rounds.write_text(rounds.read_text().replace('"round": 1', '"round": O', 1))
    kept = {path: path.read_bytes() for path in task.record.rglob("*") if path.is_file()}
    plan = study("")
    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "in-process", end)
        if end is stopped:
            with pytest.raises(KeyboardInterrupt):
                run_study(plan)
        else:
            assert [outcome.error for outcome in run_study(plan)] == [
                "RuntimeError: CUDA out of memory"
            ]
    assert {path: path.read_bytes() for path in task.record.rglob("*") if path.is_file()} == kept
    assert (f"{task.record.name} cannot be read" in task.log.read_text()) == damage
    assert bool(runner.unreadable([task])) == damage
    assert [outcome.error for outcome in run_study(plan)] == [None]
    assert [path.parent for path in plan.out.rglob("config.json")] == [task.record]
    assert not (plan.out / REPLACED).exists()
    assert rounds.read_bytes() != kept[rounds]


def test_a_record_is_put_back_where_its_successor_did_not_come(study: Callable[..., Study]) -> None:
    plan = study("")
    run_study(plan)
    (task,) = tasks_of(plan)
    before = stamps(plan)
    with pytest.raises(FileNotFoundError):
        replace_record(plan.out / "nowhere", task.record, task.run.digest)
    assert stamps(plan) == before
    (plan.out / REPLACED / "d").mkdir(parents=True)  # killed between the two steps
    task.record.rename(plan.out / REPLACED / "d" / task.record.name)
    assert run_study(plan) == []
    assert stamps(plan) == before


def test_a_table_says_what_is_not_in_it(study: Callable[..., Study]) -> None:
    plan = study("[grid]\ncrash = [false, true]\n")
    run_study(plan)
    again = plan.out / "again.md"
    compare_command([plan.file], markdown=again)
    (of_folder,) = read_source(plan.out).notes
    assert of_folder == "1 of the study's 2 runs are not finished"
    for table in (plan.out / MARKDOWN, again):
        assert "1 of the study's 2 runs are not finished" in table.read_text(encoding="utf-8")
    run_study(study("[config]\ncrash = true\n"))  # whose one run has no record
    assert not (plan.out / MARKDOWN).exists()
    assert not (plan.out / CSV).exists()


def test_failing_run_does_not_stop_the_others(study: Callable[..., Study]) -> None:
    plan = study("[grid]\ncrash = [true, false]\n")
    failed, fine = run_study(plan)
    assert failed.error is not None
    assert "crashes on purpose" in failed.error
    log = failed.task.log.read_text()
    assert "Traceback" in log
    assert "the app talks" in log
    assert fine.error is None
    assert "round 2/2" in fine.task.log.read_text()
    assert [outcome.task.run for outcome in run_study(plan)] == [plan.runs[0]]  # tried again


def test_ctrl_c_stops_the_study_even_where_a_library_makes_another_error_of_it(
    study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # a shell's background jobs ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    plan = study("[grid]\nseed = [1, 2, 3]\n")
    in_process = ENGINES["in-process"]

    def interrupted(app: FlowerApp, config: Mapping[str, Any], *rest: Any) -> Path:
        if config["seed"] == 2:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None
        return in_process(app, config, *rest)

    monkeypatch.setitem(ENGINES, "in-process", interrupted)
    ended: list[Outcome] = []
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, tell=ended.append)
    assert [outcome.task.run for outcome in ended] == [plan.runs[0]]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [run.path.name for run in finished_runs(plan)] == [plan.runs[0].slug]
    assert (plan.out / MARKDOWN).read_text().count("\n| 1 |") == 1  # the table of what is finished
    monkeypatch.undo()
    assert [outcome.error for outcome in run_study(plan)] == [None, None]


def test_one_process_at_a_time(study: Callable[..., Study]) -> None:
    plan = study("")
    plan.out.mkdir()
    with (
        file_lock(plan.out / ".lock", wait=0, busy="nobody else holds it"),
        pytest.raises(ConfigError, match=f"process {os.getpid()} is at work"),
    ):
        run_study(plan)
    # as one that was killed leaves it: process 1 is alive, but does not hold it
    (plan.out / ".lock").write_text("1")
    assert len(run_study(plan)) == 1


def test_a_batched_study_runs_stacks_and_its_records_say_so(study: Callable[..., Study]) -> None:
    text = "[grid]\nalgorithm = ['mcepl', 'dsgd']\n"
    plan = study(text, engine="batched")
    ended = run_study(plan, jobs=2)
    stacks, refused = sorted(ended, key=lambda outcome: outcome.error is not None)
    assert stacks.error is None
    assert (
        "engine batched stacks agents of mcepl and its variants; got agent 0, of class Dsgd"
        in str(refused.error)
    )
    (run,) = finished_runs(plan)
    assert (run.config["engine"], run.config["study"]["engine"]) == ("batched", "batched")
    assert len(run_study(study(text, engine="batched"))) == 1  # the refused one
    assert len(run_study(study(text))) == 2  # other bits
    assert run_study(study(text)) == []


def test_jobs_are_for_runs_in_process(study: Callable[..., Study]) -> None:
    with pytest.raises(ConfigError, match="--jobs"):
        run_study(study("", engine="flower"), jobs=2)
    with pytest.raises(ConfigError, match="got 0"):
        run_study(study(""), jobs=0)


def test_the_same_bits_as_through_flowers_messages(
    study: Callable[..., Study], tmp_path: Path
) -> None:
    plan = study("[grid]\nalgorithm = ['mcepl', 'dsgd', 'local-masks']\n")
    run_study(plan)
    with imported_client(plan.app) as client:
        for task in tasks_of(plan):
            config = {**task.run.config, "record-dir": str(tmp_path / task.run.slug)}
            grid = InProcessGrid(client, 4, config)
            strategy = GossipStrategy.from_run_config(config, app_keys=plan.app.config)
            strategy.start(grid=grid)
            assert strategy.record is not None
            assert facts(task.record) == facts(strategy.record.path)
            assert read_run(task.record).config["run_config"] == task.run.config
            assert not any(line["failed"] for line in read_run(task.record).relay)


def test_both_engines_keep_the_agents_classes_secret(
    study: Callable[..., Study], tmp_path: Path
) -> None:
    app = study("").app
    config = {**app.config, "tell-classes": False, "record-dir": str(tmp_path / "flower")}
    alone = run_in_process(app, config, tmp_path / "alone", print)
    with imported_client(app) as client:
        strategy = GossipStrategy.from_run_config(config, app_keys=app.config)
        strategy.start(grid=InProcessGrid(client, 4, config))
    assert strategy.record is not None
    in_process, in_flower = (
        read_run(path).config["agents"] for path in (alone, strategy.record.path)
    )
    assert [agent.keys() for agent in in_process] == [agent.keys() for agent in in_flower]
    assert not any(
        {"classes", "train_counts", "test_counts"} & agent.keys() for agent in in_process
    )


def test_server_based_algorithm_runs_around_its_server(study: Callable[..., Study]) -> None:
    plan = study("[config]\nalgorithm = 'fedavg'\n")
    (outcome,) = run_study(plan)
    assert outcome.error is None
    run = read_run(outcome.task.record)
    assert "server" in run.config
    (row,) = compare([run], target=1e-9).rows
    relay = [json.loads(line) for line in (run.path / "relay.jsonl").read_text().splitlines()]
    assert row.mean("link_bytes") == relay[-1]["link_bytes"] + relay[-1]["uplink_bytes"] > 0
    # after round 1
    assert row.mean("target_bytes") == relay[1]["link_bytes"] + relay[0]["uplink_bytes"]


def test_client_of_another_making_or_place_is_refused(
    tmp_path: Path, study: Callable[..., Study]
) -> None:
    other = write_app(tmp_path, "other")
    settings = other / "pyproject.toml"
    client = other / "mcepl_other_probe" / "client_app.py"
    client.write_text("from flwr.clientapp import ClientApp\n\napp = ClientApp()\n")
    (tmp_path / "other.toml").write_text(
        f'app = "{other}"\nengine = "in-process"\nout = "{tmp_path / "out"}"\n'
    )
    (outcome,) = run_study(read_study(tmp_path / "other.toml"))
    assert outcome.error is not None
    assert "make_client_app" in outcome.error

    settings.write_text(
        settings.read_text().replace("mcepl_other_probe.client_app", "json.decoder")
    )
    (outcome,) = run_study(read_study(tmp_path / "other.toml"))
    assert outcome.error is not None
    assert "a name of its own" in outcome.error


def test_task_that_takes_its_process_down_is_told() -> None:
    ((task, error),) = side_by_side(os._exit, [3], jobs=2)
    assert task == 3
    assert error is not None
    assert "exit code 3" in error


def long_reason(length: int) -> str:
    return length * "x"


def test_a_reason_longer_than_a_pipe_holds_ends_its_task() -> None:
    ((_, reason),) = side_by_side(long_reason, [1_000_000], jobs=1)
    assert reason == long_reason(1_000_000)


@pytest.mark.slow
def test_tasks_run_side_by_side() -> None:
    assert sorted(side_by_side(shutil.which, ["sh", "no-such-program", "ls"], jobs=2)) == [
        ("ls", shutil.which("ls")),
        ("no-such-program", None),
        ("sh", shutil.which("sh")),
    ]


# --- killed ---

PLACES = {
    "log_round": RunRecord,
    "amend_config": RunRecord,
    "rename": Path,
    "rmtree": shutil,
    "write_csv": runner,
}


def killed(path: Path, at: str, count: int) -> None:
    """A process that runs a study until it calls a function for the so-manieth time."""
    real, calls = getattr(PLACES[at], at), itertools.count(1)

    def killing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    def play() -> None:
        setattr(PLACES[at], at, killing)
        run_study(read_study(path))

    assert Twin(play).wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("at", "count", "finished"),
    [
        ("rename", 2, 1),  # the second record is whole, but not in its place
        pytest.param("log_round", 5, 1, marks=pytest.mark.slow),  # in the second run
        pytest.param("log_round", 1, 0, marks=pytest.mark.slow),
        # the first record is whole, but unmarked
        pytest.param("amend_config", 3, 0, marks=pytest.mark.slow),
        # right after the first record went to its place
        pytest.param("rmtree", 2, 1, marks=pytest.mark.slow),
        pytest.param("write_csv", 1, 3, marks=pytest.mark.slow),
    ],
)
def test_sigkill_loses_no_finished_run_and_repeats_none(
    at: str, count: int, finished: int, tmp_path: Path, app: Path
) -> None:
    path = write_study(tmp_path, app, SEEDS)
    killed(path, at, count)
    plan = read_study(path)
    before = stamps(plan)
    assert len(before) == finished
    assert len(run_study(plan)) == 3 - finished
    assert stamps(plan).items() >= before.items()
    assert len(stamps(plan)) == 3
    assert not any((plan.out / UNFINISHED).glob("*"))
    for task in tasks_of(plan):
        assert read_run(task.record).config["run_config"]["seed"] == task.run.config["seed"]
    with open(plan.out / CSV) as file:
        assert next(csv.DictReader(file))["seeds"] == "3"


def started(path: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "flower_mcepl", "run", str(path), *more]
    # Where pytest itself was started in the background, it and its children would
    # ignore Ctrl-C.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hears
    )


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_signal_from_outside(signum: signal.Signals, jobs: int, tmp_path: Path, app: Path) -> None:
    path = write_study(tmp_path, app, "[config]\nnum-rounds = 40\n[grid]\nseed = [1, 2, 3]\n")
    plan = read_study(path)
    with started(path, "--jobs", str(jobs)) as process:
        until(lambda: len(stamps(plan)) >= 1)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
    before = stamps(plan)
    if signum is signal.SIGINT:
        assert process.returncode == 130
        assert "The same command goes on from here." in output
        assert "Traceback" not in output
        assert (plan.out / MARKDOWN).exists()
    else:
        assert process.returncode == -signal.SIGKILL
        time.sleep(1)
        quiet = sorted((p, p.stat().st_size) for p in plan.out.rglob("*.jsonl"))
        time.sleep(1)
        # nobody works on
        assert sorted((p, p.stat().st_size) for p in plan.out.rglob("*.jsonl")) == quiet
    with started(path, "--jobs", str(jobs)) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert stamps(plan).items() >= before.items()
    assert len(stamps(plan)) == 3


@pytest.mark.flower
@pytest.mark.slow
def test_flower_gives_the_bits_of_in_process(
    tmp_path: Path, app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "[grid]\nseed = [1, 2]\n"
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    mine = read_study(write_study(here, app, text))
    theirs = read_study(write_study(there, app, text, engine="flower"))
    for plan in (mine, theirs):
        assert [outcome.error for outcome in run_study(plan)] == [None, None]
    for ours, other in zip(tasks_of(mine), tasks_of(theirs), strict=True):
        assert ours.run.slug == other.run.slug
        assert facts(ours.record) == facts(other.record)
    assert run_study(theirs) == []


# --- comparing ---


def test_filters_that_are_off_are_counted_where_the_lasso_varies(
    study: Callable[..., Study],
) -> None:
    plan = study("[config]\nretention-conv = '0.1'\n[grid]\ngroup-lasso = [0.0, 0.5]\n")
    assert [outcome.error for outcome in run_study(plan)] == [None, None]
    runs = find_records([plan.out])
    table = compare(runs)
    assert "filters off" in titles(table)
    assert any(note.startswith("filters off:") for note in footnotes(table))
    for run, row in zip(runs, table.rows, strict=True):
        masks, _ = final_masks(run)
        filters = [mask for layers in masks.values() for layer in layers.values() for mask in layer]
        assert row.mean("filters_off") == sum(not mask.any() for mask in filters) / len(filters)
    alone = compare(runs[:1])
    assert "filters off" not in titles(alone)
    assert alone.rows[0].mean("filters_off") is None


def write_record(root: Path, *, accuracies: np.ndarray, sent: int = 100, **run_config: Any) -> Path:
    """A finished record with ``accuracies[round, agent]``; after round t an agent has
    sent t * `sent` bytes.
    """
    rounds, agents = accuracies.shape
    record = RunRecord.create(root, name="made", config={"run_config": run_config})
    record.amend_config(
        agents=[
            {
                "agent": a,
                "num_examples": 10,
                "parameters": {"batch_size": 4, "local_steps": 2, "local_epochs": 0},
            }
            for a in range(agents)
        ]
    )
    for round in range(1, rounds + 1):
        record.log_agents(
            {
                "round": round,
                "agent": agent,
                "accuracy": float(accuracies[round - 1, agent]),
                "loss": 1.0,
                "num_examples": 5,
                "density": 0.5,
                "sent_bytes": round * sent,
                "received_bytes": round * sent,
                "uplink_bytes": 0,
                "seconds": 0.0,
            }
            for agent in range(agents)
        )
        counts = {
            "answered": agents,
            "agents": agents,
            "failed": {},
            "missing": [],
            "link_bytes": (round - 1) * sent * agents,
            "uplink_bytes": 0,
        }
        record.log_round({"round": round, **counts, "seconds": 0.0})
    total = {
        "links_total": rounds * sent * agents,
        "bits_per_weight": 0.25,
        "busiest_agent_total": 3 * sent,
    }
    record.finish("finished", num_rounds=rounds, bytes=total, seconds=float(sent))
    return record.path


@pytest.fixture
def records(tmp_path: Path) -> Iterator[tuple[Path, dict[tuple[str, int], np.ndarray]]]:
    rng = np.random.default_rng(3)
    made = {}
    for algorithm in ("a", "b"):
        for seed in (1, 2, 3):
            made[algorithm, seed] = rng.uniform(0.2, 0.9, size=(4, 13))
            write_record(
                tmp_path / "records",
                accuracies=made[algorithm, seed],
                sent=100 * seed,
                algorithm=algorithm,
                seed=seed,
                **{"record-dir": str(seed), "num-rounds": 4},
            )
    return tmp_path / "records", made


def test_table_equals_a_slow_recount(
    records: tuple[Path, dict[tuple[str, int], np.ndarray]], tmp_path: Path
) -> None:
    root, made = records
    comparison = compare(find_records([root]), target=0.57)
    assert comparison.keys == ("algorithm",)
    write_csv(comparison, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        table = {row["algorithm"]: row for row in csv.DictReader(file)}
    assert set(table) == {"a", "b"}
    for algorithm, row in table.items():
        mine = np.stack([made[algorithm, seed] for seed in (1, 2, 3)])  # [seed, round, agent]
        last = mine[:, -1]
        curve = mine.mean(axis=(0, 2))
        reached = []
        for seed, rounds in zip((1, 2, 3), mine, strict=True):
            reached += [100 * seed * 13 * (int(np.argmax(rounds.mean(axis=1) >= 0.57)) + 1)] * bool(
                (rounds.mean(axis=1) >= 0.57).any()
            )
        expected = {
            "seeds": 3,
            "accuracy_mean": last.mean(),
            "accuracy_sd": last.mean(axis=1).std(ddof=1),
            "agent_sd": last.std(axis=1).mean(),
            "worst_tenth": np.sort(last, axis=1)[:, :2].mean(),
            "best_accuracy": curve.max(),
            "best_round": curve.argmax() + 1,
            "link_bytes": 4 * 200 * 13,
            "seeds_reaching_target": len(reached),
            "bits_per_weight": 0.25,
            "busiest_agent_bytes": 600,
            "images_per_agent": 4 * 8,
            "seconds": 200,
        }
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(float(value), abs=1e-12), name
        assert row["target_bytes"] == ("" if len(reached) < 3 else str(np.mean(reached)))


def test_table_for_people(records: tuple[Path, dict[tuple[str, int], np.ndarray]]) -> None:
    root, made = records
    comparison = compare(find_records([root]), target=0.95)
    heads = titles(comparison)
    rows = [dict(zip(heads, row, strict=True)) for row in cells(comparison)]
    means = [made["a", seed][-1].mean() for seed in (1, 2, 3)]
    assert rows[0]["accuracy"] == f"{np.mean(means):.4f} ± {np.std(means, ddof=1):.4f}"
    assert rows[0]["to 0.95"] == "not reached"
    lines = markdown(comparison).splitlines()
    assert lines[0] == f"| {' | '.join(heads)} |"
    assert lines[1].count("---:") == len(heads) - 1
    assert lines[2].startswith("| a | 3 | ")
    assert "one seed has none" in footnotes(comparison)[0]
    assert lines[-1].startswith("- to 0.95: bytes")


def test_without_a_target_nothing_is_said_to_have_reached_it(
    records: tuple[Path, dict[tuple[str, int], np.ndarray]], tmp_path: Path
) -> None:
    write_csv(compare(find_records([records[0]])), tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        assert {row["seeds_reaching_target"] for row in csv.DictReader(file)} == {""}


def test_a_setting_may_be_called_as_a_measure_is(tmp_path: Path) -> None:
    for agents in ("all", "some"):
        write_record(tmp_path, accuracies=np.full((1, 2), 0.5), agents=agents, seed=1)
    write_csv(compare(find_records([tmp_path])), tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["config.agents"], row["agents"]) for row in rows] == [("all", "2"), ("some", "2")]


def test_names_are_no_markup_in_a_table(tmp_path: Path) -> None:
    scores, names = np.full((4, 3), 0.5), ("<b>x</b>", "_a_ *b*", "[c](d)", "a_b \\ $e$")
    for seed, name in enumerate(names):
        write_record(tmp_path / "r", accuracies=scores, sent=1, algorithm=name, seed=seed)
    table = markdown(compare(find_records([tmp_path / "r"])))
    shown = [re.sub(r"\\(.)", r"\1", line.split(" | ")[0]) for line in table.splitlines()[2:6]]
    assert sorted(shown) == sorted(f"| {name}" for name in names)
    for raw in ("<b>", " _a", "[c]", "$e"):
        assert f"| {raw}" not in table
    assert r"\<b\>x\</b\>" in table
    assert r"\_a\_ \*b\*" in table
    assert r"a_b \\ \$e\$" in table


def test_one_seed_has_no_spread_and_target_may_be_reached_by_some(tmp_path: Path) -> None:
    low, high = np.full((2, 10), 0.4), np.full((2, 10), 0.6)
    write_record(tmp_path, accuracies=low, algorithm="a", seed=1)
    write_record(tmp_path, accuracies=high, algorithm="a", seed=2)
    write_record(tmp_path, accuracies=high, algorithm="b|c", seed=1)
    comparison = compare(find_records([tmp_path]), target=0.5)
    heads = titles(comparison)
    some, one = [dict(zip(heads, row, strict=True)) for row in cells(comparison)]
    assert some["to 0.5"] == "not reached (1 of 2 seeds did)"
    assert one["to 0.5"] == "1.00 kB"
    assert one["accuracy"] == "0.6000"
    assert "| b\\|c | 1 |" in markdown(comparison)


def test_a_run_without_a_value_is_named(tmp_path: Path) -> None:
    write_record(tmp_path / "r", accuracies=np.full((2, 3), 0.5), seed=1)
    lost = write_record(tmp_path / "r", accuracies=np.full((2, 3), 0.5), seed=2)
    rows = (lost / "rounds.jsonl").read_text(encoding="utf-8")
    rows = rows.replace('"accuracy": 0.5', '"accuracy": null')
    for loss in ("null", "1.0"):
        changed = rows.replace('"loss": 1.0', f'"loss": {loss}').replace("}", ', "metrics": {}}')
        (lost / "rounds.jsonl").write_text(changed, encoding="utf-8")
        if loss == "null":
            comparison = compare(find_records([tmp_path / "r"]))
            assert comparison.rows[0].mean("result") is None
            assert f"{lost.name}: no agent has a value of accuracy" in comparison.notes[0]
        else:
            with pytest.raises(ConfigError, match=rf"and loss \({re.escape(lost.name)}\)"):
                compare(find_records([tmp_path / "r"]))


def test_records_that_do_not_count_are_named(tmp_path: Path) -> None:
    accuracies = np.full((2, 4), 0.5)
    write_record(tmp_path, accuracies=accuracies, algorithm="a", seed=1)
    old = write_record(tmp_path, accuracies=accuracies, algorithm="b", seed=1)
    RunRecord(old).amend_config(started="2000-01-01T00:00:00+00:00")
    write_record(tmp_path, accuracies=2 * accuracies, algorithm="b", seed=1)
    stopped = write_record(tmp_path, accuracies=accuracies, algorithm="c", seed=1)
    RunRecord(stopped).finish("interrupted")
    going = RunRecord.create(tmp_path, name="going", config={"run_config": {"algorithm": "d"}})
    comparison = compare(find_records([tmp_path]))
    assert [row.mean("result") for row in comparison.rows] == [0.5, 1.0]
    notes = "\n".join(comparison.notes)
    for path, why in (
        (old, "newer record"),
        (stopped, "interrupted"),
        (going.path, "without a summary"),
    ):
        assert f"left out: {path.name}" in notes
        assert why in notes
    with pytest.raises(ConfigError, match="at least one finished run"):
        compare(find_records([stopped]))
    with pytest.raises(RecordError, match=r"config\.json"):
        find_records([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"in \(0, 1\]; got 50"):
        compare(find_records([tmp_path]), target=50.0)


def made_run(root: Path, name: str, *, label: str | None = None, **run_config: Any) -> None:
    path = write_record(root, accuracies=np.full((1, 2), 0.5), **run_config)
    RunRecord(path).amend_config(study={"name": "s", "label": label})
    path.rename(root / name)


def test_a_folders_runs_stand_in_the_order_of_its_study(tmp_path: Path) -> None:
    made_run(tmp_path, "a", algorithm="dsgd", topology="ring", seed=1)
    made_run(tmp_path, "b", algorithm="gone", topology="ring", seed=1)
    made_run(tmp_path, "c", algorithm="mcepl", topology="torus", seed=1, label="torus")
    made_run(tmp_path, "d", algorithm="mcepl", topology="ring", seed=1)
    made_run(tmp_path, "e", algorithm="mcepl", topology="ring", seed=2)
    made_run(tmp_path, "f", algorithm="mcepl", topology="torus", seed=1, label="an older name")
    made_run(tmp_path, "g", algorithm="mcepl", topology="complete", seed=1)
    file = tmp_path / "study.toml"

    def order() -> str:
        return "".join(run.path.name for run in read_sources([tmp_path]).runs)

    assert order() == "abcdefg"
    file.write_text(
        # the runs' own was given on the command line
        'app = "no longer there"\nconfig = {num-rounds = 9}\n'
        "[[runs]]\nlabel = 'torus'\ntopology = 'torus'\n"
        "[[runs]]\nalgorithm = 'mcepl'\ntopology = 'complete'\n"
        "[[runs]]\nalgorithm = ['mcepl', 'dsgd']\nseed = [2, 1]\n"
    )
    assert order() == "cg" + "ed" + "a" + "bf"
    file.write_text("app = [")
    assert order() == "abcdefg"


def test_an_order_that_the_study_gives_is_that_of_its_table(study: Callable[..., Study]) -> None:
    made = study("[grid]\nalgorithm = ['mcepl', 'dsgd', 'local']\nseed = [2, 1]\n")
    run_study(made)
    by_folder, by_file = read_source(made.out), read_source(made.file)
    assert [run.path.name for run in by_folder.runs] == [run.slug for run in made.runs]
    assert by_folder.runs == by_file.runs
    assert markdown(compare(by_folder.runs)) == (made.out / "compare.md").read_text()


def test_what_a_record_does_not_say_is_left_open(tmp_path: Path) -> None:
    path = write_record(tmp_path, accuracies=np.full((2, 4), 0.5), seed=1)
    lines = (path / "relay.jsonl").read_text().splitlines()
    absent = {**json.loads(lines[0]), "answered": 3}
    (path / "relay.jsonl").write_text("\n".join([json.dumps(absent), lines[1], ""]))
    bare = RunRecord.create(tmp_path, name="bare", config={})
    bare.finish("finished", num_rounds=2)
    comparison = compare(find_records([tmp_path]))
    assert comparison.keys == ("run",)
    made, empty = (
        comparison.rows if comparison.rows[0].settings["run"] is None else comparison.rows[::-1]
    )
    assert made.mean("images") is None
    assert empty.mean("result") is None
    assert empty.best() is None
    assert "-" in next(iter(cells(comparison)))


@given(
    size=st.integers(1, 40),
    batch=st.integers(1, 12),
    steps=st.integers(1, 12),
    epochs=st.integers(0, 3),
)
def test_images_are_those_that_the_data_deal_out(
    size: int, batch: int, steps: int, epochs: int
) -> None:
    told = {"batch_size": batch, "local_steps": steps, "local_epochs": epochs}
    taken = epochs * batches_per_pass(size, batch) if epochs else steps
    dealt = _index_batches(size, steps=taken, batch_size=batch, generator=torch.Generator())
    assert _images_a_round({"num_examples": size, "parameters": told}) == sum(map(len, dealt))


@pytest.mark.parametrize("odd", ["8", [8], -8, 8.0, True, {}])
def test_images_are_not_known_of_an_agent_with_odd_parameters(odd: Any) -> None:
    for key in ("batch_size", "local_steps", "local_epochs"):
        told = {"batch_size": 8, "local_steps": 1, "local_epochs": 0, key: odd}
        assert _images_a_round({"num_examples": 24, "parameters": told}) is None


def test_a_target_is_a_value_of_the_tasks_main_metric(tmp_path: Path) -> None:
    app = (Path(__file__).parents[2] / "examples" / "regression").as_posix()
    file = tmp_path / "study.toml"
    head = f"app = '{app}'\nengine = 'in-process'\ntarget = 1.5\n[grid]\nseed = [1]\n"
    file.write_text(head, encoding="utf-8")
    assert read_study(file).target == 1.5  # an rmse
    file.write_text(head + "task = ['binary']\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 3: target is an accuracy in \(0, 1\]; got 1\.5"):
        read_study(file)


@pytest.mark.parametrize(
    ("target", "read", "note"),
    [
        ("0.4", 0.4, None),
        ("1", 1.0, None),
        ("60.0", None, r"study.toml: target is an accuracy in (0, 1]; got 60.0. It is left out."),
        ("true", None, r"study.toml: target must be a number; got True. It is left out."),
    ],
)
def test_a_folder_has_its_studys_target_or_says_why_not(
    target: str, read: float | None, note: str | None, tmp_path: Path
) -> None:
    made_run(tmp_path, "a", seed=1)
    (tmp_path / STUDY_COPY).write_text(f"app = 'a'\ntarget = {target}\n")
    source = read_source(tmp_path)
    assert (source.target, source.notes) == (read, () if note is None else (note,))


@pytest.mark.parametrize("target", ["60.0", "inf", "true"])
def test_a_folders_target_has_the_range_of_its_runs_metric(target: str, tmp_path: Path) -> None:
    made_run(tmp_path, "a", seed=1)
    rmse = {"agent": 0, "main_metric": "rmse", "higher_is_better": False}
    RunRecord(tmp_path / "a").amend_config(agents=[rmse])
    rounds = tmp_path / "a" / "rounds.jsonl"
    rows = [json.loads(line) for line in rounds.read_text().splitlines()]
    rounds.write_text(
        "".join(f"{json.dumps({**row, 'metrics': {'rmse': 55.0}})}\n" for row in rows)
    )
    (tmp_path / STUDY_COPY).write_text(f"app = 'a'\ntarget = {target}\n")
    source = read_source(tmp_path)
    assert source.target == (60.0 if target == "60.0" else None)
    assert bool(source.notes) == (target != "60.0")
    assert any(title.startswith("to 60") for title in titles(compare(source.runs, target=60.0)))
