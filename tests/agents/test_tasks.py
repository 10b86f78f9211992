"""Tasks: what is learned and measured, for every algorithm, and what fits it."""

import contextlib
import copy
import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import StackDataset, TensorDataset
from torchmetrics.classification import MulticlassF1Score

from flower_mcepl import (
    AgentData,
    ConfigError,
    DataError,
    DivergedError,
    MceplAgent,
    MceplConfig,
    UnsupportedLayerError,
    shared_module,
)
from flower_mcepl.agents import ALGORITHMS, Task, make_agent
from flower_mcepl.agents.parts.pace import REASON_METRIC, SHARE_METRIC, SPENT_METRIC
from flower_mcepl.agents.tasks import find_task
from flower_mcepl.agents.tasks.kinds import CLASSIFICATION, yes_or_no
from flower_mcepl.agents.tasks.network import call, described, one_output
from flower_mcepl.agents.tasks.tally import Tally
from flower_mcepl.agents.tasks.task import TAKEN, TASKS, is_free
from flower_mcepl.record.layout import AGENT_KEYS
from flower_mcepl.record.selection import BEST_ROUND, BEST_VALUE

ROOT = Path(__file__).parents[2]
N, CLASSES, TOKENS, SIZE = 24, 3, 5, 4


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def some_classes(*shape: int, upto: int = CLASSES) -> Tensor:
    return torch.randint(upto, shape, generator=torch.Generator().manual_seed(sum(shape)))


def image_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1))


def mlp(outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))


X = draws(N, 4)
# network, inputs and targets of each built-in task
KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "classification": (mlp(CLASSES), X, some_classes(N)),
    "binary": (mlp(1), X, (X[:, 0] > 0).float()),
    "multilabel": (mlp(CLASSES), X, (draws(N, CLASSES) > 0).int()),
    "regression": (mlp(1), X, X[:, 0] * 2 - X[:, 1]),
    "segmentation": (image_net, draws(N, 1, SIZE, SIZE), some_classes(N, SIZE, SIZE)),
    "tokens": (mlp(CLASSES), draws(N, TOKENS, 4), some_classes(N, TOKENS)),
}


def an_agent(task: str | Task, algorithm: str = "mcepl", **settings: Any) -> Any:
    name = task if isinstance(task, str) else "classification"
    build, inputs, targets = KINDS[name]
    data = AgentData.of((inputs, targets), (inputs, targets), agent=0)
    keys = {"task": task} if isinstance(task, str) else {}
    config = {**keys, "batch-size": 8, "num-rounds": 4, **settings}
    own = {} if isinstance(task, str) else {"task": task}
    return make_agent(algorithm, 0, shared_module(build, seed=1), data, config, seed=1, **own)


def test_every_built_in_task_is_tried_here() -> None:
    assert set(KINDS) == set(TASKS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("task", KINDS)
def test_every_algorithm_learns_every_task(task: str, algorithm: str) -> None:
    agent = an_agent(task, algorithm)
    agent.check()
    assert math.isfinite(agent.train(round=1)["train-loss"])
    metrics = agent.evaluate()
    kind = find_task(task)
    assert set(metrics) == {*kind.metrics, "loss", "num-examples", "density"}
    assert metrics["num-examples"] == N
    assert all(math.isfinite(value) for value in metrics.values())
    assert agent.describe()["task"] == agent.parameters()["task"] == task
    assert agent.describe()["main-metric"] == kind.main


@pytest.mark.parametrize("task", KINDS)
def test_training_gets_better_at_what_the_task_says(task: str) -> None:
    agent = an_agent(task, "local", lr=0.1, **{"local-epochs": 30})
    kind = find_task(task)
    before = agent.evaluate()
    agent.train(round=1)
    after = agent.evaluate()
    assert after["loss"] < before["loss"]
    assert (after[kind.main] > before[kind.main]) == kind.higher_is_better


# --- metrics against slow, obvious oracles ---


def outputs_of(agent: Any) -> Tensor:
    agent.model.eval()
    with torch.no_grad():
        return agent.model(agent.data.test.inputs)


def test_metrics_are_what_their_names_say() -> None:
    agent = an_agent("binary", "local")
    p, y = outputs_of(agent)[:, 0].sigmoid().numpy(), KINDS["binary"][2].numpy()
    metrics = agent.evaluate()
    guess = p > 0.5
    hits = int((guess & (y == 1)).sum())
    assert metrics["accuracy"] == pytest.approx((guess == y).mean())
    assert metrics["f1"] == pytest.approx(2 * hits / (guess.sum() + y.sum()))
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y == 1] for b in p[y == 0]]
    assert metrics["auroc"] == pytest.approx(np.mean(pairs))
    assert metrics["loss"] == pytest.approx(-np.log(np.where(y == 1, p, 1 - p)).mean(), rel=1e-5)

    agent = an_agent("multilabel", "local")
    guess, y = (outputs_of(agent) > 0).numpy(), KINDS["multilabel"][2].numpy()
    metrics = agent.evaluate()
    assert metrics["label-accuracy"] == pytest.approx((guess == y).mean())
    assert metrics["f1"] == pytest.approx(2 * (guess & (y == 1)).sum() / (guess.sum() + y.sum()))

    agent = an_agent("regression", "local")
    guess, y = outputs_of(agent)[:, 0].numpy(), KINDS["regression"][2].numpy()
    metrics = agent.evaluate()
    assert metrics["loss"] == pytest.approx(((guess - y) ** 2).mean(), rel=1e-5)
    assert metrics["rmse"] == pytest.approx(((guess - y) ** 2).mean() ** 0.5, rel=1e-5)
    assert metrics["mae"] == pytest.approx(np.abs(guess - y).mean(), rel=1e-5)
    assert metrics["r2"] == pytest.approx(
        1 - ((guess - y) ** 2).sum() / ((y - y.mean()) ** 2).sum(), rel=1e-4
    )

    agent = an_agent("segmentation", "local")
    guess, y = outputs_of(agent).argmax(1).numpy(), KINDS["segmentation"][2].numpy()
    metrics = agent.evaluate()
    assert metrics["pixel-accuracy"] == pytest.approx((guess == y).mean())
    shares = [((guess == c) & (y == c)).sum() / ((guess == c) | (y == c)).sum() for c in range(3)]
    assert metrics["iou"] == pytest.approx(np.mean(shares))

    agent = an_agent("tokens", "local")
    guess, y = outputs_of(agent).argmax(2).numpy(), KINDS["tokens"][2].numpy()
    assert agent.evaluate()["token-accuracy"] == pytest.approx((guess == y).mean())


