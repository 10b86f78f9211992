"""Averages of an existing app's arrays."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flower_mcepl import encode_frame
from flower_mcepl.agents.array_layout import ArrayLayout
from flower_mcepl.agents.neighbor_average import NeighborAverageAgent
from flower_mcepl.agents.parts.averaging import DEGREE
from flower_mcepl.agents.parts.words import from_words, to_words
from flower_mcepl.exchange.parcels import Parcel
from flower_mcepl.exchange.turn import open_mail, play_round


def unused(*_: object) -> None:
    raise AssertionError("nothing is trained here")


def test_halves_are_summed_in_single_precision_and_rounded_once() -> None:
    models = np.random.default_rng(0).standard_normal((9, 200)).astype(np.float16)
    layout = ArrayLayout.of({"w": models[0]})
    first, *others = (
        NeighborAverageAgent(index, layout, unused, unused, initial={"w": model})
        for index, model in enumerate(models)
    )
    first.fuse({agent.index: agent.outgoing() for agent in others}, round=1)
    mean = first.outgoing()["w"].numpy()
    exact = models.astype(np.float64).mean(axis=0)
    assert np.all(np.abs(mean - exact) <= 0.501 * np.spacing(np.abs(exact).astype(np.float16)))


def agent_of(index: int, array: NDArray[Any]) -> NeighborAverageAgent:
    """Agent that keeps what it gets."""
    layout = ArrayLayout.of({"w": np.zeros_like(array)})
    return NeighborAverageAgent(
        index,
        layout,
        lambda arrays, round: (arrays, {}),
        lambda arrays: {},
        initial={"w": array},
    )


def heard(receiver: NeighborAverageAgent, frame: bytes) -> list[str]:
    """What an agent refuses in a round in which the frame comes from agent 0."""
    mail = open_mail(receiver, max_staleness=5)
    play_round(receiver, mail, Parcel(1, None))
    return list(play_round(receiver, mail, Parcel(2, (0,), {0: [frame]})).refused)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_finite_number_of_every_type_is_heard(dtype: str) -> None:
    """A word of a float64 may have the bits of a NaN, as one in some hundred has."""
    models = np.random.default_rng(0).standard_normal((2, 3000)).astype(dtype)
    models[:, :2] = np.finfo(dtype).max / 4, -np.finfo(dtype).max / 4
    sender, receiver = (agent_of(index, model) for index, model in enumerate(models))
    reply = play_round(sender, open_mail(sender, max_staleness=5), Parcel(1, None))
    assert heard(receiver, reply.frames[0].data) == []
    mean = from_words(receiver.outgoing()["w"], receiver.float_types["w"]).numpy().reshape(-1)
    near = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(mean, models.astype(float).mean(axis=0), rtol=near, atol=near)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float64", np.nan), ("float64", -np.inf), ("float32", np.inf), ("float16", 65536.0)],
)
def test_what_is_no_finite_number_of_its_type_is_refused(dtype: str, value: float) -> None:
    receiver = agent_of(1, np.ones(4, dtype))
    sent = torch.ones(4, dtype=torch.float64 if dtype == "float64" else torch.float32)
    sent[2] = value
    frame = encode_frame(
        {"w": to_words(sent), DEGREE: torch.ones(1)},
        sender=0,
        round=1,
        fingerprint=receiver.fingerprint,
    )
    (refused,) = heard(receiver, frame)
    assert "values must be finite" in refused
    kept = from_words(receiver.outgoing()["w"], sent.dtype)
    assert bool((kept == 1).all())
