"""The fuzzer of benchmarks/fuzz_frames.py, and proof that it would notice."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from flower_mcepl.errors import CorruptFrameError
from flower_mcepl.wire import PRECISIONS, decode_frame


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_frames.py"
    spec = importlib.util.spec_from_file_location("fuzz_frames", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_frames"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count", [5_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_thousands_of_mutants(fuzzer: ModuleType, count: int) -> None:
    outcome = fuzzer.fuzz(count, seed=2)
    assert outcome.failures == []
    assert sum(outcome.counts.values()) == count
    assert outcome.deep > count / 20
    assert {key.split(": ")[1] for key in outcome.counts} >= {
        "CorruptFrameError",
        "ForeignFrameError",
        "FutureFrameError",
        "MissingReferenceError",
        "TruncatedFrameError",
        "accepted",
        "accepted with a forged digest",
    }


def test_every_kind_of_layer_is_among_the_honest(fuzzer: ModuleType) -> None:
    entries = [
        e
        for case in fuzzer.honest_frames(2)
        for e in fuzzer.read_header(case.data, fuzzer.LAYERS).layers
    ]
    assert {entry.kind for entry in entries} == {0, 1, 2, 3}
    assert {entry.precision.name for entry in entries if entry.precision} == {*PRECISIONS}
    assert any(entry.with_classes for entry in entries)
    assert any(entry.with_recent for entry in entries)
    assert {entry.kind for entry in entries if entry.among_live} == {2, 3}
    assert any(entry.is_sparse for entry in entries)


def test_a_decoder_that_returns_something_else_is_found_out(fuzzer: ModuleType) -> None:
    def careless(data: bytes, **expected: Any) -> Any:
        try:
            return decode_frame(data, **expected)
        except CorruptFrameError:
            return SimpleNamespace(
                tensors={name: torch.zeros(shape) for name, shape in fuzzer.LAYERS.items()}
            )

    with patch.object(fuzzer, "decode_frame", careless):
        outcome = fuzzer.fuzz(200, seed=2)
    assert any("other tensors than were encoded" in failure for failure in outcome.failures)


def test_a_decoder_that_raises_something_else_is_found_out(fuzzer: ModuleType) -> None:
    def fragile(data: bytes, **expected: Any) -> Any:
        try:
            return decode_frame(data, **expected)
        except CorruptFrameError:
            raise IndexError("a bug") from None

    with patch.object(fuzzer, "decode_frame", fragile):
        outcome = fuzzer.fuzz(200, seed=2)
    assert any("IndexError('a bug')" in failure for failure in outcome.failures)


def test_a_decoder_that_allocates_much_is_found_out(fuzzer: ModuleType) -> None:
    def greedy(data: bytes, **expected: Any) -> Any:
        if len(data) < 40 or int.from_bytes(data[36:40], "little") != len(data):
            np.ones(2**20)
        return decode_frame(data, **expected)

    with patch.object(fuzzer, "decode_frame", greedy), patch.object(fuzzer, "EXAMINE", 2):
        outcome = fuzzer.fuzz(300, seed=2)
    assert any(" bytes: " in failure for failure in outcome.failures)
