"""Keys of compact training, and `filters = "auto"`: the device chooses its share."""

import math
from typing import Any, Protocol

from flower_mcepl.agents.parts.pace import LEVELS
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig
from flower_mcepl.errors import ConfigError

FULL, COMPACT = "full", "compact"  # of filters-training
AUTO, FILTERS, BUDGET = "auto", "filters", "step-budget"
SCHEDULE = ("filters-rounds", "filters-warmup")


class _Settings(Protocol):
    @property
    def filters(self) -> float: ...
    @property
    def has_gates(self) -> bool: ...
    @property
    def filters_refresh(self) -> int: ...
    @property
    def filters_auto(self) -> bool: ...
    @property
    def filters_training(self) -> str: ...
    @property
    def step_budget(self) -> float: ...


def check_compact_keys(config: _Settings) -> None:
    """Check the settings of compact training, and those of ``filters = "auto"``.

    Raises
    ------
    ConfigError
        If the first has no gates, or the second lacks a budget or compact training, or
        there is a budget without it.
    """
    check(config.filters_refresh >= 1, "filters-refresh must be >= 1", config.filters_refresh)
    check(
        config.filters_training == FULL or config.has_gates,
        "filters-training compact leaves out filters that are off and needs a share of filters "
        "below 1",
        config.filters,
        'Set filters, such as "1.0, 0.5".',
    )
    budget = config.step_budget
    check(math.isfinite(budget) and budget >= 0, f"{BUDGET} must be a finite number >= 0", budget)
    if not config.filters_auto:
        check(budget == 0, f'{BUDGET} is for filters = "auto", which chooses by it', budget)
        return
    check(budget > 0, f'filters = "auto" needs a {BUDGET} > 0, seconds of a local step', budget)
    check(
        config.filters_training == COMPACT,
        'filters = "auto" makes steps shorter only with filters-training compact',
        config.filters_training,
    )


def without_auto(
    run_config: RunConfig, node_config: RunConfig | None
) -> tuple[RunConfig, RunConfig | None, dict[str, Any]]:
    """Settings of an agent in which ``filters`` is a number, and fields to set instead.

    In the run config "auto" is for all agents. A node config's number or "auto" wins on
    its device; all agents have gates in either case.

    Raises
    ------
    ConfigError
        If a schedule of filters is set, or the run config leaves all filters on.
    """
    node = dict(node_config or {})
    if AUTO not in (run_config.get(FILTERS), node.get(FILTERS)):
        return run_config, node_config, {}
    run = dict(run_config)
    if run.get(FILTERS) == AUTO:
        run[FILTERS] = ", ".join(map(str, LEVELS))  # what the agents may come to have
    elif run.get(FILTERS, 1.0) in (1.0, 1):
        raise ConfigError(
            'the node config\'s filters is "auto" where the run config leaves all filters on. Set '
            'filters in the run config, too, such as "auto".'
        )
    budget = node.get(BUDGET, run.pop(BUDGET, 0.0))
    if node.get(FILTERS, run_config.get(FILTERS)) != AUTO:
        return run, node, {}
    for key in SCHEDULE:
        check(
            not run.get(key),
            f'filters = "auto" has no schedule; run-config key {key}',
            run.get(key),
            "Remove the key.",
        )
    run.pop("num-rounds", None)  # from which a schedule would follow
    return run, {**node, FILTERS: 1.0}, {"filters_auto": True, "step_budget": _number(budget)}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"key {BUDGET} must be a number of seconds; got {value!r}.")
    return float(value)
