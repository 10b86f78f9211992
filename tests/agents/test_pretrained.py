"""Pretrained weights in place of the module's, and scores that begin at their sizes."""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from flower_mcepl import (
    Agent,
    AgentData,
    ConfigError,
    FingerprintError,
    MceplAgent,
    Topology,
    shared_module,
    simulate,
)
from flower_mcepl.agents import make_agent, make_server
from flower_mcepl.agents.handshake import check_common_ground
from flower_mcepl.masks import load_weights
from flower_mcepl.masks.pretrained import with_state
from tests.fleet.agents import SEED, noisy_net, same_tensors, small_net, split

State = dict[str, Tensor]


def net(model_fn: Callable[[], nn.Module] = small_net, *, seed: int = SEED) -> nn.Module:
    return shared_module(model_fn, seed=seed)


def other_state(model_fn: Callable[[], nn.Module] = small_net) -> State:
    """What a network of another seed holds, its buffers moved, too."""
    module = net(model_fn, seed=99)
    with torch.no_grad():
        for buffer in module.buffers():
            buffer.add_(3)
    return dict(module.state_dict())


def written(state: Any, path: Path) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return f"file:{path}"


def agent_of(
    source: str, index: int = 0, algorithm: str = "mcepl", node: Any = None, **keys: Any
) -> Agent:
    keys = {key.replace("_", "-"): value for key, value in keys.items()}
    data = AgentData.of(split(index), split(1000 + index), agent=index)
    given = {"weights": source} if source else {}
    return make_agent(algorithm, index, net(), data, {**given, **COMMON, **keys}, node, seed=SEED)


# --- the loader ---


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_every_parameter_and_buffer_is_the_files(suffix: str, tmp_path: Path) -> None:
    state = other_state(noisy_net)
    module, origin = load_weights(net(noisy_net), written(state, tmp_path / f"w{suffix}"))
    assert same_tensors(dict(module.state_dict()), state)
    content = (tmp_path / f"w{suffix}").read_bytes()
    assert origin == "file " + hashlib.blake2b(content, digest_size=16).hexdigest()[:16]


def test_the_digest_is_that_of_the_command_that_the_docs_name(tmp_path: Path) -> None:
    _, origin = load_weights(net(), written(other_state(), tmp_path / "w.pt"))
    try:
        command = ["b2sum", "-l", "128", str(tmp_path / "w.pt")]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no b2sum")
    assert origin == f"file {out[:16]}"


def test_the_module_passed_in_is_untouched(tmp_path: Path) -> None:
    module, before = net(), net().state_dict()
    load_weights(module, written(other_state(), tmp_path / "w.pt"))
    assert same_tensors(dict(module.state_dict()), dict(before))


def test_values_are_cast_to_the_networks_dtype() -> None:
    state = {name: tensor.double() for name, tensor in other_state().items()}
    module = with_state(net(), state, source="here")
    assert same_tensors(dict(module.state_dict()), other_state())


def test_names_of_data_parallel_are_read() -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in other_state().items()}
    assert same_tensors(dict(with_state(net(), wrapped, source="here").state_dict()), other_state())


def test_all_differences_stand_in_one_error() -> None:
    state = other_state(noisy_net)
    state["5.weight"] = torch.zeros(4, 64)
    state["1.running_mean"] = torch.zeros(4, dtype=torch.int64)
    state["6.bias"] = state.pop("5.bias")
    with pytest.raises(ConfigError) as caught:
        with_state(net(noisy_net), state, source="here")
    for part in (
        "'here'",
        "missing: 5.bias",
        "unexpected: 6.bias",
        r"of another shape: 5.weight (4, 64) for (3, 64)",
        "of another kind: 1.running_mean torch.int64 for torch.float32",
        'weights-except = "fc*"',
    ):
        assert part in str(caught.value)


def test_many_names_are_cut() -> None:
    with pytest.raises(ConfigError, match=r"missing: 0\.weight, 0\.bias, .* and 4 more"):
        with_state(net(noisy_net), {}, source="here")


