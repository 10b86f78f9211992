"""The ClientApp of an agent, from the app's functions or from their names."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.clientapp import ClientApp

from flower_mcepl.clients.message_app import Mod
from flower_mcepl.clients.named import NamedApp, Names
from flower_mcepl.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from flower_mcepl.agents import Task


def make_client_app(
    model_fn: "Callable[[Context], nn.Module] | str",
    data_fn: Callable[[Context], tuple[object, object]] | str,
    *,
    task: "Task | str | None" = None,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """Make the ClientApp of one agent from what a Flower app has anyway.

    Functions may be given by name, ``"my_app.task:model_fn"``, from modules that the
    one with the ClientApp does not import. On a device, where every message is a
    process of its own, that process then loads neither torch nor data: the rounds are
    played in the device's resident worker (`WorkerSettings`).

    Parameters
    ----------
    model_fn : callable or str
        ``model_fn(context)`` returns the network, freshly initialised. It is called on
        the run's seed, so that every device draws the same weights; they are never
        sent.
    data_fn : callable or str
        ``data_fn(context)`` returns the agent's splits ``(train, test)`` or ``(train,
        validation, test)``: pairs of tensors, map-style datasets or DataLoaders (see
        `flower_mcepl.data.batches.AgentData.of`). The run-config key ``evaluate-on``
        says which of the last two the agent is evaluated on. Which agent it is stands
        in ``context.node_config["partition-id"]``.
    task : Task or str, optional
        Loss, metrics and targets of one's own, or their name, in place of the
        run-config key ``task`` (``"classification"``, ``"binary"``, ``"multilabel"``,
        ``"regression"``, ``"segmentation"`` or ``"tokens"``).
    mods : sequence of callables (default: none)
        Flower's mods around every message, ``mod(message, context, call_next)``, as for
        any ClientApp. The agent's new state is kept only after they have let the answer
        pass.

    Raises
    ------
    ConfigError
        If a mod cannot work here, as Flower's own that clip arrays or add noise; if
        some are given by name and others not, or a name is not "module:attribute".

    Notes
    -----
    All parameters are read from the run config (``algorithm``, the parameters of that
    algorithm, `DeviceSettings`, ``seed``); a SuperNode's node config may set
    ``retention-conv``, ``retention-linear``, ``filters``, ``step-budget``, ``depth``,
    ``density``, ``weights``, ``weights-except`` and the `DeviceSettings` for itself.
    Both functions are called once per process and run, and their results are kept;
    what they draw from a global generator is the same each time. With ``worker =
    "none"``, or without names, a device calls them for every message.

    Examples
    --------
    >>> app = make_client_app("my_app.task:model_fn", "my_app.task:data_fn")
    """
    if isinstance(task, str) and ":" not in task:
        raise ConfigError(
            "a task of the package is chosen by the run-config key task, for server and devices "
            f"alike; make_client_app got task={task!r}. Write it into the app's pyproject.toml, or "
            "pass a Task of your own, or its name, module:attribute."
        )
    if isinstance(model_fn, str) and isinstance(data_fn, str):
        if not isinstance(task, str | None):
            raise _mixed(task)
        return NamedApp(Names(model_fn, data_fn, task), mods)
    for given in (model_fn, data_fn, task):
        if isinstance(given, str):
            raise _mixed(given)
    from flower_mcepl.clients.app import app_of_functions

    return app_of_functions(model_fn, data_fn, task=task, mods=mods)  # type: ignore[arg-type]


def _mixed(given: object) -> ConfigError:
    return ConfigError(
        "make_client_app takes model_fn, data_fn and task all by name, such as "
        f'"my_app.task:model_fn", or none of them; got {given!r:.80} beside others of the other '
        "kind. Name all of them, or import them."
    )
