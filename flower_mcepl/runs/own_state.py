"""What of a run without a barrier must survive beside its exchange, in checkpoints.

Answers to rounds that not all have played yet, and what is under way between the
exchange and agents: under `simulate` answers that have not come yet, as an agent plays
when it gets its parcel; under Flower the parcels, which are sent again.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from flower_mcepl.exchange.parcels import Answer, FrameT, Parcel, Posted, by_number, post_facts
from flower_mcepl.files.bundle import Arrays, Bundle

_ANSWER = (
    *("facts", "metrics", "content", "refused", "lacking", "fresh", "late_of", "introduces"),
    "evaluation_error",
)
_PARCEL = ("round", "evaluate", "train", "acknowledged", "whole")


def answer_facts(answer: Answer[Any]) -> dict[str, Any]:
    """An answer without its frames and what it hands over, JSON-able."""
    return {**{name: getattr(answer, name) for name in _ANSWER}, "held": dict(answer.held)}


def answer_of(facts: Mapping[str, Any]) -> Answer[Any]:
    """Answer from `answer_facts`."""
    return Answer(**{name: facts[name] for name in _ANSWER}, held=by_number(facts["held"]))


def answers_state(answers: Mapping[int, Answer[bytes]]) -> Bundle:
    """Whole answers by agent, but for what a simulated agent of Flower hands over."""
    facts = {
        str(agent): {**answer_facts(answer), "posts": [post_facts(p) for p in answer.posts]}
        for agent, answer in answers.items()
    }
    frames = {
        f"{agent}/{place}": np.frombuffer(post.frame, np.uint8)
        for agent, answer in answers.items()
        for place, post in enumerate(answer.posts)
    }
    return Bundle(facts, frames)


def answers_of(state: Bundle) -> dict[int, Answer[bytes]]:
    """Answers from `answers_state`."""
    answers = {}
    for agent, facts in state.facts.items():
        frames = [state.arrays[f"{agent}/{i}"].tobytes() for i in range(len(facts["posts"]))]
        posts = [Posted(frame, *rest) for frame, rest in zip(frames, facts["posts"], strict=True)]
        answers[int(agent)] = replace(answer_of(facts), posts=posts, raw=frames)
    return answers


def parcels_state(
    parcels: Mapping[int, Parcel[FrameT]], open_frame: Callable[[FrameT], bytes]
) -> Bundle:
    """Parcels by agent."""
    facts, frames = {}, Arrays()
    for agent, parcel in parcels.items():
        facts[str(agent)] = {
            **{name: getattr(parcel, name) for name in _PARCEL},
            "neighbors": None if parcel.neighbors is None else list(parcel.neighbors),
            "chains": [[sender, len(chain)] for sender, chain in parcel.frames.items()],
            "kept": {sender: list(counts) for sender, counts in parcel.kept.items()},
            "ages": None if parcel.ages is None else dict(parcel.ages),
        }
        for sender, chain in parcel.frames.items():
            for place, frame in enumerate(chain):
                data = np.frombuffer(open_frame(frame), np.uint8)
                frames[f"{agent}/{sender}/{place}"] = data
    return Bundle(facts, frames)


def parcels_of(state: Bundle, wrap_frame: Callable[[bytes], FrameT]) -> dict[int, Parcel[FrameT]]:
    """Parcels from `parcels_state`."""
    parcels = {}
    for agent, facts in state.facts.items():
        frames = {
            sender: [
                wrap_frame(state.arrays[f"{agent}/{sender}/{place}"].tobytes())
                for place in range(length)
            ]
            for sender, length in facts["chains"]
        }
        parcels[int(agent)] = Parcel(
            **{name: facts[name] for name in _PARCEL},
            neighbors=None if facts["neighbors"] is None else tuple(facts["neighbors"]),
            frames=frames,
            kept=by_number(facts["kept"]),
            ages=None if facts["ages"] is None else by_number(facts["ages"]),
        )
    return parcels
