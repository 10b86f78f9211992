"""All algorithms by name, and how an agent is made of a run config."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from flower_mcepl.agents.agent import Agent
from flower_mcepl.agents.dfedavgm import DfedavgmAgent, DfedavgmConfig
from flower_mcepl.agents.dispfl import DispflAgent, DispflConfig
from flower_mcepl.agents.dsgd import DsgdAgent, DsgdConfig
from flower_mcepl.agents.fedavg import FedavgAgent, FedavgConfig, FedavgServer
from flower_mcepl.agents.fedpm import FedpmAgent, FedpmConfig, FedpmServer
from flower_mcepl.agents.fedspa import FedspaAgent, FedspaConfig, FedspaServer
from flower_mcepl.agents.local import LocalAgent, LocalConfig
from flower_mcepl.agents.mask_variants import (
    LocalMasksAgent,
    MaskAveragingAgent,
    NoFinetuningAgent,
    NoFinetuningConfig,
)
from flower_mcepl.agents.mcepl import MceplAgent, MceplConfig
from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.agents.server import Server
from flower_mcepl.config.fields import RunConfig, field_keys, with_section
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import ConfigError


class Algorithm(NamedTuple):
    """One algorithm: the class of its agents, of their parameters, and of its server."""

    agent: type[Agent]  # made with (index, module, data, config, *, seed, device)
    config: type[TrainingConfig]  # its fields in kebab-case are run-config keys
    # made with (module, num_agents, config, *, seed); None: agents hear each other
    server: type[Server] | None = None


_CLASSES = (
    Algorithm(MceplAgent, MceplConfig),
    Algorithm(NoFinetuningAgent, NoFinetuningConfig),
    Algorithm(LocalMasksAgent, MceplConfig),
    Algorithm(MaskAveragingAgent, MceplConfig),
    Algorithm(LocalAgent, LocalConfig),
    Algorithm(DsgdAgent, DsgdConfig),
    Algorithm(DfedavgmAgent, DfedavgmConfig),
    Algorithm(DispflAgent, DispflConfig),
    Algorithm(FedavgAgent, FedavgConfig, FedavgServer),
    Algorithm(FedspaAgent, FedspaConfig, FedspaServer),
    Algorithm(FedpmAgent, FedpmConfig, FedpmServer),
)
ALGORITHMS = {entry.agent.algorithm: entry for entry in _CLASSES}


def find_algorithm(name: str) -> Algorithm:
    """Return the algorithm that the run-config key ``algorithm`` names.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    if name not in ALGORITHMS:
        close = difflib.get_close_matches(str(name), ALGORITHMS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {name!r}.{hint}")
    return ALGORITHMS[name]


def algorithm_keys() -> set[str]:
    """Return the run-config keys that set the algorithms: plain ones, and in sections such as ``dsgd.lr``."""
    keys = set()
    for name, algorithm in ALGORITHMS.items():
        own = field_keys(algorithm.config) - {"retention", "first-retention"}
        if "retention" in field_keys(algorithm.config):
            own |= {"retention-conv", "retention-linear", "retention-layers"}
        keys |= own | {f"{name}.{key}" for key in own}
    return keys


def read_config(
    algorithm: str, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
) -> TrainingConfig:
    """Return one agent's parameters of the named algorithm.

    A key in the algorithm's section of the run config counts in place of the plain one,
    and a cosine schedule without ``lr-rounds`` lasts ``num-rounds``.

    Raises
    ------
    ConfigError
        If there is no such algorithm, or one of its settings is out of range.
    """
    own = with_section(run_config, algorithm)
    if own.get("lr-schedule") == "cosine" and not own.get("lr-rounds") and "num-rounds" in own:
        own["lr-rounds"] = own["num-rounds"]
    return find_algorithm(algorithm).config.from_run_config(
        own, agent=agent, node_config=node_config
    )


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
) -> Agent:
    """Make one agent of the named algorithm.

    Parameters
    ----------
    algorithm : str
        One of `ALGORITHMS`.
    index : int
        The agent's number in the graph, 0..N-1.
    module : nn.Module
        The network with the weights that all agents share or start from, as from
        `shared_module`.
    data : AgentData
        Training and test split.
    run_config, node_config : mapping
        Flower's settings of the run, and of this device; keys of other algorithms do
        not matter.
    seed : int
        Seed of the run, the same on all agents.
    device : str (default: "cpu")
        Where to calculate.

    Raises
    ------
    ConfigError
        If there is no such algorithm, or one of its settings is out of range.
    """
    chosen = find_algorithm(algorithm)
    config = read_config(algorithm, run_config, agent=index, node_config=node_config)
    make: Callable[..., Agent] = chosen.agent
    return make(index, module, data, config, seed=seed, device=device)


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
        served = ", ".join(name for name, entry in ALGORITHMS.items() if entry.server is not None)
        raise ConfigError(
            f"the algorithms with a server are {served}; got {algorithm!r}, whose agents hear "
            "each other. Give it a graph instead."
        )
    config = read_config(algorithm, run_config, agent=0)
    make: Callable[..., Server] = kind or chosen.server
    return make(module, num_agents, config, seed=seed)
