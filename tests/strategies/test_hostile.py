"""One hostile agent among honest ones, which end with the bits of a run without it.

What an honest agent ends with is that of a run in which the hostile one said the truth
wherever its answer was taken, and nothing where it was refused. Its frames are its own:
a mask that is one counts, whatever it holds.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl import encode_frame
from flower_mcepl.messages.envelope import open_envelope
from flower_mcepl.strategies.answers import frame_array
from tests.fleet.hostile import (
    AGENTS,
    HOSTILE,
    ROUNDS,
    RUN,
    Ended,
    Records,
    fuzzer,
    handshake_of,
    play,
    reference,
    tiny_agent,
)

CLOSING = ROUNDS + 1
ALL = frozenset(range(1, CLOSING + 1))
SILENT = frozenset({1})  # honest in round 1, and then silent
ESCAPES = fuzzer.ESCAPES


def from_round_2(change: Callable[[Records], Any]) -> Any:
    """Twist that changes every answer but the first."""

    def twist(round: int, records: Records) -> Any:
        if round > 1:
            changed = change(records)
            return records if changed is None else changed
        return records

    return twist


def agent(**facts: Any) -> Any:
    """Change of what an agent says of itself."""

    def change(records: Records) -> None:
        records["agent"] |= {key.replace("_", "-"): fact for key, fact in facts.items()}

    return from_round_2(change)


def handshake(**facts: Any) -> Any:
    """The same, in a handshake that comes anew in every round."""

    def change(records: Records) -> None:
        records["agent"] |= handshake_of()
        records["agent"] |= {key.replace("_", "-"): fact for key, fact in facts.items()}

    return from_round_2(change)


def metrics(**values: Any) -> Any:
    """Change of an answer's metrics."""

    def change(records: Records) -> None:
        records["metrics"] |= {key.replace("_", "-"): value for key, value in values.items()}

    return from_round_2(change)


def as_silent(ended: Ended) -> bool:
    """Whether nothing after round 1 was taken, and the others went on as without it."""
    return ended.taken == SILENT and ended.honest == reference(SILENT).honest


# --- whole answers, mutated ---


@settings(max_examples=25)
@given(rng=st.randoms(use_true_random=False), key_interval=st.sampled_from([1, 1, 0]))
def test_whatever_an_agent_says_the_others_get_its_frames_or_nothing(
    rng: Any, key_interval: int
) -> None:
    mutants = fuzzer.Mutants(rng)
    ended = play(
        from_round_2(lambda records: mutants.make(records, frames=False)),
        key_interval=key_interval,
    )
    assert ended.honest == reference(ended.taken, key_interval=key_interval).honest


@settings(max_examples=15)
@given(rng=st.randoms(use_true_random=False))
def test_a_late_answer_may_say_whatever_it_likes(rng: Any) -> None:
    mutants = fuzzer.Mutants(rng)
    late = frozenset({2})
    ended = play(from_round_2(lambda records: mutants.make(records, frames=False)), late=late)
    assert ended.honest == reference(ended.taken, late=late).honest


@settings(max_examples=15)
@given(
    code=st.integers(1, 2**31 - 1),
    text=st.sampled_from(fuzzer.TEXTS) | st.text(max_size=50),
    times=st.sampled_from([1, 1000]),
)
def test_an_error_reply_is_silence(code: int, text: str, times: int) -> None:
    assert as_silent(play(from_round_2(lambda records: Error(code, text * times))))


def test_a_text_that_was_made_to_be_searched_for_hours_is_an_error_as_any_other() -> None:
    text = "error 0: " * 700 + "actor " * 2000
    assert as_silent(play(from_round_2(lambda records: Error(0, text))))


def test_a_name_of_a_record_is_no_lost_worker() -> None:
    change = lambda records: {**records, "error 0: the worker died": {}, "agent": {}}  # noqa: E731
    assert as_silent(play(from_round_2(change)))


# --- frames ---


def forged(records: Records, make: Callable[[bytes], bytes]) -> None:
    for name, array in records.get("frame", {}).items():
        records["frame"][name] = frame_array(make(open_envelope(array.data)))


