"""Dense weights: the agent's own copy of the network, trained by SGD."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Agent, AgentState, data_facts
from flower_mcepl.agents.parts.depth import Depths, at_depth, depth_facts, depth_of, held_names
from flower_mcepl.agents.parts.groups import Shapes, check_group, groups_of, state_of
from flower_mcepl.agents.parts.learner import Learner
from flower_mcepl.agents.parts.sharing import num_elements, share_fact, shared_shapes
from flower_mcepl.agents.parts.training import (
    TrainingConfig,
    check_learned,
    descent_direction,
    finite_loss,
    gradients_of,
    train_locally,
)
from flower_mcepl.config.checks import check
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.masks.copying import own_copy
from flower_mcepl.masks.layers import find_maskable
from flower_mcepl.masks.model import fingerprint
from flower_mcepl.masks.placement import kept_in_eval, train_mode

AVERAGES = "averages"  # fact of a state whose weights the running mean takes in next


@dataclass(frozen=True, kw_only=True)
class SgdConfig(TrainingConfig):
    """Parameters of SGD on weights.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float  # η > 0; every algorithm has its own default
    # factor on the step size per round, beside lr_schedule, 0 < lr_decay <= 1
    lr_decay: float = 1.0
    clip_norm: float = 0.0  # the gradient of a batch is scaled down to this norm; 0: never
    # β in [0, 1): evaluate at the weights' running mean x̄ = β x̄ + (1 - β) x; 0: at x
    weight_averaging: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("lr", "clip_norm")
        check(self.lr > 0, "lr must be > 0", self.lr)
        check(
            0 < self.lr_decay <= 1,
            "lr-decay must be in (0, 1]",
            self.lr_decay,
            "1 leaves the step size as it is.",
        )
        check(
            0 <= self.weight_averaging < 1,
            "weight-averaging must be in [0, 1)",
            self.weight_averaging,
        )

    def lr_factor(self, round: int) -> float:
        """Return what the step size is multiplied by in ``round`` (from 1)."""
        return float(super().lr_factor(round) * self.lr_decay ** (round - 1))


ConfigT = TypeVar("ConfigT", bound=SgdConfig)


