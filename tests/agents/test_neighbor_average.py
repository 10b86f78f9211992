"""Averages of an existing app's arrays."""

import numpy as np

from flower_mcepl.agents.array_layout import ArrayLayout
from flower_mcepl.agents.neighbor_average import NeighborAverageAgent


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
