"""What simulated agents hand over for the run record; the runs that are resumed from it
are in `tests.runs.test_resumption`.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Array

from flower_mcepl import AnswerError, RecordError
from flower_mcepl.agents import load_state
from flower_mcepl.agents.agent import best_file
from flower_mcepl.exchange.parcels import Answer
from flower_mcepl.exchange.turn import open_mail
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.store import StateStore
from flower_mcepl.strategies import handover
from flower_mcepl.strategies.handover import Handover, check_handed
from tests.fleet.agents import make_agent, same_tensors
from tests.fleet.flower_messages import RUN


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "in_simulation", lambda: True)


def a_generation(agent: int = 1, *, run: str = RUN, round: int = 4) -> Generation:
    fresh = make_agent(agent)
    return Generation.of(fresh, open_mail(fresh, max_staleness=5, run=run), run=run, round=round)


def an_answer(generation: Generation, **exported: bytes) -> Answer[Array]:
    files = {f".{ending}": data for ending, data in exported.items()}
    return Answer({"agent": 1}, {}, state=generation.encode(), exported=files)


def test_a_state_goes_into_the_record_and_back(tmp_path: Path) -> None:
    kept = Handover(tmp_path, run=RUN)
    generation = a_generation()
    kept.keep({1: an_answer(generation), 2: Answer({"agent": 2}, {})}, closing=False)
    assert [StateStore(tmp_path).rounds(agent) for agent in (1, 2)] == [[4], []]
    sent = kept.state_before(5, 1)
    assert sent is not None
    assert sent.data == generation.encode()
    assert kept.state_before(4, 1) is None
    assert kept.state_before(5, 2) is None


def test_the_end_leaves_final_state_best_state_and_model(tmp_path: Path) -> None:
    final = replace(a_generation(), best=a_generation(round=3).state)
    Handover(tmp_path, run=RUN).keep({1: an_answer(final, onnx=b"a model")}, closing=True)
    assert StateStore(tmp_path).rounds(1) == []
    assert same_tensors(
        load_state(tmp_path / "agent-0001.safetensors").tensors, final.state.tensors
    )
    assert (tmp_path / best_file(1)).exists()
    assert (tmp_path / "agent-0001.onnx").read_bytes() == b"a model"


def test_a_record_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "agents").write_text("a file in the folder's place", encoding="utf-8")
    kept = Handover(tmp_path / "agents", run=RUN)
    for closing in (False, True):
        with pytest.raises(RecordError, match="cannot write into the run record: "):
            kept.keep({1: an_answer(a_generation())}, closing=closing)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (an_answer(a_generation(2)), f"of run {RUN} must hand over a state of its own; got one of"),
        (an_answer(a_generation(run="feedfeedfeedfeed")), "agent 1 of run feedfeedfeedfeed"),
        (Answer({"agent": 1}, {}, state=b"x"), "agent 1 handed over no readable state: "),
        (Answer({"agent": 1}, {}, exported={".onnx": b"x"}), "no readable state"),
        (an_answer(a_generation(), exe=b"x"), r"ending in \.mask, .*; agent 1 handed over \.exe"),
    ],
)
def test_what_is_not_the_agents_own_is_its_failure(answer: Answer[Array], rule: str) -> None:
    with pytest.raises(AnswerError, match=rule):
        check_handed(answer, agent=1, run=RUN)


def test_a_device_that_sends_its_state_is_refused() -> None:
    with pytest.raises(AnswerError, match="a device keeps its state to itself, and agent 1 sent"):
        check_handed(an_answer(a_generation()), agent=1, run=RUN)
    check_handed(Answer({"agent": 1}, {}), agent=1, run=RUN)


def test_a_late_answer_to_the_last_round_is_no_final_state(tmp_path: Path) -> None:
    kept = Handover(tmp_path, run=RUN)
    kept.keep({1: replace(an_answer(a_generation()), late_of=4)}, closing=True)
    assert StateStore(tmp_path).rounds(1) == [4]
    assert not (tmp_path / "agent-0001.safetensors").exists()
