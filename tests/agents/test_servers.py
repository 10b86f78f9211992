"""FedAvg, Ditto, FedSpa and FedPM, agents and servers, against their equations; and
what each of them must do.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flower_mcepl import ConfigError, DivergedError, StateError, UnsupportedLayerError
from flower_mcepl.agents import (
    ALGORITHMS,
    AgentState,
    find_algorithm,
    load_state,
    make_server,
    save_state,
)
from flower_mcepl.agents.fedpm import FedpmConfig
from flower_mcepl.agents.fedspa import NEXT_MASK
from flower_mcepl.masks.sparsity import from_sparse
from flower_mcepl.streams import torch_stream
from tests.fleet.agents import noisy_net, same_tensors, split
from tests.oracles import servers as slow_servers
from tests.oracles.baselines import (
    CLOSE,
    SEED,
    agent_of,
    arrays,
    assert_same,
    blobs,
    fleet_of,
    serve,
    server_of,
    two_layers,
)

SERVED = sorted(name for name, entry in ALGORITHMS.items() if entry.server is not None)
MASKED = {"w1": "0.weight", "w2": "2.weight"}
FULL = {
    "model_fn": noisy_net,
    "split": split,
    "local_epochs": 0,
    "local_steps": 2,
    "batch_size": 8,
    "momentum": 0.6,
    "lr_schedule": "cosine",
    "lr_rounds": 9,
    "score_lr": 3.0,
    "score_optimizer": "sgd",
    "lr": 0.05,
    "reset_rounds": 2,
}
ADAM = {**FULL, "momentum": 0.0, "score_lr": 0.2, "score_optimizer": "adam"}
# Adam's moments are states of their own; all else is the same with either
SETTINGS = [*((name, FULL) for name in SERVED), ("fedpm", ADAM)]
IDS = [*SERVED, "fedpm-adam"]


def run_of(algorithm: str, size: int = 4, **settings: Any) -> tuple[Any, list[Any]]:
    return server_of(algorithm, size, **settings), fleet_of(algorithm, size, **settings)


def unequal(agent: int) -> tuple[Tensor, Tensor]:
    return blobs(agent, size=12 + 3 * (agent % 1000))


def plain(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {short: tensors[name].numpy().copy() for short, name in MASKED.items()}


# --- FedAvg ---


def test_fedavg_by_the_published_equation() -> None:
    server, agents = run_of(
        "fedavg", lr=0.3, weight_decay=0.02, momentum=0.5, local_epochs=3, split=unequal
    )
    w, data = arrays(agents[0]), [tuple(part.numpy() for part in unequal(k)) for k in range(4)]
    for round in (1, 2, 3):
        w, models = slow_servers.fedavg(w, data, steps=3, lr=0.3, decay=0.02, momentum=0.5)
        for agent, model in zip(agents, models, strict=True):
            agent.train(round=round)
            assert_same([agent], [model])
        sent = {agent.index: agent.outgoing() for agent in agents}
        server.receive(sent, round=round, num_examples={k: 12 + 3 * k for k in range(4)})
        for agent in agents:
            agent.fuse({4: server.payload_for(agent.index, round=round)}, round=round)
        assert_same(agents, [w] * 4)


def test_fedavg_takes_an_unknown_size_for_one() -> None:
    server, agents = run_of("fedavg", 2)
    for agent in agents:
        agent.train(round=1)
    sent = {agent.index: agent.outgoing() for agent in agents}
    server.receive(sent, round=1, num_examples={1: 3})
    mean = (sent[0]["0.weight"] + 3 * sent[1]["0.weight"]) / 4
    torch.testing.assert_close(server.payload_for(0, round=1)["0.weight"], mean)
    server.receive({0: sent[0]}, round=2, num_examples={0: 0})
    assert same_tensors(server.payload_for(0, round=2), sent[0])


@pytest.mark.parametrize("steps", [0, 3])
def test_fedavg_is_evaluated_after_its_fine_tuning(steps: int) -> None:
    settings = {"lr": 0.3, "local_epochs": 1, "momentum": 0.5, "finetune_steps": steps}
    server, agents = run_of("fedavg", lr_schedule="cosine", lr_rounds=4, **settings)
    serve(server, agents, 1, 2)
    before, data = arrays(agents[1]), tuple(part.numpy() for part in blobs(1))
    slow = slow_servers.sgd(
        before, data, steps=steps, lr=0.3, decay=5e-4, momentum=0.5, velocity={}
    )
    state, metrics = agents[1].state().tensors, agents[1].evaluate()
    assert metrics == agents[1].evaluate()
    assert same_tensors(state, agents[1].state().tensors)
    inputs, labels = (part.double().numpy() for part in blobs(1001))
    logits = np.tanh(inputs @ slow["w1"].T + slow["b1"]) @ slow["w2"].T + slow["b2"]
    chosen = logits[np.arange(len(labels)), labels.astype(int)]
    loss = float(np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)


# --- Ditto ---


@pytest.mark.parametrize(("share", "personal"), [(0.5, 2), (0.25, 1), (0.75, 3)])
def test_ditto_by_the_published_equations(share: float, personal: int) -> None:
    settings = {"lr": 0.3, "weight_decay": 0.02, "local_epochs": 4, "personal_share": share}
    server, agents = run_of("ditto", 3, proximal=0.4, split=unequal, **settings)
    w, data = arrays(agents[0]), [tuple(part.numpy() for part in unequal(k)) for k in range(3)]
    v = [w] * 3
    for round in (1, 2, 3):
        v = [
            slow_servers.ditto_personal(
                mine, w, part, steps=personal, lr=0.3, decay=0.02, proximal=0.4
            )
            for mine, part in zip(v, data, strict=True)
        ]
        w, _ = slow_servers.fedavg(w, data, steps=4 - personal, lr=0.3, decay=0.02, momentum=0.0)
        serve(server, agents, round)
        assert_same(agents, [w] * 3)
        for agent, mine in zip(agents, v, strict=True):
            for short, name in (*MASKED.items(), *BIASES.items()):
                found = agent.personal_weights[name].detach().numpy()
                np.testing.assert_allclose(found, mine[short], **CLOSE)


def test_ditto_is_evaluated_on_its_personal_model() -> None:
    server, agents = run_of("ditto", 2, lr=0.3, proximal=0.1)
    serve(server, agents, 1, 2, 3)
    metrics = [agent.evaluate() for agent in agents]
    assert metrics[0]["loss"] != metrics[1]["loss"]
    assert same_tensors(agents[0].outgoing(), agents[1].outgoing())  # the global one
    with torch.no_grad():
        for weight in agents[0].weights.values():
            weight.zero_()
    assert agents[0].evaluate() == metrics[0]


def test_a_strong_pull_keeps_dittos_personal_model_at_the_global_one() -> None:
    far, near = (run_of("ditto", 2, lr=0.1, proximal=strength) for strength in (0.0, 5.0))
    gaps = []
    for server, agents in (far, near):
        serve(server, agents, *range(1, 9))
        gap = [
            torch.linalg.vector_norm(agents[0].personal_weights[n] - agents[0].weights[n])
            for n in agents[0].weights
        ]
        gaps.append(float(sum(gap).detach()))
    assert gaps[1] < 0.3 * gaps[0]


def test_dittos_steps_are_divided_over_the_rounds() -> None:
    """One step a round: the two models take turns, and no image counts twice."""
    settings = {"local_epochs": 0, "local_steps": 1, "batch_size": 8, "personal_share": 0.5}
    agent = agent_of("ditto", **settings)
    moved = []
    for round in (1, 2, 3, 4):
        before = agent.state().tensors
        agent.train(round=round)
        after = agent.state().tensors
        moved.append(
            tuple(
                not torch.equal(before[f"{group}/0.weight"], after[f"{group}/0.weight"])
                for group in ("weights", "personal")
            )
        )
    assert moved == [(True, False), (False, True)] * 2


# --- FedSpa ---

EQUATIONS = {
    "lr": 0.4,
    "lr_decay": 0.9,
    "weight_decay": 0.02,
    "clip_norm": 0.3,
    "local_epochs": 2,
    "anneal_rounds": 4,
}


@pytest.mark.parametrize("alpha", [0.6, 0.0], ids=["dynamic", "static"])
@pytest.mark.parametrize("density", [0.5, "0.3, 0.5, 0.9"], ids=["equal", "mixed"])
def test_fedspa_by_the_published_equations(alpha: float, density: object) -> None:
    server, agents = run_of("fedspa", density=density, drop_fraction=alpha, **EQUATIONS)
    w = {
        short: server.weights[name].double().numpy()
        for short, name in (*MASKED.items(), *BIASES.items())
    }
    masks, data = (
        [plain(agent.masks) for agent in agents],
        [tuple(t.numpy() for t in blobs(k)) for k in range(4)],
    )
    moved = 0
    for round in range(1, 6):  # in the last one nothing moves any more
        before = masks
        w, masks, updates = slow_servers.fedspa(
            w,
            masks,
            data,
            round=round,
            steps=2,
            lr=0.4,
            lr_decay=0.9,
            decay=0.02,
            clip=0.3,
            alpha=alpha,
            rounds=4,
        )
        for agent, update in zip(agents, updates, strict=True):
            agent.train(round=round)
            for short, name in (*MASKED.items(), *BIASES.items()):
                sent = agent.outgoing()[name].to_dense().numpy()
                np.testing.assert_allclose(sent, update[short], rtol=1e-3, atol=2e-6)
        server.receive({a.index: a.outgoing() for a in agents}, round=round, num_examples={})
        for agent in agents:
            agent.fuse({4: server.payload_for(agent.index, round=round)}, round=round)
            for short, mask in plain(agent.masks).items():
                assert np.array_equal(mask, masks[agent.index][short])
                moved += int((mask != before[agent.index][short]).sum())
        for short, name in (*MASKED.items(), *BIASES.items()):
            np.testing.assert_allclose(server.weights[name].numpy(), w[short], **CLOSE)
        assert_same(
            agents, [{n: value * mask.get(n, 1) for n, value in w.items()} for mask in masks]
        )
    assert moved > 20 if alpha else moved == 0


BIASES = {"b1": "0.bias", "b2": "2.bias"}


def test_fedspa_says_masks_only_where_they_move() -> None:
    moving, still = agent_of("fedspa"), agent_of("fedspa", drop_fraction=0.0)
    both = {"0.weight", "0.bias", "2.weight", "2.bias"}
    masks = {NEXT_MASK + "0.weight", NEXT_MASK + "2.weight"}
    for agent, names in ((moving, both | masks), (still, both)):
        agent.train(round=1)
        assert set(agent.layers) == set(agent.outgoing()) == names
        assert set(agent.layers_down) == both
        server = server_of("fedspa", drop_fraction=agent.config.drop_fraction)
        assert (server.layers, server.layers_down) == (agent.layers, agent.layers_down)
        assert server.mask_layers == names - both


def test_fedspa_sends_its_move_at_the_places_of_the_mask_it_trained_under() -> None:
    agent = agent_of("fedspa")
    old = {name: mask.clone() for name, mask in agent.masks.items()}
    agent.train(round=1)
    sent = agent.outgoing()
    for name, mask in old.items():
        assert torch.equal(from_sparse(sent[name])[1], mask)
        assert torch.equal(sent[NEXT_MASK + name], agent.masks[name])
        assert not torch.equal(agent.masks[name], mask)


def test_fedspa_gives_nobody_more_than_its_mask() -> None:
    server, agents = run_of("fedspa", density="0.2, 0.6")
    assert server.payload_for(0, round=0) is None
    for round in (1, 2, 3):
        serve(server, agents, round)
        for agent in agents:
            for name, mask in agent.masks.items():
                values, places = from_sparse(server.payload_for(agent.index, round=round)[name])
                assert torch.equal(places, mask)
                assert torch.equal(values, server.weights[name] * mask)
                assert not agent.weights[name][~mask].any()
    assert [agent.describe()["kept-weights"] - 9 for agent in agents] == [8, 25, 8, 25]  # of 42


def test_fedspa_follows_the_places_that_the_server_knows() -> None:
    """An answer was lost: the server still holds the mask of the round before."""
    server, agents = run_of("fedspa", 2)
    serve(server, agents, 1)
    known = {name: mask.clone() for name, mask in agents[0].masks.items()}
    agents[0].train(round=2)
    assert not torch.equal(agents[0].masks["0.weight"], known["0.weight"])
    agents[0].fuse({2: server.payload_for(0, round=2)}, round=2)
    assert same_tensors(agents[0].masks, known)
    assert agents[0].evaluate()["density"] == sum(int(mask.sum()) for mask in known.values()) / 42


def test_fedspa_takes_note_of_a_mask_without_moving() -> None:
    server, agents = run_of("fedspa", 2)
    before = {name: w.clone() for name, w in server.weights.items()}
    agents[1].train(round=1)
    server.note(1, agents[1].outgoing())
    assert same_tensors(before, server.weights)
    assert torch.equal(
        from_sparse(server.payload_for(1, round=1)["0.weight"])[1], agents[1].masks["0.weight"]
    )


# --- FedPM ---


def uniforms(agent: int, round: int, steps: int) -> list[dict[str, Any]]:
    stream = torch_stream(SEED, "training-masks", agent=agent, round=round)
    shapes = {"w1": (6, 4), "w2": (3, 6)}
    return [
        {n: torch.rand(shape, generator=stream).numpy() for n, shape in shapes.items()}
        for _ in range(steps)
    ]


def scores_of(agent: Any) -> dict[str, Any]:
    return {
        short: agent.scores[name].detach().double().numpy().copy() for short, name in MASKED.items()
    }


def frozen(agent: Any) -> dict[str, Any]:
    weights = dict(agent.network.named_parameters())
    return {
        short: weights[name].double().numpy() for short, name in (*MASKED.items(), *BIASES.items())
    }


def test_fedpm_by_the_published_equations() -> None:
    settings = {
        "score_lr": 20.0,
        "score_optimizer": "sgd",
        "weight_decay": 0.01,
        "momentum": 0.5,
        "local_epochs": 3,
        "reset_rounds": 2,
    }
    server, agents = run_of("fedpm", 3, **settings)
    history = []
    for round in (1, 2, 3, 4, 5):
        for k, agent in enumerate(agents):
            data = tuple(part.numpy() for part in blobs(k))
            expected = slow_servers.fedpm_steps(
                scores_of(agent),
                frozen(agent),
                data,
                uniforms(k, round, 3),
                lr=20.0,
                decay=0.01,
                momentum=0.5,
            )
            agent.train(round=round)
            for short, value in scores_of(agent).items():
                np.testing.assert_allclose(value, expected[short], **CLOSE)
        sent = {agent.index: agent.outgoing() for agent in agents}
        history.append([plain(payload) for payload in sent.values()])
        server.receive(sent, round=round, num_examples={})
        theta = slow_servers.fedpm_posterior(history, reset=2)
        for agent in agents:
            agent.fuse({3: server.payload_for(agent.index, round=round)}, round=round)
            for short, value in scores_of(agent).items():
                np.testing.assert_allclose(slow_servers.sigmoid(value), theta[short], **CLOSE)


@pytest.mark.parametrize("reset", [0, 1, 3])
def test_fedpm_counts_since_the_last_reset(reset: int) -> None:
    server = server_of("fedpm", reset_rounds=reset)
    assert server.payload_for(0, round=0) is None
    rng, history = np.random.default_rng(3), []
    for round in range(1, 8):
        masks = [
            {"w1": rng.random((6, 4)) < 0.5, "w2": rng.random((3, 6)) < 0.2}
            for _ in range(1 + round % 3)
        ]
        sent = {
            k: {MASKED[n]: torch.from_numpy(m) for n, m in mask.items()}
            for k, mask in enumerate(masks)
        }
        history.append(masks)
        server.receive(sent, round=round, num_examples={})
        theta = slow_servers.fedpm_posterior(history, reset=reset)
        for short, name in MASKED.items():
            found = server.payload_for(0, round=round)[name]
            np.testing.assert_allclose(found.numpy(), theta[short], rtol=1e-5)
            assert 0.0099 < float(found.min()) <= float(found.max()) < 0.9901


def test_fedpm_draws_its_mask_from_its_probabilities_and_keeps_it() -> None:
    agent = agent_of("fedpm")
    agent.train(round=1)
    with torch.no_grad():
        agent.scores["0.weight"].copy_(torch.linspace(-40, 40, 24).view(6, 4))
    mask = agent.outgoing()["0.weight"]
    assert torch.equal(mask.flatten()[:9], torch.zeros(9, dtype=torch.bool))
    assert bool(mask.flatten()[15:].all())
    assert same_tensors(agent.outgoing(), agent.outgoing())
    again = agent_of("fedpm", 1)
    assert same_tensors(dict(again.scores), dict(agent_of("fedpm", 0).scores))  # a common start
    assert not same_tensors(again.outgoing(), agent_of("fedpm", 0).outgoing())


def test_fedpm_trains_no_weight() -> None:
    server, agents = run_of("fedpm", 2)
    before = {name: w.clone() for name, w in agents[0].network.named_parameters()}
    serve(server, agents, 1, 2)
    assert same_tensors(before, dict(agents[0].network.named_parameters()))
    assert not any(w.requires_grad for w in agents[0].network.parameters())


def test_fedpm_takes_the_steps_of_torchs_adam_over_rounds_and_a_restart() -> None:
    settings = {"weight_decay": 0.01, "local_epochs": 2, "score_lr": 0.1, "lr_schedule": "cosine"}
    settings |= {"lr_rounds": 6, "batch_size": 8}
    server, agents = run_of("fedpm", 2, **settings)
    watched, gradients = agents[0], []
    slow = {name: nn.Parameter(s.detach().clone()) for name, s in watched.scores.items()}
    oracle = torch.optim.Adam(slow.values(), lr=0.1, weight_decay=0.01)
    for round in (1, 2, 3, 4):
        if round == 3:  # in a new process, the moments come from the state
            state, watched = watched.state(), agent_of("fedpm", **settings)
            watched.restore(state)
            agents[0] = watched
        gradients = collected(watched)
        for name, value in slow.items():  # the server's scores; the moments stay
            value.data.copy_(watched.scores[name].detach())
        for agent in agents:
            agent.train(round=round)
        assert len(gradients) == 6  # 18 examples in batches of 8, twice
        oracle.param_groups[0]["lr"] = 0.1 * watched.config.lr_factor(round)
        for step in gradients:
            for name, value in slow.items():
                value.grad = step[name]
            oracle.step()
        assert same_tensors(
            {name: value.detach() for name, value in slow.items()},
            {name: s.detach() for name, s in watched.scores.items()},
        )
        sent = {agent.index: agent.outgoing() for agent in agents}
        server.receive(sent, round=round, num_examples={})
        for agent in agents:
            agent.fuse({2: server.payload_for(agent.index, round=round)}, round=round)


def collected(agent: Any) -> list[dict[str, Tensor]]:
    """The gradients of the agent's steps from now on."""
    gradients, descend = [], agent._descend

    def watch(step: dict[str, Tensor], round: int) -> None:
        gradients.append({name: g.clone() for name, g in step.items()})
        descend(step, round)

    agent._descend = watch
    return gradients


