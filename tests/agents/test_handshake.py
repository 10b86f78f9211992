"""Handshakes: everything that agents must have in common is compared, each with its own
way out.
"""

from typing import Any

import pytest

from flower_mcepl import ConfigError, FingerprintError
from flower_mcepl.agents.handshake import check_common_ground, introduction
from tests.fleet.agents import make_agent

# what differs, and the words that say what to do
DIFFERENCES = {
    "algorithm": ("different algorithms", "Run the same algorithm"),
    "main-metric": (r"tasks \(main-metric\)", "Set the same task"),
    "higher-is-better": (r"tasks \(higher-is-better\)", "Set the same task"),
    "metric-unit": (r"tasks \(metric-unit\)", "Set the same task"),
    "kept-by-layer": ("numbers of layers", "same model function"),
    "num-weights": ("numbers of maskable weights", "same model function"),
    "fingerprint": ("frozen weights", "same seed, model function and torch release"),
    "first-mask": ("common first masks", "same first_retention"),
    "prior": ("classes of weights", "same score_init and torch release"),
}


def facts(**changes: Any) -> dict[str, Any]:
    return {**make_agent(0).describe(), **changes}


def test_agents_of_one_run_have_common_ground() -> None:
    check_common_ground("agent 0", facts(), "agent 1", make_agent(1).describe())


@pytest.mark.parametrize("key", DIFFERENCES)
def test_a_difference_is_refused_by_its_name(key: str) -> None:
    what, way_out = DIFFERENCES[key]
    message = rf"agent 0 and agent 1 have .*{what}.*: .* and other\. .*{way_out}"
    with pytest.raises(FingerprintError, match=message):
        check_common_ground("agent 0", facts(), "agent 1", facts(**{key: "other"}))


def test_agents_with_other_classes_of_weights_are_refused() -> None:
    """Independent first scores make other classes, and frames other masks."""
    independent = make_agent(1, score_init="independent").describe()
    assert facts()["prior"] != independent["prior"]
    with pytest.raises(FingerprintError, match="classes of weights for the wire"):
        check_common_ground("agent 0", facts(), "agent 1", independent)


def test_counts_of_kept_weights_may_differ_but_not_how_many_layers_there_are() -> None:
    kept = facts()["kept-by-layer"]
    other = facts(**{"kept-by-layer": [count + 1 for count in kept]})
    check_common_ground("agent 0", facts(), "agent 1", other)
    fewer = facts(**{"kept-by-layer": kept[1:]})
    with pytest.raises(FingerprintError, match=r"numbers of layers\): 2 and 1\."):
        check_common_ground("agent 0", facts(), "agent 1", fewer)


def test_a_server_has_no_task_and_an_agent_must_say_its_own() -> None:
    server = {key: facts()[key] for key in ("algorithm", "num-weights", "fingerprint")}
    plain = {key: fact for key, fact in facts().items() if key not in ("first-mask", "prior")}
    check_common_ground("agent 0", plain, "the server", server)
    silent = {key: fact for key, fact in facts().items() if key != "main-metric"}
    with pytest.raises(FingerprintError, match=r"main-metric\): None and accuracy"):
        check_common_ground("agent 0", silent, "agent 1", facts())


def test_a_fact_is_called_as_no_other_one_is_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent(0)
    told = agent.describe() | {"main_metric": "loss"}
    monkeypatch.setattr(agent, "describe", lambda: told)
    with pytest.raises(ConfigError, match=r"kebab-case.*got \['main_metric'\]\. Rename them"):
        introduction(agent, tell_classes=True)
