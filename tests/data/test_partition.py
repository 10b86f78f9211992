"""Who holds what: partitions and splits, and that the examples' default data are bit
for bit what they always were.
"""

import builtins
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flower_mcepl.data.batches import AgentData
from flower_mcepl.data.partition import Partition
from flower_mcepl.data.splits import DataSettings, own_splits, own_tests
from flower_mcepl.errors import ConfigError, DataError
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.streams import isolated_rng, torch_stream
from flower_mcepl.studies import read_study
from tests.fleet.study_app import write_study
from tests.test_streams import BAD_SEEDS, GOOD_SEEDS

if importlib.util.find_spec("flwr_datasets") is None:  # to import it takes seconds
    pytest.skip("needs the extra vision", allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples"
LABELS = np.random.default_rng(0).integers(0, 10, 600)
PARTITIONS = [
    *(
        "iid",
        "linear",
        "square",
        "pathological:classes=3",
        "pathological:classes=2,assignment=deterministic",
    ),
    *(
        "pathological:classes=4,assignment=first-deterministic",
        "dirichlet:alpha=0.5,min-size=2",
        "shards:per-agent=2",
    ),
]


def divided(
    text: str, *, num_agents: int = 8, seed: int = 1, labels: Any = LABELS
) -> tuple[Any, ...]:
    return Partition.parse(text).divide(labels, num_agents=num_agents, seed=seed)


# --- partitions ---


@pytest.mark.parametrize("text", PARTITIONS)
@settings(max_examples=4)
@given(num_agents=st.integers(1, 7), seed=st.integers(0, 2**40))  # of 8 squares one gets none
def test_no_example_goes_to_two_agents(text: str, num_agents: int, seed: int) -> None:
    labels = LABELS[:200]
    parts = divided(text, num_agents=num_agents, seed=seed, labels=labels)
    everything = np.concatenate(parts).tolist()
    assert len(parts) == num_agents
    assert all(len(part) for part in parts)
    assert len(set(everything)) == len(everything)
    held = {int(labels[index]) for index in everything}
    unused = set(range(len(labels))) - set(everything)
    if text.startswith("shards"):
        assert len(unused) < 2 * num_agents
    else:  # whole classes may be left out, as nobody holds them; never a part of one
        assert not {index for index in unused if labels[index] in held}
    if not text.startswith(("pathological", "shards")):
        assert not unused


@pytest.mark.parametrize("text", PARTITIONS)
def test_parts_depend_on_the_seed_alone(text: str) -> None:
    first, again, other = (divided(text, seed=seed, labels=LABELS[:400]) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(
        np.array_equal(np.sort(a), np.sort(b)) for a, b in zip(first, other, strict=True)
    ) or (
        "=deterministic" in text  # which draws the order within a part alone
    )


@pytest.mark.parametrize(
    "text", ["iid", "pathological:classes=3", "dirichlet:alpha=1", "shards:per-agent=2"]
)
def test_a_seed_is_taken_where_it_is_in_range(text: str) -> None:
    """As everywhere (tests/test_streams.py), but with a package of slow import."""
    for seed in GOOD_SEEDS:
        divided(text, num_agents=2, seed=seed, labels=LABELS[:100])
    for bad_seed in BAD_SEEDS:
        with pytest.raises(ConfigError, match=r"seed must be .*; got"):
            divided(text, seed=bad_seed)  # type: ignore[arg-type]


def test_pathological_gives_so_many_classes() -> None:
    assert {len(set(LABELS[part])) for part in divided("pathological:classes=3")} == {3}
    parts = divided("pathological:classes=3,assignment=deterministic", num_agents=10)
    assert [sorted(set(LABELS[part])) for part in parts] == [
        sorted((i + k) % 10 for k in range(3)) for i in range(10)
    ]


def test_shards_hold_few_classes_and_are_equal() -> None:
    parts = divided("shards:per-agent=2", num_agents=6)
    assert {len(part) for part in parts} == {100}
    # a shard of 50 of 60 a class lies in two at most
    assert max(len(set(LABELS[part])) for part in parts) <= 4


@pytest.mark.parametrize(
    ("name", "size"),
    [("linear", lambda i: i), ("square", lambda i: i * i), ("exponential", np.exp)],
)
def test_unequal_sizes_follow_their_rule_whatever_the_order_of_the_data(
    name: str, size: Any
) -> None:
    parts = divided(name, num_agents=4, labels=np.sort(LABELS))
    units = np.array([float(size(i)) for i in range(1, 5)])
    assert [len(part) for part in parts[:-1]] == [
        int(600 * unit / units.sum()) for unit in units[:-1]
    ]
    assert len(set(np.sort(LABELS)[parts[-1]])) == 10  # not the last classes alone


def test_dirichlet_is_the_more_uneven_the_smaller_alpha() -> None:
    def unevenness(alpha: float) -> float:
        parts = divided(f"dirichlet:alpha={alpha},min-size=1")
        return float(
            np.mean([max(Counter(LABELS[part].tolist()).values()) / len(part) for part in parts])
        )

    assert unevenness(0.1) > unevenness(1) > unevenness(100)


def test_labels_may_be_words() -> None:
    words = np.array(["cat", "dog"] * 20)
    assert [
        len(set(words[part]))
        for part in divided("pathological:classes=1", num_agents=4, labels=words)
    ] == [1] * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "pathologic:classes=3",
            "unknown partition 'pathologic'; known: .*Did you mean 'pathological'",
        ),
        (
            "pathological",
            r"pathological needs classes; got ''\. Write 'pathological:classes=\.\.\.'",
        ),
        ("pathological:classes=0", "classes must be a whole number >= 1; got '0'"),
        (
            "pathological:classes=3,assignment=best",
            "assignment must be one of random, deterministic, first-det",
        ),
        ("pathological:classes=3,classes=4", "takes classes once"),
        ("dirichlet:alpha=-1", "alpha must be a finite number > 0"),
        ("dirichlet:alpha=nan", "alpha must be a finite number > 0"),
        ("dirichlet:beta=1", "unknown parameter of dirichlet 'beta'; known: alpha, min-size"),
        ("iid:classes=3", "unknown parameter of iid 'classes'; known: none"),
        (3, 'partition must be a text such as "pathological:classes=3"; got 3'),
    ],
)
def test_a_wrong_partition_is_refused_before_anything_runs(text: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Partition.parse(text)
    with pytest.raises(ConfigError):
        RunSettings.from_run_config({"partition": text}, app_keys=["partition"])


@pytest.mark.parametrize(
    ("text", "num_agents", "words"),
    [
        (
            "exponential",
            10,
            "impossible for 10 agents: agent 0 would get no example. Use fewer agents",
        ),
        ("pathological:classes=11", 4, "is greater than the number of unique classes"),
        (
            "dirichlet:alpha=0.001,min-size=60",
            10,
            "fewer than min-size. Raise alpha, lower min-size",
        ),
        ("shards:per-agent=100", 10, "more shards than examples. Lower per-agent"),
        ("iid", 601, "at least one example for each of 601 agents; got labels of shape"),
    ],
)
def test_an_impossible_division_says_why_and_the_way_out(
    text: str, num_agents: int, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        divided(text, num_agents=num_agents)


def test_a_missing_extra_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] in ("datasets", "flwr_datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    Partition.parse("iid")
    with pytest.raises(ConfigError, match=r'pip install "flower-mcepl\[vision\]"'):
        divided("iid")


# --- splits of an agent's own examples ---

FRACTIONS = st.tuples(st.integers(1, 20), st.integers(0, 10), st.integers(0, 10)).filter(
    lambda f: sum(f) <= 20
)


@given(
    size=st.integers(80, 300),
    classes=st.integers(1, 6),
    fractions=FRACTIONS,
    stratify=st.booleans(),
    seed=st.integers(0, 99),
)
def test_splits_are_disjoint_and_as_large_as_asked_for(
    size: int, classes: int, fractions: tuple[int, int, int], stratify: bool, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, size)
    train, validation, test = (twentieths / 20 for twentieths in fractions)
    rules = DataSettings(
        train_fraction=train, validation_fraction=validation, test_fraction=test, stratify=stratify
    )
    splits = own_splits(labels, rules, seed=seed, agent=3)
    places = np.concatenate([splits.train, splits.validation, splits.test]).tolist()
    assert len(set(places)) == len(places)
    assert set(places) <= set(range(size))
    for found, fraction in zip(
        (splits.train, splits.validation, splits.test), (train, validation, test), strict=True
    ):
        assert abs(len(found) - fraction * size) <= 1.5
    if sum(fractions) == 20:
        assert len(places) == size
    if stratify:
        shares = np.bincount(labels, minlength=classes) / size
        for found in (splits.train, splits.validation, splits.test):
            counts = np.bincount(labels[found], minlength=classes)
            assert np.abs(counts - shares * len(found)).max() <= 1 + classes * shares.max()


def test_stratifying_keeps_shares_that_a_plain_cut_does_not() -> None:
    labels = np.repeat([0, 1, 2, 3], [10, 20, 30, 40])
    rules = {"train_fraction": 0.1, "validation_fraction": 0.4, "test_fraction": 0.5}
    mixed = own_splits(labels, DataSettings(stratify=True, **rules), seed=0, agent=0)
    assert np.bincount(labels[mixed.train]).tolist() == [1, 2, 3, 4]
    assert np.bincount(labels[mixed.validation]).tolist() == [4, 8, 12, 16]
    assert np.bincount(labels[mixed.test]).tolist() == [5, 10, 15, 20]
    plain = own_splits(labels, DataSettings(**rules), seed=0, agent=0)
    assert np.bincount(labels[plain.train], minlength=4).tolist() != [1, 2, 3, 4]


@pytest.mark.parametrize("stratify", [False, True])
def test_a_validation_split_moves_neither_the_test_split_nor_the_beginning_of_training(
    stratify: bool,
) -> None:
    before = own_splits(
        LABELS,
        DataSettings(train_fraction=0.8, test_fraction=0.2, stratify=stratify),
        seed=1,
        agent=2,
    )
    rules = DataSettings(
        train_fraction=0.3, validation_fraction=0.2, test_fraction=0.2, stratify=stratify
    )
    after = own_splits(LABELS, rules, seed=1, agent=2)
    assert np.array_equal(before.test, after.test)
    assert np.array_equal(before.train[:180], after.train)
    assert np.array_equal(before.train[180:300], after.validation)


def test_splits_come_from_seed_and_agent() -> None:
    rules = DataSettings(train_fraction=0.5)
    found = [
        own_splits(LABELS, rules, seed=seed, agent=agent).train
        for seed, agent in ((1, 2), (1, 2), (2, 2), (1, 3))
    ]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[3])


def test_a_split_of_less_than_one_example_names_agent_and_key() -> None:
    with pytest.raises(
        DataError,
        match=r"agent 7 holds 10 examples, of which train-fraction = 0\.01 is less than one",
    ):
        own_splits(LABELS[:10], DataSettings(train_fraction=0.01), seed=1, agent=7)
    with pytest.raises(
        DataError, match=r"agent 7 holds 10 examples, of which validation-fraction = 0\.02"
    ):
        own_splits(
            LABELS[:10], DataSettings(train_fraction=0.5, validation_fraction=0.02), seed=1, agent=7
        )


# --- splits of a data set's own test examples ---

TESTS = np.repeat(np.arange(10), 50)


def test_the_test_split_of_the_paper_is_all_of_the_agents_classes() -> None:
    own = own_tests(TESTS, [3, 3, 5], DataSettings(), seed=1, agent=0)
    assert own.tolist() == np.flatnonzero((TESTS == 3) | (TESTS == 5)).tolist()


def test_a_proportional_test_split_has_the_agents_shares_and_uses_up_a_class() -> None:
    rules = DataSettings(test_split="proportional")
    labels = [3] * 50 + [5] * 20 + [8] * 10
    own = own_tests(TESTS, labels, rules, seed=1, agent=0)
    assert Counter(TESTS[own].tolist()) == {3: 50, 5: 20, 8: 10}
    assert own.tolist() == sorted(set(own.tolist()))
    assert np.array_equal(own, own_tests(TESTS, labels, rules, seed=1, agent=0))
    assert not np.array_equal(own, own_tests(TESTS, labels, rules, seed=1, agent=1))


@pytest.mark.parametrize("how", ["classes", "proportional"])
def test_a_class_without_test_examples_names_the_agent(how: str) -> None:
    with pytest.raises(
        DataError, match="agent 4 holds class 11, of which there is no test example"
    ):
        own_tests(TESTS, [1, 11], DataSettings(test_split=how), seed=1, agent=4)


# --- settings ---


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train-fraction": 0.0}, r"train-fraction must be in \(0, 1\]; got 0.0"),
        (
            {"train-fraction": 0.9, "validation-fraction": 0.2},
            r"not exceed 1 together; got '0.9 \+ 0.2 \+ 0'",
        ),
        ({"validation-fraction": -0.1}, "validation-fraction must be in"),
        ({"test-fraction": 1.0}, "test-fraction must be in"),
        ({"test-split": "all"}, "test-split must be one of classes, proportional; got 'all'"),
        ({"stratify": 1}, "stratify must be bool"),
        (
            {"validation-fraction": 0.0, "evaluate-on": "validation"},
            "needs validation-fraction > 0; got 0.0",
        ),
        ({"evaluate-on": "train"}, "evaluate-on must be one of test, validation; got 'train'"),
    ],
)
def test_keys_that_an_app_declares_are_checked_with_the_run_config(
    config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        RunSettings.from_run_config(config, app_keys=config.keys())


def test_keys_that_an_app_does_not_declare_are_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown run-config key 'partition'"):
        RunSettings.from_run_config({"partition": "iid"})
    # An app without a validation split of ours may have one of its own.
    assert RunSettings.from_run_config({"evaluate-on": "validation"}).evaluate_on == "validation"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            'partition = ["iid", "dirichlet"]',
            "line 5: partition = 'dirichlet': dirichlet needs alpha",
        ),
        (
            "train-fraction = [0.5, 0.9]",
            "line 5: train-fraction = 0.9: .*must not exceed 1 together",
        ),
        (
            'evaluate-on = ["test", "validation"]',
            "line 5: evaluate-on = 'validation': .*needs validation-fraction > 0",
        ),
    ],
)
def test_a_study_with_an_impossible_division_is_refused_with_its_line(
    line: str, words: str, tmp_path: Path
) -> None:
    study = write_study(tmp_path, EXAMPLES / "quickstart", f"[grid]\n{line}\n")
    with pytest.raises(ConfigError, match=words):
        read_study(study)


