"""Settings of a device's resident worker, read where torch is not loaded."""

from dataclasses import dataclass, field

from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import FREE

RESIDENT, NONE = "resident", "none"


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Where the rounds of a device's agent are played.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    # "resident": in a process that stays between messages and keeps torch, network,
    # data and agent, where the app names its functions; "none": in the process that
    # Flower starts for each message
    worker: str = field(default=RESIDENT, metadata=FREE)
    # seconds without a message after which the resident process ends
    worker_idle: float = field(default=900.0, metadata=FREE)

    def __post_init__(self) -> None:
        check(self.worker in (RESIDENT, NONE), 'worker must be "resident" or "none"', self.worker)
        check(self.worker_idle > 0, "worker-idle must be > 0 seconds", self.worker_idle)
