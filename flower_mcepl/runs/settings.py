"""The settings of a run and of a device, as keys of the run config."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flower_mcepl.agents.registry import algorithm_keys, find_algorithm, read_config
from flower_mcepl.agents.stacking import check_stackable
from flower_mcepl.config.checks import check, refuse_unknown_keys
from flower_mcepl.config.engines import BATCHED, LOOP, check_engine
from flower_mcepl.config.fields import FREE, RunConfig, field_keys, read_fields
from flower_mcepl.config.sizes import read_bytes
from flower_mcepl.data.batches import EVALUATED
from flower_mcepl.data.splits import check_data_keys
from flower_mcepl.errors import ConfigError
from flower_mcepl.exchange.ages import check_graph, check_votes
from flower_mcepl.files.user_folders import user_folder
from flower_mcepl.record.layout import EXPORTS
from flower_mcepl.runs.options import RoundOptions, check_nodes
from flower_mcepl.runs.schedules import check_schedule, check_votes_of_server
from flower_mcepl.runs.worker_settings import WorkerSettings
from flower_mcepl.streams import check_seed
from flower_mcepl.topology import Topology


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(WorkerSettings):
    """Device settings of one agent; a SuperNode's node config may set the same keys."""

    # "auto" (CUDA, else MPS, else CPU), or a torch device such as "cpu" or "cuda:1"
    device: str = "auto"
    threads: int = 1  # of torch on the CPU; float sums depend on it. 0: torch's own choice
    # folder of a device's states; "": below the user's; "none": they stay in Flower's
    # Context. It comes from the device alone, never from a run config
    state_dir: str = ""
    state_runs: int = field(default=2, metadata=FREE)  # runs whose states stay in state_dir
    # bytes of built agents, networks and states, that a process keeps; the newest one
    # always stays
    agent_cache: str = field(default="1GB", metadata=FREE)
    # say in the handshake, and so in the record, which classes the agent holds, and how
    # many
    tell_classes: bool = field(default=True, metadata=FREE)
    # "mask", "pt2" or "onnx": the personal model as a file at the end of the run, in
    # the record where the agent is simulated, else in models/ below state_dir
    export: str = field(default="", metadata=FREE)
    # record of a run with filters = "auto", a path on the device: take its decisions
    # again, and so give its bits
    decisions: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.export in ("", *EXPORTS),
            'export must be "mask", "pt2", "onnx", or "" for no file',
            self.export,
        )
        check(
            not (self.export and self.state_dir == "none"),
            'export needs a folder on the device, and state-dir must not be "none" beside it',
            self.export,
        )
        check(self.state_runs >= 1, "state-runs must be >= 1", self.state_runs)
        check(
            self.state_dir in ("", "none")
            or self.state_dir.startswith("~")
            or Path(self.state_dir).is_absolute(),
            'state-dir must be an absolute path, or "none" to keep the state in Flower\'s Context',
            self.state_dir,
        )
        read_bytes(self.agent_cache, key="agent-cache")
        check(self.threads >= 0, "threads must be >= 0 (0: torch's own choice)", self.threads)
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise ConfigError(
                f"device must be auto, cpu, cuda, cuda:N or mps; got {self.device!r} ({error})."
            ) from None

    @property
    def agent_cache_bytes(self) -> int:
        """Bytes that `agent_cache` names."""
        return read_bytes(self.agent_cache, key="agent-cache")

    def state_folder(self) -> Path | None:
        """Folder of the device's states; None if they stay in Flower's Context.

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
            return user_folder("XDG_STATE_HOME", ".local", "state") / "flower_mcepl"
        except RuntimeError as error:
            raise ConfigError(
                f"this process has no home folder for its agent's state ({error}); state-dir is "
                f"{self.state_dir!r}. Set state-dir to an absolute path in the SuperNode's "
                "--node-config."
            ) from None


@dataclass(frozen=True, kw_only=True)
class RunSettings(RoundOptions):
    """What one run does, apart from the algorithm's own parameters.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    algorithm: str = "mcepl"  # one of flower_mcepl.agents.ALGORITHMS
    num_agents: int = 10
    num_rounds: int = field(default=100, metadata=FREE)
    seed: int = 0
    topology: str = "ring"  # see Topology.parse
    # the split that accuracy and loss are of: one of flower_mcepl.data.EVALUATED
    evaluate_on: str = "test"
    # how a node with several agents calculates, or a run without Flower: "loop": one
    # after the other; "batched": equal agents as a stack, to bits of its own
    engine: str = LOOP
    round_timeout: float = field(default=600.0, metadata=FREE)  # seconds that a round may take
    # the run record becomes a folder in here
    record_dir: str = field(default="runs", metadata=FREE)
    # the run record of a run that broke off: it goes on in there
    resume: str = field(default="", metadata=FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_agents", "num_rounds"):
            key, value = name.replace("_", "-"), getattr(self, name)
            check(value >= 1, f"{key} must be >= 1", value)
        check_seed(self.seed)
        check(
            self.evaluate_on in EVALUATED,
            f"evaluate-on must be one of {', '.join(EVALUATED)}",
            self.evaluate_on,
        )
        check(
            self.min_agents <= self.num_agents,
            f"min-agents must be in 0..{self.num_agents} (num-agents)",
            self.min_agents,
        )
        check(
            self.evaluate_on == "validation" or not (self.keep_best or self.patience),
            "keep-best and patience choose by the evaluation, and what was chosen by test "
            'examples has no honest result on them: evaluate-on must be "validation"',
            self.evaluate_on,
            "Set it, with validation-fraction > 0 or a validation split from the data function; "
            "test the chosen states afterwards (docs/data.md).",
        )
        check_engine(self.engine)
        check_nodes(self.num_agents, self.agents_per_node)
        check(self.round_timeout > 0, "round-timeout must be > 0 seconds", self.round_timeout)

    @classmethod
    def from_run_config(
        cls, run_config: RunConfig, *, app_keys: Iterable[str] = ()
    ) -> "RunSettings":
        """Read and check the whole run config before anything runs.

        The algorithm's and the devices' keys are checked, too.

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
        # first, as an algorithm that does not load has no keys
        _refuse_state_dir(run_config)
        algorithm = find_algorithm(run_config.get("algorithm", cls.algorithm))
        refuse_unknown_keys(
            run_config, field_keys(cls, DeviceSettings) | algorithm_keys() | app_keys
        )
        settings = read_fields(cls, run_config)
        config = read_config(settings.algorithm, run_config, agent=0)
        if settings.engine == BATCHED:
            check_stackable(algorithm.agent, config, whose=f"algorithm {settings.algorithm}")
        check(
            "lr" not in run_config or "lr" in algorithm.keys() | app_keys,
            f"algorithm {settings.algorithm} has no lr, so that the key would change nothing",
            run_config.get("lr"),
            "Remove it, set score-lr and finetune-lr of masks, or write it into a section such as "
            "dsgd.lr.",
        )
        check(
            run_config.get("depth", 0) == 0 or "depth" in algorithm.keys() | app_keys,
            f"agents of algorithm {settings.algorithm} all hold the whole network; depth",
            run_config.get("depth"),
            "Remove it, write it into a section such as mcepl.depth, or use mcepl, local, dsgd, "
            "dfedavgm or choco.",
        )
        check_schedule(settings.schedule, has_server=algorithm.server is not None)
        if algorithm.server is not None:
            check_votes_of_server(settings.age_decay)
        elif settings.age_decay != 1:
            weighs = algorithm.agent.weighs_votes_with(config)
            check_votes(settings.age_decay, whose=f"algorithm {settings.algorithm}", weighs=weighs)
        graph = settings.graph()
        check_graph(settings.schedule, graph)
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


def read_device(run_config: RunConfig, node_config: RunConfig) -> DeviceSettings:
    """Settings of a device; the node config's stand above the run config's.

    Raises
    ------
    ConfigError
        If a value has the wrong type or is out of range, or the run config says where
        the device keeps its states.
    """
    _refuse_state_dir(run_config)
    return read_fields(DeviceSettings, {**run_config, **node_config})


def _refuse_state_dir(run_config: RunConfig) -> None:
    """Refuse a run config that says below which folder a device writes and deletes."""
    check(
        "state-dir" not in run_config,
        "state-dir comes from the device alone, which writes and deletes below it; the run config "
        "must not name it",
        run_config.get("state-dir"),
        "Remove it there, and set it where it is to differ from the default: flower-supernode "
        "--node-config 'state-dir=\"/an/absolute/path\"'.",
    )


def recorded(settings: RunSettings, run_config: RunConfig) -> dict[str, Any]:
    """What the run record says of a run config, beside the options of the rounds."""
    cache = read_fields(DeviceSettings, run_config).agent_cache
    return {"run_config": dict(run_config), "seed": settings.seed, "agent_cache": cache}