def test_fedpm_is_over_signed_constants_of_kaimings_scale() -> None:
    agent, server = agent_of("fedpm"), server_of("fedpm")
    assert agent.fingerprint == server.fingerprint
    assert agent.fingerprint != agent_of("fedpm", weight_init="module").fingerprint
    for name, fan_in in (("0.weight", 4), ("2.weight", 6)):
        weight = agent.network.get_parameter(name)
        torch.testing.assert_close(weight.abs(), torch.full_like(weight, (2 / fan_in) ** 0.5))
        assert 0 < int((weight > 0).sum()) < weight.numel()


def test_fedpm_really_learns_what_its_server_hands_out() -> None:
    server, agents = run_of("fedpm", model_fn=wide_net)
    first = np.mean([agent.evaluate()["loss"] for agent in agents])
    trained = serve(server, agents, *range(1, 16))
    assert np.mean([agent.evaluate()["loss"] for agent in agents]) < 0.6 * first
    assert np.mean([m["train-loss"] for m in trained[-4:]]) < 0.6 * np.mean(
        [m["train-loss"] for m in trained[:4]]
    )


def test_fedpm_learns_digits() -> None:
    """A small fleet with three classes an agent; the loss is the handed-out model's."""
    images, labels = load_digits(return_X_y=True)

    def digits(agent: int) -> tuple[Tensor, Tensor]:
        test, number = divmod(agent, 1000)
        of_mine = np.flatnonzero((labels - number) % 10 < 3)[test::5][:60]
        inputs = torch.from_numpy(images[of_mine] / 16).float()
        return inputs, torch.from_numpy(labels[of_mine])

    def model_fn() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    server, agents = run_of("fedpm", 6, model_fn=model_fn, split=digits, score_lr=0.4)
    first = np.mean([agent.evaluate()["loss"] for agent in agents])
    serve(server, agents, *range(1, 9))
    metrics = [agent.evaluate() for agent in agents]
    assert np.mean([m["loss"] for m in metrics]) < 0.5 * first
    assert np.mean([m["accuracy"] for m in metrics]) > 0.6  # chance is 0.1


