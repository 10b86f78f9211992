"""Device of an agent: its number, settings and data, and what torch calculates with."""

from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Context

from flower_mcepl.clients.naming import agent_index
from flower_mcepl.config.fields import read_fields
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import ConfigError, DataError
from flower_mcepl.runs.settings import DeviceSettings, RunSettings, read_device
from flower_mcepl.streams import isolated_rng

DataFn = Callable[[Context], tuple[object, object]]

# modules and data of the present run, for all agents of this process
_shared: dict[tuple[object, ...], Any] = {}


def device_settings(context: Context) -> DeviceSettings:
    """Settings of the device; the node config's stand above the run config's."""
    return read_device(context.run_config, context.node_config)


def torch_device(context: Context) -> str:
    """Name of the device that torch calculates on."""
    device = device_settings(context).device
    if device != "auto":
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f'device is {device!r}, but torch finds no CUDA here. Use device = "auto" or '
                '"cpu"; in simulation, give each client a share of the GPU '
                "(client-resources-num-gpus in --federation-config)."
            )
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_data(data_fn: DataFn, context: Context, *, seed: int) -> AgentData:
    """Splits of the agent, by the app's data function, whose draws are seeded."""
    index = agent_index(context)
    with isolated_rng(seed, "data", agent=index):
        splits: object = data_fn(context)
    if not isinstance(splits, tuple) or len(splits) not in (2, 3):
        got = f"a tuple of {len(splits)}" if isinstance(splits, tuple) else type(splits).__name__
        raise DataError(
            "the data function must return the pair (train, test), or (train, validation, test); "
            f"for agent {index} it gave {got}."
        )
    train, *validation, test = splits
    return AgentData.of(
        train,
        test,
        agent=index,
        validation=validation[0] if validation else None,
        evaluate_on=read_fields(RunSettings, context.run_config).evaluate_on,
    )


def once(context: Context, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
    """Value that ``make`` gave earlier in this process and run, under a key."""
    if any(run_id != context.run_id for run_id, *_ in _shared):
        _shared.clear()
    place = (context.run_id, *key)
    if place not in _shared:
        _shared[place] = make()
    return _shared[place]
