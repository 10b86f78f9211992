"""Groups of a layer's weights whose bits look alike, and ranks within them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.wire.digits import Bits, Ints

MARKED = 16  # places are sorted by marking them where at least one in so many is among them
_WORD = 64  # bits of the words in which members are counted
_BLOCK = 1 << 16  # places whose members are listed at once


@dataclass(frozen=True)
class Classes:
    """The weights of a layer, sorted into classes that both ends know."""

    order: Ints  # weights by class, within a class by index
    place: Ints  # of each weight in ``order``
    starts: Ints  # where each class begins in ``order``, and at the end the number of weights

    @classmethod
    def of(cls, labels: NDArray[np.uint8]) -> "Classes":
        """Sort weights by their label, 0 to 255."""
        order = np.argsort(labels, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        starts = np.zeros(int(labels.max(initial=0)) + 2, np.int64)
        np.cumsum(np.bincount(labels, minlength=len(starts) - 1), out=starts[1:])
        return cls(order, place, starts)

    def among(self, live: Bits) -> "Classes":
        """The same classes of the live weights alone, numbered anew in their order."""
        chosen = live[self.order]
        order = (np.cumsum(live) - 1)[self.order[chosen]]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return Classes(order, place, np.concatenate([[0], np.cumsum(chosen)])[self.starts])


# Why groups. Positions among n weights cost about n H(share) bits (H: binary entropy).
# H is concave: groups with different shares, each coded on its own, never cost more
# than all weights together, and much less where both ends know beforehand which weights
# are lively. They know three things. The last bit: where 3 of 10 weights are on, one
# that is on flips more often than one that is off, since as many come as go. What
# flipped a round ago: such a weight lies at the edge of being kept, and tends to flip
# back. The class: how far a score began from zero, and how fast it moves. The price of
# a group is its count, some 5 to 20 bits.
#
# Why ranks. A weight's index says little in a layer where most weights belong to other
# groups; among its own group alone the gaps between positions are geometric with one
# parameter, which the count gives. So index and rank must lead to each other for
# millions of weights, both ways, with a few array operations: `_sets` holds, for each
# last bit, the places (by class, then by index) of its weights. Classes are consecutive
# ranges of them, so a group's ranks are a set's without those of the classes before.


class Places:
    """A set of a layer's places, whose members have ranks in ascending order.

    In a small layer the members are listed. In a large one they are counted by words,
    as a list would be eight times as large as the layer's mask.
    """

    def __init__(self, members: Bits) -> None:
        self._members = members
        self._listed = np.flatnonzero(members) if len(members) <= _BLOCK else None

    def among(self, places: Ints) -> Ints:
        """Those of the places that are members."""
        # by numbers, as a choice by bits that look random takes several times as long
        return np.asarray(places[np.flatnonzero(self._members[places])])

    def begins(self, starts: Ints) -> Ints:
        """Number of members below the start of each class, and of all at the end."""
        if len(starts) == 2:
            return np.array([0, np.count_nonzero(self._members)])
        return self.below(starts)

    def below(self, places: Ints) -> Ints:
        """Number of members below each place, which is a member's rank."""
        if self._listed is not None:
            return np.searchsorted(self._listed, places)
        words, before = self._counted
        word, bit = places // _WORD, (places % _WORD).astype(np.uint64)
        lower = words[word] & ((np.uint64(1) << bit) - np.uint64(1))
        return np.asarray(before[word] + np.bitwise_count(lower))

    def at(self, ranks: Ints) -> Ints:
        """The members of these ranks, which ascend."""
        if self._listed is not None:
            return np.asarray(self._listed[ranks])
        pieces, begin, before = [], 0, 0
        for start in range(0, len(self._members), _BLOCK):
            members = np.flatnonzero(self._members[start : start + _BLOCK])
            end = begin + int(np.searchsorted(ranks[begin:], before + len(members)))
            pieces.append(members[ranks[begin:end] - before] + start)
            begin, before = end, before + len(members)
        return np.concatenate(pieces)

    @cached_property
    def _counted(self) -> tuple[NDArray[np.uint64], Ints]:
        """The members as bits of words, and how many lie before each word."""
        packed = np.packbits(self._members, bitorder="little")
        octets = np.zeros((len(self._members) // _WORD + 1) * 8, np.uint8)
        octets[: len(packed)] = packed
        words = octets.view("<u8")
        before = np.zeros(len(words), np.int64)
        np.cumsum(np.bitwise_count(words[:-1]), out=before[1:])
        return words, before


@dataclass(frozen=True)
class Sorted:
    """Weights of a layer, sorted into its groups."""

    recent: list[Ints]  # ranks of those in the groups of recent flips
    places: list[Ints]  # of all others, by last bit; ascending
    counts: Ints  # in each group


class Groups:
    """The groups of one layer's weights, and each weight's rank in its group.

    The rank is the weight's place among the others of the group, by index.

    Parameters
    ----------
    numel : int
        Number of weights.
    last : bool array [numel], optional
        The weights' bits in the reference. With it, group ``2c`` of class ``c`` holds
        the weights whose last bit is 0 and group ``2c + 1`` those with a 1; without it,
        group ``c`` is class ``c``.
    recent : int array, optional
        Weights (ascending) that flipped when the reference itself was sent; needs
        ``last``. They leave their classes for two groups of their own, by last bit,
        that come before all others.
    classes : Classes, optional
        Without it there is one class.
    """

    def __init__(
        self,
        numel: int,
        *,
        last: Bits | None = None,
        recent: Ints | None = None,
        classes: Classes | None = None,
    ) -> None:
        self._classes = classes
        starts = np.array([0, numel]) if classes is None else classes.starts
        self._recent: list[Ints] = []
        # The weights of one last bit, by class and index: their places in the order of
        # the classes (None: all places), and where each class begins among them.
        self._sets: list[tuple[Places | None, Ints]] = [(None, starts)]
        self._starts = starts
        if last is not None:
            on = last if classes is None else last[classes.order]
            off = ~on
            if recent is not None:
                self._recent = [recent[~last[recent]], recent[last[recent]]]
                present = np.ones(numel, np.bool_)
                present[recent if classes is None else classes.place[recent]] = False
                on, off = on & present, off & present
            self._sets = [(places, places.begins(starts)) for places in (Places(off), Places(on))]
        ends = [begins for _, begins in self._sets]
        self.sizes: Ints = self._by_group([len(members) for members in self._recent], ends)

    def _by_group(self, recent: list[int], ends: list[Ints]) -> Ints:
        """Numbers of weights by group, from where each class ends in each set."""
        first, step = len(recent), len(ends)
        numbers = np.empty(first + step * (len(self._starts) - 1), np.int64)
        numbers[:first] = recent
        for number, end in enumerate(ends):
            numbers[first + number :: step] = end[1:] - end[:-1]
        return numbers

    def sort(self, weights: Ints) -> Sorted:
        """Sort ``weights`` (ascending) into the groups."""
        places = weights
        if self._classes is not None:
            places = ascending(self._classes.place[weights], len(self._classes.place))
        recent = [_find(members, weights) for members in self._recent]
        by_set = [places if chosen is None else chosen.among(places) for chosen, _ in self._sets]
        ends = [np.searchsorted(places, self._starts) for places in by_set]
        return Sorted(recent, by_set, self._by_group([len(ranks) for ranks in recent], ends))

    def ranks(self, taken: Sorted) -> Ints:
        """Ranks of sorted weights, by group."""
        first, step = len(self._recent), len(self._sets)
        pieces, groups = list(taken.recent), [np.arange(first)]
        for number, (places, (chosen, begins)) in enumerate(
            zip(taken.places, self._sets, strict=True)
        ):
            groups.append(np.arange(first + number, len(taken.counts), step))
            below = places if chosen is None else chosen.below(places)
            pieces.append(below - np.repeat(begins[:-1], taken.counts[groups[-1]]))
        ranks = np.concatenate(pieces)
        if step == 1 or len(self._starts) == 2:
            return ranks
        of_pieces = np.concatenate(groups)
        group = np.repeat(of_pieces, taken.counts[of_pieces]).astype(np.uint16)
        return np.asarray(ranks[np.argsort(group, kind="stable")])

    def weights(self, counts: Ints, ranks: Ints) -> Ints:
        """The weights of these ranks, in any order; the inverse of `ranks`."""
        first, step = len(self._recent), len(self._sets)
        group = np.arange(len(counts))
        pieces = []
        for bit, members in enumerate(self._recent):
            begin = int(counts[:bit].sum())
            pieces.append(members[ranks[begin : begin + int(counts[bit])]])
        for number, (chosen, begins) in enumerate(self._sets):
            mine = (group >= first) & (group % step == number)
            at = select(mine, counts, ranks) + np.repeat(begins[:-1], counts[mine])
            places = at if chosen is None else chosen.at(at)
            pieces.append(places if self._classes is None else self._classes.order[places])
        return np.asarray(np.concatenate(pieces))


def ascending(places: Ints, numel: int) -> Ints:
    """The places (all different, below ``numel``) sorted; many are faster marked."""
    if len(places) * MARKED < numel:
        return np.sort(places)
    taken = np.zeros(numel, np.bool_)
    taken[places] = True
    return np.flatnonzero(taken)


def _find(members: Ints, wanted: Ints) -> Ints:
    """Ranks of those of ``wanted`` that are ``members``; both ascend."""
    at = np.searchsorted(members, wanted)
    if not len(members):
        return at[:0]
    return np.asarray(at[members[np.minimum(at, len(members) - 1)] == wanted])


def select(chosen: Bits, counts: Ints, values: Ints) -> Ints:
    """Values of the chosen groups, where ``counts`` of them lie group by group."""
    if chosen.all():
        return values
    return values[np.repeat(chosen, counts)]


def merge(chosen: Bits, counts: Ints, values: Ints, others: Ints) -> Ints:
    """Values of the chosen groups and of all others, group by group."""
    if chosen.all():
        return values
    mine = np.repeat(chosen, counts)
    merged = np.empty(len(mine), np.int64)
    merged[mine], merged[~mine] = values, others
    return merged