# --- all servers ---


def in_memory(state: AgentState, tmp_path: Path) -> AgentState:
    return state


def through_a_file(state: AgentState, tmp_path: Path) -> AgentState:
    save_state(state, tmp_path / "state.safetensors")
    return load_state(tmp_path / "state.safetensors")


@pytest.mark.parametrize(
    ("trained", "way"),
    [(False, in_memory), (True, through_a_file)],
    ids=["between rounds", "before the exchange"],
)
@pytest.mark.parametrize(("algorithm", "settings"), SETTINGS, ids=IDS)
def test_restored_agents_and_server_continue_bit_for_bit(
    algorithm: str,
    settings: dict[str, Any],
    trained: bool,
    way: Callable[[AgentState, Path], AgentState],
    tmp_path: Path,
) -> None:
    first, later = run_of(algorithm, 3, **settings), run_of(algorithm, 3, **settings)
    serve(*first, 1, 2, 3)
    serve(*later, 5)  # whatever they did before is overwritten
    if trained:
        for agent in first[1]:
            agent.train(round=4)
    for one, copy in zip([first[0], *first[1]], [later[0], *later[1]], strict=True):
        state = one.state()
        copy.restore(way(state, tmp_path))
        assert copy.state().facts == state.facts
        assert same_tensors(copy.state().tensors, state.tensors)
    for server, agents in (first, later):
        server.receive({a.index: a.outgoing() for a in agents}, round=4, num_examples={0: 3})
        for agent in agents:
            agent.fuse({3: server.payload_for(agent.index, round=4)}, round=4)
    assert serve(*first, 5, 6) == serve(*later, 5, 6)
    for one, copy in zip(first[1], later[1], strict=True):
        assert one.evaluate() == copy.evaluate()
        assert same_tensors(one.state().tensors, copy.state().tensors)
    assert same_tensors(first[0].state().tensors, later[0].state().tensors)


