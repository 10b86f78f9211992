"""Schedules of a run: rounds of all agents, or each agent's own."""

from flower_mcepl.config.checks import check
from flower_mcepl.config.schedules import ASYNC, ROUNDS, SCHEDULES
from flower_mcepl.errors import ConfigError


def check_schedule(
    schedule: str,
    *,
    time_budget: float = 0.0,
    patience: int = 0,
    agents_per_node: int = 1,
    has_server: bool = False,
) -> None:
    """Raise ConfigError unless a run can go by this schedule."""
    check(schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}", schedule)
    check(time_budget >= 0, "time-budget must be >= 0 seconds (0: none)", time_budget)
    if schedule == ROUNDS:
        check(
            time_budget == 0,
            f"time-budget ends a run of schedule {ASYNC}; with schedule {ROUNDS} it must be 0",
            time_budget,
            "Set num-rounds instead.",
        )
        return
    none = f"a run of schedule {ASYNC}"
    check(patience == 0, f"{none} has no rounds of all agents to stop after; patience", patience)
    check(
        agents_per_node == 1,
        f"{none} has one agent a node, whose message waits for no other; agents-per-node must be 1",
        agents_per_node,
    )
    if has_server:
        raise ConfigError(
            f"{none} is one of agents that hear each other; a server-based algorithm waits for "
            f"all of them. Use schedule {ROUNDS}."
        )


def check_votes_of_server(age_decay: float) -> None:
    """Raise ConfigError if votes are to fade where agents hear a server."""
    check(
        age_decay == 1,
        "agents of a server-based algorithm hear its model, which has no vote; age-decay must be 1",
        age_decay,
        "Leave it out.",
    )