@given(size=st.integers(1, N + 3), task=st.sampled_from(sorted(KINDS)))
def test_metrics_do_not_depend_on_how_batches_are_cut(size: int, task: str) -> None:
    whole = an_agent(task, "local", **{"eval-batch-size": N}).evaluate()
    cut = an_agent(task, "local", **{"eval-batch-size": size}).evaluate()
    assert cut == pytest.approx(whole, rel=1e-5)


def test_ignored_tokens_and_pixels_count_nowhere() -> None:
    for task, ignored in (("tokens", -100), ("segmentation", 255)):
        agent = an_agent(task, "local")
        half = KINDS[task][2].clone()
        half[: N // 2] = ignored
        inputs = KINDS[task][1]
        agent.data = AgentData.of((inputs, half), (inputs, half), agent=0)
        ignoring = agent.evaluate()
        agent.data = AgentData.of(*[(inputs[N // 2 :], half[N // 2 :])] * 2, agent=0)
        without = agent.evaluate()
        assert ignoring.pop("num-examples") == 2 * without.pop("num-examples")
        assert ignoring == pytest.approx(without, rel=1e-6)
        assert all(math.isfinite(loss) for loss in agent.train(round=1).values())


def test_a_metric_that_is_not_defined_is_left_out() -> None:
    agent = an_agent("regression")
    inputs, targets = X[:1], KINDS["regression"][2][:1]
    agent.data = AgentData.of((inputs, targets), (inputs, targets), agent=0)
    assert set(agent.evaluate()) == {"rmse", "mae", "loss", "num-examples", "density"}


# --- what fits, and what does not ---

Y = some_classes(N)
FITS = {
    "int32": ("classification", Y.int()),
    "int16": ("classification", Y.short()),
    "uint8": ("classification", Y.to(torch.uint8)),
    **{
        str(dtype).removeprefix("torch."): ("classification", Y.to(dtype))
        for dtype in (torch.uint16, torch.uint32, torch.uint64)
    },
    "uint16 of yes and no": ("binary", (Y > 0).to(torch.uint16)),
    "[B, 1]": ("classification", Y[:, None]),
    "bool": ("binary", Y > 0),
    "uint8 [B, 1]": ("binary", (Y > 0).to(torch.uint8)[:, None]),
    "float": ("multilabel", KINDS["multilabel"][2].float()),
    "float64": ("regression", KINDS["regression"][2].double()),
    "float [B, 1]": ("regression", KINDS["regression"][2][:, None]),
    "int": ("regression", Y),
    "[B, 1, H, W] uint8": ("segmentation", KINDS["segmentation"][2][:, None].to(torch.uint8)),
    "int32 [B, T]": ("tokens", KINDS["tokens"][2].int()),
}


@pytest.mark.parametrize("of_outputs", [(N,), (N, 1)])
@pytest.mark.parametrize("of_targets", [(N,), (N, 1)])
def test_a_dimension_of_one_at_the_end_does_not_matter(
    of_outputs: tuple[int, ...], of_targets: tuple[int, ...]
) -> None:
    labels = X[:, 0] > 0
    fitted = yes_or_no(torch.zeros(of_outputs), labels.view(of_targets))
    assert torch.equal(fitted, labels.float().view(of_outputs))


@pytest.mark.parametrize("kind", FITS)
def test_targets_of_one_meaning_are_taken(kind: str) -> None:
    task, targets = FITS[kind]
    build, inputs, plain = KINDS[task]
    plain = (
        plain
        if kind not in ("int", "bool", "uint8 [B, 1]", "uint16 of yes and no")
        else targets.flatten().float()
    )
    states = []
    for given_targets in (plain, targets):
        data = AgentData.of((inputs, given_targets), (inputs, given_targets), agent=0)
        agent = make_agent(
            "mcepl", 0, shared_module(build, seed=1), data, {"task": task, "score-lr": 1.0}, seed=1
        )
        agent.check()
        states.append((agent.train(round=1), agent.evaluate()))
    assert states[0] == states[1]


REFUSED = {
    "float classes": ("classification", X, Y.float(), "whole numbers in 0..2", "labels.long()"),
    "one-hot": ("classification", X, nn.functional.one_hot(Y), r"targets \[B\]", "argmax"),
    "from 1": ("classification", X, Y + 1, "values 1..3", "subtract 1"),
    "negative": ("classification", X, Y * 0 - 100, "values -100..-100", "to be ignored"),
    "too many": ("classification", X, Y + 2, "values 2..4", "an output for each"),
    "one a position": ("classification", draws(N, 5, 4), Y, "outputs must be", "tokens"),
    "-1 and 1": ("binary", X, (Y > 0).float() * 2 - 1, "0 or 1", "labels > 0"),
    "several": ("binary", X, (draws(N, 3) > 0).float(), "one logit", "multilabel"),
    "one label": ("multilabel", X, (Y > 0).float(), "a logit for each label", "binary"),
    "other shape": ("regression", X, draws(N, 2), "of one shape", "output for each number"),
    "not a number": ("regression", X, X[:, 0] / 0 * 0, "finite", "missing"),
    "one an image": ("segmentation", draws(N, 1, 4, 4), Y, "same without C", "classification"),
    "one a text": ("tokens", draws(N, 5, 4), Y, r"targets \[B, T\]", "classification"),
    "beyond": ("tokens", draws(N, 5, 4), some_classes(N, 5) + 9, "0..2", "an output for each"),
}


@pytest.mark.parametrize("split", ["training", "test"])
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("algorithm", ["mcepl", "dsgd", "fedpm"])
def test_targets_that_do_not_fit_are_refused_before_round_1(
    kind: str, split: str, algorithm: str
) -> None:
    task, inputs, targets, rule, way_out = REFUSED[kind]
    build, good_inputs, good_targets = KINDS[task]
    splits = {"training": (good_inputs, good_targets), "test": (good_inputs, good_targets)}
    splits[split] = StackDataset(inputs, targets)  # drawn, so that the task sees them first
    data = AgentData.of(splits["training"], splits["test"], agent=7)
    agent = make_agent(algorithm, 7, shared_module(build, seed=1), data, {"task": task}, seed=1)
    whose = f"agent 7's {split} split, task {task}"
    with pytest.raises(DataError, match=f"{whose}: .*{rule}") as refusal:
        agent.check()
    assert way_out in str(refusal.value)
    play = agent.evaluate if split == "test" else lambda: agent.train(round=1)
    with pytest.raises(DataError, match=whose):
        play()


def test_what_the_network_cannot_take_is_refused_with_what_came() -> None:
    data = AgentData.of((X.to(torch.uint8), Y), (X, Y), agent=3)
    agent = MceplAgent(3, shared_module(mlp(3), seed=1), data, MceplConfig(), seed=1)
    with pytest.raises(DataError, match=r"agent 3's training split: .*uint8 \[24, 4\].*Byte"):
        agent.check()


@pytest.mark.parametrize("algorithm", ["mcepl", "dsgd", "fedpm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_test_data_that_are_not_finite_have_no_accuracy(algorithm: str, bad: float) -> None:
    inputs = X.clone()
    agent = an_agent("classification", algorithm)
    agent.data.test.inputs = inputs
    inputs[5, 2] = bad
    for call_it in (agent.check, agent.evaluate):
        with pytest.raises(DataError, match="agent 0's test split must hold finite inputs; 1 of"):
            call_it()


def test_a_network_that_diverged_has_no_accuracy() -> None:
    agent = an_agent("classification", "local")
    with torch.no_grad():
        agent.weights["0.weight"].fill_(1e38)
        agent.weights["2.weight"].fill_(1e38)
    with pytest.raises(DivergedError, match="outputs are not finite, though its inputs are"):
        agent.evaluate()


# --- inputs and outputs ---


def test_inputs_are_arguments_in_order_or_by_name_and_floats_take_the_weights_dtype() -> None:
    def network(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a, b

    floats, indices = draws(3).double(), torch.arange(3)
    options = {"device": "cpu", "dtype": torch.float32}
    for inputs in ((floats, indices), [floats, indices], {"b": indices, "a": floats}):
        a, b = call(network, inputs, **options)
        assert a.dtype == torch.float32
        assert torch.equal(a, floats.float())
        assert b.dtype == torch.int64
        assert torch.equal(b, indices)
    assert call(lambda x: x, floats, **options).dtype == torch.float32


def test_outputs_of_one_meaning_are_found() -> None:
    class Named:
        logits = torch.ones(2)

    one = torch.ones(2)
    for outputs in (one, (one,), [one], {"x": one}, {"logits": one, "h": X}, Named()):
        assert torch.equal(one_output(outputs), one)
    for outputs in ((one, X), {"a": one, "b": X}, None, [], "text", ({"a": one}, one)):
        with pytest.raises(DataError, match="must return one tensor"):
            one_output(outputs)


@given(st.recursive(st.none() | st.text() | st.integers() | st.floats(), st.lists, max_leaves=9))
def test_whatever_comes_is_described_on_one_line(value: object) -> None:
    assert "\n" not in described(value)
    assert len(described(value)) < 3000


@pytest.mark.filterwarnings("ignore::UserWarning")  # that torch warns of rare types
def test_every_kind_of_tensor_is_described() -> None:
    types = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    tensors = {}
    for dtype in types:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # no such tensor can be made
            tensors[dtype] = torch.empty(2, dtype=dtype)
    assert len(tensors) > 10
    for dtype, tensor in tensors.items():
        assert described(tensor).startswith(str(dtype).removeprefix("torch.") + " [2]")
    assert described(torch.eye(2).to_sparse()) == "float32 [2, 2]"
    assert described(torch.zeros(2, device="meta")) == "float32 [2]"
    assert described(torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])) == "float32"


def test_what_came_is_described_by_type_shape_and_range() -> None:
    assert described(torch.tensor([[1, 3]])) == "int64 [1, 2] with values 1..3"
    assert described((torch.zeros(2), "x")) == "tuple of float32 [2] with values 0..0, 'x'"
    assert described({"a": torch.zeros(0)}) == "dict of a: float32 [0]"
    assert described(object()) == "object"


def test_of_a_sequence_the_first_four_are_described() -> None:
    one = "float32 [1] with values 0..0"
    for size, more in ((3, ""), (4, ""), (5, ", ..."), (9, ", ...")):
        expected = ", ".join([one] * min(size, 4)) + more
        assert described([torch.zeros(1)] * size) == f"list of {expected}"


# --- tasks of one's own ---


class MeanOutput:
    """A metric that is no torchmetrics."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.values += outputs.mean(1).tolist()

    def compute(self) -> float:
        return float(np.mean(self.values))


def test_a_task_of_ones_own_has_its_loss_and_metrics() -> None:
    own = Task(
        name="smooth",
        loss=lambda outputs, targets: nn.functional.cross_entropy(
            outputs, targets, label_smoothing=0.1
        ),
        metrics={"mean-output": MeanOutput},
        main="mean-output",
        higher_is_better=True,
    )
    agent = an_agent(own, "local")
    metrics = agent.evaluate()
    outputs = outputs_of(agent)
    assert metrics["mean-output"] == pytest.approx(float(outputs.mean()), rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(own.loss(outputs, Y)), rel=1e-5)
    assert agent.describe()["task"] == "smooth"
    assert agent.parameters()["task"] == "smooth"
    same = MceplConfig(task=own)
    assert same.as_parameters()["task"] == "smooth"


def test_settings_of_tasks_are_checked() -> None:
    loss, data = CLASSIFICATION.loss, AgentData.of((X, Y), (X, Y), agent=0)
    with pytest.raises(ConfigError, match=r"unknown task 'clasification'.*Did you mean 'classifi"):
        MceplConfig(task="clasification")
    with pytest.raises(ConfigError, match=r"task must be one of .* or a Task; got int"):
        MceplConfig(task=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="main metric must be one of loss; got 'f1'"):
        Task(loss=loss, main="f1")
    with pytest.raises(ConfigError, match="a loss gets better as it falls"):
        Task(loss=loss, higher_is_better=True)
    for name in ("loss", "num-examples", "F1", "my_metric", "train-accuracy", "round", "agent"):
        with pytest.raises(ConfigError, match="names of metrics"):
            Task(loss=loss, metrics={name: MeanOutput})
    with pytest.raises(ConfigError, match="given as a value, own; run-config key task"):
        make_agent("mcepl", 0, mlp(3)(), data, {"task": "binary"}, seed=1, task=Task(loss=loss))
    by_name: Any = "binary"
    with pytest.raises(ConfigError, match="must be a Task; a built-in one is the run-config key"):
        make_agent("mcepl", 0, mlp(3)(), data, {}, seed=1, task=by_name)


def test_no_metric_has_the_name_of_a_column_of_the_record() -> None:
    row = (ROOT / "docs" / "run-record.md").read_text().split("**`rounds.jsonl`**")[1]
    fields = [line.split("|")[1] for line in row.split("**`")[0].splitlines() if "| `" in line]
    names = {name for field in fields for name in re.findall(r"`(\w+)`", field)}
    assert names >= {*AGENT_KEYS, "clock", "best_round"}
    assert {name.replace("_", "-") for name in names} - {"accuracy"} <= {*TAKEN}
    assert {BEST_ROUND, BEST_VALUE} <= {*TAKEN}
    assert not any(map(is_free, [SHARE_METRIC, REASON_METRIC, SPENT_METRIC]))


# --- networks whose state no saved state would hold ---


class Counting(nn.Module):
    """A network that keeps a number, or a tensor, in an attribute of some name."""

    KEPT: ClassVar = {
        "number": 0,
        "tensor": torch.zeros(3),
        "array": np.zeros(3, np.float32),
        "dict": {"sum": torch.zeros(3)},
        "queue": deque([torch.zeros(3)], maxlen=1),
    }

    def __init__(self, *, used: bool, kind: str = "number", name: str = "kept") -> None:
        super().__init__()
        self.layer, self.used, self.kind, self.name = nn.Linear(4, 3), used, kind, name
        setattr(self, name, copy.deepcopy(self.KEPT[kind]))
        self.parts = [0]

    def forward(self, x: Tensor) -> Tensor:
        outputs, kept = self.layer(x), getattr(self, self.name)
        key: Any = {"dict": "sum", "queue": 0}.get(self.kind)
        if self.training and key is None:
            setattr(self, self.name, kept + 1)
        elif self.training:
            kept[key] = kept[key] + 1
        self.last = outputs.detach()
        held = getattr(self, self.name)
        return outputs + torch.as_tensor(held if key is None else held[key]) * self.used


@pytest.mark.parametrize("algorithm", ["mcepl", "dsgd", "fedpm"])
@pytest.mark.parametrize("kind", [*Counting.KEPT, "tensor of a private name"])
def test_a_state_in_an_attribute_is_refused_by_name(algorithm: str, kind: str) -> None:
    data = AgentData.of((X, Y), (X, Y), agent=0)
    build = partial(Counting, kind=kind.split()[0], name="_kept" if "private" in kind else "kept")
    for used in (True, False):
        module = shared_module(partial(build, used=used), seed=1)
        agent = make_agent(algorithm, 0, module, data, {}, seed=1)
        if used:
            with pytest.raises(UnsupportedLayerError, match=r"changes .*kept.*register_buffer"):
                agent.check()
        else:  # what is only written, such as the last outputs, is no state
            agent.check()
        assert repr(getattr(module, module.name)) == repr(Counting.KEPT[module.kind])


KEYS = {"num-rounds": 9}  # for which masks that move do so


def test_a_check_changes_nothing_of_what_comes_after() -> None:
    build = lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))  # noqa: E731
    data = AgentData.of((X, Y), (X, Y), agent=0)
    for algorithm in ALGORITHMS:
        with_check, without = (
            make_agent(algorithm, 0, shared_module(build, seed=1), data, KEYS, seed=1) for _ in "ab"
        )
        with_check.check()
        assert with_check.train(round=1) == without.train(round=1)
        assert with_check.evaluate() == without.evaluate()


def test_frozen_batch_norm_stays_frozen_in_every_algorithm() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8).eval(), nn.Linear(8, 3))

    data = AgentData.of((X, Y), (X, Y), agent=0)
    for algorithm in ALGORITHMS:
        agent = make_agent(algorithm, 0, shared_module(build, seed=1), data, KEYS, seed=1)
        agent.train(round=1)
        state = agent.state()
        buffers = [*state.group("buffer").items()]
        if algorithm == "ditto":  # that of its personal model, too
            buffers += state.group("personal-buffer").items()
        means = [t for name, t in buffers if "running_mean" in name]
        assert len(means) == 1 + (algorithm == "ditto"), algorithm
        assert not any(bool(mean.any()) for mean in means), algorithm


# --- what the check before round 1 sees beyond a first batch ---


class Squeezing(nn.Module):
    """A network that drops every dimension of one, also that of a batch of one."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = mlp(outputs)()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze()


def squeezing(task: str, size: int, algorithm: str = "mcepl", **settings: Any) -> Any:
    _, inputs, targets = KINDS[task]
    outputs = 1 if task in ("binary", "regression") else CLASSES
    data = AgentData.of((inputs, targets), (inputs[:size], targets[:size]), agent=7)
    config = {"task": task, "eval-batch-size": 8, "num-rounds": 4, **settings}
    module = shared_module(lambda: Squeezing(outputs), seed=1)
    return make_agent(algorithm, 7, module, data, config, seed=1)


@pytest.mark.parametrize("task", ["classification", "binary", "multilabel", "regression"])
def test_a_last_batch_of_one_is_tried_before_round_1(task: str) -> None:
    squeezing(task, 16).check()  # it never meets one
    for size in (17, 9, 1):
        with pytest.raises(DataError, match=rf"agent 7's test split, task {task}: .*squeeze\(-1\)"):
            squeezing(task, size).check()


def test_a_training_batch_of_one_is_tried_before_round_1() -> None:
    with pytest.raises(DataError, match=r"agent 7's training split.*squeeze\(-1\)"):
        squeezing("regression", 16, **{"batch-size": 1}).check()


def with_norm(outputs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, outputs))


@pytest.mark.parametrize("algorithm", ["mcepl", "dsgd", "fedpm"])
def test_a_batch_norm_that_gets_one_example_is_refused_before_round_1(algorithm: str) -> None:
    def agent(size: int, build: Callable[[], nn.Module] = with_norm, **settings: Any) -> Any:
        data = AgentData.of((X[:size], Y[:size]), (X, Y), agent=7)
        module = shared_module(build, seed=1)
        return make_agent(algorithm, 7, module, data, {"num-rounds": 4, **settings}, seed=1)

    rule = r"agent 7's training split: with {} examples and batch-size {} .*raise batch-size"
    for size, batch_size in ((1, 128), (N, 1)):
        with pytest.raises(DataError, match=rule.format(size, batch_size)):
            agent(size, **{"batch-size": batch_size}).check()
    agent(9, **{"batch-size": 8}).check()  # the one that is left over joins the batch before
    agent(N, **{"eval-batch-size": 1}).check()

    def frozen() -> nn.Module:
        network = with_norm()
        network[1].eval()
        return network

    agent(1, frozen).check()  # which training leaves in eval mode
    assert math.isfinite(agent(1, frozen).train(round=1)["train-loss"])


LATE = {
    "a class too many": ("classification", Y, 9, r"whole numbers in 0\.\.2"),
    "no zero or one": ("binary", KINDS["binary"][2], 2, "targets must be 0 or 1"),
    "no class of a token": ("tokens", KINDS["tokens"][2], 9, r"whole numbers in 0\.\.2"),
}


@pytest.mark.parametrize("split", ["training", "test"])
@pytest.mark.parametrize("held", ["tensors", "dataset"])
@pytest.mark.parametrize("kind", LATE)
def test_all_targets_in_memory_are_looked_at_before_round_1(
    kind: str, held: str, split: str
) -> None:
    task, targets, wrong, rule = LATE[kind]
    build, inputs, _ = KINDS[task]
    late = targets.clone()
    late[-1] = wrong
    splits: dict[str, Any] = {"training": (inputs, targets), "test": (inputs, targets)}
    splits[split] = (inputs, late) if held == "tensors" else TensorDataset(inputs, late)
    data = AgentData.of(splits["training"], splits["test"], agent=7)
    config = {"task": task, "eval-batch-size": 4}
    agent = make_agent("mcepl", 7, shared_module(build, seed=1), data, config, seed=1)
    with pytest.raises(DataError, match=f"agent 7's {split} split, task {task}: .*{rule}"):
        agent.check()


class Constant:
    """A metric that is whatever is asked for, or raises it."""

    def __init__(self, value: Any = 0.5, *, least: int = 0) -> None:
        self.value, self.least, self.seen = value, least, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.seen += len(targets)
        if self.value is KeyError:
            raise KeyError("no such thing")

    def itself(self) -> "Constant":
        return self

    def compute(self) -> Any:
        if self.seen < self.least:
            raise ValueError("too few")
        return self.value


cross_entropy = nn.functional.cross_entropy
UNFIT: dict[str, tuple[Task, str]] = {
    "one loss an example": (
        Task(loss=lambda o, t: cross_entropy(o, t, reduction="none")),
        r"loss must be one float.*got float32 \[8\].*\.mean\(\)",
    ),
    "a loss that is no tensor": (
        Task(loss=lambda o, t: 1.0),  # type: ignore[arg-type,return-value]
        "loss must be one float.*got 1.0",
    ),
    "a loss that fails": (
        Task(loss=nn.functional.mse_loss, metrics={"half": Constant}),
        r"task's loss must take a batch; given outputs float32 \[8, 3\].*it raised",
    ),
    "a sum": (
        Task(loss=nn.CrossEntropyLoss(reduction="sum")),
        r"loss must be the mean over a batch; it is twice as large.*reduction=\"mean\"",
    ),
    "a metric that is made once": (
        Task(loss=cross_entropy, metrics={"f1": Constant(0.5).itself}),
        "metric f1 must be made anew for each evaluation; the same object came twice",
    ),
    "a metric that needs arguments": (
        Task(loss=cross_entropy, metrics={"f1": MulticlassF1Score}),
        "metric f1 must be made without arguments; it raised TypeError.*num_classes.*lambda",
    ),
    "a vector": (
        Task(loss=cross_entropy, metrics={"f1": lambda: Constant(torch.zeros(3))}),
        r"metric f1 must compute one number; got float32 \[3\].*average=",
    ),
    "text": (
        Task(loss=cross_entropy, metrics={"f1": lambda: Constant("high")}),
        "metric f1 must compute one number; got 'high'",
    ),
    "percent": (
        Task(loss=cross_entropy, metrics={"accuracy": lambda: Constant(55.0)}),
        "metric accuracy must be a fraction in 0..1; got 55",
    ),
    "an update that fails": (
        Task(loss=cross_entropy, metrics={"f1": lambda: Constant(KeyError)}),
        "metric f1 must take a batch; .*KeyError: 'no such thing'",
    ),
}


@pytest.mark.filterwarnings("ignore:Using a target size")  # of torch's mse_loss
@pytest.mark.parametrize("kind", UNFIT)
def test_a_loss_or_metric_that_is_no_number_is_refused_before_round_1(kind: str) -> None:
    task, rule = UNFIT[kind]
    agent = an_agent(task, "dsgd", **{"eval-batch-size": 8})
    with pytest.raises(ConfigError, match=f"agent 0's (training|test) split, task own: .*{rule}"):
        agent.check()


NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch's": nn.MSELoss(),
    "by hand": lambda outputs, targets: ((outputs - targets) ** 2).mean(),
    "on absolute values": nn.L1Loss(),
}


@pytest.mark.filterwarnings("ignore:Using a target size")  # of torch's losses
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("whole", [True, False])
def test_a_loss_that_compares_all_with_all_is_refused_before_round_1(
    kind: str, whole: bool
) -> None:
    """As of outputs [B, 1] and targets [B], which torch broadcasts to [B, B]."""
    targets = X.sum(1).round().long() if whole else X.sum(1)
    loss = NUMBERS[kind]

    def agent(task: Task, shape: tuple[int, ...]) -> Any:
        split = (X, targets.view(shape))
        data = AgentData.of(split, split, agent=0)
        return make_agent("local", 0, shared_module(mlp(1), seed=1), data, {}, seed=1, task=task)

    with pytest.raises(ConfigError, match=r"outputs \[\d+, 1\] and targets \[\d+\].*squeeze"):
        agent(Task(loss=loss), (-1,)).check()
    own = lambda outputs, targets: loss(outputs.squeeze(1), targets.float())  # noqa: E731
    fitting = Task(loss=loss, targets=lambda outputs, targets: targets.float().view_as(outputs))
    for sound, shape in [(Task(loss=own), (-1,)), (fitting, (-1,))]:
        agent(sound, shape).check()
    if not whole:
        agent(Task(loss=loss), (-1, 1)).check()


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 9.0, 2.0])])
def test_a_mean_is_no_sum_whatever_its_classes_weigh(weight: Tensor | None) -> None:
    for loss in (nn.CrossEntropyLoss(weight=weight), nn.CrossEntropyLoss(weight, reduction="mean")):
        an_agent(Task(loss=loss), "local").check()