@pytest.mark.parametrize("algorithm", SERVED)
def test_the_global_generators_do_not_matter(algorithm: str) -> None:
    results = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        server, agents = run_of(algorithm, 2, **FULL)
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        metrics = serve(server, agents, 1, 2)
        metrics.append(agents[1].evaluate())
        assert torch.equal(torch.get_rng_state(), before)
        results.append((metrics, {**server.state().tensors, **agents[0].state().tensors}))
    assert results[0][0] == results[1][0]
    assert same_tensors(results[0][1], results[1][1])


@pytest.mark.parametrize("algorithm", SERVED)
def test_the_order_of_the_inbox_does_not_matter(algorithm: str) -> None:
    agents = fleet_of(algorithm)
    for agent in agents:
        agent.train(round=1)
    sent = {agent.index: agent.outgoing() for agent in agents}
    states = []
    for inbox in (sent, dict(reversed(sent.items()))):
        server = server_of(algorithm)
        server.receive(inbox, round=1, num_examples={0: 5, 3: 2})
        states.append(server.state().tensors)
    assert same_tensors(*states)


@pytest.mark.parametrize("algorithm", SERVED)
def test_missing_agents_are_left_out_and_come_back(algorithm: str) -> None:
    server, agents = run_of(algorithm)
    fewer_server, fewer = run_of(algorithm, 4)
    serve(server, agents, 1, 2, absent=[3])
    serve(fewer_server, fewer[:3], 1, 2)
    assert same_tensors(server.state().tensors, fewer_server.state().tensors)
    payload = server.payload_for(3, round=2)
    assert (payload is None) == (algorithm == "fedspa")
    agents[3].fuse({} if payload is None else {4: payload}, round=2)
    serve(server, agents, 3)
    assert all(np.isfinite(agent.evaluate()["loss"]) for agent in agents)


