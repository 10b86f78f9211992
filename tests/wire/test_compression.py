"""Codecs of signs and of the largest differences: what they keep and refuse."""

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import ConfigError
from flower_mcepl.wire import PRECISIONS, Codec
from flower_mcepl.wire.compression import pack_places, places_nbytes, unpack_places

NAMES = [name for name in PRECISIONS if name.startswith(("sign-", "top-"))]


def values_of(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    return np.round(values, 1) if seed % 2 else values  # with ties


def there_and_back(codec: Codec, values: Any) -> Any:
    data = codec.encode(values)
    assert len(data) == codec.size(len(values))
    return codec.decode(memoryview(data), len(values))


@given(count=st.integers(0, 400), seed=st.integers(0, 99))
def test_signs_have_one_size(count: int, seed: int) -> None:
    values = values_of(count, seed)
    came = there_and_back(PRECISIONS["sign-differences"], values)
    np.testing.assert_array_equal(came >= 0, (values >= 0) | (came == 0))
    if count:
        np.testing.assert_allclose(np.abs(came), np.abs(values).mean(), rtol=1e-6)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
@given(count=st.integers(0, 400), seed=st.integers(0, 99))
def test_the_largest_come_as_they_are_and_the_rest_as_zero(
    share: float, count: int, seed: int
) -> None:
    values = values_of(count, seed)
    came = there_and_back(PRECISIONS[f"top-{share}-differences"], values)
    kept = min(count, max(1, int(np.ceil(share * count))))
    order = np.argsort(-np.abs(values), kind="stable")
    np.testing.assert_allclose(came[order[:kept]], values[order[:kept]], rtol=2**-8)
    assert not came[order[kept:]].any()


@pytest.mark.parametrize("name", NAMES)
@given(count=st.integers(1, 300), seed=st.integers(0, 99))
def test_what_is_left_out_is_less_than_what_was_there(name: str, count: int, seed: int) -> None:
    """The property of a compressor on which error feedback rests."""
    values = values_of(count, 2 * seed)
    left = values - there_and_back(PRECISIONS[name], values)
    assert float((left**2).sum()) < float((values**2).sum())


@given(data=st.data(), count=st.integers(1, 5000))
def test_any_places_come_back(data: st.DataObject, count: int) -> None:
    places = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))), np.int64)
    packed = pack_places(places, count)
    assert len(packed) == places_nbytes(len(places), count)
    np.testing.assert_array_equal(unpack_places(memoryview(packed), len(places), count), places)


def test_places_have_bits_near_their_entropy() -> None:
    for share in (0.001, 0.01, 0.1):
        kept, count = round(share * 10**6), 10**6
        entropy = -np.log2(share) - (1 - share) / share * np.log2(1 - share)
        assert entropy < 8 * places_nbytes(kept, count) / kept < entropy + 0.6


@given(damage=st.binary(min_size=1, max_size=40), at=st.integers(0, 200))
def test_damaged_places_are_refused_or_are_places(damage: bytes, at: int) -> None:
    codec = PRECISIONS["top-0.1-differences"]
    data = bytearray(codec.encode(values_of(500, 1)))
    data[at : at + len(damage)] = damage[: max(0, len(data) - at)]
    came = None
    with contextlib.suppress(ConfigError):  # which the reader makes a refused frame of
        came = codec.decode(memoryview(bytes(data)), 500)
    assert came is None or np.count_nonzero(came) <= 50


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_differences_must_be_finite(name: str, odd: float) -> None:
    with pytest.raises(ConfigError, match="differences must be finite"):
        PRECISIONS[name].encode(np.array([1.0, odd], np.float32))
