"""Which agents can calculate as one stack, and a trial before the first round."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Agent
from flower_mcepl.agents.mcepl import MceplAgent, MceplConfig
from flower_mcepl.agents.parts.arithmetic import EXACT
from flower_mcepl.agents.parts.training import TrainingConfig, gradients_of
from flower_mcepl.agents.stack import AgentStack, shape_of
from flower_mcepl.config.checks import check
from flower_mcepl.config.engines import BATCHED, LOOP
from flower_mcepl.data.batches import Batch
from flower_mcepl.errors import ConfigError, FlowerMceplError, UnsupportedLayerError
from flower_mcepl.masks.placement import evaluating
from flower_mcepl.masks.stacked import stacked
from flower_mcepl.streams import SHARED_GENERATORS, noting_draws

# Differences relative to the norm. A mistake is of the order of 1. Loss and outputs
# differ by the last places of floats. So do gradients, unless a tie in a max pool falls
# the other way: then one image counts in another place, 2 % of a layer's gradient in a
# narrow AlexNet at batch 8.
CLOSE = {"loss": 1e-2, "outputs": 1e-2}
CLOSE_GRADIENTS = 0.25
FLIPPED = 1e-3  # share of a layer's mask, or one pair of bits: nearly equal scores
WAY_OUT = f'Use engine "{LOOP}", or "in-process" in a study.'


def stacks_of(agents: Sequence[Agent]) -> list[AgentStack]:
    """Agents in stacks of equal ones: one network, one configuration but for ratios.

    Raises
    ------
    ConfigError
        If an agent is of another algorithm than MCE-PL and its variants, or has a
        setting that no stack can follow.
    """
    groups: list[list[MceplAgent]] = []
    for agent in agents:
        one = _stackable(agent)
        group = next((group for group in groups if _alike(one, group[0])), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return [AgentStack(group) for group in groups]


def check_stack(stack: AgentStack) -> None:
    """Compare a stack's losses and gradients with each agent's own, on a batch each.

    Raises
    ------
    UnsupportedLayerError
        If the network cannot be called for several agents at once, or gives something
        else then.
    """
    own = [_Own(agent) for agent in stack.agents]
    alike: dict[object, list[_Own]] = {}
    for one in own:
        alike.setdefault(shape_of(one.batch), []).append(one)
    for group in alike.values():
        part = AgentStack([one.agent for one in group])
        with _naming_the_layer(part.first.model.module):
            masks = stacked([one.masks for one in group])
            results = part.trial([one.batch for one in group], masks)
            together = part.masks()
        for i, one in enumerate(group):
            one.compare({name: result[i] for name, result in results.items()})
            one.compare_masks({name: mask[i] for name, mask in together.items()})


class _Own:
    """An agent's batch, and what its own network makes of it."""

    def __init__(self, agent: MceplAgent) -> None:
        self.agent = agent
        self.batch: Batch
        self.results: dict[str, Tensor]
        self.masks = agent.model.masks()
        agent.model.train()
        agent.learner.on_one_batch(agent.data.train, agent.model.module, self._measure)

    def _measure(self, inputs: object, targets: Tensor) -> float:
        agent, model = self.agent, self.agent.model
        self.batch = inputs, targets
        with evaluating(model.module), torch.no_grad():  # before running statistics change
            outputs = agent.learner.outputs(model, inputs)
        drew = noting_draws()
        agent.learner.loss_of(outputs, targets)
        if drew():
            raise UnsupportedLayerError(
                f"a stack of agents needs a loss that draws nothing; agent {agent.index}'s draws "
                f"from {SHARED_GENERATORS}. {WAY_OUT}"
            )
        loss = agent.learner.loss(model, inputs, targets)
        gradients = gradients_of(agent.objective(loss), model.scores)
        self.results = {"loss": loss.detach(), "outputs": outputs, **gradients}
        return 0.0

    def compare(self, results: Mapping[str, Tensor]) -> None:
        """Raise UnsupportedLayerError unless the stack's results are the same."""
        norms = {name: float(own.norm()) for name, own in self.results.items()}
        least = 1e-6 * max(norms.values())  # of a layer that gets next to no gradient
        bad = [
            name
            for name, own in self.results.items()
            if not float((own - results[name]).norm())
            <= CLOSE.get(name, CLOSE_GRADIENTS) * max(norms[name], least)
        ]
        if bad:
            raise UnsupportedLayerError(
                "a stack of agents must give what each agent gives alone; agent "
                f"{self.agent.index}'s {', '.join(bad)} on one batch are others. {WAY_OUT}"
            )

    def compare_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Raise UnsupportedLayerError unless the stack's masks are the same.

        The last place of a float may exchange two weights of nearly equal scores.
        """
        flips = {name: int((own != masks[name]).sum()) for name, own in self.masks.items()}
        bad = [name for name, n in flips.items() if n > max(2, FLIPPED * masks[name].numel())]
        if bad:
            raise UnsupportedLayerError(
                "a stack of agents must give the masks that each agent gives alone; agent "
                f"{self.agent.index}'s differ in {flips[bad[0]]} bits of {bad[0]}. {WAY_OUT}"
            )


@contextlib.contextmanager
def _naming_the_layer(module: nn.Module) -> Iterator[None]:
    """Say in which layer of a network an error was; a draw in its forward is one."""
    last = ["none"]
    names = {submodule: name for name, submodule in module.named_modules()}
    watches = []

    def entered(layer: nn.Module, _: object) -> None:
        last.append(f"{type(layer).__name__} {names[layer]}".strip())
        watches.append(noting_draws())

    def left(_: nn.Module, __: object, ___: object) -> None:
        if watches.pop()():
            raise RuntimeError(f"its forward draws from {SHARED_GENERATORS}")

    hooks = [submodule.register_forward_pre_hook(entered) for submodule in names]
    hooks += [submodule.register_forward_hook(left) for submodule in names]
    try:
        yield
    except FlowerMceplError:
        raise
    except Exception as error:  # whatever a network does to a stack
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedLayerError(
            f"engine {BATCHED} calls a network once for several agents (torch.vmap), and "
            f"{type(module).__name__} cannot be called so; the last layer entered was {last[-1]}: "
            f"{type(error).__name__}: {reason}. Layers that draw at random, such as dropout, and "
            f"recurrent ones are of this kind. {WAY_OUT}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def check_stackable(agent: type[Agent], config: TrainingConfig, *, whose: str) -> None:
    """Check that agents of a class, with such parameters, have a stacked form.

    Raises
    ------
    ConfigError
        If they have none.
    """
    if agent is not MceplAgent or not isinstance(config, MceplConfig):
        raise ConfigError(
            f"engine {BATCHED} stacks agents of mcepl and its variants; got {whose}, of class "
            f"{agent.__name__}. {WAY_OUT}"
        )
    check(
        config.arithmetic == EXACT,
        f"engine {BATCHED} is a class of arithmetic itself and needs arithmetic {EXACT}; that of "
        f"{whose} is another",
        config.arithmetic,
        WAY_OUT,
    )
    check(
        not config.has_gates and not config.filters_auto,
        f"engine {BATCHED} stacks masks without gates and needs filters 1 everywhere; that of "
        f"{whose} is another",
        "auto" if config.filters_auto else config.filters,
        WAY_OUT,
    )


def _stackable(agent: Agent) -> MceplAgent:
    config = agent.config if isinstance(agent, MceplAgent) else TrainingConfig()
    check_stackable(type(agent), config, whose=f"agent {agent.index}")
    assert isinstance(agent, MceplAgent)
    return agent


def _alike(one: MceplAgent, other: MceplAgent) -> bool:
    """Whether two agents may stand in one stack."""
    return (
        one.model.fingerprint == other.model.fingerprint
        and repr(one.model.module) == repr(other.model.module)
        and one.device == other.device
        and one.learner.dtype == other.learner.dtype
        and one.layers == other.layers
        and _common(one) == _common(other)
    )


def _common(agent: MceplAgent) -> object:
    """Parameters that agents of a stack have in common: all but the ratios."""
    return replace(agent.config, retention=1.0, first_retention=None)
