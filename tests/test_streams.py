import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from flower_mcepl import shared_module
from flower_mcepl.streams import isolated_rng, numpy_stream, stream_seed, torch_stream


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
        for seed in (0, 1, -1)
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
