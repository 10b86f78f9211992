import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl.errors import CorruptFrameError
from flower_mcepl.wire import range_coding
from flower_mcepl.wire.digits import Bits, Ints, count_table, gap_table
from flower_mcepl.wire.groups import Classes, Groups, Places
from flower_mcepl.wire.range_coding import (
    AT_ONCE,
    SMALL,
    BitReader,
    BitWriter,
    estimate_bits,
    read_positions,
    write_positions,
)
from tests.oracles import frames as oracle

quick = settings(deadline=None, max_examples=100)


def ints(*numbers: int) -> Ints:
    return np.array(numbers, np.int64)


@st.composite
def bits(draw: st.DrawFn, numel: int) -> Bits:
    share = draw(st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.7, 0.97, 1.0]))
    return np.random.default_rng(draw(st.integers(0, 999))).random(numel) < share


@st.composite
def layers(
    draw: st.DrawFn,
) -> tuple[int, Bits | None, Ints | None, np.ndarray[tuple[int], np.dtype[np.uint8]] | None]:
    """How many weights, their last bits, which flipped recently, and their classes."""
    numel = draw(st.sampled_from([0, 1, 2, 7, 16, 17, 100, 400]))
    last = draw(st.one_of(st.none(), bits(numel)))
    recent = None if last is None else draw(st.one_of(st.none(), bits(numel).map(np.flatnonzero)))
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    labels = draw(
        st.sampled_from(
            [None, *(generator.integers(0, n, numel).astype(np.uint8) for n in (1, 2, 7, 256))]
        )
    )
    return numel, last, recent, labels


def groups_of(numel: int, last: Bits | None, recent: Ints | None, labels: object) -> Groups:
    classes = None if labels is None else Classes.of(np.asarray(labels, np.uint8))
    return Groups(numel, last=last, recent=recent, classes=classes)


# ---- the coder -----------------------------------------------------------------------