def test_a_task_is_made_of_what_stays_as_it_is() -> None:
    class Margin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(outputs @ self.weight, targets)

    with pytest.raises(ConfigError, match=r"loss must have no weights to train.*got 'Margin'"):
        Task(loss=Margin())
    an_agent(Task(loss=Margin().requires_grad_(False)), "local").check()
    made: Any = MulticlassF1Score(num_classes=3)
    with pytest.raises(ConfigError, match=r"metric f1 must be what makes a fresh one.*Pass its"):
        Task(loss=cross_entropy, metrics={"f1": made})


def test_a_metric_that_needs_more_than_a_first_batch_is_taken() -> None:
    def agent(least: int) -> Any:
        task = Task(loss=cross_entropy, metrics={"most": lambda: Constant(least=least)})
        return an_agent(task, "local", **{"eval-batch-size": 8})

    agent(N).check()
    assert agent(N).evaluate()["most"] == 0.5
    with pytest.raises(ConfigError, match=f"must compute one number of {N} examples; .*too few"):
        agent(N + 1).evaluate()
    whole = Task(loss=cross_entropy, metrics={"most": lambda: Constant(least=N + 1)})
    with pytest.raises(ConfigError, match=r"agent 0's test split.*too few"):
        an_agent(whole, "local").check()


