"""What is written down of an existing app's arrays."""

import re

import numpy as np
import pytest

from flower_mcepl.agents.array_layout import ArrayLayout
from flower_mcepl.errors import AnswerError


def zeros(count: int) -> dict[str, np.ndarray]:
    return {f"w{number}": np.zeros(2, np.float32) for number in range(count)}


@pytest.mark.parametrize(
    ("count", "named"),
    [
        (0, "none"),
        (1, "'w0'"),
        (8, "'w0', 'w1', 'w2', 'w3', 'w4', 'w5', 'w6', 'w7'"),
        (9, "'w0', 'w1', 'w2', 'w3', 'w4', 'w5', 'w6', 'w7' and 1 more"),
        (20, "'w0', 'w1', 'w2', 'w3', 'w4', 'w5', 'w6', 'w7' and 12 more"),
    ],
)
def test_an_error_names_the_first_eight_arrays(count: int, named: str) -> None:
    layout = ArrayLayout.of({"x": np.zeros(2, np.float32)})
    with pytest.raises(AnswerError, match=re.escape(f"got 'x', returned {named}. Return")):
        layout.take(zeros(count))