@quick
@given(
    seed=st.integers(0, 9999),
    count=st.integers(0, 400),
    ends=st.sampled_from([1, 2**12, 2**23, 2**24 - 1]),
)
def test_words_are_those_of_the_oracle(seed: int, count: int, ends: int) -> None:
    generator = np.random.default_rng(seed)
    frequency = generator.integers(1, ends + 1, count)
    # likely and unlikely bits
    symbols = generator.random(count) < generator.choice([0.5, 1e-9, 1 - 1e-9])
    slow = oracle.Encoder()
    for bit, f in zip(symbols.tolist(), frequency.tolist(), strict=True):
        slow.write(int(bit), f)
    writer = BitWriter()
    writer.write(symbols[: count // 2], frequency[: count // 2])
    writer.write(symbols[count // 2 :], frequency[count // 2 :])
    data = writer.to_bytes()
    assert data == slow.finish()
    reader, back = BitReader(memoryview(data)), oracle.Decoder(data)
    assert np.array_equal(reader.read(count, frequency), symbols)
    assert [back.read(f) for f in frequency.tolist()] == symbols.astype(int).tolist()
    assert reader.at_end()
    assert back.all_read()


@pytest.mark.parametrize("frequency", [1, 2, 2**23, 2**24 - 1])
def test_one_frequency_for_all_bits_is_the_same_as_one_for_each(frequency: int) -> None:
    symbols = np.random.default_rng(0).random(300) < frequency / 2**24
    one, each = BitWriter(), BitWriter()
    one.write(symbols, ints(frequency))
    each.write(symbols, np.full(300, frequency))
    assert one.to_bytes() == each.to_bytes()
    assert np.array_equal(BitReader(memoryview(one.to_bytes())).read(300, ints(frequency)), symbols)


def test_a_carry_runs_through_many_words() -> None:
    """Bits that keep the state at the upper edge: the encoder holds many words back."""
    for last in (0, 1):
        symbols = np.array([0, *[1] * 4000, last, 0, 1] * 2, np.bool_)
        frequency = np.full(len(symbols), 2**24 - 1)
        frequency[0] = 2**23
        slow = oracle.Encoder()
        for bit, f in zip(symbols.tolist(), frequency.tolist(), strict=True):
            slow.write(int(bit), f)
        writer = BitWriter()
        writer.write(symbols, frequency)
        assert writer.to_bytes() == slow.finish()
        assert np.array_equal(
            BitReader(memoryview(writer.to_bytes())).read(len(symbols), frequency), symbols
        )


def test_nothing_written_is_nothing() -> None:
    writer = BitWriter()
    writer.write(np.zeros(0, np.bool_), ints())
    assert writer.to_bytes() == b""
    reader = BitReader(memoryview(b""))
    assert reader.read(0, ints()).size == 0
    assert reader.at_end()


@quick
@given(data=st.binary(max_size=64), seed=st.integers(0, 99))
def test_garbage_is_read_as_the_oracle_reads_it(data: bytes, seed: int) -> None:
    data = data[: len(data) // 4 * 4]
    frequency = np.random.default_rng(seed).integers(1, 2**24, 300)
    back = oracle.Decoder(data)
    try:
        slow = [back.read(f) for f in frequency.tolist()]
    except AssertionError:
        with pytest.raises(CorruptFrameError, match="cannot be read"):
            BitReader(memoryview(data)).read(300, frequency)
        return
    reader = BitReader(memoryview(data))
    assert reader.read(300, frequency).astype(int).tolist() == slow
    assert reader.at_end() == back.all_read()


# ---- groups --------------------------------------------------------------------------


@quick
@given(layer=layers(), data=st.data())
def test_groups_are_those_of_the_oracle_and_ranks_lead_back(
    layer: tuple[int, Bits | None, Ints | None, object], data: st.DataObject
) -> None:
    numel, last, recent, labels = layer
    chosen = np.flatnonzero(data.draw(bits(numel)))
    groups = groups_of(numel, last, recent, labels)
    slow = oracle.sort_weights(
        numel,
        None if last is None else last.astype(int).tolist(),
        None if recent is None else recent.tolist(),
        None if labels is None else np.asarray(labels).tolist(),
    )
    assert groups.sizes.tolist() == [len(group) for group in slow]
    taken = groups.sort(chosen)
    counts, ranks = taken.counts, groups.ranks(taken)
    wanted = [[rank for rank, weight in enumerate(group) if weight in chosen] for group in slow]
    assert counts.tolist() == [len(group_ranks) for group_ranks in wanted]
    assert ranks.tolist() == [rank for group_ranks in wanted for rank in group_ranks]
    assert np.sort(groups.weights(counts, ranks)).tolist() == chosen.tolist()


@pytest.mark.parametrize("numel", [2**16, 2**16 + 1, 2**17 - 1, 2**17, 2**17 + 70])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_members_of_large_layers_are_counted_as_those_of_small_ones(
    numel: int, share: float
) -> None:
    members = np.random.default_rng(0).random(numel) < share
    places, listed = Places(members), np.flatnonzero(members)
    everywhere, ranks = np.arange(numel + 1), np.arange(len(listed))
    assert np.array_equal(places.below(everywhere), np.searchsorted(listed, everywhere))
    assert np.array_equal(places.among(everywhere[:-1]), listed)
    for chosen in (ranks, ranks[::7], ranks[-1:], ranks[:0]):
        assert np.array_equal(places.at(chosen), listed[chosen])
    starts = np.array([0, 0, 63, 64, 65, numel - 1, numel])
    assert np.array_equal(places.begins(starts), np.searchsorted(listed, starts))
    assert places.begins(np.array([0, numel])).tolist() == [0, len(listed)]


@pytest.mark.parametrize("num_classes", [0, 1, 5])
@pytest.mark.parametrize("with_recent", [False, True])
def test_ranks_lead_back_in_a_large_layer(num_classes: int, with_recent: bool) -> None:
    draw, numel = np.random.default_rng(0), 150_000
    last, recent = draw.random(numel) < 0.3, np.flatnonzero(draw.random(numel) < 0.01)
    labels = draw.integers(0, num_classes, numel) if num_classes else None
    groups = groups_of(numel, last, recent if with_recent else None, labels)
    chosen = np.flatnonzero(draw.random(numel) < 0.05)
    taken = groups.sort(chosen)
    ranks = groups.ranks(taken)
    assert np.array_equal(np.sort(groups.weights(taken.counts, ranks)), chosen)
    ends = np.cumsum(taken.counts)
    for size, count, end in zip(groups.sizes, taken.counts, ends, strict=True):
        own = ranks[end - count : end]
        assert np.all(np.diff(own) > 0)
        assert np.all((own >= 0) & (own < size))


def test_classes_sort_stably() -> None:
    classes = Classes.of(np.array([2, 0, 2, 0, 5], np.uint8))
    assert classes.order.tolist() == [1, 3, 0, 2, 4]
    assert classes.place.tolist() == [2, 0, 3, 1, 4]
    assert classes.starts.tolist() == [0, 2, 2, 4, 4, 4, 5]
    assert Classes.of(np.zeros(0, np.uint8)).starts.tolist() == [0, 0]


# ---- positions -----------------------------------------------------------------------


@st.composite
def positions(draw: st.DrawFn) -> list[Bits]:
    """The places of each group, and which of them are taken."""
    sizes = draw(
        st.lists(st.sampled_from([0, 0, 1, 2, 15, 16, 17, 33, 200, 500]), min_size=1, max_size=6)
    )
    return [draw(bits(size)) for size in sizes]


def sizes_counts_ranks(groups: list[Bits]) -> tuple[Ints, Ints, Ints]:
    sizes, counts = ints(*map(len, groups)), ints(*(int(group.sum()) for group in groups))
    return sizes, counts, np.concatenate([np.flatnonzero(group) for group in groups])


@quick
@given(groups=positions())
def test_positions_come_back_and_are_coded_as_by_the_oracle(groups: list[Bits]) -> None:
    sizes, counts, ranks = sizes_counts_ranks(groups)
    writer, slow = BitWriter(), oracle.Encoder()
    write_positions(writer, sizes, counts, ranks)
    oracle.write_positions(slow.write, [group.astype(int).tolist() for group in groups])
    data = writer.to_bytes()
    assert data == slow.finish()
    reader, back = BitReader(memoryview(data)), oracle.Decoder(data)
    total = int(counts.sum())
    came = read_positions(reader, sizes, total)
    assert np.array_equal(came[0], counts)
    assert np.array_equal(came[1], ranks)
    assert reader.at_end()
    assert oracle.read_positions(back.read, sizes.tolist(), total) == [
        group.astype(int).tolist() for group in groups
    ]


def test_more_gaps_than_are_read_at_once() -> None:
    taken = np.random.default_rng(0).random(60 * AT_ONCE) < 0.05
    sizes, counts, ranks = sizes_counts_ranks([taken[: AT_ONCE * 50], taken[AT_ONCE * 50 :]])
    assert counts[0] > 2 * AT_ONCE
    writer = BitWriter()
    write_positions(writer, sizes, counts, ranks)
    came = read_positions(BitReader(memoryview(writer.to_bytes())), sizes, int(counts.sum()))
    assert np.array_equal(came[0], counts)
    assert np.array_equal(came[1], ranks)


def assert_coded_as_by_the_oracle(groups: list[Bits]) -> None:
    sizes, counts, ranks = sizes_counts_ranks(groups)
    writer, slow = BitWriter(), oracle.Encoder()
    write_positions(writer, sizes, counts, ranks)
    oracle.write_positions(slow.write, [group.astype(int).tolist() for group in groups])
    data = writer.to_bytes()
    assert data == slow.finish()
    came = read_positions(BitReader(memoryview(data)), sizes, int(counts.sum()))
    assert np.array_equal(came[0], counts)
    assert np.array_equal(came[1], ranks)


def test_many_gaps_of_one_group_are_coded_as_by_the_oracle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(range_coding, "AT_ONCE", 64)
    monkeypatch.setattr(range_coding, "SMALL", 16)
    draw = np.random.default_rng(0)
    # more than go at once, few enough to share a call, too many for that, all but few
    shares = zip((4000, 300, 300, 900), (200, 4, 17, 880), strict=True)
    groups = [draw.permutation(size) < count for size, count in shares]
    assert_coded_as_by_the_oracle(groups)


@pytest.mark.parametrize(
    "sizes",
    [
        [100] * 200,  # more bits than a call of the coder takes
        [SMALL, SMALL + 1, 3, SMALL + 1, SMALL + 1, 2, 2],  # large ones between small ones
        [SMALL + 1],
        [AT_ONCE + 5, 1, 1],
        [SMALL] * 8 + [1],  # a call that is full to the last bit
    ],
)
def test_groups_that_share_a_call_are_coded_as_one_by_one(sizes: list[int]) -> None:
    draw = np.random.default_rng(0)
    # all of it bit by bit, some of it turned
    groups = [draw.random(size) < draw.choice([0.3, 0.7]) for size in sizes]
    assert_coded_as_by_the_oracle(groups)


@pytest.mark.parametrize("parts", [range(1), range(1, 9), range(60)])
@pytest.mark.parametrize("unit", [1, 1000, 2**20, 2**27 + 1, 2**33 + 5])
def test_tables_are_those_of_the_oracle_at_any_size(parts: range, unit: int) -> None:
    sizes = ints(*(part * unit for part in parts))
    for total in {0, int(sizes.max()), int(sizes.sum()) // 3, int(sizes.sum())}:
        slow = oracle.count_frequencies(sizes.tolist(), total)
        assert [row[row > 0].tolist() for row in count_table(sizes, total)] == slow
    for rare in (sizes // 40, sizes // 2, sizes):
        table = gap_table(sizes, rare)
        for row, size, number in zip(table, sizes.tolist(), rare.tolist(), strict=True):
            wanted = oracle.gap_frequencies(size, number) if number else []
            assert row[row > 0].tolist() == wanted


@pytest.mark.parametrize("share", [0.0, 0.0003, 0.002, 0.02, 0.06, 0.07, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("number", [1, 2, 33])
def test_estimate_is_close_to_the_real_size(share: float, number: int) -> None:
    generator = np.random.default_rng(0)
    sizes = generator.multinomial(60_000, np.full(number, 1 / number))
    groups = [
        generator.random(size) < min(share * generator.uniform(0.5, 1.5), 1) for size in sizes
    ]
    sizes, counts, ranks = sizes_counts_ranks(groups)
    writer = BitWriter()
    write_positions(writer, sizes, counts, ranks)
    real = 8 * len(writer.to_bytes())
    assert abs(real - estimate_bits(sizes, counts)) <= 0.01 * real + 64 + 3 * number


@quick
@given(
    data=st.one_of(st.binary(max_size=200), st.sampled_from([b"", b"\xff" * 400, b"\0" * 400])),
    sizes=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 200, 5000]), min_size=1, max_size=6),
    share=st.floats(0, 1),
)
def test_garbage_is_corrupt_or_some_positions(data: bytes, sizes: list[int], share: float) -> None:
    total = int(share * sum(sizes))
    data = data[: len(data) // 4 * 4]
    back = oracle.Decoder(data)
    try:
        counts, ranks = read_positions(BitReader(memoryview(data)), ints(*sizes), total)
    except CorruptFrameError:
        with pytest.raises(AssertionError):
            oracle.read_positions(back.read, sizes, total)
        return
    slow = oracle.read_positions(back.read, sizes, total)
    assert counts.tolist() == [sum(group) for group in slow]
    assert ranks.tolist() == [rank for group in slow for rank in np.flatnonzero(group).tolist()]


@quick
@given(layer=layers(), data=st.binary(max_size=100), share=st.floats(0, 1))
def test_garbage_leads_to_weights_of_the_layer(
    layer: tuple[int, Bits | None, Ints | None, object], data: bytes, share: float
) -> None:
    groups = groups_of(*layer)
    try:
        came = read_positions(
            BitReader(memoryview(data[: len(data) // 4 * 4])), groups.sizes, int(share * layer[0])
        )
    except CorruptFrameError:
        return
    weights = groups.weights(*came)
    assert len(set(weights.tolist())) == len(weights) == int(share * layer[0])
    assert np.all((weights >= 0) & (weights < layer[0]))


def test_tables_do_not_depend_on_the_machine() -> None:
    """Frequencies from the page's formulas: large sizes, where floats would round."""
    for size, rare in ((2**31 - 1, 1234), (10**9 + 7, 1), (16, 1), (17, 1)):
        writer, slow = BitWriter(), oracle.Encoder()
        taken = np.sort(np.random.default_rng(0).choice(min(size, 10**6), rare, replace=False))
        write_positions(writer, ints(size), ints(rare), taken)
        previous = -1
        for position in taken.tolist():
            for b, frequency in enumerate(oracle.gap_frequencies(size, rare)):
                slow.write(position - previous - 1 >> b & 1, frequency)
            previous = position
        assert writer.to_bytes() == slow.finish()


def test_a_torch_mask_can_be_coded() -> None:
    mask = torch.tensor([True, False, True]).numpy()
    groups = Groups(3)
    taken = groups.sort(np.flatnonzero(mask))
    writer = BitWriter()
    write_positions(writer, groups.sizes, taken.counts, groups.ranks(taken))
    assert read_positions(BitReader(memoryview(writer.to_bytes())), groups.sizes, 2)[
        1
    ].tolist() == [0, 2]