# --- metrics that are not defined ---


def measured(task: str, outputs: Tensor, targets: Tensor, size: int = 2) -> dict[str, float]:
    kind = find_task(task)
    tally = Tally(kind, whose="agent 7's test split")
    for some, labels in zip(outputs.split(size), targets.split(size), strict=True):
        tally.add(some, kind.fitting(some, labels, whose="a"), torch.zeros(1))
    return tally.metrics()


NO, YES = torch.full((5,), -3.0), torch.full((5,), 3.0)
MIXED = torch.tensor([-3.0, -3.0, -3.0, -3.0, 3.0])
ZEROS, ONES = torch.zeros(5), torch.ones(5)
UNDEFINED: dict[str, tuple[str, Tensor, Tensor, dict[str, float | None]]] = {
    "none positive": ("binary", NO, ZEROS, {"accuracy": 1, "f1": None, "auroc": None}),
    "a false positive": ("binary", MIXED, ZEROS, {"accuracy": 0.8, "f1": 0, "auroc": None}),
    "all positive": ("binary", YES, ONES, {"accuracy": 1, "f1": 1, "auroc": None}),
    "missed": ("binary", NO, (MIXED > 0).float(), {"accuracy": 0.8, "f1": 0, "auroc": 0.5}),
    "right": ("binary", MIXED, (MIXED > 0).float(), {"accuracy": 1, "f1": 1, "auroc": 1}),
    "no label": (
        "multilabel",
        NO[:, None].expand(5, 3),
        torch.zeros(5, 3),
        {"f1": None, "label-accuracy": 1},
    ),
    "false labels": (
        "multilabel",
        YES[:, None].expand(5, 3),
        torch.zeros(5, 3),
        {"f1": 0, "label-accuracy": 0},
    ),
    "constant": ("regression", ZEROS, ONES, {"rmse": 1, "mae": 1, "r2": None}),
    "one differs": ("regression", MIXED, MIXED, {"rmse": 0, "mae": 0, "r2": 1}),
}


