"""What a stack of agents hears, bit for bit what each of them hears alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flower_mcepl import MceplAgent
from flower_mcepl.agents.inboxes import Distinct, Inboxes
from flower_mcepl.agents.stack import AgentStack
from flower_mcepl.masks import formulas
from flower_mcepl.masks.fusion import FUSIONS, MCEPL, Fusion, neighbor_average
from tests.fleet.agents import make_fleet

LAYERS = {"conv": (3, 2, 2), "linear": (4, 3)}
Payload = dict[str, Tensor]


def payload(seed: int, layers: dict[str, tuple[int, ...]]) -> Payload:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in layers.items()}


@st.composite
def inboxes(draw: st.DrawFn) -> tuple[list[dict[int, Payload]], list[dict[int, float]]]:
    """Inboxes of up to five agents, who hear nobody, all or some, not always the same
    of a sender, nor all layers; and their votes, where these have faded.
    """
    heard, votes = [], []
    for _ in range(draw(st.integers(1, 5))):
        senders = sorted(draw(st.sets(st.integers(0, 6))))
        own = {}
        for sender in senders:
            whole = payload(sender + 100 * draw(st.integers(0, 1)), LAYERS)
            names = draw(st.sets(st.sampled_from([*LAYERS]), min_size=1))
            own[sender] = {name: whole[name] for name in LAYERS if name in names}
        heard.append(own)
        fading = draw(st.sets(st.sampled_from(senders))) if senders else []
        votes.append({sender: 0.7 ** draw(st.integers(1, 9)) for sender in fading})
    return heard, votes


def alone(own: dict[int, Payload], votes: dict[int, float], name: str) -> Tensor | None:
    """What one agent hears, with votes that are faded as `votes.faded` does."""
    masks = {sender: masks[name] for sender, masks in own.items() if name in masks}
    if not masks:
        return None
    if votes:
        masks = {sender: votes.get(sender, 1.0) * mask.float() for sender, mask in masks.items()}
    return neighbor_average([*masks.values()], torch.empty(0))


@given(drawn=inboxes(), shared=st.booleans())
def test_the_means_of_a_stack_are_those_of_each(drawn: Any, shared: bool) -> None:
    heard, votes = drawn
    distinct = Distinct()
    stack = Inboxes([distinct.inbox(own) for own in heard] if shared else heard, votes)
    for name, shape in LAYERS.items():
        means = stack.means(name, torch.empty(shape))
        assert len(means) == len(heard)
        for n, own, cast in zip(means, heard, votes, strict=True):
            expected = alone(own, cast, name)
            assert (n is None) == (expected is None)
            assert n is None or torch.equal(n, expected)


def test_one_mask_of_many_senders_counts_for_each_of_them() -> None:
    """As the common first one, which stands in for whoever was never heard."""
    first, other = payload(0, LAYERS), payload(1, LAYERS)
    (n,) = Inboxes([{1: first, 2: other, 3: first}], [{}]).means("conv", torch.empty(3, 2, 2))
    assert torch.equal(n, (2.0 * first["conv"] + other["conv"]) / 3)


def test_equal_payloads_of_a_sender_are_kept_once() -> None:
    distinct = Distinct()
    one, again, newer = payload(0, LAYERS), payload(0, LAYERS), payload(1, LAYERS)
    part = {"conv": one["conv"].clone()}
    kept = [distinct.inbox({4: masks})[4] for masks in (one, again, newer, part)]
    assert [kept[1] is one, kept[2] is newer, kept[3] is part] == [True] * 3
    assert distinct.inbox({5: again})[5] is again  # another sender's


# --- agents ---


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Fusion], None]:
    """Adds a rule by name, as an installed package does."""
    return lambda name, rule: monkeypatch.setitem(FUSIONS._loaded, name, rule)


def majority(masks: Any, own: Tensor) -> Tensor:
    """A rule of one's own, which looks at numbers, as no stacked one may."""
    n = neighbor_average(masks, own)
    return (n > 0.5).float() if float(n.mean()) > 0.1 else n


def two_fleets(**config: Any) -> list[list[MceplAgent]]:
    fleets = [make_fleet(4, **config) for _ in range(2)]
    for agents in fleets:
        for agent in agents[:3]:  # the last one has no gradient
            agent.train(round=1)
    return fleets


def check_equal(one: MceplAgent, other: MceplAgent) -> None:
    """The same state, bit for bit."""
    left, right = one.state(), other.state()
    assert left.facts == right.facts
    assert left.arrays.keys() == right.arrays.keys()
    for name, array in left.arrays.items():
        assert np.array_equal(right.arrays[name], array), name


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no fine-tuning": {"finetune_lr": 0.0},
    "magnitudes": {"score_form": "magnitude", "finetune_lr": 0.3},
    "running mean": {"score_averaging": 0.5},
    "shared in part": {"share": "0*"},
    "mean with the own mask": {"fusion": "mask-averaging"},
    "no exchange": {"fusion": "none"},
    "a rule of one's own": {"fusion": "majority"},
    "first scores": {"first_mask": "scores"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fading", [False, True], ids=["whole votes", "faded votes"])
def test_a_stack_fuses_to_the_bits_of_each(rules: Any, case: str, fading: bool) -> None:
    rules("majority", Fusion(hear=majority))
    fleet, stacked = two_fleets(**CASES[case])
    masks = {j: payload(j, fleet[0].layers) for j in range(4, 8)}
    heard = [{j: masks[j] for j in own} for own in ((4, 5, 6), (5,), (), (4, 6, 7))]
    votes: list[dict[int, float]] = [{}, {}, {}, {}]
    if fading and fleet[0].weighs_votes:
        votes = [{4: 0.7, 6: 0.7**3}, {}, {}, {6: 0.7**2}]
    for agent, own, cast in zip(fleet, heard, votes, strict=True):
        agent.fuse(own, round=1, votes=cast)
    AgentStack(stacked).fuse(heard, round=1, votes=votes)
    for one, other in zip(fleet, stacked, strict=True):
        check_equal(one, other)
        assert other.gradient == {}


def test_a_mean_is_one_product_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a row of masks for each that is heard, however many agents hear it."""
    products = []

    def counted(times: Tensor, masks: Tensor) -> Tensor:
        products.append((tuple(times.shape), tuple(masks.shape)))
        return mask_counts(times, masks)

    mask_counts = formulas.mask_counts
    monkeypatch.setattr(formulas, "mask_counts", counted)
    agents = make_fleet(4)
    inboxes = [{j: payload(j, agents[0].layers) for j in range(3)} for _ in agents]
    distinct = Distinct()
    AgentStack(agents).fuse([*map(distinct.inbox, inboxes)], round=1, votes=[{}] * 4)
    assert products == [((4, 3), (3, *shape)) for shape in agents[0].layers.values()]


def test_the_rule_of_the_paper_averages_and_others_do_not() -> None:
    assert MCEPL.averages
    assert not Fusion(hear=majority).averages
