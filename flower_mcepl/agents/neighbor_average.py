"""Averaging with neighbors around an app's own model, train and evaluate functions."""

from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.agents.agent import Agent, AgentState, Payload
from flower_mcepl.agents.array_layout import ArrayLayout, Arrays
from flower_mcepl.agents.parts.averaging import DEGREE, metropolis_pull
from flower_mcepl.agents.parts.groups import check_group, groups_of, state_of
from flower_mcepl.agents.parts.votes import WHOLE
from flower_mcepl.agents.parts.words import from_words, to_words
from flower_mcepl.errors import ConfigError, DivergedError, StateError

Metrics = Mapping[str, float]
TrainFn = Callable[[dict[str, NDArray[Any]], int], tuple[Arrays, Metrics]]
EvaluateFn = Callable[[dict[str, NDArray[Any]]], Metrics]


@final
class NeighborAverageAgent(Agent):
    """One agent of decentralized federated averaging, for a model given as arrays.

    In round t the app trains from ``x_i^t`` to ``z_i^t``, which goes to the neighbors;
    when theirs have come, ``x_i^{t+1} = Σ_j W_ij z_j^t`` over the neighbors and i
    itself. W are the Metropolis-Hastings weights ``1 / (1 + max(d_i, d_j))``, as in
    `MixingAgent`: on a graph whose agents all have the same number of neighbors that is
    the plain mean of the neighborhood, the agent included. A neighbor of whom nothing
    usable is held is left out, and its weight falls to the agent itself. On a directed
    graph the rows of W still sum to 1, but what the agents agree on is no longer the
    mean of all.

    Arrays of floats are averaged; integers and booleans, such as the counters of batch
    norm, stay the agent's own and are never sent. float32 and float64 travel bit for
    bit, a float64 as two 32-bit words, float16 as float32; the sums are taken in
    float32 for float16 and in the array's own type otherwise.

    Source: Lian et al. 2017 (D-PSGD), arXiv:1705.09056, where averaging follows the
    local steps; Sun et al. 2021 (DFedAvg), arXiv:2104.11375, for several steps a round;
    Xiao and Boyd 2004 for the weights.

    Parameters
    ----------
    index : int
        The agent's number in the graph, 0..N-1.
    layout : ArrayLayout
        What the app's arrays look like, the same on all agents.
    train_fn : callable
        ``train_fn(arrays, round)`` returns the trained arrays and metrics:
        ``train-loss`` and ``num-examples``, where they are known. It may keep and
        change the arrays that it gets.
    evaluate_fn : callable
        ``evaluate_fn(arrays)`` returns ``accuracy``, ``loss`` and ``num-examples``, or
        nothing.
    initial : mapping, optional
        The arrays that all agents begin with; None for an agent that is going to be
        restored.
    seed : int (default: 0)
        Seed of the run; nothing is drawn from it here.
    """

    algorithm = "neighbor-average"

    def __init__(
        self,
        index: int,
        layout: ArrayLayout,
        train_fn: TrainFn,
        evaluate_fn: EvaluateFn,
        *,
        initial: Arrays | None = None,
        seed: int = 0,
    ) -> None:
        self.index, self.seed, self.layout, self.fingerprint = (
            index,
            seed,
            layout,
            layout.fingerprint,
        )
        self._train_fn, self._evaluate_fn = train_fn, evaluate_fn
        self._averaged = layout.averaged()
        if DEGREE in self._averaged:
            raise ConfigError(
                f"the name {DEGREE!r} is taken by the neighbors' number. Give the app's array "
                "another."
            )
        self._shapes = {name: shape for name, (_, shape) in layout.arrays.items()}
        self.layers = {name: self._shape_sent(name) for name in self._averaged} | {DEGREE: (1,)}
        self.float_types = {
            name: torch.from_numpy(np.empty(0, layout.arrays[name][0])).dtype
            for name in self._averaged
        }
        self._arrays = {} if initial is None else _tensors(layout.take(initial))
        self._degree = 0  # number of neighbors in the last inbox; 0: unknown
        self._num_examples: int | None = None  # as the app last said

    @classmethod
    def weighs_votes_with(cls, config: Any) -> bool:
        """Whether votes count: what one lacks falls to the agent itself."""
        return True

    @torch.no_grad()
    def fuse(
        self, inbox: Mapping[int, Payload], *, round: int, votes: Mapping[int, float] = WHOLE
    ) -> None:
        """Average with the neighbors: ``x_i`` moves by ``Σ_j v_j W_ij (x_j - x_i)``."""
        own = {name: _summed(self._present()[name]) for name in self._averaged}
        heard = {
            sender: {DEGREE: payload[DEGREE]}
            | {name: from_words(payload[name], x.dtype).reshape(x.shape) for name, x in own.items()}
            for sender, payload in inbox.items()
        }
        pull = metropolis_pull(own, heard, degree=max(self._degree, len(inbox)), votes=votes)
        self._arrays |= {
            name: (x + pull[name]).to(self._arrays[name].dtype) for name, x in own.items()
        }
        self._degree = len(inbox)

    def train(self, *, round: int) -> dict[str, float]:
        """Let the app train from the average.

        Raises
        ------
        AnswerError
            If it returns other arrays than it got.
        DivergedError
            If it returns numbers that are not finite.
        """
        arrays, metrics = self._train_fn(self._numpy(), round)
        taken = self.layout.take(arrays)
        bad = [name for name in self._averaged if not np.isfinite(taken[name]).all()]
        if bad:
            raise DivergedError(
                f"the app's training left numbers that are not finite in {', '.join(bad[:5])}; "
                "they are not sent. Lower its step size."
            )
        self._arrays = _tensors(taken)
        self._num_examples = int(metrics["num-examples"]) if "num-examples" in metrics else None
        # that is in the handshake
        return {name: value for name, value in metrics.items() if name != "num-examples"}

    def outgoing(self) -> dict[str, Tensor]:
        """Return the trained arrays of floats, as they travel, and the own degree."""
        sent = {name: to_words(self._arrays[name]) for name in self._averaged}
        return {**sent, DEGREE: torch.tensor([float(self._degree)])}

    def evaluate(self) -> dict[str, float]:
        """Let the app evaluate the present arrays; empty where it cannot."""
        metrics = dict(self._evaluate_fn(self._numpy()))
        return {**metrics, "density": 1.0} if metrics else {}

    def first_payload(self) -> None:
        """Return None: who was never heard of is left out of the average."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the handshake's facts: who this is, and how many numbers it sends."""
        known = {} if self._num_examples is None else {"num-examples": self._num_examples}
        weights = sum(int(np.prod(self._shapes[name])) for name in self._averaged)
        return {**super().describe(), "num-weights": weights, "kept-weights": weights, **known}

    def parameters(self) -> dict[str, Any]:
        """Return what is averaged and how."""
        own = [name for name in self.layout.arrays if name not in self._averaged]
        types = sorted({str(np.dtype(self.layout.arrays[name][0])) for name in self._averaged})
        return {"mixing": "metropolis", "averaged": len(self._averaged), "types": types, "own": own}

    def state(self) -> AgentState:
        """Return the arrays and what the agent knows of the graph."""
        facts = {"degree": self._degree, "num-examples": self._num_examples}
        return state_of(self._facts(**facts), {"arrays": self._present()})

    def restore(self, state: AgentState) -> None:
        """Continue exactly where `state` was taken."""
        self._check_facts(state.facts)
        groups = groups_of(state)
        check_group(
            groups, "arrays", self._shapes, whose=f"agent {self.index}", may_be_absent=False
        )
        self._arrays = {name: groups["arrays"][name] for name in self.layout.arrays}
        self._degree, self._num_examples = int(state.facts["degree"]), state.facts["num-examples"]

    def _present(self) -> dict[str, Tensor]:
        if not self._arrays:
            raise StateError(
                f"agent {self.index} holds no arrays: its node has lost its state, or never got "
                "any. Nothing need be done: the server sends the initial arrays with its next "
                "message, and the agent begins afresh."
            )
        return self._arrays

    def _numpy(self) -> dict[str, NDArray[Any]]:
        return {name: x.numpy().copy() for name, x in self._present().items()}

    def _shape_sent(self, name: str) -> tuple[int, ...]:
        dtype, shape = self.layout.arrays[name]
        return (*shape, 2) if np.dtype(dtype).itemsize == 8 else shape


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _summed(x: Tensor) -> Tensor:
    """Return an array in the type in which sums are taken."""
    return x.float() if x.dtype == torch.float16 else x
