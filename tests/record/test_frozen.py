"""The frozen share in words: told where there is one, loudly where it is large."""

import pytest

from flower_mcepl.doctor import OK, WARNING
from flower_mcepl.doctor.frozen import check_frozen
from flower_mcepl.masks.model import MUCH_FROZEN
from flower_mcepl.record.frozen import MUCH, frozen_line


@pytest.mark.parametrize("facts", [{}, {"frozen_share": None}, {"frozen_share": 0.0004}])
def test_about_zero_is_not_worth_a_line(facts: dict[str, object]) -> None:
    assert frozen_line([facts, facts]) == ""
    assert frozen_line([]) == ""
    assert not list(check_frozen(facts))


def test_a_share_is_told_with_its_names_and_loudly_where_it_is_large() -> None:
    little, much = {"frozen_share": 0.031}, {"frozen_share": 0.42, "frozen_weights": "a, b"}
    line = "neither masked nor trained: 3.1% of the network's weights"
    assert frozen_line([little, little]) == line
    assert frozen_line([little, much]) == (
        "WARNING: neither masked nor trained: up to 42.0% of the network's weights (a, b); they "
        "stay as they were drawn"
    )
    # a small network may have many biases, for which no mask is meant
    assert frozen_line([{"frozen_share": 0.2}]).startswith("neither masked nor trained: 20.0%")


def test_the_doctor_tells_it() -> None:
    (little,) = check_frozen({"frozen-share": 0.031})
    (much,) = check_frozen({"frozen-share": 0.42, "frozen-weights": "a, b"})
    assert (little.status, much.status) == (OK, WARNING)
    assert "maskable" in much.remedy
    assert much.values == {"frozen_share": 0.42, "frozen_weights": "a, b"}


def test_much_is_the_same_here_and_where_a_model_is_built() -> None:
    """The table loads no torch, so it cannot ask there."""
    assert MUCH == MUCH_FROZEN
