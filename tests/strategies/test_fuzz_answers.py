"""The fuzzer of benchmarks/fuzz_answers.py, and proof that it would notice."""

from typing import Any
from unittest.mock import patch

import pytest

from flower_mcepl.messages import answer as answers
from flower_mcepl.messages.limits import Fields
from tests.fleet.hostile import fuzzer


@pytest.mark.parametrize("count", [150, pytest.param(6_000, marks=pytest.mark.slow)])
def test_mutants_of_whole_answers(count: int) -> None:
    outcome = fuzzer.fuzz(count, seed=2)
    assert outcome.failures == []
    assert sum(outcome.counts.values()) >= count
    assert outcome.counts["accepted"] > count / 20
    assert len(outcome.counts) > 10


def test_a_find_is_repeated_by_its_number() -> None:
    alone = fuzzer.fuzz(1, seed=2, only=3)
    assert alone.failures == []
    assert alone.counts == fuzzer.fuzz(1, seed=2, only=3).counts
    assert sum(alone.counts.values()) == fuzzer.ROUNDS + 1  # with the closing


def always(record: str, key: str, value: Any) -> Any:
    """Mutants that are all the same."""

    def make(self: Any, records: dict[str, Any]) -> dict[str, Any]:
        mutant = fuzzer.copied(records)
        mutant[record][key] = value
        return dict(mutant)

    return patch.object(fuzzer.Mutants, "make", make)


def test_a_check_that_is_left_out_is_found_out() -> None:
    with (
        always("metrics", "own", b"no JSON"),
        patch.object(Fields, "check", lambda *_: None),
    ):
        outcome = fuzzer.fuzz(1, seed=2)
    assert "RecordError" in outcome.failures[0]


def test_a_text_that_is_not_made_visible_is_found_out() -> None:
    with always("agent", "refused", [fuzzer.ESCAPES]):
        assert fuzzer.fuzz(1, seed=2).failures == []
        with patch.object(answers, "visible", lambda text, **_: text):
            outcome = fuzzer.fuzz(1, seed=2)
    assert any("a line of the log" in failure for failure in outcome.failures)


def test_another_row_of_an_honest_agent_is_found_out() -> None:
    with patch.object(fuzzer, "honest_rows", lambda strategy: [id(strategy)]):
        outcome = fuzzer.fuzz(1, seed=2)
    assert any("other rows" in failure for failure in outcome.failures)
