"""What run records say side by side: one row for each combination of settings, its seeds pooled."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.errors import ConfigError, RecordError
from flower_mcepl.record.writing import CONFIG, Run, accuracy_summary, read_run
from flower_mcepl.report.final_masks import final_masks

SEED = "seed"
LASSO = "group-lasso"  # where it varies, the share of filters that are off is measured, too
# columns for runs that a study has named, and for runs without a run config
LABEL, RUN = "label", "run"
_NO_SETTING = {SEED, "record-dir", "keep-frames"}  # these change nothing in what a row stands for


@dataclass(frozen=True)
class Measures:
    """What one finished run reached, and at what cost; None is what its record does not say."""

    seed: Any
    accuracy: float | None  # mean over the agents of their last personalized accuracies
    agent_sd: float | None  # population standard deviation over the agents
    worst_tenth: float | None  # mean of the worst tenth of the agents, at least one
    curve: dict[int, float]  # mean accuracy by evaluated round
    link_bytes: int | None  # see `link_bytes`
    # the same up to the first evaluated round whose mean accuracy reaches the target
    target_bytes: int | None
    # share of output filters without a kept weight at the end; None also where not
    # asked
    filters_off: float | None
    bits_per_weight: float | None  # mean over all frames
    busiest_bytes: int | None  # up and down, of the agent with most
    images: float | None  # training images processed by an agent, mean over the agents
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """All runs of one combination of settings."""

    settings: dict[str, Any]  # by varied key
    runs: tuple[Measures, ...]  # one a seed

    def values(self, name: str) -> list[float]:
        """Return a measure of all seeds; nothing where one of them does not say it."""
        found = [getattr(run, name) for run in self.runs]
        return [] if None in found else found

    def mean(self, name: str) -> float | None:
        """Return the mean of a measure over the seeds."""
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def sd(self, name: str) -> float | None:
        """Return the sample standard deviation over the seeds; one seed has none."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else None

    def best(self) -> tuple[int, float] | None:
        """Return the evaluated round, common to all seeds, with the highest mean accuracy, and that accuracy."""
        common = set.intersection(*(set(run.curve) for run in self.runs))
        means = {
            round: statistics.fmean(run.curve[round] for run in self.runs)
            for round in sorted(common)
        }
        return max(means.items(), key=lambda item: item[1]) if means else None


@dataclass(frozen=True)
class Comparison:
    """A table over run records."""

    keys: tuple[str, ...]  # settings that are not the same in all of them
    rows: tuple[Row, ...]  # in the order of the records
    target: float | None
    notes: tuple[str, ...] = ()  # which records were left out, and why


@dataclass(frozen=True)
class Pool:
    """The records of one combination of settings."""

    settings: dict[str, Any]  # by varied key
    runs: tuple[Run, ...]  # one a seed


@dataclass(frozen=True)
class Pooled:
    """Run records by the settings in which they differ."""

    keys: tuple[str, ...]  # settings that are not the same in all of them
    pools: tuple[Pool, ...]  # in the order of the records
    notes: tuple[str, ...] = ()  # which records were left out, and why


def find_records(paths: Iterable[Path]) -> list[Run]:
    """Read run records: each path is one, or a folder of them such as that of a study.

    Raises
    ------
    RecordError
        If a path is neither, or a record is damaged.
    """
    runs = []
    for path in paths:
        folders = (
            [path]
            if (path / CONFIG).is_file()
            else sorted(file.parent for file in path.glob(f"*/{CONFIG}"))
        )
        if not folders:
            raise RecordError(
                f"a run record is a folder with {CONFIG}; neither {path} nor a folder in it has "
                "one."
            )
        runs += [read_run(folder) for folder in folders]
    return runs


def compare(runs: Sequence[Run], *, target: float | None = None) -> Comparison:
    """Put run records side by side.

    Which settings vary is found from the records. Runs that are not finished are left
    out; of two runs with the same settings and seed the newer one counts. The notes
    name them.

    Raises
    ------
    ConfigError
        If no run is finished, or `target` is no accuracy.
    """
    if target is not None and not 0 < target <= 1:
        raise ConfigError(f"the target is an accuracy in (0, 1]; got {target}.")
    pooled = pool(runs)
    lasso = LASSO in pooled.keys
    rows = [
        Row(one.settings, tuple(_measure(run, target, lasso) for run in one.runs))
        for one in pooled.pools
    ]
    return Comparison(pooled.keys, tuple(rows), target, pooled.notes)


def pool(runs: Sequence[Run]) -> Pooled:
    """Group run records by the settings in which they differ, the seed left aside.

    Runs that are not finished are left out; of two runs with the same settings and seed
    the newer one counts.

    Raises
    ------
    ConfigError
        If no run is finished.
    """
    finished, notes = _finished(runs)
    keys = _varied([_settings(run) for run in finished])
    groups: dict[Any, dict[Any, Run]] = {}
    for run in finished:
        settings = _settings(run)
        group = groups.setdefault(
            _exact(settings[key] if key in settings else None for key in keys), {}
        )
        twin = group.get(_seed(run))
        if twin is None or _started(twin) < _started(run):
            group[_seed(run)] = run
        if twin is not None:
            older = min(twin, run, key=_started)
            notes.append(
                f"left out: {older.path.name}, as a newer record has the same settings and seed"
            )
    pools = []
    for group in groups.values():
        settings = _settings(next(iter(group.values())))
        pools.append(Pool({key: settings.get(key) for key in keys}, tuple(group.values())))
    return Pooled(keys, tuple(pools), tuple(notes))


