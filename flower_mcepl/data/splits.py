"""Training, validation and test split of an agent, all from its own distribution."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig, field_keys, read_fields
from flower_mcepl.data.partition import Indices, Partition
from flower_mcepl.errors import DataError
from flower_mcepl.streams import check_seed, numpy_stream

TEST_SPLITS = ("classes", "proportional")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Settings of who holds what, as keys of the run config.

    An app that declares such a key has it checked before a run.

    The three fractions are of the agent's own examples, and what they leave over is
    unused.

    Raises
    ------
    ConfigError
        If a value is unknown or out of range.
    """

    partition: str = "iid"  # see Partition.parse
    train_fraction: float = 1.0
    validation_fraction: float = 0.0
    test_fraction: float = 0.0  # 0 where the data set has test examples of its own
    # every split has the class shares of the whole, as nearly as whole examples allow
    stratify: bool = False
    # of a data set's own test examples: all of the agent's classes; or "proportional"
    test_split: str = "classes"

    def __post_init__(self) -> None:
        Partition.parse(self.partition)
        fractions = (self.train_fraction, self.validation_fraction, self.test_fraction)
        check(0 < self.train_fraction <= 1, "train-fraction must be in (0, 1]", self.train_fraction)
        check(
            0 <= self.validation_fraction < 1,
            "validation-fraction must be in [0, 1)",
            self.validation_fraction,
        )
        check(0 <= self.test_fraction < 1, "test-fraction must be in [0, 1)", self.test_fraction)
        check(
            sum(fractions) <= 1 + 1e-9,
            "train-fraction, validation-fraction and test-fraction must not exceed 1 together",
            f"{' + '.join(f'{fraction:g}' for fraction in fractions)}",
            "Lower train-fraction by what the validation split takes.",
        )
        check(
            self.test_split in TEST_SPLITS,
            f"test-split must be one of {', '.join(TEST_SPLITS)}",
            self.test_split,
        )

    @classmethod
    def from_run_config(cls, run_config: RunConfig) -> "DataSettings":
        """Settings from the run-config keys named as the fields, in kebab-case."""
        return read_fields(cls, run_config)


DATA_KEYS = field_keys(DataSettings)


def check_data_keys(run_config: RunConfig, app_keys: Iterable[str]) -> None:
    """Check those keys of `DataSettings` that an app declares as its own.

    Raises
    ------
    ConfigError
        If one has the wrong type or is out of range, or a validation split is asked for
        and there is none.
    """
    declared = {key: run_config[key] for key in DATA_KEYS & set(app_keys) if key in run_config}
    settings = read_fields(DataSettings, declared)
    check(
        run_config.get("evaluate-on") != "validation"
        or "validation-fraction" not in declared
        or settings.validation_fraction > 0,
        'evaluate-on = "validation" needs validation-fraction > 0',
        settings.validation_fraction,
        "Raise it, and lower train-fraction where both are above 1 together.",
    )


@dataclass(frozen=True)
class OwnSplits:
    """Places of an agent's examples among all of its own; no place is in two splits."""

    train: Indices
    validation: Indices
    test: Indices


def own_splits(labels: ArrayLike, settings: DataSettings, *, seed: int, agent: int) -> OwnSplits:
    """Divide one agent's examples into its splits.

    They are shuffled by a stream of (seed, agent) alone. Training takes the first,
    validation the next ones, testing the last; so neither a validation split nor a
    smaller training split changes what is tested. The numbers are rounded, that of the
    test split up. With ``stratify`` the shuffled examples are first brought into an
    order whose every beginning has the class shares of the whole (Sainte-Laguë's rule
    of apportionment).

    Parameters
    ----------
    labels : array of int or str, shape [num_examples]
        The classes of the agent's examples.
    settings : DataSettings
        Fractions, and whether to stratify.
    seed, agent : int
        Of the run; number of the agent.

    Raises
    ------
    DataError
        If a split that is asked for would be empty.
    ConfigError
        If the seed is out of range.
    """
    seed = check_seed(seed)
    classes = np.asarray(labels)
    order = np.random.default_rng([seed, agent]).permutation(len(classes))
    if settings.stratify:
        order = order[_evenly_mixed(classes[order])]
    end = len(order) - math.ceil(settings.test_fraction * len(order) - 1e-9)
    first = min(round(settings.train_fraction * len(order)), end)
    second = min(round((settings.train_fraction + settings.validation_fraction) * len(order)), end)
    splits = OwnSplits(order[:first], order[first:second], order[end:])
    for name in ("train", "validation", "test"):
        fraction = getattr(settings, f"{name}_fraction")
        if fraction > 0 and not len(getattr(splits, name)):
            raise DataError(
                f"agent {agent} holds {len(order)} examples, of which {name}-fraction = "
                f"{fraction:g} is less than one. Raise it, use fewer agents, or a partition that "
                "gives every agent more."
            )
    return splits


def own_tests(
    test_labels: ArrayLike, labels: ArrayLike, settings: DataSettings, *, seed: int, agent: int
) -> NDArray[np.int64]:
    """Share of an agent in a data set's own test examples, as sorted places.

    ``classes`` gives every test example of the classes that the agent holds.
    ``proportional`` gives as many as can be had in the class shares of the agent, drawn
    by a stream of (seed, agent) alone. Agents may share test examples.

    Parameters
    ----------
    test_labels : array of int or str, shape [num_test_examples]
        The classes of the test examples.
    labels : array of int or str, shape [num_examples]
        The classes of the agent's own examples, before they are divided.
    settings : DataSettings
        Which of both, ``test_split``.
    seed, agent : int
        Of the run; number of the agent.

    Raises
    ------
    DataError
        If a class of the agent has no test example.
    ConfigError
        If the seed is out of range.
    """
    seed = check_seed(seed)
    tests, own = np.asarray(test_labels), np.asarray(labels)
    classes, counts = np.unique(own, return_counts=True)
    missing = [name for name in classes if not (tests == name).any()]
    if missing:
        raise DataError(
            f"agent {agent} holds class {missing[0]}, of which there is no test example. Use test "
            "examples of every class, or test on a part of each agent's own (test-fraction)."
        )
    if settings.test_split == "classes":
        return np.flatnonzero(np.isin(tests, classes))
    draw = numpy_stream(seed, "test-split", agent=agent)
    there = [draw.permutation(np.flatnonzero(tests == name)) for name in classes]
    # The scarcest class, measured by what the agent wants of it, sets the size: it is
    # used up.
    per_example = min(len(places) / count for places, count in zip(there, counts, strict=True))
    chosen = [
        places[: round(count * per_example)] for places, count in zip(there, counts, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def _evenly_mixed(classes: NDArray[np.generic]) -> Indices:
    """Order in which example j of the n of its class stands at (j + 1/2) / n."""
    at = np.empty(len(classes))
    for name in np.unique(classes):
        places = np.flatnonzero(classes == name)
        at[places] = (np.arange(len(places)) + 0.5) / len(places)
    return np.argsort(at, kind="stable")
