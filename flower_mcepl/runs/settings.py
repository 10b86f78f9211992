"""The settings of a run and of a device, as keys of the run config."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from flower_mcepl.agents.registry import algorithm_keys, find_algorithm, read_config
from flower_mcepl.config.checks import check, refuse_unknown_keys
from flower_mcepl.config.fields import RunConfig, field_keys, read_fields
from flower_mcepl.data.batches import EVALUATED
from flower_mcepl.data.splits import check_data_keys
from flower_mcepl.errors import ConfigError
from flower_mcepl.topology import Topology


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """How one agent calculates; a SuperNode's node config may set the same keys for itself."""

    # "auto" (CUDA, else MPS, else CPU), or a torch device such as "cpu" or "cuda:1"
    device: str = "auto"
    threads: int = 1  # of torch on the CPU; float sums depend on it. 0: torch's own choice
    # folder of a device's states; "": below the user's; "none": they stay in Flower's
    # Context
    state_dir: str = ""
    state_runs: int = 2  # runs whose states stay in state_dir
    # say in the handshake, and so in the record, which classes the agent holds, and how
    # many
    tell_classes: bool = True

    def __post_init__(self) -> None:
        check(self.state_runs >= 1, "state-runs must be >= 1", self.state_runs)
        check(
            self.state_dir in ("", "none")
            or self.state_dir.startswith("~")
            or Path(self.state_dir).is_absolute(),
            'state-dir must be an absolute path, or "none" to keep the state in Flower\'s Context',
            self.state_dir,
        )
        check(self.threads >= 0, "threads must be >= 0 (0: torch's own choice)", self.threads)
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise ConfigError(
                f"device must be auto, cpu, cuda, cuda:N or mps; got {self.device!r} ({error})."
            ) from None

    def state_folder(self) -> Path | None:
        """Return the folder of the device's states, None if they stay in Flower's Context.

        By default it is ``$XDG_STATE_HOME/flower_mcepl``, else
        ``~/.local/state/flower_mcepl``.

        Raises
        ------
        ConfigError
            If there is no home folder, as for some system users.
        """
        if self.state_dir == "none":
            return None
        try:
            if self.state_dir:
                return Path(self.state_dir).expanduser()
            home = os.environ.get("XDG_STATE_HOME", "")
            return (
                Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "state"
            ) / "flower_mcepl"
        except RuntimeError as error:
            raise ConfigError(
                f"this process has no home folder for its agent's state ({error}); state-dir is "
                f"{self.state_dir!r}. Set state-dir to an absolute path in the SuperNode's "
                "--node-config."
            ) from None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What one run does, apart from the algorithm's own parameters.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    algorithm: str = "mcepl"  # one of flower_mcepl.agents.ALGORITHMS
    num_agents: int = 10
    num_rounds: int = 100
    seed: int = 0
    topology: str = "ring"  # see Topology.parse
    evaluate_every: int = 10  # rounds
    # the split that accuracy and loss are of: one of
    # flower_mcepl.data.batches.EVALUATED
    evaluate_on: str = "test"
    max_staleness: int = 5  # rounds for which an absent neighbor's last mask stays in use
    # rounds between whole frames; 0: when the deltas since the last one have as many
    # bytes
    key_interval: int = 0
    keep_frames: bool = False  # keep every frame in the run record
    # agents that must take part in round 1 and when a run resumes; 0: all, then as many
    # as last
    min_agents: int = 0
    round_timeout: float = 600.0  # seconds that a round may take
    # times the usual answer time, after which an agent is not waited for; 0:
    # round_timeout
    timeout_factor: float = 5.0
    # seconds to wait for these agents' nodes, and in a later round for any node
    wait_timeout: float = 120.0
    record_dir: str = "runs"  # the run record becomes a folder in here
    checkpoint_every: int = 25  # rounds between checkpoints in the run record; 0: none
    resume: str = ""  # the run record of a run that broke off: it goes on in there

    def __post_init__(self) -> None:
        for name in ("num_agents", "num_rounds", "evaluate_every"):
            check(
                getattr(self, name) >= 1,
                f"{name.replace('_', '-')} must be >= 1",
                getattr(self, name),
            )
        check(
            self.evaluate_on in EVALUATED,
            f"evaluate-on must be one of {', '.join(EVALUATED)}",
            self.evaluate_on,
        )
        check(self.max_staleness >= 0, "max-staleness must be >= 0", self.max_staleness)
        check(self.key_interval >= 0, "key-interval must be >= 0", self.key_interval)
        check(
            self.checkpoint_every >= 0,
            "checkpoint-every must be >= 0 (0: none)",
            self.checkpoint_every,
        )
        check(self.timeout_factor >= 0, "timeout-factor must be >= 0 (0: off)", self.timeout_factor)
        check(
            0 <= self.min_agents <= self.num_agents,
            f"min-agents must be in 0..{self.num_agents} (num-agents)",
            self.min_agents,
        )
        for name in ("round_timeout", "wait_timeout"):
            check(
                getattr(self, name) > 0,
                f"{name.replace('_', '-')} must be > 0 seconds",
                getattr(self, name),
            )

    @classmethod
    def from_run_config(
        cls, run_config: RunConfig, *, app_keys: Iterable[str] = ()
    ) -> "RunSettings":
        """Read and check the whole run config before anything runs, the algorithm's and devices' keys included.

        Parameters
        ----------
        run_config : mapping
            Flower's ``context.run_config``.
        app_keys : iterable of str
            Further keys that the app itself reads. Those of `DataSettings` are checked.

        Raises
        ------
        ConfigError
            If a key is unknown or a value has the wrong type or is out of range.
        TopologyError
            If the graph is impossible.
        """
        app_keys = set(app_keys)
        refuse_unknown_keys(
            run_config, field_keys(cls, DeviceSettings) | algorithm_keys() | app_keys
        )
        settings = read_fields(cls, run_config)
        algorithm = find_algorithm(settings.algorithm)
        read_config(settings.algorithm, run_config, agent=0)
        graph = settings.graph()
        check(
            not (graph.directed and algorithm.agent.undirected_only),
            f"algorithm {settings.algorithm} mixes with Metropolis weights, which need an "
            "undirected graph; topology",
            settings.topology,
            "Use ring, torus, erdos-renyi, small-world or another graph whose links go both ways.",
        )
        read_fields(DeviceSettings, run_config)
        check_data_keys(run_config, app_keys)
        return settings

    def graph(self) -> Topology:
        """Return the communication graph of the run."""
        return Topology.parse(self.topology, num_agents=self.num_agents, seed=self.seed)