@pytest.mark.parametrize("kind", UNDEFINED)
def test_a_metric_is_left_out_exactly_where_it_is_not_defined(kind: str) -> None:
    task, outputs, targets, expected = UNDEFINED[kind]
    metrics = measured(task, outputs, targets)
    for name, value in expected.items():
        assert metrics.get(name) == (None if value is None else pytest.approx(value)), name


@pytest.mark.parametrize("split", ["training", "test"])
@pytest.mark.parametrize("held", ["tensors", "examples"])
@pytest.mark.parametrize(("task", "ignored"), [("tokens", -100), ("segmentation", 255)])
def test_a_split_in_which_nothing_counts_is_refused_before_round_1(
    task: str, ignored: int, held: str, split: str
) -> None:
    build, inputs, targets = KINDS[task]
    nothing = torch.full_like(targets, ignored)

    def agent(bad: Tensor) -> Any:
        splits: dict[str, Any] = {"training": (inputs, targets), "test": (inputs, targets)}
        splits[split] = (inputs, bad) if held == "tensors" else StackDataset(inputs, bad)
        data = AgentData.of(splits["training"], splits["test"], agent=7)
        config = {"task": task, "eval-batch-size": 8 if held == "tensors" else N}
        return make_agent("dsgd", 7, shared_module(build, seed=1), data, config, seed=1)

    rule = f"agent 7's {split} split, task {task}: at least one target must count; of {N} examples"
    with pytest.raises(DataError, match=rule):
        agent(nothing).check()
    if split == "test":
        with pytest.raises(DataError, match=rule):
            agent(nothing).evaluate()
    nothing[-1] = 0  # beyond the first batch of those in memory
    agent(nothing).check()