@pytest.mark.parametrize("algorithm", SERVED)
def test_without_a_word_from_the_server_the_agent_goes_on_alone(algorithm: str) -> None:
    agent, deaf = agent_of(algorithm, drop_fraction=0.0), agent_of(algorithm, drop_fraction=0.0)
    for round in (1, 2):
        agent.train(round=round)
        agent.fuse({}, round=round)
        deaf.train(round=round)
    agent.train(round=3)
    deaf.train(round=3)
    assert same_tensors(agent.state().tensors, deaf.state().tensors)


@pytest.mark.parametrize("algorithm", SERVED)
def test_learning_beats_chance(algorithm: str) -> None:
    settings = {
        "score_lr": 0.2,
        "lr": 0.3,
        "density": 0.6,
        "num_rounds": 20,
        "weight_decay": 0.0,
        "local_epochs": 2,
    }
    server, agents = run_of(algorithm, model_fn=wide_net, **settings)
    serve(server, agents, *range(1, 21))
    assert np.mean([agent.evaluate()["accuracy"] for agent in agents]) > 0.7  # chance is 1/3


def wide_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 3))


@pytest.mark.parametrize("algorithm", SERVED)
def test_an_evaluation_changes_nothing(algorithm: str) -> None:
    server, agents = run_of(algorithm, 2, **FULL)
    serve(server, agents, 1)
    before = agents[0].state().tensors
    metrics = agents[0].evaluate()
    assert metrics == agents[0].evaluate()
    assert metrics.keys() == {"accuracy", "loss", "num-examples", "density"}
    assert metrics["num-examples"] == 24
    assert 0 < metrics["density"] <= 1
    assert same_tensors(before, agents[0].state().tensors)


