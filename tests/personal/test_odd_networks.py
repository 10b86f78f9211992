"""Networks that draw at random, refuse inputs, or return more than a prediction."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import AgentData, DataError, FingerprintError, MceplAgent, load_personal
from flower_mcepl.agents.tasks import find_task
from flower_mcepl.personal import (
    compact,
    personal_bytes,
    personal_network,
    predict,
    read_personal,
    reference_to,
)
from flower_mcepl.personal.files import Exported, export_model
from flower_mcepl.personal.reading import opened
from tests.fleet.agents import make_agent, small_net, split

needs_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="needs torch >= 2.7"
)
NOT_CHECKED = "gives no outputs for made-up inputs, or others each time"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(1, 4, 3), nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.features(images).relu().flatten(1))


class OfBrightImages(Net):
    """Refuses made-up inputs, which have no pixel above 1."""

    def forward(self, images: Tensor) -> Any:
        if not images.max() > 1:
            raise ValueError("an image must not be so dark")
        return super().forward(images)


class OfContrast(Net):
    """Gives what is not finite for made-up inputs."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images + (images.max() - 1).log().clamp(0, 0))


class NeverOff(Net):
    """Forgets to turn its dropout off."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(nn.functional.dropout(images, 0.5))


class Counting(Net):
    """Changes a buffer whenever it is called, and calculates with it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, images: Tensor) -> Any:
        self.calls += 1
        return super().forward(images) + 1e-6 * self.calls


class InAnOrder(nn.Module):
    """Reads its inputs in an order that is drawn, and in no buffer."""

    def __init__(self, *, floats: bool) -> None:
        super().__init__()
        self.first = nn.Linear(36, 36) if floats else nn.Embedding(9, 1)
        self.head, self.order = nn.Linear(36, 3), torch.randperm(36)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.first(images.flatten(1)[:, self.order]).flatten(1))


class TwoHeads(Net):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images).neg(), super().forward(images)


class Mapped(Net):
    def forward(self, images: Tensor) -> Any:
        return {"brightness": images.mean((1, 2, 3)), "logits": super().forward(images)}


class ByTheBatch(Net):
    """Normalizes by the batch that it is given."""

    def forward(self, images: Tensor) -> Any:
        return super().forward((images - images.mean(0)) / images.std(0))