# --- probabilities where logits are due ---


class Ends(nn.Module):
    """A network that ends as it is told."""

    def __init__(self, build: Callable[[], nn.Module], end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.end = build(), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.network(x))


SQUASHED: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "sigmoid": ("binary", torch.sigmoid),
    "its module": ("binary", nn.Sigmoid()),
    "its method": ("multilabel", lambda x: x.sigmoid()),
    "and squeezed": ("binary", lambda x: torch.sigmoid(x).squeeze(-1)),
    "in a dict": ("binary", lambda x: {"logits": torch.sigmoid(x)}),
    "softmax": ("classification", lambda x: x.softmax(1)),
    "its function": ("segmentation", lambda x: nn.functional.softmax(x, dim=1)),
    "its own module": ("tokens", nn.Softmax(dim=-1)),
}


@pytest.mark.parametrize("kind", SQUASHED)
def test_a_network_that_returns_probabilities_is_warned_of(kind: str) -> None:
    task, end = SQUASHED[kind]
    build, inputs, targets = KINDS[task]
    for algorithm in ("mcepl", "dsgd", "fedpm"):
        data = AgentData.of((inputs, targets), (inputs, targets), agent=0)
        module = shared_module(lambda: Ends(build, end), seed=1)
        agent = make_agent(algorithm, 0, module, data, {"task": task, "num-rounds": 4}, seed=1)
        with pytest.warns(UserWarning, match=f"softmax, which the loss of task {task}") as warned:
            agent.check()
        assert len(warned) == 1, algorithm


