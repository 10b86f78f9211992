"""Records pooled as seeds: what they have to have in common, and what they may lack."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flower_mcepl.record.pools import pool
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.compare import compare
from flower_mcepl.report.plots.subjects import subjects_of
from flower_mcepl.report.tables import cells, titles

PARAMETERS = {"lr": 0.1, "retention": {"conv": 0.3}}
AGENT = {
    **{"algorithm": "mcepl", "num_weights": 100, "parameters": PARAMETERS},
    **{"num_examples": 10, "num_test_examples": 5},
}
RING = {"name": "ring", "num_agents": 2, "directed": False, "edges": [[0, 1], [1, 0]]}
CONFIG: dict[str, Any] = {"engine": "loop", "topology": RING, "num_rounds": 10}


def made(
    folder: Path,
    *,
    seed: int = 1,
    name: str = "app",
    agents: tuple[Mapping[str, Any], ...] = (AGENT, AGENT),
    **config: Any,
) -> Run:
    known = [{"agent": number, **agent} for number, agent in enumerate(agents)]
    run_config = {"num-agents": 2, "seed": seed}
    whole = {"seed": seed, "run_config": run_config, **CONFIG, **config, "agents": known}
    whole = {key: value for key, value in whole.items() if value is not None}
    record = RunRecord.create(name=name, path=folder, config=whole)
    row = {"round": 1, "accuracy": 0.5, "loss": 1.0, "num_examples": 5, "density": 0.5}
    counts = {"sent_bytes": 1, "received_bytes": 1, "uplink_bytes": 1, "seconds": 0.0}
    record.log_agents({**row, **counts, "agent": number} for number in range(len(agents)))
    record.finish("finished", num_rounds=1)
    return read_run(folder)


def with_(**more: Any) -> dict[str, Any]:
    return {**AGENT, **more}


OTHERS: dict[str, tuple[dict[str, Any], str, Any, Any]] = {
    "app": ({"name": "other"}, "app", "app", "other"),
    "app of a study": ({"study": {"app": "other"}}, "app", "app", "other"),
    "algorithm": (
        {"agents": (with_(algorithm="dsgd"),) * 2},
        "algorithm",
        "mcepl",
        "dsgd",
    ),
    "engine": ({"engine": "batched"}, "engine", "loop", "batched"),
    "split": (
        {"agents": (with_(num_test_examples=None, num_validation_examples=5),) * 2},
        "evaluate-on",
        "test",
        "validation",
    ),
    "graph": ({"topology": {**RING, "name": "path"}}, "graph", "ring", "path"),
    "agents": ({"topology": {**RING, "num_agents": 3}}, "num-agents", 2, 3),
    "rounds": ({"num_rounds": 20}, "num-rounds", 10, 20),
    "network": ({"agents": (with_(num_weights=200),) * 2}, "weights", 100, 200),
    "parameter": (
        {"agents": (with_(parameters={**PARAMETERS, "lr": 0.5}),) * 2},
        "agents.lr",
        0.1,
        0.5,
    ),
    "parameter in parts": (
        {"agents": (with_(parameters={"retention": {"conv": 0.5}}),) * 2},
        "agents.retention",
        '{"conv": 0.3}',
        '{"conv": 0.5}',
    ),
    "one agent": (
        {"agents": (AGENT, with_(parameters={"lr": 0.5}))},
        "agents.lr",
        0.1,
        "differs by agent",
    ),
}


@pytest.mark.parametrize("seed", [1, 2], ids=["the same seed", "another seed"])
@pytest.mark.parametrize(("change", "key", "one", "other"), OTHERS.values(), ids=OTHERS)
def test_records_of_two_things_are_two_rows(
    change: dict[str, Any], key: str, one: Any, other: Any, seed: int, tmp_path: Path
) -> None:
    runs = [made(tmp_path / "a"), made(tmp_path / "b", seed=seed, **change)]
    pooled = pool(runs)
    assert pooled.keys == (key,)
    assert [(each.settings, each.runs) for each in pooled.pools] == [
        ({key: one}, (runs[0],)),
        ({key: other}, (runs[1],)),
    ]
    assert pooled.notes == ()
    table = compare(runs)
    assert titles(table)[0] == key
    assert [row[0] for row in cells(table)] == [str(one), str(other)]
    subjects, _ = subjects_of(runs)
    assert len({subject.label for subject in subjects}) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"agents": (with_(num_examples=99, kept_weights=7, fingerprint="ff"), AGENT)},
        {"agents": (with_(parameters={"new-key": 1}),) * 2},
        {"agents": (with_(parameters={}, algorithm=None, num_weights=None),) * 2},
        {"topology": None},
        {"engine": None},
        {"num_rounds": None},
        {"name": "gossip"},
        {"name": "mcepl"},
        {"name": "renamed", "study": {"app": "app"}},
        {"topology": {**RING, "seed": 5}},
    ],
)
def test_what_a_seed_draws_or_a_record_lacks_makes_no_row(
    change: dict[str, Any], tmp_path: Path
) -> None:
    runs = [made(tmp_path / "a"), made(tmp_path / "b", seed=2, **change)]
    pooled = pool(runs)
    assert (pooled.keys, [each.runs for each in pooled.pools]) == ((), [tuple(runs)])
    assert pooled.notes == ()


def test_agents_with_several_values_are_pooled_whichever_these_are(tmp_path: Path) -> None:
    drawn = [
        (with_(parameters={"lr": one}), with_(parameters={"lr": other}))
        for one, other in ((0.1, 0.2), (0.3, 0.1))
    ]
    runs = [made(tmp_path / str(seed), seed=seed, agents=drawn[seed]) for seed in (0, 1)]
    assert [each.runs for each in pool(runs).pools] == [tuple(runs)]


def test_records_that_lack_what_tells_others_apart_stay_together(tmp_path: Path) -> None:
    bare = {"num_rounds": None}
    runs = [
        made(tmp_path / "a", seed=1, **bare),
        made(tmp_path / "b", seed=1, num_rounds=10),
        made(tmp_path / "c", seed=2, **bare),
        made(tmp_path / "d", seed=2, num_rounds=20),
    ]
    pooled = pool(runs)
    names = ["".join(run.path.name for run in each.runs) for each in pooled.pools]
    assert (names, pooled.keys) == (["ac", "b", "d"], ("num-rounds",))


def test_links_that_differ_without_a_setting_are_noted(tmp_path: Path) -> None:
    fewer = {**RING, "edges": [[0, 1]]}
    runs = [made(tmp_path / "a"), made(tmp_path / "b", seed=2, topology=fewer)]
    pooled = pool(runs)
    assert [each.runs for each in pooled.pools] == [tuple(runs)]
    assert pooled.notes == ("pooled as seeds, though their graphs have 1, 2 links: a, b",)
    known = {"num-agents": 2, "topology": "random"}
    runs = [
        made(tmp_path / "c", run_config={**known, "seed": 1}),
        made(tmp_path / "d", seed=2, run_config={**known, "seed": 2}, topology=fewer),
    ]
    assert pool(runs).notes == ()


def test_rows_come_in_the_order_of_the_records_where_facts_divide_them(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / "a", run_config={"lr": 1}),
        made(tmp_path / "b", run_config={"lr": 2}),
        made(tmp_path / "c", run_config={"lr": 1}, engine="batched"),
    ]
    pooled = pool(runs)
    assert [each.runs for each in pooled.pools] == [(run,) for run in runs]
    assert pooled.keys == ("lr", "engine")
    again = made(tmp_path / "d", run_config={"lr": 2})
    assert "left out: b" in " ".join(pool([*runs, again]).notes)