@pytest.mark.parametrize("algorithm", SERVED)
def test_payloads_have_the_shapes_and_kinds_that_were_said(algorithm: str) -> None:
    server, agents = run_of(algorithm, 2, **FULL)
    for round in (1, 2):
        for agent in agents:
            agent.train(round=round)
            sent = agent.outgoing()
            assert (
                {name: tuple(tensor.shape) for name, tensor in sent.items()}
                == agent.layers
                == server.layers
            )
            assert {
                name for name, tensor in sent.items() if tensor.dtype == torch.bool
            } == server.mask_layers
            assert agent.first_payload() is None
        server.receive({a.index: a.outgoing() for a in agents}, round=round, num_examples={})
        for agent in agents:
            payload = server.payload_for(agent.index, round=round)
            assert {
                name: tuple(tensor.shape) for name, tensor in payload.items()
            } == server.layers_down
            assert (agent.layers_down or agent.layers) == server.layers_down
            assert {tensor.dtype for tensor in payload.values()} == {torch.float32}
            agent.fuse({2: payload}, round=round)
    assert server.shared == (algorithm != "fedspa")


@pytest.mark.parametrize("algorithm", SERVED)
def test_agents_and_server_shake_hands(algorithm: str) -> None:
    server, agent = server_of(algorithm, 3), agent_of(algorithm, 2)
    facts = agent.describe()
    assert server.describe() == {
        key: facts[key] for key in ("algorithm", "seed", "fingerprint", "num-weights")
    }
    assert facts["num-weights"] == (42 if algorithm == "fedpm" else 51)
    assert 0 < facts["kept-weights"] <= facts["num-weights"]
    assert facts["num-examples"] == 18
    assert (server.index, server.num_agents) == (3, 3)
    assert find_algorithm(algorithm).config(**agent.parameters()) == agent.config
    assert server.parameters().keys() <= agent.parameters().keys()
    serve(server, [agent, *fleet_of(algorithm, 2)], 1, 2)
    assert agent.describe() == facts  # a handshake is said once, so that nothing in it may change