NOT_SQUASHED: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "logits in 0..1": ("binary", lambda x: x * 0 + 0.5),
    "a gate": ("classification", lambda x: x * torch.sigmoid(x)),
    "attention": ("tokens", lambda x: (x @ x.mT).softmax(-1) @ x),
    "log-softmax": ("classification", lambda x: x.log_softmax(1)),
    "numbers in 0..1": ("regression", torch.sigmoid),
}


@pytest.mark.parametrize("kind", NOT_SQUASHED)
def test_no_network_is_warned_of_for_what_its_logits_are(kind: str) -> None:
    task, end = NOT_SQUASHED[kind]
    build, inputs, targets = KINDS[task]
    data = AgentData.of((inputs, targets), (inputs, targets), agent=0)
    module = shared_module(lambda: Ends(build, end), seed=1)
    make_agent("mcepl", 0, module, data, {"task": task}, seed=1).check()  # warnings are errors


class Unsigned:
    """A source of one's own whose labels torch hardly calculates with."""

    def __init__(self, task: str) -> None:
        _, self.inputs, targets = KINDS[task]
        self.targets, self.num_examples = targets.to(torch.uint16), N

    def training_batches(self, *, steps: int, **how: Any) -> Iterator[tuple[Tensor, Tensor]]:
        yield from [(self.inputs, self.targets)] * steps

    def evaluation_batches(self, *, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.inputs, self.targets


@pytest.mark.parametrize("task", ["classification", "binary", "multilabel", "tokens"])
def test_whole_targets_of_a_source_of_ones_own_may_be_of_any_size(task: str) -> None:
    data = AgentData.of(Unsigned(task), Unsigned(task), agent=0)
    module = shared_module(KINDS[task][0], seed=1)
    agent = make_agent("mcepl", 0, module, data, {"task": task, "num-rounds": 4}, seed=1)
    agent.check()
    trained, plain = agent.train(round=1), an_agent(task, **{"batch-size": N})
    assert trained == pytest.approx(plain.train(round=1), rel=1e-4)