def test_an_excepted_head_stays_as_it_was_drawn() -> None:
    state = {**other_state(), "3.weight": torch.zeros(9, 64), "head.extra": torch.zeros(2)}
    made = with_state(net(), state, source="here", excepted=["3.*", "head.*"]).state_dict()
    own = net().state_dict()
    for name in ("0.weight", "0.bias"):
        assert torch.equal(made[name], state[name])
    for name in ("3.weight", "3.bias"):
        assert torch.equal(made[name], own[name])


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights-except must fit .*'fc\*'.*0\.weight"):
        with_state(net(), other_state(), source="here", excepted=["fc*"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    """Also those that the cast makes infinite."""
    state = {name: tensor.double() for name, tensor in other_state().items()}
    state["3.bias"][1] = value
    with pytest.raises(ConfigError, match=r"finite in the network's dtype.*3\.bias"):
        with_state(net(), state, source="here")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight


def test_a_shared_tensor_may_stand_once_and_must_agree(tmp_path: Path) -> None:
    trained = net(Tied, seed=99)
    safetensors.torch.save_model(trained, str(tmp_path / "w.safetensors"))
    made, _ = load_weights(net(Tied), f"file:{tmp_path / 'w.safetensors'}")
    assert torch.equal(made.state_dict()["two.weight"], trained.state_dict()["one.weight"])
    state = {"one.weight": torch.zeros(4, 4), "two.weight": torch.ones(4, 4)}
    with pytest.raises(ConfigError, match=r"layers share a tensor; one\.weight"):
        with_state(net(Tied), state, source="here")


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("resnet18", "weights must be"),
        ("http:x.pt", "weights must be"),
        ("file:", "weights must be"),
        ("file:w.pt", "absolute path"),
        ("file:/w.onnx", "must end in .safetensors"),
        ("timm:hf-hub:someone/anything", "named as it lists them"),
        ("timm:a/b", "named as it lists them"),
        ("torchvision:a/b/c", "named as it lists them"),
    ],
)
def test_sources_that_are_none_are_refused(source: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        load_weights(net(), source)
    with pytest.raises(ConfigError, match=rule):
        agent_of(source)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (Evil(), "must be a state dict"),
        ([1], "must be a state dict; got 'list'"),
        ({"state_dict": {}, "epoch": 3}, "other entries: state_dict, epoch"),
    ],
)
def test_files_of_something_else_are_refused(
    content: Any, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rule):
        load_weights(net(), written(content, tmp_path / "w.pt"))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_missing_and_damaged_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    with pytest.raises(ConfigError, match="must exist, on each device"):
        load_weights(net(), f"file:{path}")
    source = written(other_state(), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="must be a state dict"):
        load_weights(net(), source)


def test_a_network_of_torchvision_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    asked = []

    def get_state_dict(self: Any, **_: Any) -> State:
        asked.append(str(self))
        return dict(models.resnet18().state_dict())

    kind = models.ResNet18_Weights
    monkeypatch.setattr(kind, "get_state_dict", get_state_dict)
    for name in ("resnet18/IMAGENET1K_V1", "resnet18"):
        module = shared_module(lambda: models.resnet18(), seed=1)
        _, origin = load_weights(module, f"torchvision:{name}")
        assert origin.startswith(f"torchvision:{name} ")
    assert asked == ["ResNet18_Weights.IMAGENET1K_V1"] * 2
    for name in ("resnet18/IMAGENET", "resnet1"):
        with pytest.raises(ConfigError, match="cannot be had"):
            load_weights(net(), f"torchvision:{name}")


def test_a_hub_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install timm"):
        load_weights(net(), "timm:resnet18")


# --- agents ---

# weight-init: FedPM draws weights of its own by default
COMMON = {"batch-size": 8, "num-rounds": 4, "weight-init": "module"}

ALGORITHMS = ("mcepl", "local-masks", "local", "dsgd", "dispfl", "fedavg", "fedpm")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_begins_from_them(algorithm: str, tmp_path: Path) -> None:
    source = written(other_state(), tmp_path / "w.safetensors")
    loaded, drawn = agent_of(source, 0, algorithm), agent_of("", 0, algorithm)
    assert loaded.fingerprint != drawn.fingerprint
    direct = make_agent(
        algorithm,
        0,
        net(seed=99),
        AgentData.of(split(0), split(1000), agent=0),
        COMMON,
        seed=SEED,
    )
    assert loaded.fingerprint == direct.fingerprint
    assert loaded.train(round=1) == direct.train(round=1)
    assert same_tensors(dict(loaded.state().tensors), dict(direct.state().tensors))
    assert loaded.describe()["weights-from"].startswith("file ")
    assert "weights-from" not in drawn.describe()


@pytest.mark.parametrize("algorithm", ["fedavg", "fedpm"])
def test_the_server_begins_from_them(algorithm: str, tmp_path: Path) -> None:
    keys = {**COMMON, "weights": written(other_state(), tmp_path / "w.safetensors")}
    server = make_server(algorithm, net(), 2, keys, seed=SEED)
    agent = agent_of(keys["weights"], 0, algorithm)
    check_common_ground("agent 0", agent.describe(), "the server", server.describe())
    drawn = make_server(algorithm, net(), 2, COMMON, seed=SEED)
    with pytest.raises(FingerprintError, match=r"They come from file .* and the model function"):
        check_common_ground("agent 0", agent.describe(), "the server", drawn.describe())


