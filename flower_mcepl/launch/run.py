"""One run, from its plan to its outcome."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_mcepl.launch.logs import without_colors
from flower_mcepl.launch.plan import Plan, plan_run
from flower_mcepl.launch.restarts import plan_of_resumption
from flower_mcepl.launch.signals import StopSignals
from flower_mcepl.launch.superlink import private_superlink


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes
    ----------
    run_id
        Flower's number of the run.
    status
        Flower's word for it (``finished:completed``, ``finished:failed``,
        ``finished:stopped``), or ``timed-out`` when its time was over, or ``lost`` when
        the SuperLink went away.
    details
        The reason, as far as it is known.
    log
        The log of the run, without colors.
    seconds
        Wall time from the start of the SuperLink to the end of the run.
    superlink_log
        What the SuperLink and the processes below it printed.
    record
        Folder of the run record, if the run has one.
    """

    run_id: int
    status: str
    details: str
    log: str
    seconds: float
    superlink_log: str = ""
    record: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether the run really finished well."""
        return self.status == "finished:completed"


def run_app(
    app: Path,
    *,
    run_config: Mapping[str, object] | Sequence[str] = (),
    num_supernodes: int | None = None,
    federation_config: str = "",
    timeout: float | None = None,
    restarts: int = 2,
    on_line: Callable[[str], object] | None = None,
) -> RunOutcome:
    """Run one Flower app in a private SuperLink and wait for its end.

    The SuperLink starts in the current folder, so that an app's relative paths mean
    what the caller expects.

    Parameters
    ----------
    app
        Folder of the app, the one with its ``pyproject.toml``.
    run_config
        Overrides of the app's settings: a mapping, or the strings that ``flwr run
        --run-config`` takes.
    num_supernodes
        How many SuperNodes Flower simulates (default: the app's ``num-agents``).
    federation_config
        More of ``flwr run --federation-config``; ``client-resources-num-cpus`` is 1
        unless said here.
    timeout
        Seconds after which the run is stopped (default: none).
    restarts
        How often a run that lost a process of Flower's simulation is resumed in a new
        one, to the same bits (default: 2).
    on_line
        Called with each line of the run's log as it arrives.

    Returns
    -------
    RunOutcome
        How the run ended; a failed run is an outcome, not an exception.

    Raises
    ------
    ConfigError
        Flower refuses the app or its settings.
    LaunchError
        The SuperLink does not start or does not answer.
    """
    plan = plan_run(
        app,
        run_config=run_config,
        num_supernodes=num_supernodes,
        federation_config=federation_config,
    )
    on_line = on_line or (lambda _: None)
    return carry_out(plan, timeout=timeout, restarts=restarts, on_line=on_line, tell=on_line)


def carry_out(
    plan: Plan,
    *,
    timeout: float | None,
    restarts: int,
    on_line: Callable[[str], object],
    tell: Callable[[str], object],
    on_record: Callable[[Path], object] = lambda _: None,
) -> RunOutcome:
    """Do what the plan says; see ``run_app``.

    ``tell`` gets a line a resumption, ``on_record`` the path of the run record as soon
    as it is known.
    """
    started = time.monotonic()
    deadline = None if timeout is None else started + timeout
    for attempt in range(restarts + 1):
        outcome = _carry_out_once(
            plan, started=started, deadline=deadline, on_line=on_line, on_record=on_record
        )
        following = None if outcome.ok else plan_of_resumption(plan, outcome.record)
        if following is None or attempt == restarts:
            break
        how = "begins anew" if following == plan else "goes on from its checkpoint"
        tell(
            f"a process of Flower's simulation died; the run {how} in a new simulation "
            f"(restart {attempt + 1} of {restarts})"
        )
        plan = following
    return outcome


def _carry_out_once(
    plan: Plan,
    *,
    started: float,
    deadline: float | None,
    on_line: Callable[[str], object],
    on_record: Callable[[Path], object],
) -> RunOutcome:
    lines: list[str] = []
    record: Path | None = None

    def take(line: str) -> None:
        lines.append(without_colors(line))
        learn()
        on_line(line)

    def learn() -> None:
        nonlocal record
        if record is None and (record := superlink.record()) is not None:
            on_record(record)

    with StopSignals() as signals, private_superlink(signals) as superlink:
        run_id = superlink.submit(plan)
        try:
            status, details = superlink.follow(take, deadline=deadline)
        finally:
            learn()
        return RunOutcome(
            run_id,
            status,
            details,
            "\n".join(lines),
            time.monotonic() - started,
            superlink.read_log(),
            record,
        )