class DenseAgent(Agent, Generic[ConfigT]):
    """An agent that trains all weights of its own copy of the common network.

    Biases and norm layers are included, and all of it goes out but for what ``share``
    leaves personal, unless a subclass says otherwise. One local step is
    ``v = momentum * v + (clip(g) + μ * x)``, ``x = x - η * v``.
    Buffers, such as the running statistics of batch norm, follow the agent's own data
    and are never sent. Parameters that the module has frozen (``requires_grad=False``)
    keep their initial values.

    Parameters
    ----------
    index : int
        The agent's number in the graph, 0..N-1.
    module : nn.Module
        The network with the weights that all agents start from, as from
        `shared_module`; it is copied, and must itself stay as it is.
    data : AgentData
        Training and test split.
    config : SgdConfig
        The method's parameters.
    seed : int
        Seed of the run, the same on all agents.
    device : str (default: "cpu")
        Where to calculate.

    Raises
    ------
    UnsupportedLayerError
        If the module has no weight to train.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        data: AgentData,
        config: ConfigT,
        *,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.index, self.seed, self.data, self.config, self.device = (
            index,
            seed,
            data,
            config,
            device,
        )
        self.learner = Learner.of(module, config, agent=index, seed=seed, device=device)
        self.fingerprint = fingerprint(module, find_maskable(module))
        depths = Depths.of(module, depth_of(config))
        self.depth = depths.depth
        self.model = own_copy(depths.held).to(device)
        self._frozen = kept_in_eval(depths.held)
        self.weights = {
            name: weight for name, weight in self.model.named_parameters() if weight.requires_grad
        }
        if not self.weights:
            raise UnsupportedLayerError(
                f"{type(module).__name__} has no weight to train: requires_grad is False for all "
                "of its parameters. Leave it True in the model function."
            )
        self._initial = {  # of all layers, which those of another depth begin with
            name: weight.detach()
            for name, weight in module.named_parameters()
            if weight.requires_grad
        }
        self.velocity: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}  # x̄ of the rounds before, if there is any
        self._averages = False  # whether the present weights are those of a round
        self.shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        whole = shared_shapes(config, {name: tuple(x.shape) for name, x in self._initial.items()})
        self._initial = {name: self._initial[name] for name in whole}
        self._shared_by_depth = [
            {name: whole[name] for name in held_names(whole, dict(part.named_parameters()))}
            for part in depths.parts
        ]
        self.shared = at_depth(self._shared_by_depth, self.depth)  # the others are personal
        self._send(self._shared_by_depth)  # unless the algorithm says otherwise

    def _send(self, by_depth: Sequence[dict[str, tuple[int, ...]]]) -> None:
        """Set what agents of each depth send."""
        self.layers, self.layers_by_depth = at_depth(by_depth, self.depth), tuple(by_depth)

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps; the metrics hold the mean loss of the steps.

        Raises
        ------
        DivergedError
            If a loss or weight is not finite.
        """
        self._average_weights()
        train_mode(self.model, self._frozen)
        step = partial(self._local_step, round=round)
        metrics = train_locally(
            step,
            self.data.train,
            self.config,
            seed=self.seed,
            agent=self.index,
            round=round,
            device=self.device,
        )
        check_weights(self.weights, agent=self.index, round=round, lr=self.config.lr)
        self._averages = self.config.weight_averaging > 0
        return metrics

    def outgoing(self) -> dict[str, Tensor]:
        """Return copies of all shared weights."""
        return {name: self.weights[name].detach().cpu().clone() for name in self.shared}

    def first_payload(self) -> dict[str, Tensor] | None:
        """Return None: of whom nothing was heard, nothing is known."""
        return None

    def evaluate(self) -> dict[str, float]:
        """Evaluate the agent's network on its own test split.

        With ``weight_averaging`` that is the network of the weights' running mean;
        training and what is sent do without it.
        """
        model = self._personal_model()
        return {**self.learner.evaluate(model, self.data), "density": self.density()}

    def personal_model(self) -> nn.Module:
        """Return a copy of the agent's network, at the running mean if there is one."""
        return own_copy(self._personal_model())

    def check(self) -> None:
        """Check that weights can travel, and the first batches against the task."""
        sent = {name: self.weights[name] for name in self.layers if name in self.weights}
        wide = [name for name, weight in sent.items() if weight.dtype == torch.float64]
        if wide:
            raise UnsupportedLayerError(
                f"algorithm {self.algorithm} sends weights, and frames hold floats of 32 bits or "
                f"fewer; float64 are {', '.join(wide[:4])}{', ...' if len(wide) > 4 else ''}. Call "
                ".float() on the network in the model function, or use an algorithm that sends "
                "masks, or nothing."
            )
        self.learner.check(self.model, self.data, self.weights, frozen=self._frozen)

    def describe(self) -> dict[str, Any]:
        """Facts for the handshake: who this is, its weights and its data."""
        sizes = [*map(num_elements, self._shared_by_depth)]
        return {
            **super().describe(),
            **share_fact(self.config),
            "num-weights": self.num_weights(),
            "kept-weights": self.num_kept(),
            **depth_facts(self.depth, self.layers_by_depth, sizes),
            **self.learner.task.facts(),
            **data_facts(self.data),
        }

    def parameters(self) -> dict[str, Any]:
        """Return the fields of the agent's configuration."""
        return self.config.as_parameters()

    def state(self) -> AgentState:
        """Return weights, momentum, buffers and what the algorithm adds to them."""
        more = {AVERAGES: True} if self._averages else {}
        return state_of(self._facts(**more), self._groups())

    def restore(self, state: AgentState) -> None:
        """Continue exactly where `state` was taken."""
        self._check_facts(state.facts)
        groups = groups_of(state, device=self.device)
        for group, (shapes, may_be_absent) in self._group_shapes().items():
            check_group(
                groups, group, shapes, whose=f"agent {self.index}", may_be_absent=may_be_absent
            )
        self._take_back(groups)
        self._averages = bool(state.facts.get(AVERAGES))

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        """Return what each group of a state holds, and whether it may be absent."""
        buffers = {name: tuple(buffer.shape) for name, buffer in self.model.named_buffers()}
        return {
            "weights": (self.shapes, False),
            "velocity": (self.shapes, True),
            "buffer": (buffers, False),
            "average": (self.shapes, True),
        }

    @torch.no_grad()
    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(groups["weights"][name])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(groups["buffer"][name])
        self.velocity, self._average = groups.get("velocity", {}), groups.get("average", {})

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "weights": self.weights,
            "velocity": self.velocity,
            "buffer": dict(self.model.named_buffers()),
            "average": self._average,
        }

    # The weights of round t are those after its exchange, with which the next training
    # begins. So the mean takes them in there, whatever the algorithm does in `fuse`,
    # and an evaluation before that adds the present ones by itself. Initial weights are
    # of no round, whichever round an agent begins in.
    @torch.no_grad()
    def _average_weights(self) -> None:
        if self._averages:
            self._average = {name: x.clone() for name, x in self._mean_with_present().items()}

    def _own(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Model that is evaluated, and those of its weights that train."""
        return self.model, self.weights

    def _averaged(self) -> dict[str, Tensor]:
        """Weights at which the model is evaluated."""
        return self._mean_with_present()

    def _mean_with_present(self) -> dict[str, Tensor]:
        present = {name: x.detach() for name, x in self._own()[1].items()}
        share = 1 - self.config.weight_averaging
        return (
            {n: self._average[n].lerp(x, share) for n, x in present.items()}
            if self._average
            else present
        )

    @torch.no_grad()
    def _personal_model(self) -> nn.Module:
        own, _ = self._own()
        if not self._average:
            return own
        model = own_copy(own)
        for name, mean in self._averaged().items():
            model.get_parameter(name).copy_(mean)
        return model

    def _local_step(self, inputs: Any, labels: Tensor, *, round: int) -> float:
        value, gradients = self._gradients(self.model, self.weights, inputs, labels, round=round)
        self._descend(self.weights, gradients, self.velocity, round=round)
        return value

    def _gradients(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        inputs: Any,
        labels: Tensor,
        *,
        round: int,
    ) -> tuple[float, dict[str, Tensor]]:
        """Return a batch's loss and its gradients, clipped."""
        loss = self.learner.loss(model, inputs, labels)
        value = finite_loss(loss, agent=self.index, round=round, key="lr", lr=self.config.lr)
        return value, clip(gradients_of(loss, weights), norm=self.config.clip_norm)

    @torch.no_grad()
    def _descend(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        velocity: dict[str, Tensor],
        *,
        round: int,
    ) -> None:
        """Move the weights in place by one step."""
        config, lr = self.config, self.config.lr * self.config.lr_factor(round)
        for name, x in weights.items():
            g = gradients[name]
            x.add_(descent_direction(name, x, g, velocity=velocity, config=config), alpha=-lr)

    def density(self) -> float:
        """Return the share of weights that the personal model holds."""
        return 1.0

    def num_weights(self) -> int:
        """Return the number of shared weights."""
        return num_elements(self.shared)

    def num_kept(self) -> int:
        """Return the number of shared weights that the agent holds."""
        return self.num_weights()


def check_weights(weights: Mapping[str, Tensor], *, agent: int, round: int, lr: float) -> None:
    """Raise DivergedError unless all weights are finite."""
    way_out = f"Lower lr (now {lr:g})."
    check_learned(weights, what="weights", agent=agent, round=round, way_out=way_out)


def clip(gradients: Mapping[str, Tensor], *, norm: float) -> dict[str, Tensor]:
    """Scale gradients down to a common Euclidean norm of at most ``norm``; 0: never."""
    if not norm:
        return dict(gradients)
    total = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])
    )
    scale = (norm / (total + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    return {name: g * scale for name, g in gradients.items()}