@pytest.mark.parametrize("algorithm", SERVED)
def test_running_statistics_stay_at_home(algorithm: str) -> None:
    server, agents = run_of(algorithm, 2, **FULL)
    serve(server, agents, 1)
    assert not [
        name
        for agent in agents
        for name in agent.outgoing()
        if "running" in name or "tracked" in name
    ]
    means = [agent.state().tensors["buffer/1.running_mean"] for agent in agents]
    assert not torch.equal(*means)


def test_the_module_that_was_passed_in_stays_as_it_is() -> None:
    for algorithm in SERVED:
        module = two_layers()
        before = {name: w.clone() for name, w in module.named_parameters()}
        agent = agent_of(algorithm, model_fn=lambda module=module: module)
        server = make_server(algorithm, module, 1, {}, seed=SEED)
        serve(server, [agent], 1, 2)
        assert same_tensors(before, dict(module.named_parameters()))


# --- what can go wrong ---

BAD = [
    ("fedavg", {"lr": 0.0}, r"lr must be > 0; got 0\.0"),
    ("fedavg", {"local_epochs": -1}, r"local-epochs must be >= 0; got -1"),
    ("fedavg", {"finetune_steps": -1}, r"finetune-steps must be >= 0; got -1"),
    ("ditto", {"proximal": -0.1}, r"proximal must be a finite number >= 0; got -0\.1"),
    ("ditto", {"personal_share": 1.0}, r"personal-share must be in \(0, 1\); got 1\.0\. Use"),
    ("fedspa", {"density": 0.0}, r"density must be in \(0, 1\]; got 0\.0"),
    ("fedspa", {"drop_fraction": 1.2}, r"drop-fraction must be in \[0, 1\]; got 1\.2"),
    ("fedspa", {"regrow": "magic"}, r"regrow must be one of gradient, random; got 'magic'"),
    ("fedpm", {"score_lr": 0.0}, r"score-lr must be > 0; got 0\.0"),
    ("fedpm", {"score_optimizer": "lion"}, r"score-optimizer must be one of adam, sgd; got 'lion'"),
    ("fedpm", {"momentum": 0.9}, r"momentum must be 0 with score-optimizer adam.*got 0\.9\. Set"),
    ("fedpm", {"score_lr": float("nan")}, r"score-lr must be a finite number >= 0; got nan"),
    ("fedpm", {"reset_rounds": -1}, r"reset-rounds must be >= 0; got -1\. 0 never resets"),
    ("fedpm", {"reset_rounds": 0.5}, r"run-config key reset-rounds must be int; got 0\.5"),
]


@pytest.mark.parametrize(("algorithm", "settings", "message"), BAD)
def test_a_bad_parameter_is_refused_by_its_key(
    algorithm: str, settings: dict[str, Any], message: str
) -> None:
    for make in (agent_of, server_of):
        with pytest.raises(ConfigError, match=message):
            make(algorithm, **settings)


def test_a_server_needs_an_algorithm_that_has_one_and_agents() -> None:
    with pytest.raises(
        ConfigError,
        match=r"with a server are fedavg, ditto, fedspa, fedpm; got 'dsgd', whose agents hear",
    ):
        server_of("dsgd")
    with pytest.raises(ConfigError, match=r"Did you mean 'fedavg'"):
        server_of("fedavgg")
    with pytest.raises(ConfigError, match="num_agents must be >= 1; got 0"):
        server_of("fedavg", 0)


def test_a_section_of_the_run_config_is_the_algorithms_own() -> None:
    run_config = {"reset-rounds": 2, "fedpm.reset-rounds": 5}
    assert make_server("fedpm", two_layers(), 1, run_config, seed=1).parameters() == {
        "reset_rounds": 5
    }
    assert FedpmConfig().reset_rounds == 1
    assert (FedpmConfig().score_optimizer, FedpmConfig().score_lr) == ("adam", 0.1)


@pytest.mark.parametrize("algorithm", SERVED)
def test_a_loss_that_is_not_finite_names_the_agent(algorithm: str) -> None:
    agent = agent_of(algorithm, 2)
    agent.data.train.inputs[0] = float("nan")  # before, the split would be refused
    with pytest.raises(
        DivergedError,
        match=r"agent 2: the training loss of round 4 is nan\. Lower (score-)?lr \(now",
    ):
        agent.train(round=4)