def mask_frame(*, keep: bool, round: int, sender: int = HOSTILE, run: str = RUN) -> bytes:
    honest = tiny_agent(HOSTILE)
    masks = {name: torch.full(shape, keep) for name, shape in honest.layers.items()}
    return encode_frame(
        masks,
        sender=sender,
        round=round,
        fingerprint=honest.fingerprint,
        prior=honest.prior,
        run=run,
    )


def flipped(frame: bytes, place: int) -> bytes:
    place %= 8 * len(frame)
    at = place // 8
    return frame[:at] + bytes([frame[at] ^ 1 << place % 8]) + frame[at + 1 :]


FORGERIES: dict[str, Callable[[bytes, int, int], bytes]] = {  # frame, round, place
    "a bit flipped": lambda frame, round, place: flipped(frame, place),
    "cut off": lambda frame, round, place: frame[: place % len(frame)],
    "cut off, with a checksum": lambda frame, round, place: fuzzer.sealed(
        frame[: place % len(frame)]
    ),
    "of another run": lambda frame, round, place: mask_frame(keep=True, round=round, run="f" * 16),
    "of another agent": lambda frame, round, place: mask_frame(keep=True, round=round, sender=1),
    "of an earlier round": lambda frame, round, place: mask_frame(keep=True, round=1),
    "of a round to come": lambda frame, round, place: mask_frame(keep=True, round=round + 1),
    "a mask that keeps all": lambda frame, round, place: mask_frame(keep=True, round=round),
    "a mask that keeps none": lambda frame, round, place: mask_frame(keep=False, round=round),
}


def with_forged_frames(way: str, place: int, *, first: int = 2) -> Any:
    def twist(round: int, records: Records) -> Records:
        if round >= first and records.get("frame"):
            forged(records, lambda frame: FORGERIES[way](frame, round, place))
            records["agent"]["header-bytes"] = [0] * len(records["frame"])
        return records

    return twist


@settings(max_examples=6)
@given(
    first=st.integers(2, ROUNDS),
    place=st.integers(0, 10_000),
    way=st.sampled_from(["a bit flipped", "cut off", "cut off, with a checksum"]),
)
def test_damaged_frames_are_silence(first: int, place: int, way: str) -> None:
    """Accepted by the relay, which opens none, and refused by every neighbor."""
    ended = play(with_forged_frames(way, place, first=first))
    assert ended.taken == ALL
    assert ended.honest == reference(frozenset({*range(1, first), CLOSING})).honest


# --- the rows of issue 13, section 1, by their names ---


def snake_case(records: Records) -> None:
    """Say another main metric by a name that the record makes the same of."""
    records["agent"] |= handshake_of() | {"main_metric": "loss", "higher_is_better": False}


