"""What relay and agents say: the same bytes as ever, read back as they were written, and nothing believed unchecked."""

import json

import pytest

from .message_runs import FILE, record_messages

# --- the bytes on the wire ---


@pytest.fixture(scope="module")
def recorded() -> dict:
    """Orders and answers of scripted runs, recorded by `message_runs` before `Order` and `Answer` were classes."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_the_messages_of_whole_runs_are_those_recorded(recorded: dict) -> None:
    """Kinds, names, order of the keys, types and values; as text, since a loss may be not a number."""
    now = record_messages()
    for name, messages in recorded["messages"].items():
        for mine, then in zip(now["messages"][name], messages, strict=True):
            assert json.dumps(mine) == json.dumps(then)
    assert now["parcels"] == recorded["parcels"]