def test_a_device_has_a_path_of_its_own(tmp_path: Path) -> None:
    """The format does not matter, the weights do."""
    one = agent_of(written(other_state(), tmp_path / "w.safetensors"))
    node = {"weights": written(other_state(), tmp_path / "w.pt")}
    two = agent_of("file:/nowhere.pt", 1, node=node)
    check_common_ground("agent 0", one.describe(), "agent 1", two.describe())
    node = {"weights": written(net().state_dict(), tmp_path / "other.pt")}
    three = agent_of("file:/nowhere.pt", 2, node=node)
    with pytest.raises(FingerprintError, match=r"They come from file \w+ and file \w+: set"):
        check_common_ground("agent 0", one.describe(), "agent 2", three.describe())


def test_agents_of_different_weights_say_no_path(tmp_path: Path) -> None:
    agent = agent_of(written(other_state(), tmp_path / "secret-name.pt"))
    assert "secret" not in repr(agent.describe())


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"weight_init": "signed-constant"}, "weight-init draws the frozen weights anew"),
        ({"weights_except": "3.*,"}, "names or patterns, separated by commas"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: Any, rule: str, tmp_path: Path) -> None:
    source = written(other_state(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=rule):
        agent_of(source, **keys)


def test_exceptions_without_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs weights"):
        agent_of("", weights_except="3.*")


# --- scores that begin at the weights' sizes ---


def masks_agent(**keys: Any) -> MceplAgent:
    agent = agent_of("", score_init="magnitude", **keys)
    assert isinstance(agent, MceplAgent)
    return agent


@pytest.mark.parametrize("form", ["signed", "magnitude"])
def test_the_first_mask_keeps_the_largest_weights(form: str) -> None:
    keys = {"retention-conv": "0.3", "retention-linear": 0.6, "first-mask": "scores"}
    agent = masks_agent(score_form=form, **keys)
    first = agent.first_payload()
    assert first is not None
    for name, kept in (("0.weight", 36 - int(0.7 * 36)), ("3.weight", 192 - int(0.4 * 192))):
        sizes = net().get_parameter(name).detach().abs()
        largest = set(sizes.flatten().argsort(descending=True)[:kept].tolist())
        for mask in (first[name], agent.model.masks()[name]):
            assert set(mask.flatten().nonzero().flatten().tolist()) == largest


def test_a_weight_of_zero_has_a_score_that_can_learn() -> None:
    class Zero(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*small_net())
            with torch.no_grad():
                self[3].weight[0, :5] = 0

    data = AgentData.of(split(0), split(1000), agent=0)
    keys = {"score-init": "magnitude", "score-form": "magnitude"}
    agent = make_agent("mcepl", 0, net(Zero), data, keys, seed=SEED)
    assert isinstance(agent, MceplAgent)
    assert all(bool((z > 0).all()) for z in agent.model.scores.values())


def test_all_agents_begin_alike_and_know_it_on_the_wire() -> None:
    one, two, shared = masks_agent(), masks_agent(), agent_of("", 1)
    assert one.prior is two.prior is not None
    assert one.prior.digest != shared.prior.digest  # type: ignore[union-attr]
    with pytest.raises(FingerprintError, match="classes of weights"):
        check_common_ground("one", one.describe(), "two", shared.describe())


def test_a_run_of_them_is_sound_whatever_was_made_before() -> None:
    def final(scores: str) -> list[State]:
        keys = {"score_init": scores, "score_lr": 1.0, "first_mask": "scores"}
        agents = [agent_of("", index, **keys) for index in range(3)]
        simulate(agents, Topology.ring(3), num_rounds=3)
        return [dict(agent.state().tensors) for agent in agents]

    before = final("magnitude")
    assert not same_tensors(before[0], final("shared")[0])
    assert all(map(same_tensors, before, final("magnitude")))


def test_sizes_that_are_all_equal_rank_nothing() -> None:
    with pytest.raises(ConfigError, match="score-init magnitude ranks weights by their sizes"):
        masks_agent(weight_init="signed-constant")


def test_before_any_training_magnitudes_keep_what_was_learned() -> None:
    """Half of the weights of a trained network on digits: the large ones, or any."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    trained = net(mlp)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(images[:900]), labels[:900]).backward()
        optimizer.step()
    data = AgentData.of((images[:900], labels[:900]), (images[900:], labels[900:]), agent=0)

    def accuracy(scores: str) -> float:
        keys = {"score-init": scores, "first-mask": "scores"}
        ratios = {"retention-conv": "0.5", "retention-linear": 0.5}
        return make_agent("mcepl", 0, trained, data, keys | ratios, seed=SEED).evaluate()[
            "accuracy"
        ]

    assert accuracy("magnitude") > 0.8
    assert accuracy("magnitude") > accuracy("shared") + 0.2
