import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flower_mcepl import (
    AgentData,
    ConfigError,
    MceplAgent,
    MceplConfig,
    Topology,
    shared_module,
    simulate,
)
from flower_mcepl.data import DataSettings, own_splits, own_tests
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.runs.simulation import SimulationResult
from flower_mcepl.streams import (
    check_seed,
    isolated_rng,
    mersenne_seed,
    mersenne_words,
    numpy_stream,
    stream_seed,
    torch_stream,
    torch_threads,
)


def draws() -> tuple[float, float, float]:
    """One draw from each of the global generators."""
    return torch.rand(1).item(), float(np.random.rand()), random.random()  # noqa: NPY002


def global_states() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()


def test_stream_seeds_are_fixed_for_ever() -> None:
    """A changed number here changes every run that anyone recorded."""
    # printf '0/weights/-/-' | b2sum -l 64; likewise 0/batches/3/17; then without the
    # last bit
    assert stream_seed(0, "weights") == 0xC6EBEF5C5CFA9CF1 >> 1
    assert stream_seed(0, "batches", agent=3, round=17) == 0x0836F0F9F8E5CB1B >> 1


def test_every_part_of_the_name_counts() -> None:
    names = [
        (seed, purpose, agent, round)
        for seed in (0, 1, 2**63 - 1)
        for purpose in ("a", "b")
        for agent in (None, 0, 1, 11)
        for round in (None, 0, 1, 11)
    ]
    seeds = {stream_seed(s, p, agent=a, round=r) for s, p, a, r in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_stream_starts_again_at_its_beginning() -> None:
    assert torch.equal(*(torch.rand(5, generator=torch_stream(3, "x", agent=1)) for _ in range(2)))
    first, again = (numpy_stream(3, "x", agent=1).random(5) for _ in range(2))
    assert np.array_equal(first, again)


def test_draws_inside_come_from_the_stream_and_leave_the_outside_alone() -> None:
    before = global_states()
    with isolated_rng(5, "weights"):
        first = draws()
    assert global_states() == before
    draws()
    random.seed(99)
    with isolated_rng(5, "weights"):
        assert draws() == first
    with isolated_rng(5, "weights", round=1):
        assert all(other != one for other, one in zip(draws(), first, strict=True))


def test_the_outside_is_restored_after_an_error() -> None:
    before = global_states()
    with pytest.raises(ZeroDivisionError), isolated_rng(5, "weights"):
        _ = draws()[0] / 0
    assert global_states() == before


def model_fn() -> nn.Module:
    """Draws its weights from torch, NumPy and Python at once."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0] = torch.from_numpy(np.random.rand(4))  # noqa: NPY002
        layer.bias.fill_(random.random())
    return layer


def test_a_model_function_draws_from_the_stream_alone() -> None:
    before = global_states()
    first = shared_module(model_fn, seed=1).state_dict()
    assert global_states() == before
    draws()
    again, other = (shared_module(model_fn, seed=seed).state_dict() for seed in (1, 2))
    for name in ("weight", "bias"):
        assert torch.equal(first[name], again[name])
        assert not (first[name] == other[name]).any()


@pytest.mark.slow
def test_another_process_draws_the_same() -> None:
    code = (
        "import torch; from flower_mcepl.streams import *\nprint(torch.rand(3, "
        "generator=torch_stream(4, 'x')).tolist(), numpy_stream(4, 'x').random(3).tolist())"
    )
    of_torch = torch.rand(3, generator=torch_stream(4, "x")).tolist()
    here = f"{of_torch} {numpy_stream(4, 'x').random(3).tolist()}"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == here


LABELS = np.arange(200) % 10
SEEDED: dict[str, Callable[[Any], object]] = {
    "check": check_seed,
    "settings": lambda seed: RunSettings.from_run_config({"seed": seed}),
    "torch stream": lambda seed: torch_stream(seed, "x"),
    "NumPy stream": lambda seed: numpy_stream(seed, "x"),
    "global generators": lambda seed: isolated_rng(seed, "x").__enter__(),
    "model": lambda seed: shared_module(model_fn, seed=seed),
    **{
        f"graph {spec}": lambda seed, spec=spec: Topology.parse(spec, num_agents=10, seed=seed)
        for spec in ("ring", "erdos-renyi:degree=3", "random-neighbors:degree=3")
    },
    "random-regular": lambda seed: Topology.random_regular(6, degree=3, seed=seed),
    "random neighbors": lambda seed: Topology.random_neighbors(6, degree=3, seed=seed),
    "own splits": lambda seed: own_splits(LABELS, DataSettings(), seed=seed, agent=0),
    "own tests": lambda seed: own_tests(LABELS, LABELS, DataSettings(), seed=seed, agent=0),
}


BAD_SEEDS = (-1, 2**63, 2**64 + 1, True, 1.0, "1", None, np.bool_(True))
GOOD_SEEDS = (0, 2**32, 2**32 + 5, 2**63 - 1)


@pytest.mark.parametrize("place", SEEDED)
def test_no_seed_is_out_of_range_wherever_one_is_given(place: str) -> None:
    for seed in BAD_SEEDS:
        with pytest.raises(ConfigError, match=r"seed must be .*; got"):
            SEEDED[place](seed)


@pytest.mark.parametrize("place", [place for place in SEEDED if place != "global generators"])
def test_every_seed_in_range_is_taken_wherever_one_is_given(place: str) -> None:
    for seed in GOOD_SEEDS:
        SEEDED[place](seed)


def test_a_seed_is_a_number_of_numpy_too() -> None:
    assert check_seed(np.int32(7)) == 7
    assert type(check_seed(np.uint8(7))) is int


def in_threads(*functions: Callable[[], object]) -> list[object]:
    """Results and errors of functions that run each in a thread of its own."""
    results: list[object] = [None] * len(functions)

    def run(place: int) -> None:
        try:
            results[place] = functions[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("outer", [lambda: isolated_rng(1, "x"), lambda: torch_threads(0)])
@pytest.mark.parametrize("inner", [lambda: isolated_rng(1, "x"), lambda: torch_threads(0)])
def test_a_second_thread_is_refused_at_once_and_may_come_afterwards(outer: Any, inner: Any) -> None:
    def enter() -> str:
        with inner():
            return "entered"

    with outer():
        (error,) = in_threads(enter)
        assert isinstance(error, ConfigError)
        assert "processes of their own" in str(error)
        with outer(), inner():  # the thread itself may
            pass
        assert isinstance(in_threads(enter)[0], ConfigError)  # it still holds what is common
    assert in_threads(enter) == ["entered"]


def test_what_is_common_is_free_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), isolated_rng(1, "x"):
        _ = 1 / 0
    assert in_threads(lambda: isolated_rng(1, "x").__enter__()) == [None]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_by_another_thread_is_not_held_up() -> None:
    def fork() -> int:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            with isolated_rng(1, "x"):
                os._exit(0)
        finally:
            os._exit(1)

    with isolated_rng(1, "x"):
        assert in_threads(fork) == [0]


def simulation(until: threading.Barrier | None = None) -> SimulationResult:
    """A short run; with a barrier it waits in its first round for the other threads."""
    split = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    net = shared_module(model_fn, seed=1)
    data = AgentData.of(split, split, agent=0)
    agents = [MceplAgent(i, net, data, MceplConfig(), seed=1) for i in range(2)]

    def wait(round: int, agent: int, reply: object) -> None:
        if until is not None and (round, agent) == (1, 0):
            until.wait(30)
            until.wait(30)

    return simulate(agents, Topology.ring(2), num_rounds=2, on_reply=wait)


def test_simulations_in_three_threads_are_refused_and_the_first_is_undisturbed() -> None:
    barrier = threading.Barrier(2)

    def late() -> list[object]:
        barrier.wait(30)
        try:
            return in_threads(simulation, simulation)
        finally:
            barrier.wait(30)

    first, refused = in_threads(lambda: simulation(barrier), late)
    assert isinstance(refused, list)
    assert all(isinstance(error, ConfigError) for error in refused)
    assert isinstance(first, SimulationResult)
    without_clock = [
        [{**row, "seconds": 0} for row in result.rows] for result in (first, simulation())
    ]
    assert without_clock[0] == without_clock[1]


# --- the Mersenne twister, with which a personal model's file draws weights again ---


def test_words_of_the_twister_are_fixed_for_ever() -> None:
    """The first word of std::mt19937() and its 10,000th, which the C++ standard names
    for the default seed 5489.
    """
    words = mersenne_words(5489, 10_000)
    assert (words[0], words[-1]) == (3499211612, 4123659995)
    assert (mersenne_words(5489, 7, skip=9_993) == words[9_993:]).all()


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_torch_draws_signs_and_uniform_weights_from_these_words(seed: int) -> None:
    words = mersenne_words(mersenne_seed(seed), 40, skip=3)
    bound = float(np.float32(0.0721687))
    for draw, known in (
        (lambda g: torch.randint(0, 2, (43,), generator=g), words & 1),
        (
            lambda g: torch.empty(43).uniform_(-bound, bound, generator=g),
            ((words & 0xFFFFFF) * (bound * 2**-23) - bound).astype(np.float32),
        ),
    ):
        drawn = draw(torch.Generator().manual_seed(seed))[3:]
        assert np.array_equal(drawn.numpy(), known)
