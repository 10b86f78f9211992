"""Whether a process belongs to a simulation of Flower's."""

import sys
from types import ModuleType
from typing import Any

import pytest

from flower_mcepl.runs.simulated import in_simulation


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (None, False),
        ({}, False),  # another thread is importing it
        ({"is_initialized": lambda: False}, False),
        ({"is_initialized": lambda: True}, True),
    ],
)
def test_it_does_where_ray_runs(
    attributes: dict[str, Any] | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = ModuleType("ray")
    vars(ray).update(attributes or {})
    if attributes is None:
        monkeypatch.delitem(sys.modules, "ray", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "ray", ray)
    assert in_simulation() is expected
