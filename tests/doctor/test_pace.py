"""What the doctor says of the share of filters that a device would choose."""

from pathlib import Path

import pytest

from flower_mcepl import MceplAgent
from flower_mcepl.agents.parts.pacing import set_pace
from flower_mcepl.doctor.pace import check_pace
from tests.agents.test_auto_filters import agent


@pytest.mark.parametrize(("budget", "share"), [(0.31, 0.25), (0.51, 0.5), (0.8, 0.75), (1.0, 1.0)])
def test_the_share_that_fits_and_the_times_by_share(
    budget: float, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(MceplAgent, "_measure_step", lambda self, share: 0.1 + 0.8 * share)
    (found,) = check_pace(agent(0, step_budget=budget))
    assert (found.status, found.values["filters"]) == ("ok", share)
    assert found.values["step_costs"] == pytest.approx({"0.25": 0.3, "0.5": 0.5, "1": 0.9})
    assert "300 ms at 0.25, 500 ms at 0.5, 900 ms at 1 of the filters" in found.found
    assert f"a run begins at {share:g}" in found.found


def test_a_budget_that_nothing_fits_is_warned_of() -> None:
    one = agent(0, step_budget=0.1)
    set_pace([one], step_seconds=lambda agent, round, share: share)
    (found,) = check_pace(one)
    assert (found.status, found.values["filters"]) == ("warning", 0.25)
    assert "even there it takes 250 ms" in found.found


def test_an_agent_that_chooses_nothing_has_no_finding() -> None:
    assert [*check_pace(agent(0, filters="0.5", step_budget=0.0))] == []
