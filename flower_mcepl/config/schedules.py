"""Names of the schedules that a run may go by."""

ROUNDS, ASYNC = "rounds", "async"  # rounds of all agents, or each agent's own
SCHEDULES = (ROUNDS, ASYNC)