# --- the examples: bits that records and frozen figures depend on ---


def digest(*tensors: Tensor) -> str:
    sink = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        sink.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sink.update(tensor.contiguous().numpy().tobytes())
    return sink.hexdigest()


def task_of(app: str) -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES / app))
    try:
        yield importlib.import_module(f"mcepl_{app}.task")
    finally:
        sys.path.remove(str(EXAMPLES / app))


@pytest.fixture(scope="module")
def quickstart() -> Iterator[ModuleType]:
    pytest.importorskip("sklearn")
    yield from task_of("quickstart")


@functools.cache
def made_up(split: str) -> Any:
    """Encoded images in place of CIFAR-10's; nobody changes them."""
    from datasets import Dataset
    from PIL import Image

    size, seed = (1500, 1) if split == "train" else (300, 2)
    draw = np.random.default_rng(seed)
    pixels, labels = (
        draw.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8),
        draw.integers(0, 10, size),
    )
    return Dataset.from_dict(
        {"img": [Image.fromarray(one) for one in pixels], "label": labels.tolist()}
    )


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The task on made-up images."""
    pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for task in task_of("cifar10"):
        monkeypatch.setattr(task, "load_split", lambda data, split: made_up(split))
        yield task
        for cached in (task.encoded_images, task.parts):
            cached.cache_clear()


@pytest.mark.parametrize(
    ("num_agents", "classes", "seed", "bits"),
    [
        (10, 3, 1, "f694ce5ab6d979483ae01d234a709052"),
        (10, 3, 2, "a856a296cf8c112957ddaf63d9a3968e"),
        (7, 4, 5, "f24236aa28ddc3dad2a2e0ac3d6c7649"),
    ],
)
def test_the_quickstarts_data_are_what_they_were(
    quickstart: ModuleType, num_agents: int, classes: int, seed: int, bits: str
) -> None:
    """Digests taken before partition and splits moved into the package."""
    rules = DataSettings(
        partition=f"pathological:classes={classes},assignment=deterministic",
        train_fraction=0.8,
        test_fraction=0.2,
    )
    tensors: list[Tensor] = []
    for agent in range(num_agents):
        train, validation, test = quickstart.load_data(
            agent, num_agents=num_agents, settings=rules, seed=seed
        )
        assert validation is None
        tensors += [*train, *test]
    assert digest(*tensors) == bits


def test_cifar10s_data_are_what_they_were(cifar10: ModuleType) -> None:
    """Digest taken before partition and splits moved into the package."""
    tensors: list[Tensor] = []
    for agent in range(6):
        rules = DataSettings(partition="pathological:classes=3", train_fraction=0.2)
        train, validation, test = cifar10.load_data(
            agent, data="x", num_agents=6, settings=rules, seed=1
        )
        assert validation is None
        tensors += [*train, *test]
    assert digest(*tensors) == "7089c4674b4413e07f8c5c22a48b7b35"


def test_cifar10s_data_come_from_the_cache_where_there_is_one(
    cifar10: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = DataSettings(
        partition="pathological:classes=3", train_fraction=0.2, validation_fraction=0.1
    )
    common: dict[str, Any] = {"data": "x", "num_agents": 6, "settings": rules, "seed": 1}
    plain = cifar10.load_data(2, **common)
    first = cifar10.load_data(2, cache=str(tmp_path), **common)
    monkeypatch.setattr(cifar10, "load_split", None)  # nobody may decode any more
    cifar10.encoded_images.cache_clear()
    again = cifar10.load_data(2, cache=str(tmp_path), **common)
    for splits in (first, again):
        assert [digest(*split) for split in splits] == [digest(*split) for split in plain]
    with pytest.raises(TypeError):  # another agent's are not there
        cifar10.load_data(3, cache=str(tmp_path), **common)


def test_augmented_images_are_shifted_and_mirrored_ones_and_the_rounds_stream_says_which(
    cifar10: ModuleType,
) -> None:
    rules = DataSettings(partition="pathological:classes=3", train_fraction=0.2)
    train, _, test = cifar10.load_data(0, data="x", num_agents=6, settings=rules, seed=1)
    augmented = cifar10.Augmented(*train)
    data = AgentData.of(augmented, test, agent=0)
    assert data.class_counts == AgentData.of(train, test, agent=0).class_counts

    def drawn(round: int) -> list[tuple[Tensor, Tensor]]:
        with isolated_rng(1, "training", agent=0, round=round):
            generator = torch_stream(1, "training", agent=0, round=round)
            return list(
                data.train.training_batches(
                    round=round, steps=2, batch_size=16, generator=generator
                )
            )

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(
        torch.equal(x, y)
        for one, two in zip(first, again, strict=True)
        for x, y in zip(one, two, strict=True)
    )
    assert not torch.equal(first[0][0], other[0][0])
    around = torch.nn.functional.pad(train[0], (4, 4, 4, 4))
    views = [(i, j) for i in range(9) for j in range(9)]
    seen = set()
    for image, label in [(augmented[0][0], augmented[0][1]) for _ in range(60)]:
        assert label == int(train[1][0])
        window = [
            v for v in views if torch.equal(image, around[0, :, v[0] : v[0] + 32, v[1] : v[1] + 32])
        ]
        mirrored = [
            v
            for v in views
            if torch.equal(image.flip(2), around[0, :, v[0] : v[0] + 32, v[1] : v[1] + 32])
        ]
        assert len(window) + len(mirrored) == 1
        seen.add((bool(mirrored), *(window or mirrored)))
    assert {mirrored for mirrored, *_ in seen} == {False, True}
    assert len(seen) > 30


def test_cifar10s_cache_knows_a_folder_by_its_files(
    cifar10: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def cached(below: str) -> int:
        monkeypatch.chdir(tmp_path / below)
        settings = DataSettings(partition="pathological:classes=3", train_fraction=0.2)
        cifar10.load_data(0, data="mine", num_agents=6, settings=settings, seed=1, cache=str(cache))
        return len(list(cache.glob("*.tensors")))

    for below in ("one", "other"):
        (tmp_path / below / "mine").mkdir(parents=True)
        (tmp_path / below / "mine" / "train.parquet").write_bytes(b"images")
    assert [cached("one"), cached("other"), cached("one")] == [1, 2, 2]
    (tmp_path / "one" / "mine" / "train.parquet").write_bytes(b"more images")
    assert [cached("one"), cached("other")] == [3, 3]
    assert cifar10.source_of("uoft-cs/cifar10") == "uoft-cs/cifar10"


def test_cifar10s_validation_images_are_unused_training_images(cifar10: ModuleType) -> None:
    rules = {"partition": "pathological:classes=3", "train_fraction": 0.2}
    before, _, _ = cifar10.load_data(
        0, data="x", num_agents=6, settings=DataSettings(**rules), seed=1
    )
    (images, labels), (unseen, their_labels), _ = cifar10.load_data(
        0, data="x", num_agents=6, settings=DataSettings(validation_fraction=0.1, **rules), seed=1
    )
    assert torch.equal(before[0], images)
    assert len(unseen) == len(images) // 2
    assert set(their_labels.tolist()) <= set(labels.tolist())
    assert not {image.numpy().tobytes() for image in images} & {
        image.numpy().tobytes() for image in unseen
    }


@pytest.mark.parametrize(
    ("width", "shapes"), [(1.0, [32, 64, 128, 10]), (0.5, [16, 32, 64, 10]), (0.01, [8, 8, 8, 10])]
)
def test_the_quickstarts_network_scales_in_whole_groups(
    quickstart: ModuleType, width: float, shapes: list[int]
) -> None:
    net = quickstart.Net(width)
    assert [p.shape[0] for name, p in net.named_parameters() if name.endswith("weight")] == shapes
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_width_one_draws_the_weights_that_it_always_drew(quickstart: ModuleType) -> None:
    torch.manual_seed(3)
    net = quickstart.Net()
    weights = digest(*(parameter.detach() for parameter in net.parameters()))
    assert weights == "f7b173c4eed86b7d819e63efcd9a3fc9"
