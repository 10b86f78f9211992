"""What is under way in a run without a barrier, as it comes back from a checkpoint."""

from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl.exchange.parcels import Answer, Parcel, Posted
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.runs.own_state import answers_of, answers_state, parcels_of, parcels_state

agents, rounds, frames = st.integers(0, 20), st.integers(1, 99), st.binary(max_size=9)
parcels = st.builds(
    Parcel[bytes],
    round=rounds,
    neighbors=st.none() | st.lists(agents, max_size=3).map(tuple),
    frames=st.dictionaries(agents, st.lists(frames, max_size=3), max_size=3),
    evaluate=st.booleans(),
    train=st.booleans(),
    acknowledged=st.none() | rounds,
    whole=st.booleans(),
    kept=st.dictionaries(agents, st.lists(rounds, max_size=3), max_size=2),
    ages=st.none() | st.dictionaries(agents, rounds, max_size=3),
)


def with_frames(answer: Answer[bytes], sent: list[bytes]) -> Answer[bytes]:
    posts = [Posted(frame, len(frame), 1, place or None) for place, frame in enumerate(sent)]
    return Answer(**{**vars(answer), "posts": posts, "raw": sent})


answers = st.builds(
    with_frames,
    st.builds(
        Answer[bytes],
        facts=st.dictionaries(st.sampled_from("abc"), rounds),
        metrics=st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False)),
        content=st.none() | st.just("0123456789abcdef"),
        held=st.dictionaries(agents, rounds, max_size=3),
        refused=st.lists(st.text(max_size=5), max_size=2),
        lacking=st.lists(agents, max_size=2),
        fresh=st.booleans(),
        late_of=st.none() | rounds,
        introduces=st.booleans(),
        evaluation_error=st.text(max_size=5),
    ),
    st.lists(frames, max_size=2),
)


@given(st.dictionaries(agents, parcels, max_size=3))
def test_parcels_come_back(under_way: dict[int, Parcel[bytes]]) -> None:
    saved = Bundle.decode(parcels_state(under_way, bytes).encode())
    assert parcels_of(saved, bytes) == under_way


@given(st.dictionaries(agents, answers, max_size=3))
def test_answers_come_back(under_way: dict[int, Answer[bytes]]) -> None:
    saved = Bundle.decode(answers_state(under_way).encode())
    assert answers_of(saved) == under_way