class OfTheWrongAxis(Net):
    """Runs a recurrent layer along the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(36, 36)

    def forward(self, images: Tensor) -> Any:
        return super().forward(self.memory(images.flatten(2))[0].view_as(images).flip(0))


class OfOneSize(Net):
    def forward(self, images: Tensor) -> Any:
        assert len(images) > 7
        return super().forward(images)


class Squeezing(Net):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images).squeeze()


def trained(model_fn: Callable[[], nn.Module], *, floats: bool = True, **config: Any) -> Any:
    agent: MceplAgent = make_agent(0, model_fn=model_fn, **config)
    if not floats:
        kept = [(x.abs().long().clamp(max=8), y) for x, y in (split(0), split(1))]
        agent.data = AgentData.of(*kept, agent=0)
    agent.train(round=1)
    inputs, _ = next(iter(agent.data.test.evaluation_batches(batch_size=99)))
    return agent, inputs


@pytest.mark.parametrize("model_fn", [OfBrightImages, OfContrast])
def test_a_network_that_takes_no_made_up_inputs_has_a_file(
    model_fn: type[nn.Module], tmp_path: Path
) -> None:
    agent, inputs = trained(model_fn)
    lines = export_model(Exported(agent, 1, network=reference_to(model_fn)), tmp_path / "a.mask")
    assert any(NOT_CHECKED in line for line in lines)
    assert read_personal(tmp_path / "a.mask").facts["probe"] == {
        "shape": [1, 1, 6, 6],
        "outputs": [],
    }
    loaded = load_personal(tmp_path / "a.mask")
    assert torch.equal(loaded(inputs), personal_network(agent)(inputs))


def test_a_file_of_outputs_at_random_opens(tmp_path: Path) -> None:
    agent, inputs = trained(NeverOff)
    lines = export_model(Exported(agent, 1, network=reference_to(NeverOff)), tmp_path / "a.mask")
    assert any(NOT_CHECKED in line for line in lines)
    assert load_personal(tmp_path / "a.mask")(inputs).shape == (24, 3)


def test_outputs_of_an_ordinary_network_are_checked(tmp_path: Path) -> None:
    agent, _ = trained(Net)
    before = torch.random.get_rng_state()
    lines = export_model(Exported(agent, 1, network=reference_to(Net)), tmp_path / "a.mask")
    assert not any(NOT_CHECKED in line for line in lines)
    load_personal(tmp_path / "a.mask")
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(FingerprintError, match="its outputs differ"):
        read_personal(tmp_path / "a.mask").network(partial(Changed))


class Changed(Net):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images.neg())


Changed.__qualname__ = "Net"  # its type alone does not give it away


def test_the_check_of_outputs_leaves_buffers_as_they_are() -> None:
    file = opened(personal_bytes(Counting(), input_shape=(1, 1, 6, 6)), where="x")
    assert file.facts["probe"]["outputs"]
    assert float(file.network(Counting).get_buffer("calls")) == 0


@pytest.mark.parametrize("model_fn", [ByTheBatch, OfTheWrongAxis, OfOneSize])
def test_outputs_that_depend_on_the_inputs_beside_are_said(
    model_fn: type[nn.Module], tmp_path: Path
) -> None:
    for build, told in ((Net, False), (model_fn, True)):
        agent, _ = trained(build)
        lines = export_model(Exported(agent, 1), tmp_path / "a.mask")
        assert any("does not hold for single inputs" in line for line in lines) is told


class OfSmallBatches(Net):
    """Takes no more examples than a small device has memory for."""

    def forward(self, images: Tensor) -> Any:
        assert len(images) <= 8
        return super().forward(images)


def test_an_export_tries_no_larger_batch_than_an_evaluation(tmp_path: Path) -> None:
    agent = make_agent(0, model_fn=OfSmallBatches, eval_batch_size=8)
    lines = export_model(Exported(agent, 1), tmp_path / "a.mask")
    assert not any("does not hold for single inputs" in line for line in lines)


@pytest.mark.parametrize("floats", [True, False])
def test_what_a_network_draws_besides_its_weights_is_drawn_again(
    floats: bool, tmp_path: Path
) -> None:
    model_fn = partial(InAnOrder, floats=floats)
    agent, inputs = trained(model_fn, floats=floats)
    export_model(Exported(agent, 1), tmp_path / "a.mask")
    loaded = load_personal(tmp_path / "a.mask", model_fn)
    assert torch.equal(loaded(inputs), personal_network(agent)(inputs))


@pytest.mark.parametrize("seed", [True, -1, 2**63, 1.0, "1", None])
def test_a_seed_of_a_stranger_is_any(seed: Any) -> None:
    opened(personal_bytes(Net(), facts={"seed": seed}), where="x").network(Net)


def test_what_the_task_picks_is_the_prediction(tmp_path: Path) -> None:
    picks = replace(find_task("classification"), outputs=lambda outputs: outputs[1])
    agent, inputs = trained(TwoHeads, task=picks)
    exported = Exported(agent, 1, network=reference_to(TwoHeads))
    lines = export_model(exported, tmp_path / "a.pt2")
    assert "same prediction for 24 of 24" in lines[-1]
    program = torch.export.load(tmp_path / "a.pt2").module()
    with torch.no_grad():
        whole = personal_network(agent)(inputs)
        torch.testing.assert_close(program(inputs), whole[1])
    export_model(exported, tmp_path / "a.mask")
    with torch.no_grad():
        assert torch.equal(load_personal(tmp_path / "a.mask")(inputs)[0], whole[0])
    np.save(tmp_path / "x.npy", inputs.numpy())
    with pytest.raises(DataError, match=r"picks it by a function of its own.* \.pt2"):
        list(predict(tmp_path / "a.mask", [tmp_path / "x.npy"]))


@pytest.mark.slow
@needs_torch
def test_onnx_has_the_output_that_counts(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    agent, inputs = trained(Mapped)
    export_model(Exported(agent, 1), tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.no_grad():
        logits = personal_network(agent)(inputs)["logits"]
    torch.testing.assert_close(torch.from_numpy(outputs), logits)


@pytest.mark.parametrize("count", [1, 2, 65])
def test_a_batch_of_one_is_predicted_though_the_network_squeezes_it(
    count: int, tmp_path: Path
) -> None:
    agent, _ = trained(Squeezing)
    export_model(Exported(agent, 1, network=reference_to(Squeezing)), tmp_path / "a.mask")
    inputs = torch.randn(count, 1, 6, 6)
    np.save(tmp_path / "x.npy", inputs.numpy())
    found = list(predict(tmp_path / "a.mask", [tmp_path / "x.npy"]))
    with torch.no_grad():
        best = [int(personal_network(agent)(row[None]).argmax()) for row in inputs]
    assert [row["class"] for row in found] == best


def test_a_network_without_an_output_for_each_input_is_refused(tmp_path: Path) -> None:
    data = personal_bytes(nn.Linear(4, 3), facts={"network": reference_to(Mean)}, input_shape=None)
    (tmp_path / "a.mask").write_bytes(data)
    np.save(tmp_path / "x.npy", np.ones((5, 4), np.float32))
    with pytest.raises(DataError, match=r"an output for each input; for 5, .* it gives \[3\]"):
        list(predict(tmp_path / "a.mask", [tmp_path / "x.npy"], model_fn=Mean))


class Mean(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).mean(0)


Mean.__qualname__ = "Linear"


def unnamed() -> Any:
    return small_net()


@pytest.mark.parametrize(
    "build", [unnamed, partial(Net), lru_cache(Net), Net().forward, InAnOrder.forward]
)
def test_what_no_file_may_call_is_not_named_and_said(build: Any, tmp_path: Path) -> None:
    assert reference_to(build) == {}
    agent, _ = trained(Net)
    (_, line) = export_model(Exported(agent, 1, network=reference_to(build)), tmp_path / "a.mask")
    assert "called model_fn or annotated to return one" in line


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_compact_network_is_of_the_floats_of_the_whole_one(dtype: torch.dtype) -> None:
    module = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU()),
        *(nn.Conv2d(4, 64, 3, padding=1), nn.GroupNorm(2, 64), nn.Flatten(), nn.Linear(1024, 3)),
    )
    with torch.no_grad():
        module[0].weight[1:3] = 0
        module[3].weight[::2] = 0
    module, inputs = module.eval().to(dtype), torch.randn(5, 1, 6, 6, dtype=dtype)
    small = compact(module, inputs)
    assert small.filters["0"] == (4, 2)
    assert small.module(inputs).dtype == dtype
    assert {x.dtype for x in small.module.parameters()} == {dtype}
