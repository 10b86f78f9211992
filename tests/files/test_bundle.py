"""Bundles: what is encoded comes back bit for bit, and damaged bytes are refused, never
anything else.
"""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from flower_mcepl.errors import StateError
from flower_mcepl.files.bundle import Bundle

NAMES = st.text("abc/.-_0", min_size=1, max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
FACTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)
DTYPES = st.sampled_from(["?", "u1", "i4", "u4", "i8", "f4", "f8"])
ARRAYS = DTYPES.flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, min_side=0, max_side=3))
)
BUNDLES = st.builds(Bundle, FACTS, st.dictionaries(NAMES, ARRAYS, max_size=4))


def same(one: Bundle, other: Bundle) -> bool:
    pairs = [(one.arrays[name], other.arrays.get(name)) for name in one.arrays]
    return (
        one.facts == other.facts
        and one.arrays.keys() == other.arrays.keys()
        and all(b is not None and a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
        and all(b is not None and a.tobytes() == b.tobytes() for a, b in pairs)
    )


@given(BUNDLES)
def test_a_bundle_comes_back_bit_for_bit(bundle: Bundle) -> None:
    back = Bundle.decode(bundle.encode())
    assert same(bundle, back)
    assert [*back.arrays] == sorted(bundle.arrays)
    assert back.encode() == bundle.encode()


@given(
    FACTS, st.dictionaries(st.text("ab", min_size=1), st.dictionaries(NAMES, ARRAYS, max_size=3))
)
def test_groups_are_joined_and_taken_apart(facts: dict[str, Any], groups: dict[str, Any]) -> None:
    bundle = Bundle.joined(facts, groups)
    assert same(Bundle.joined(facts, bundle.groups()), bundle)
    for name, group in groups.items():
        assert same(Bundle({}, bundle.group(name)), Bundle({}, group))
    assert bundle.group("none") == {}


def test_arrays_that_are_not_contiguous_are_copied() -> None:
    array = np.arange(6).reshape(2, 3).T
    assert np.array_equal(Bundle.decode(Bundle({}, {"a": array}).encode()).arrays["a"], array)


def test_tensors_share_the_arrays_memory() -> None:
    bundle = Bundle({}, {"a": np.zeros(3, np.float32)})
    bundle.tensors["a"][1] = 2
    assert bundle.arrays["a"].tolist() == [0, 2, 0]
    decoded = Bundle.decode(bundle.encode())
    decoded.tensors["a"].add_(1)  # what is decoded can be written to, too
    assert torch.equal(decoded.tensors["a"], torch.tensor([1.0, 3.0, 1.0]))


WHOLE = Bundle(
    {"round": 3, "name": "a"},
    {"in/3/bits": np.arange(9, dtype=np.uint8), "z": np.ones(4, np.float32)},
).encode()
EDITS = st.lists(
    st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4
)


@given(EDITS, st.integers(0, len(WHOLE)))
def test_damaged_bytes_are_refused_or_read_as_a_bundle(
    edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(WHOLE)
    for at, byte in edits:
        data[at] = byte
    for damaged in (bytes(data), bytes(data[:cut])):
        with contextlib.suppress(StateError):
            assert isinstance(Bundle.decode(damaged), Bundle)


@pytest.mark.parametrize(
    "metadata", [{}, {"facts": "no JSON"}, {"facts": "[1]"}, {"other": json.dumps({})}]
)
def test_metadata_without_facts_is_refused(metadata: dict[str, str]) -> None:
    import safetensors.numpy

    with pytest.raises(StateError, match="cannot be read"):
        Bundle.decode(safetensors.numpy.save({"a": np.zeros(1)}, metadata=metadata))
