"""FedPM: Bernoulli masks over shared random weights, one probability per weight.

Longer than other files here: agent and server have little in common with other parts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Agent, AgentState, Payload, data_facts
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.adam import Adam
from flower_mcepl.agents.parts.frozen_weights import FrozenWeightsConfig
from flower_mcepl.agents.parts.groups import Shapes, check_group, groups_of, state_of
from flower_mcepl.agents.parts.learner import Learner
from flower_mcepl.agents.parts.training import (
    check_learned,
    descent_direction,
    finite_loss,
    gradients_of,
    train_locally,
)
from flower_mcepl.agents.server import Server
from flower_mcepl.config.checks import check
from flower_mcepl.data.batches import AgentData
from flower_mcepl.masks.copying import own_copy
from flower_mcepl.masks.layers import find_frozen, find_maskable
from flower_mcepl.masks.model import fingerprint
from flower_mcepl.masks.placement import call_with, kept_in_eval, slots_of, train_mode
from flower_mcepl.masks.weight_init import SIGNED_CONSTANT, with_weights
from flower_mcepl.streams import torch_stream

ADAM, SGD = "adam", "sgd"
SCORE_OPTIMIZERS = (ADAM, SGD)
GAIN = 2**0.5  # of Kaiming's init for ReLU, which the paper's signed constants have


@dataclass(frozen=True, kw_only=True)
class FedpmConfig(FrozenWeightsConfig):
    """Parameters of FedPM; the defaults are those of the published code.

    Source: Isik et al. 2023, arXiv:2209.15328.

    On the quickstart's digits (10 agents of 3 classes, validation split, two seeds, 15
    rounds of some 9 steps) larger steps are better: of 0.01, 0.03, 0.1, 0.2, 0.4, 0.8
    and 1.6 the best was 0.4 (.80, where 0.1 had .53 and SGD's best .56).

    With ``score_optimizer = "sgd"`` the step size must be some thousand times larger:
    the gradient on a score is the one on a weight times that weight times
    ``σ'(s) <= 1/4``, and the server's mean of a few masks tells only large moves from
    chance. Adam's steps have the same size whatever the gradient's.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    score_lr: float = 0.1  # η > 0: step size on the scores
    # "adam": moments live on over the rounds; "sgd": with a score_lr of some hundreds
    score_optimizer: str = ADAM
    weight_init: str = SIGNED_CONSTANT
    weight_decay: float = 0.0  # μ >= 0, on the scores
    local_epochs: int = 3
    reset_rounds: int = 1  # 1/ρ: rounds after which the server's Beta prior starts anew; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("score_lr")
        check(self.score_lr > 0, "score-lr must be > 0", self.score_lr)
        self._check_one_of("score_optimizer", SCORE_OPTIMIZERS)
        check(
            self.score_optimizer == SGD or self.momentum == 0,
            "momentum must be 0 with score-optimizer adam, which has its own",
            self.momentum,
            "Set fedpm.momentum = 0.0.",
        )
        check(
            self.reset_rounds >= 0,
            "reset-rounds must be >= 0",
            self.reset_rounds,
            "0 never resets.",
        )


@final
class FedpmAgent(Agent):
    """One FedPM agent: scores ``s`` over a frozen network, and masks drawn from them.

    ``θ = σ(s)``, ``m ~ Bernoulli(θ)`` in every forward pass, loss
    ``CE(f(x; w ⊙ m))``; straight through the draw, ``∂m/∂θ := 1``, so that
    ``g = ∂CE/∂(w ⊙ m) ⊙ w ⊙ σ'(s)``. One mask drawn from
    the trained θ is what goes out; `fuse` takes the server's θ over, ``s = σ⁻¹(θ)``.
    The scores are trained by Adam, whose moments an agent keeps over the rounds while
    its scores become the server's; by SGD its momentum starts anew every round. All
    agents begin from common scores, standard normal; biases and norm layers stay
    frozen.

    `evaluate` after `fuse` sees the network under one mask drawn from the server's θ,
    on the agent's own test split: such a mask is the global model that the method hands
    out, as the mean of the weights is FedAvg's. The agent's own θ after its local steps
    is no result of the method, and would compare it after a fine-tuning that others
    lack.

    Notes
    -----
    The frozen weights are signed constants of Kaiming's scale, ``± sqrt(2 / fan_in)``,
    as the paper's: ``sqrt(2)`` times those that ``weight_init = "signed-constant"``
    gives other algorithms. With ``"module"`` they are those of the model function.

    Differs from the published code: that masks the biases, too. Here, as for every
    algorithm over frozen weights, what can be masked are the weights of convolutions
    and linear layers, and the wire's masks are theirs; biases stay as the model
    function made them.

    Source: Isik et al. 2023, arXiv:2209.15328, algorithm 1; Adam, its moments and
    standard normal scores as in its published code.
    """

    algorithm = "fedpm"
    server_based = True

    def __init__(
        self,
        index: int,
        module: nn.Module,
        data: AgentData,
        config: FedpmConfig,
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
        module = frozen_module(module, config, seed=seed)
        specs = find_maskable(module)
        self.fingerprint = fingerprint(module, specs)
        self.layers = {name: tuple(spec.shape) for name, spec in specs.items()}
        self.network = own_copy(module).requires_grad_(False).to(device)
        self._slots, self._frozen = slots_of(self.network, specs), kept_in_eval(module)
        common = torch_stream(seed, "scores")
        self.scores = {
            name: torch.randn(shape, generator=common).to(device).requires_grad_()
            for name, shape in self.layers.items()
        }
        self._kept_at_first = round(
            sum(float(s.detach().sigmoid().sum()) for s in self.scores.values())
        )
        self._adam = Adam()
        self._velocity: dict[str, Tensor] = {}
        self._round = 0  # in which it last trained

    @torch.no_grad()
    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Take over the server's probabilities; without any go on from the own ones."""
        for payload in inbox.values():
            for name, s in self.scores.items():
                s.copy_(payload[name].to(s).logit())

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps on the scores, by SGD from momentum zero.

        Raises
        ------
        DivergedError
            If a loss or score is not finite.
        """
        train_mode(self.network, self._frozen)
        self._velocity, self._round = {}, round
        step = partial(self._local_step, round=round, draws=self._stream("training-masks"))
        metrics = train_locally(
            step,
            self.data.train,
            self.config,
            seed=self.seed,
            agent=self.index,
            round=round,
            device=self.device,
        )
        self._velocity = {}
        way_out = f"Lower score-lr (now {self.config.score_lr:g})."
        check_learned(self.scores, what="scores", agent=self.index, round=round, way_out=way_out)
        return metrics

    def check(self) -> None:
        """Check the first batch of both splits against the task."""
        weights = {name: self.network.get_parameter(name) for name in self.layers}
        self.learner.check(self.network, self.data, weights, frozen=self._frozen)

    # What is sent may be asked for again, after a restart or by a repeated message, and
    # must then be the same mask: so it is drawn from a stream of its own, which depends
    # on the round of the last training alone, and that round is part of the state.
    def outgoing(self) -> dict[str, Tensor]:
        """Return one mask drawn from θ, the same until the next training."""
        return {
            name: mask.cpu() for name, mask in self._draw_all(self._stream("sent-mask")).items()
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluate the network under one mask drawn from the probabilities."""
        masks = self._evaluation_masks()
        return {
            **self.learner.evaluate(self._under(masks), self.data),
            "density": sum(int(mask.sum()) for mask in masks.values()) / self._num_weights(),
        }

    def personal_model(self) -> nn.Module:
        """Return the frozen network under the mask that `evaluate` draws."""
        return self._under(self._evaluation_masks())

    def first_payload(self) -> None:
        """Return None: all start from the common scores, without the server."""

    def describe(self) -> dict[str, Any]:
        """Facts for the handshake; kept weights are those expected in a first mask."""
        return {
            **super().describe(),
            "num-weights": self._num_weights(),
            "kept-weights": self._kept_at_first,
            **self.learner.task.facts(),
            **find_frozen(self.network, self.layers).facts(),
            **data_facts(self.data),
        }

    def parameters(self) -> dict[str, Any]:
        """Return the fields of the agent's `FedpmConfig`."""
        return self.config.as_parameters()

    def state(self) -> AgentState:
        """Return scores, moments, buffers and the last round, which tells the mask."""
        groups = {
            "scores": self.scores,
            "buffer": dict(self.network.named_buffers()),
            "round": {"last": torch.tensor([self._round])},
        }
        return state_of(self._facts(), {**groups, **self._adam.groups()})

    @torch.no_grad()
    def restore(self, state: AgentState) -> None:
        """Continue exactly where `state` was taken."""
        self._check_facts(state.facts)
        groups = groups_of(state, device=self.device)
        buffers = dict(self.network.named_buffers())
        shapes: dict[str, tuple[Shapes, bool]] = {
            "scores": (self.layers, False),
            "buffer": ({name: tuple(buffer.shape) for name, buffer in buffers.items()}, False),
            "round": ({"last": (1,)}, False),
            **self._adam.group_shapes(self.layers),
        }
        for group, (full, absent) in shapes.items():
            check_group(groups, group, full, whose=f"agent {self.index}", may_be_absent=absent)
        for name, s in self.scores.items():
            s.copy_(groups["scores"][name])
        for name, buffer in buffers.items():
            buffer.copy_(groups["buffer"][name])
        self._adam.take_back(groups)
        self._velocity, self._round = {}, int(groups["round"]["last"])

    def _local_step(
        self, inputs: Any, labels: Tensor, *, round: int, draws: torch.Generator
    ) -> float:
        weights = {name: self._masked_weight(name, draws) for name in self.scores}

        def network(*args: Any, **kwargs: Any) -> Any:
            return call_with(self.network, self._slots, weights, args, kwargs)

        loss = self.learner.loss(network, inputs, labels)
        value = finite_loss(
            loss, agent=self.index, round=round, key="score-lr", lr=self.config.score_lr
        )
        self._descend(gradients_of(loss, self.scores), round)
        return value

    @torch.no_grad()
    def _descend(self, gradients: Mapping[str, Tensor], round: int) -> None:
        config, lr = self.config, self.config.score_lr * self.config.lr_factor(round)
        if config.score_optimizer == ADAM:
            decay = config.weight_decay
            self._adam.step(self.scores, gradients, lr=lr, weight_decay=decay)
            return
        for name, s in self.scores.items():
            g, velocity = gradients[name], self._velocity
            s.add_(descent_direction(name, s, g, velocity=velocity, config=config), alpha=-lr)

    def _masked_weight(self, name: str, draws: torch.Generator) -> Tensor:
        """Return ``w ⊙ m`` for a new draw; the gradient passes to θ as if m were θ."""
        theta = self.scores[name].sigmoid()
        mask = self._draw(name, draws) + (theta - theta.detach())  # the bracket is zero
        return self.network.get_parameter(name) * mask

    def _draw(self, name: str, draws: torch.Generator) -> Tensor:
        """Draw a bool mask on the CPU, so that it is the same on every device."""
        theta = self.scores[name].detach().sigmoid()
        return torch.rand(theta.shape, generator=draws).to(self.device) < theta

    def _evaluation_masks(self) -> dict[str, Tensor]:
        return self._draw_all(torch_stream(self.seed, "evaluation-mask", agent=self.index))

    @torch.no_grad()
    def _under(self, masks: Mapping[str, Tensor]) -> nn.Module:
        model = own_copy(self.network)
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
        return model

    def _draw_all(self, draws: torch.Generator) -> dict[str, Tensor]:
        return {name: self._draw(name, draws) for name in self.scores}

    def _stream(self, purpose: str) -> torch.Generator:
        return torch_stream(self.seed, purpose, agent=self.index, round=self._round)

    def _num_weights(self) -> int:
        return sum(math.prod(shape) for shape in self.layers.values())


def frozen_module(module: nn.Module, config: FedpmConfig, *, seed: int) -> nn.Module:
    """Return the network over whose weights FedPM learns masks."""
    made = with_weights(module, config.weight_init, seed=seed)
    if config.weight_init == SIGNED_CONSTANT:  # then it is a copy
        with torch.no_grad():
            for name in find_maskable(made):
                made.get_parameter(name).mul_(GAIN)
    return made


EPSILON = 0.01  # a bit counts as 0.99 or 0.01, so that θ stays between them and its score finite


@final
class FedpmServer(Server):
    """The server of FedPM: ``θ`` is the mode of Beta(α, β), which counts the masks.

    ``α += Σ_k m̂_k``, ``β += Σ_k (1 - m̂_k)``, ``θ = (α - 1) / (α + β - 2)``. Both
    begin at 1, the even prior, and begin there anew every ``reset_rounds`` rounds;
    right after that θ is the mean of the masks. ``m̂ = ε + (1 - 2ε) m`` with ε = 0.01,
    as in the published code. θ is what agents get.

    Source: Isik et al. 2023, arXiv:2209.15328, algorithm 2 (Bayesian aggregation).
    """

    algorithm = "fedpm"
    shared = True

    def __init__(
        self, module: nn.Module, num_agents: int, config: FedpmConfig, *, seed: int
    ) -> None:
        module = frozen_module(module, config, seed=seed)
        super().__init__(module, num_agents, seed=seed)
        self.reset_rounds = config.reset_rounds
        self.layers = self.layers_down = {
            name: tuple(spec.shape) for name, spec in find_maskable(module).items()
        }
        self.mask_layers = frozenset(self.layers)
        self._reset()

    def receive(
        self, inbox: Mapping[int, Payload], *, round: int, num_examples: Mapping[int, int]
    ) -> None:
        """Count one mask of each agent, from the even prior where it is due again."""
        if self.reset_rounds and self._rounds == self.reset_rounds:
            self._reset()
        for name in self.layers:
            ones = torch.stack([inbox[agent][name] for agent in inbox]).sum(dim=0)
            evidence = EPSILON * len(inbox) + (1 - 2 * EPSILON) * ones
            self._alpha[name] += evidence
            self._beta[name] += len(inbox) - evidence
        self._rounds += 1

    def note(self, agent: int, payload: Payload) -> None:
        """Leave it: nothing in it is needed."""

    def payload_for(self, agent: int, *, round: int) -> Payload | None:
        """Return θ of every weight; None before the first masks have come."""
        if not self._rounds:
            return None
        return {name: (a - 1) / (a + self._beta[name] - 2) for name, a in self._alpha.items()}

    def parameters(self) -> dict[str, Any]:
        """Return how often the prior begins anew."""
        return {"reset_rounds": self.reset_rounds}

    def _reset(self) -> None:
        self._alpha, self._beta = (
            {n: torch.ones(shape) for n, shape in self.layers.items()} for _ in range(2)
        )
        self._rounds = 0  # since the last reset

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "alpha": self._alpha,
            "beta": self._beta,
            "rounds": {"counted": torch.tensor([self._rounds])},
        }

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        return {
            "alpha": (self.layers, False),
            "beta": (self.layers, False),
            "rounds": ({"counted": (1,)}, False),
        }

    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        self._alpha, self._beta = groups["alpha"], groups["beta"]
        self._rounds = int(groups["rounds"]["counted"])


FEDPM = Algorithm(FedpmAgent, FedpmConfig, FedpmServer)