def _finished(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    finished, notes = [], []
    for run in runs:
        status = "without a summary" if run.summary is None else str(run.summary.get("status"))
        if status == "finished":
            finished.append(run)
        else:
            notes.append(f"left out: {run.path.name}, which is {status}")
    if not finished:
        raise ConfigError(
            "a comparison needs at least one finished run; "
            f"{'; '.join(notes) or 'no record was given'}."
        )
    return finished, notes


def _settings(run: Run) -> dict[str, Any]:
    config = run.config.get("run_config")
    if not config:
        return {RUN: run.name}
    label = (run.config.get("study") or {}).get(LABEL)
    named = {} if label is None else {LABEL: label}
    return {**named, **{key: value for key, value in config.items() if key not in _NO_SETTING}}


def _seed(run: Run) -> Any:
    return (run.config.get("run_config") or {}).get(SEED, run.config.get(SEED))


def _started(run: Run) -> str:
    return str(run.config.get("started", ""))


def _varied(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    keys = dict.fromkeys(key for one in settings for key in one)
    return tuple(key for key in keys if len({_exact([one.get(key)]) for one in settings}) > 1)


def _exact(values: Iterable[Any]) -> tuple[tuple[type, Any], ...]:
    return tuple((type(value), value) for value in values)  # True == 1 == 1.0


# --- one run ---


def link_bytes(run: Run) -> int | None:
    """Return the bytes of payload that went over links: from agent to agent, or both ways between agents and server.

    What agents send to a relay is not in it: it stands for nothing but the links that
    the relay serves.
    """
    counts = (run.summary or {}).get("bytes") or {}
    found: int | None = counts.get("links_total")
    return found + counts["uplink_total"] if found is not None and _has_server(run) else found


def sends_nothing(run: Run) -> bool:
    """Tell whether a run, as far as it got, sent no payload at all; False where its record does not say."""
    counts = (run.summary or {}).get("bytes") or {}
    sent = [counts.get("links_total"), counts.get("uplink_total")]
    if run.summary is None and run.relay:
        sent = [run.relay[-1].get("link_bytes"), run.relay[-1].get("uplink_bytes")]
    return sent == [0, 0]


def _measure(run: Run, target: float | None, lasso: bool) -> Measures:
    assert run.summary is not None
    counts = run.summary.get("bytes") or {}
    last = accuracy_summary(run.rounds)
    return Measures(
        seed=_seed(run),
        accuracy=last["mean"],
        agent_sd=last["std"],
        worst_tenth=_worst_tenth(row["accuracy"] for row in run.final().values()),
        curve={round: mean for round, mean, *_ in run.curve()},
        link_bytes=link_bytes(run),
        target_bytes=None if target is None else _bytes_to(run, target),
        filters_off=_filters_off(run) if lasso else None,
        bits_per_weight=counts.get("bits_per_weight"),
        busiest_bytes=counts.get("busiest_agent_total"),
        images=_images(run),
        seconds=run.summary.get("seconds"),
    )


def _filters_off(run: Run) -> float | None:
    """Return the share of all agents' output filters that keep no weight, from the states at the end."""
    masks, _ = final_masks(run)
    layers = [mask.reshape(len(mask), -1) for layers in masks.values() for mask in layers.values()]
    filters = sum(map(len, layers))
    return sum(int((~layer.any(axis=1)).sum()) for layer in layers) / filters if filters else None


def _worst_tenth(accuracies: Iterable[float | None]) -> float | None:
    known = sorted(accuracy for accuracy in accuracies if accuracy is not None)
    return statistics.fmean(known[: math.ceil(len(known) / 10)]) if known else None


def _bytes_to(run: Run, target: float) -> int | None:
    for round, mean, *_ in run.curve():
        if mean >= target:
            return bytes_by_round(run)[round]
    return None


def bytes_by_round(run: Run) -> dict[int, int]:
    """Return the bytes over the links, as in `link_bytes`, from the start to each evaluated round."""
    keys = ("received_bytes", "uplink_bytes") if _has_server(run) else ("received_bytes",)
    counts: dict[int, int] = {}
    for row in run.rounds:
        counts[row["round"]] = counts.get(row["round"], 0) + sum(
            int(row.get(key) or 0) for key in keys
        )
    return counts


def _has_server(run: Run) -> bool:
    return "server" in run.config


def _images(run: Run) -> float | None:
    """Return how many training images an agent processed, if every agent trained in every round and tells how."""
    rounds = int((run.summary or {}).get("num_rounds", 0))
    trained = [line for line in run.relay if line["round"] <= rounds]
    if len(trained) != rounds or any(
        line.get("answered") != line.get("agents") for line in trained
    ):
        return None
    agents = run.config.get("agents") or []
    counts = [_images_a_round(agent) for agent in agents]
    known = [count for count in counts if count is not None]
    return rounds * statistics.fmean(known) if known and len(known) == len(agents) else None


def _images_a_round(agent: Mapping[str, Any]) -> int | None:
    """Count what `flower_mcepl.data` deals out: shuffled passes; a single last image joins the batch before it."""
    told: Callable[[str], Any] = (agent.get("parameters") or {}).get
    size, batch, steps, epochs = (
        agent.get("num_examples"),
        told("batch_size"),
        told("local_steps"),
        told("local_epochs"),
    )
    if not size or not batch or steps is None:
        return None
    if epochs:
        steps = epochs * math.ceil(size / batch)
    in_a_pass = math.ceil(size / batch) - (size % batch == 1 and size > batch > 1)
    passes, rest = divmod(steps, in_a_pass)
    return int(passes * size + rest * batch)