SAID = {  # what is refused, in the order of the rows
    "a fact of bytes": handshake(own=b"\x00"),
    "parameters nested 900 deep": handshake(parameters='{"a":' * 900 + "1" + "}" * 900),
    "train-loss inf": metrics(train_loss=float("inf")),
    "train-loss -inf": metrics(train_loss=float("-inf")),
    "accuracy 1.7e308": metrics(accuracy=1.7e308),
    "accuracy 1e6": metrics(accuracy=1e6),
    "accuracy not a number": metrics(accuracy=float("nan")),
    "an error text of 2 MB": agent(evaluation_error="x" * 2_000_000),
    "refused of 2 MB": agent(refused=["x" * 2_000_000]),
    "refused of 2 MB in small texts": agent(refused=["x" * 100] * 20_000),
    "parameters of 2 MB": handshake(parameters=json.dumps({"a": "x" * 2_000_000})),
    "a main metric that is a column": handshake(main_metric="metrics"),
    "a main metric that is a path": handshake(main_metric="../../x"),
    "a main metric that is markup": handshake(main_metric="[/x]"),
    "a main metric that is a formula": handshake(main_metric=r"$\frac{$"),
    "another main metric than the others": handshake(main_metric="loss"),
    "a main metric beside its main metric": from_round_2(snake_case),
    "a share of text": handshake(frozen_share="much"),
    "classes of a number": handshake(classes=5),
    "a task of a list": handshake(task=["classification"]),
    "kept weights of other layers": handshake(kept_by_layer=[1]),
    "another agent's number": handshake(agent=1),
    "a number that the graph has not": handshake(agent=AGENTS),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_out_of_type_range_or_size_is_its_failure_of_that_round(name: str) -> None:
    assert as_silent(play(SAID[name]))


def no_headers(records: Records) -> None:
    if "header-bytes" in records["agent"]:
        records["agent"]["header-bytes"] = [0, 0]


LIES = {  # what is within the rules, and concerns nobody else
    "holds nothing": agent(held_agents=[1], held_rounds=[0]),
    "holds what is to come": agent(held_agents=[1, 3], held_rounds=[10**9, 2]),
    "lacks everyone": agent(lacking=[*range(AGENTS)]),
    "refuses everything": agent(refused=[ESCAPES] * 10),
    "could not evaluate": agent(evaluation_error=ESCAPES),
    "began afresh": agent(fresh=True),
    "headers of no bytes": from_round_2(no_headers),
    "a perfect accuracy": metrics(accuracy=1.0, loss=0.0, density=0.0, seconds=1e100),
    "a huge loss": metrics(loss=1e100, train_loss=-1e100),
    "metrics of its own": metrics(metrics=1, round=2, agent=3, seconds=0),
    "other data": handshake(num_examples=10**15, classes="²", train_counts="0:9 x"),
    "parameters that are none": handshake(parameters='{"batch_size": 0, "local_steps": "x"}'),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_within_the_rules_changes_its_own_rows_alone(name: str) -> None:
    ended = play(LIES[name])
    assert ended.taken == ALL
    assert ended.honest == reference(ALL).honest


def test_a_frame_far_beyond_the_network_is_its_failure_of_that_round() -> None:
    huge = frame_array(bytes(1_000_000))

    def change(records: Records) -> None:
        if records.get("frame"):
            records["frame"] = dict.fromkeys(records["frame"], huge)

    ended = play(from_round_2(change))
    assert ended.taken == {1, CLOSING}


def test_who_never_sends_a_whole_frame_is_silent_and_nothing_of_it_is_kept() -> None:
    def deltas_alone(round: int, records: Records) -> Records:
        if records.get("frame"):
            records["frame"].pop("key-frame", None)
            records["agent"]["builds-on"] = [max(1, round - 1)]
            records["agent"]["header-bytes"] = records["agent"]["header-bytes"][:1]
        return records

    ended = play(deltas_alone, rounds=6, key_interval=0)
    kept = ended.strategy.exchange.state(round=6).facts["posted"]
    assert len(ended.taken) == 7
    assert kept.get(HOSTILE, []) == []
    assert len(kept[1]) >= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_in_a_float_frame_is_silence(value: float) -> None:
    def twist(round: int, records: Records) -> Records:
        if round == 2:
            honest = tiny_agent(HOSTILE, "dsgd")
            floats = {name: torch.zeros(shape) for name, shape in honest.layers.items()}
            next(iter(floats.values())).view(-1)[0] = value
            frame = encode_frame(
                floats, sender=HOSTILE, round=2, fingerprint=honest.fingerprint, run=RUN
            )
            forged(records, lambda _: frame)
        return records

    ended = play(twist, algorithm="dsgd")
    assert ended.honest == reference(ALL - {2}, algorithm="dsgd").honest


@pytest.mark.parametrize("way", [*FORGERIES][3:])
def test_a_mask_that_keeps_all_or_no_weights_or_is_anothers_is_silence(way: str) -> None:
    assert play(with_forged_frames(way, 0)).honest == reference(frozenset({1, CLOSING})).honest


def test_a_wrong_partition_id_in_round_1_is_that_nodes_alone() -> None:
    def twist(round: int, records: Records) -> Records:
        records["agent"]["agent"] = AGENTS
        return records

    ended = play(twist)
    assert ended.taken == frozenset()
    assert ended.honest == reference(frozenset()).honest


def test_an_error_of_code_0_is_no_lost_worker_on_devices() -> None:
    assert as_silent(play(from_round_2(lambda r: Error(0, "The worker died unexpectedly"))))


# --- a server in the center ---


def server_twist(change: Callable[[Records], Any]) -> Any:
    """Twist of the answer of round 2 alone."""
    return lambda round, records: (change(records) or records) if round == 2 else records


def claims(**facts: Any) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        records["agent"] |= {key.replace("_", "-"): fact for key, fact in facts.items()}

    return change


def measures(**values: Any) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        records["metrics"] |= {key.replace("_", "-"): value for key, value in values.items()}

    return change


def float_frame(algorithm: str, value: float) -> bytes:
    honest = tiny_agent(HOSTILE, algorithm)
    floats = {name: torch.full(shape, value) for name, shape in honest.layers.items()}
    return encode_frame(floats, sender=HOSTILE, round=2, fingerprint=honest.fingerprint, run=RUN)


LEFT_OUT: dict[str, Callable[[Records], Any]] = {
    "an accuracy of 1e6": measures(accuracy=1e6),
    "an error": lambda records: Error(2, ESCAPES),
    "another agent's number": claims(agent=1),
    "a model that it does not hold": claims(held_agents=[AGENTS], held_rounds=[0]),
    "a frame of zeros": lambda r: forged(r, lambda frame: bytes(len(frame))),
    "a frame with a flipped bit": lambda r: forged(r, lambda frame: flipped(frame, 500)),
}
HEARD: dict[str, Callable[[Records], Any]] = {
    "a perfect accuracy": measures(accuracy=1.0, loss=0.0),
    "refusals": claims(refused=[ESCAPES]),
    "that it lacks the server": claims(lacking=[AGENTS]),
    "that it began afresh": claims(fresh=True),
}


@pytest.mark.parametrize("algorithm", ["fedavg", "fedpm"])
def test_a_server_leaves_out_what_is_refused_and_hears_the_rest(algorithm: str) -> None:
    silent = reference(ALL - {2}, algorithm=algorithm)
    for name, change in LEFT_OUT.items():
        if name == "a model that it does not hold" and algorithm == "fedpm":
            continue  # the server has its mask, on which the one of round 3 builds
        ended = play(server_twist(change), algorithm=algorithm)
        assert (ended.server, ended.honest) == (silent.server, silent.honest), name
    heard = reference(ALL, algorithm=algorithm)
    for name, change in HEARD.items():
        ended = play(server_twist(change), algorithm=algorithm)
        assert (ended.server, ended.honest) == (heard.server, heard.honest), name
    assert silent.server != heard.server


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_server_takes_no_value_that_is_not_finite(value: float) -> None:
    change = lambda r: forged(r, lambda _: float_frame("fedavg", value))  # noqa: E731
    ended = play(server_twist(change), algorithm="fedavg")
    silent = reference(ALL - {2}, algorithm="fedavg")
    assert (ended.server, ended.honest) == (silent.server, silent.honest)


def test_a_frame_with_long_names_of_layers_is_a_short_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "flwr")
    tensors = {ESCAPES + "x" * 60_000: torch.ones(3)}
    frame = encode_frame(
        tensors, sender=HOSTILE, round=2, fingerprint=tiny_agent(HOSTILE).fingerprint, run=RUN
    )
    change = lambda r: forged(r, lambda _: frame)  # noqa: E731
    play(server_twist(change), algorithm="fedavg")
    (told,) = [line for line in caplog.messages if "the server refused a frame" in line]
    assert len(told) < 1100
    assert told.isprintable()


def test_fedpm_takes_no_floats_where_masks_are_due() -> None:
    change = lambda r: forged(r, lambda _: float_frame("fedpm", 1.0))  # noqa: E731
    ended = play(server_twist(change), algorithm="fedpm")
    silent = reference(ALL - {2}, algorithm="fedpm")
    assert (ended.server, ended.honest) == (silent.server, silent.honest)


def test_what_an_agent_can_do_to_fedavg_it_says_how_many_examples_it_has() -> None:
    """FedAvg weighs by them: who says a great number has nearly all of the mean."""
    many = 10**15

    def twist(round: int, records: Records) -> Records:
        if round == ROUNDS:
            records["agent"] |= {**handshake_of("fedavg"), "num-examples": many}
        return records

    ended = play(twist, algorithm="fedavg")
    assert ended.taken == ALL
    heard = reference(ALL, algorithm="fedavg")
    assert ended.server != heard.server
    assert all(np.isfinite(np.frombuffer(bits, "f4")).all() for bits in ended.server.values())