@pytest.mark.parametrize("algorithm", SERVED)
def test_what_leaves_the_numbers_is_not_sent(algorithm: str) -> None:
    settings = {"lr": 3e38, "score_lr": 3e38, "weight_decay": 1e3, "local_epochs": 1}
    settings["score_optimizer"] = "sgd"
    message = (
        r"agent 2: round 1 left (weights|scores) that are not finite in 0\.weight, .*"
        r"\. Lower (score-)?lr \(now 3e"
    )
    with pytest.raises(DivergedError, match=message):
        agent_of(algorithm, 2, **settings).train(round=1)


def test_fedspa_without_weights_under_a_mask_is_refused() -> None:
    def only_norms_train() -> nn.Module:
        model = noisy_net()
        model[0].weight.requires_grad_(False)
        model[5].weight.requires_grad_(False)
        return model

    with pytest.raises(
        UnsupportedLayerError, match="algorithm fedspa needs maskable weights that train"
    ):
        agent_of("fedspa", model_fn=only_norms_train)


@pytest.mark.parametrize("algorithm", SERVED)
def test_the_state_of_another_run_is_refused(algorithm: str) -> None:
    server, agent = server_of(algorithm), agent_of(algorithm)
    with pytest.raises(StateError, match=r"saved state is of num-agents 3, but the server has 4"):
        server.restore(server_of(algorithm, 3).state())
    with pytest.raises(StateError, match=r"saved state is of seed 8, but the server has 7"):
        server.restore(server_of(algorithm, seed=SEED + 1).state())
    with pytest.raises(StateError, match=r"saved state is of algorithm '\w+', but the server has"):
        server.restore(server_of("fedavg" if algorithm != "fedavg" else "fedpm").state())
    with pytest.raises(StateError, match="of agent 1, but agent 0 has 0"):
        agent.restore(agent_of(algorithm, 1).state())


COUNTS = ("round", "adam")  # groups of one number


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
@pytest.mark.parametrize("who", ["agent", "server"])
@pytest.mark.parametrize(("algorithm", "settings"), SETTINGS, ids=IDS)
def test_an_incomplete_state_is_refused_and_changes_nothing(
    algorithm: str, settings: dict[str, Any], who: str, damage: str
) -> None:
    server, agents = run_of(algorithm, 1, **settings)
    serve(server, agents, 1)
    agents[0].train(round=2)
    one, fresh = (
        (agents[0], agent_of(algorithm, **settings))
        if who == "agent"
        else (server, server_of(algorithm, 1, **settings))
    )
    groups = {name.partition("/")[0] for name in one.state().tensors}
    for group in groups:
        state, before = one.state(), fresh.state().tensors
        victim = next(name for name in state.tensors if name.startswith(f"{group}/"))
        if damage == "misshapen":
            state.arrays[victim] = np.zeros((7, 7), np.float32)
        elif sum(name.startswith(f"{group}/") for name in state.tensors) > 1 or group in COUNTS:
            del state.arrays[victim]
        else:
            continue
        with pytest.raises(
            StateError, match=rf"(agent 0|the server) is incomplete: its {group} must hold"
        ):
            fresh.restore(state)
        assert same_tensors(before, fresh.state().tensors)


@pytest.mark.parametrize(
    ("algorithm", "groups"),
    [("fedavg", ["weights"]), ("fedspa", ["weights"]), ("fedpm", ["alpha", "beta", "rounds"])],
)
def test_a_servers_state_without_a_whole_group_is_refused(
    algorithm: str, groups: list[str]
) -> None:
    server, agents = run_of(algorithm, 1, **FULL)
    serve(server, agents, 1)
    for group in groups:
        state, fresh = server.state(), server_of(algorithm, 1, **FULL)
        for name in [name for name in state.tensors if name.startswith(f"{group}/")]:
            del state.arrays[name]
        with pytest.raises(StateError, match=f"the server is incomplete: its {group} must hold"):
            fresh.restore(state)


def test_momentum_is_zero_after_a_training_that_broke_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken, whole = (agent_of("fedavg", **{**FULL, "momentum": 0.9}) for _ in range(2))
    start = broken.outgoing()
    with monkeypatch.context() as patch:
        patch.setattr(broken, "_local_step", stumbling(broken._local_step, at=2))
        with pytest.raises(ZeroDivisionError):
            broken.train(round=1)
    for agent in (broken, whole):
        agent.fuse({7: start}, round=2)
        agent.train(round=2)
    assert same_tensors(broken.outgoing(), whole.outgoing())


def stumbling(step: Callable[..., float], *, at: int) -> Callable[..., float]:
    calls = iter(range(1, at))

    def stumble(*arguments: Any, **options: Any) -> float:
        if next(calls, None) is None:
            raise ZeroDivisionError
        return step(*arguments, **options)

    return stumble
