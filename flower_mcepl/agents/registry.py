"""All algorithms by name, and how an agent is made of a run config."""

import dataclasses
from collections.abc import Callable, Iterator

from torch import nn

from flower_mcepl.agents.agent import Agent
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.depth import deepest
from flower_mcepl.agents.parts.initial_weights import InitialWeights
from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.agents.server import Server
from flower_mcepl.agents.tasks import Task
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig, field_keys, with_section
from flower_mcepl.config.registry import Registry
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import ConfigError
from flower_mcepl.streams import isolated_rng

# On a device every message is a process of its own, which loads the one algorithm that
# its run names: so an entry is a reference, and the module behind it loads when it is
# asked for.
ALGORITHMS = Registry(
    "flower_mcepl.algorithms",
    Algorithm,
    {
        "mcepl": "flower_mcepl.agents.mcepl:MCEPL",
        "mcepl-no-finetuning": "flower_mcepl.agents.mask_variants:NO_FINETUNING",
        "local-masks": "flower_mcepl.agents.mask_variants:LOCAL_MASKS",
        "mask-averaging": "flower_mcepl.agents.mask_variants:MASK_AVERAGING",
        "local": "flower_mcepl.agents.local:LOCAL",
        "dsgd": "flower_mcepl.agents.dsgd:DSGD",
        "dfedavgm": "flower_mcepl.agents.dfedavgm:DFEDAVGM",
        "choco": "flower_mcepl.agents.choco:CHOCO",
        "dispfl": "flower_mcepl.agents.dispfl:DISPFL",
        "fedavg": "flower_mcepl.agents.fedavg:FEDAVG",
        "ditto": "flower_mcepl.agents.ditto:DITTO",
        "fedspa": "flower_mcepl.agents.fedspa:FEDSPA",
        "fedpm": "flower_mcepl.agents.fedpm:FEDPM",
    },
    noun="algorithm",
)


# attributes that the agents of every algorithm set
_DECLARED = ("index", "seed", "fingerprint", "layers")


def find_algorithm(name: str) -> Algorithm:
    """Return the algorithm that the run-config key ``algorithm`` names.

    Raises
    ------
    ConfigError
        If there is none of that name, or it cannot be loaded.
    """
    return ALGORITHMS.find(name)


def algorithm_keys() -> set[str]:
    """Run-config keys of all algorithms: plain, and in sections as ``dsgd.lr``."""
    keys = set()
    for name, algorithm in _usable():
        own = algorithm.keys() | field_keys(InitialWeights)
        keys |= own | {f"{name}.{key}" for key in own}
    return keys


def _usable() -> Iterator[tuple[str, Algorithm]]:
    """All algorithms that load; one that does not is refused where a run names it."""
    for name in ALGORITHMS:
        try:
            algorithm = ALGORITHMS.find(name)
        except ConfigError:
            continue
        yield name, algorithm


def read_config(
    algorithm: str, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
) -> TrainingConfig:
    """Return one agent's parameters of the named algorithm.

    A key in the algorithm's section of the run config counts in place of the plain one,
    and a schedule without ``lr-rounds`` or ``fusion-rounds`` lasts ``num-rounds``.

    Raises
    ------
    ConfigError
        If there is no such algorithm, or one of its settings is out of range.
    """
    own = with_section(run_config, algorithm)
    for of in ("lr", "fusion"):
        falls = own.get(f"{of}-schedule", "constant") != "constant"
        if falls and not own.get(f"{of}-rounds") and "num-rounds" in own:
            own[f"{of}-rounds"] = own["num-rounds"]
    config = find_algorithm(algorithm).read_config(own, agent=agent, node_config=node_config)
    InitialWeights.of(own, node_config).check_with(config)
    return config


def make_agent(
    algorithm: str,
    index: int,
    module: nn.Module,
    data: AgentData,
    run_config: RunConfig,
    node_config: RunConfig | None = None,
    *,
    seed: int,
    device: str = "cpu",
    task: Task | None = None,
) -> Agent:
    """Make one agent of the named algorithm; it bears that name in records and states.

    Parameters
    ----------
    algorithm : str
        One of `ALGORITHMS`.
    index : int
        The agent's number in the graph, 0..N-1.
    module : nn.Module
        The network with the weights that all agents share or start from, as from
        `shared_module`; the keys ``weights`` and ``weights-except`` put pretrained ones
        in their place.
    data : AgentData
        Training and test split.
    run_config, node_config : mapping
        Flower's settings of the run, and of this device; keys of other algorithms do
        not matter.
    seed : int
        Seed of the run, the same on all agents.
    device : str (default: "cpu")
        Where to calculate.
    task : Task, optional
        A task of one's own, in place of the run-config key ``task``.

    Raises
    ------
    ConfigError
        If there is no such algorithm, one of its settings is out of range, a task comes
        both ways, or the agent does not say what it sends.
    """
    chosen = find_algorithm(algorithm)
    config = read_config(algorithm, run_config, agent=index, node_config=node_config)
    if task is not None:
        check(
            isinstance(task, Task),
            "task must be a Task; a built-in one is the run-config key task",
            task,
        )
        check(
            "task" not in run_config,
            f"the task is given as a value, {task.name}; run-config key task",
            run_config.get("task"),
            "Remove the key.",
        )
        config = dataclasses.replace(config, task=task)
    initial = InitialWeights.of(with_section(run_config, algorithm), node_config)
    module, origin = initial.begin(module)
    if "depth" not in chosen.keys():
        module = deepest(module)
    make: Callable[..., Agent] = chosen.agent
    with isolated_rng(seed, "agent", agent=index):
        agent = make(index, module, data, config, seed=seed, device=device)
    missing = [name for name in _DECLARED if not hasattr(agent, name)]
    check(
        not missing,
        f"an agent must set {', '.join(_DECLARED)} when it is made; {type(agent).__name__} of "
        f"algorithm {algorithm} lacks",
        ", ".join(missing),
        "See flower_mcepl.agents.Agent.",
    )
    agent.algorithm, agent.weights_from = algorithm, origin
    return agent


def make_server(
    algorithm: str,
    module: nn.Module,
    num_agents: int,
    run_config: RunConfig,
    *,
    seed: int,
    kind: type[Server] | None = None,
) -> Server:
    """Make the server of the named algorithm.

    Parameters
    ----------
    algorithm : str
        One of `ALGORITHMS` that has a server.
    module : nn.Module
        The network that the agents are made with.
    num_agents : int
        N; agents are 0..N-1.
    run_config : mapping
        Flower's settings of the run, the same as for `make_agent`.
    seed : int
        Seed of the run, the same as on all agents.
    kind : type[Server], optional
        A subclass of the algorithm's server to make in place of it.

    Raises
    ------
    ConfigError
        If there is no such algorithm, it has no server, or one of its settings is out
        of range.
    """
    chosen = find_algorithm(algorithm)
    if chosen.server is None:
        served = ", ".join(name for name, entry in _usable() if entry.server is not None)
        raise ConfigError(
            f"the algorithms with a server are {served}; got {algorithm!r}, whose agents hear "
            "each other. Give it a graph instead."
        )
    config = read_config(algorithm, run_config, agent=0)
    initial = InitialWeights.of(with_section(run_config, algorithm), None)
    module, origin = initial.begin(module)
    make: Callable[..., Server] = kind or chosen.server
    server = make(deepest(module), num_agents, config, seed=seed)
    server.algorithm, server.weights_from = algorithm, origin
    return server
