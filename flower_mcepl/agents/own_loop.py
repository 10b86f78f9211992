"""MCE-PL in a training loop of the user's own, whose model becomes a `MaskedModel`."""

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import nn

from flower_mcepl.agents.parts.arithmetic import keep_freed_memory
from flower_mcepl.agents.parts.masked import MaskedAgent
from flower_mcepl.agents.parts.masked_config import MaskedConfig
from flower_mcepl.agents.parts.own_metrics import further_metrics, plain_number
from flower_mcepl.agents.parts.training import check_learned
from flower_mcepl.config.checks import check
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import ConfigError
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.streams import isolated_rng

# what a MaskedConfig says of the training that the user's functions do
_WITHOUT_EFFECT = (
    *("batch_size", "eval_batch_size", "local_epochs", "local_steps", "momentum"),
    "weight_decay",
)
_READ = ("accuracy", "loss", "num-examples")  # of what the evaluate function returns
OwnTrainFn = Callable[[MaskedModel, int], float]
OwnEvaluateFn = Callable[[nn.Module], Mapping[str, Any]]


@final
class OwnLoopAgent(MaskedAgent[MaskedConfig]):
    """An MCE-PL agent whose local steps and evaluation are functions of the user's.

    Everything else, masks, fusion, fine-tuning and frames, is as in `MceplAgent`. Of a
    configuration count the fields of `MaskedConfig` but those of training; the step
    size on the scores is what ``train_fn`` chooses (the reference value is 10, with
    plain SGD).

    Parameters
    ----------
    index, module, data, config, seed, device : see `MceplAgent`
        Of the data only the numbers of examples are used.
    train_fn : callable
        ``train_fn(model, round)`` trains a `MaskedModel` as any module and returns the
        mean loss. Its parameters with a gradient are the scores:
        ``torch.optim.SGD(model.parameters(), lr=...)`` does what it should. The
        gradient that the last ``backward`` leaves is the one of the fine-tuning step:
        do not clear it at the end.
    evaluate_fn : callable
        ``evaluate_fn(model)`` gets an ordinary module, the network under the mask, and
        returns ``loss`` and ``num-examples``, and ``accuracy`` (0..1) where there is
        one. Other metrics go into the record, too, if they are finite numbers.
    """

    algorithm = "mcepl"

    def __init__(
        self,
        index: int,
        module: nn.Module,
        data: AgentData,
        config: MaskedConfig,
        *,
        train_fn: OwnTrainFn,
        evaluate_fn: OwnEvaluateFn,
        seed: int,
        device: str = "cpu",
    ) -> None:
        super().__init__(index, module, data, config, seed=seed, device=device)
        self._train_fn, self._evaluate_fn = train_fn, evaluate_fn

    def parameters(self) -> dict[str, Any]:
        """Return the configuration, and which of its fields have no effect here."""
        return {**super().parameters(), "without_effect": list(_WITHOUT_EFFECT)}

    def check(self) -> None:
        """Check nothing: what the user's functions make of the data is theirs."""

    def train(self, *, round: int) -> dict[str, float]:
        """Let the user's function train, on the random stream of this agent and round.

        Raises
        ------
        ConfigError
            If it leaves no gradient for the fine-tuning step.
        DivergedError
            If it leaves scores that are not finite.
        """
        self.begin(round)
        keep_freed_memory()
        with (
            isolated_rng(self.seed, "local-steps", agent=self.index, round=round),
            self.learner.arithmetic(),
        ):
            loss = float(self._train_fn(self.model, round))
        scores = self.model.all_scores
        way_out = "Lower the step size of the train function."
        check_learned(scores, what="scores", agent=self.index, round=round, way_out=way_out)
        if self.config.finetune_lr and all(z.grad is None for z in scores.values()):
            raise ConfigError(
                "the fine-tuning step needs the gradient of the last local step, and the train "
                "function left none on the scores. Let it call loss.backward() on the model that "
                "it gets, and zero_grad() before that, not after; or set finetune_lr=0."
            )
        self.gradient = {
            name: torch.zeros_like(z) if z.grad is None else z.grad.detach().clone()
            for name, z in scores.items()
        }
        for z in scores.values():
            z.grad = None
        return {"train-loss": loss}

    def evaluate(self) -> dict[str, float]:
        """Let the user's function evaluate the network under the agent's mask."""
        masks = self._personal_masks()
        with isolated_rng(self.seed, "evaluation", agent=self.index), self.learner.arithmetic():
            metrics = dict(self._evaluate_fn(self.model.bake(masks)))
        own = {key: plain_number(metrics[key]) for key in _READ if key in metrics}
        missing = [key for key in ("loss", "num-examples") if own.get(key) is None]
        if missing:
            raise ConfigError(
                "the evaluate function must return loss and num-examples, and may return accuracy; "
                f"{', '.join(missing)} is missing from {', '.join(metrics) or 'nothing'}, or no "
                "number. Add it."
            )
        accuracy = own.get("accuracy", 0.0)
        check(
            accuracy is not None and 0 <= accuracy <= 1,
            f"agent {self.index}: the evaluate function's accuracy is a fraction in 0..1",
            metrics.get("accuracy"),
            "Divide percents by 100.",
        )
        return {
            **further_metrics(metrics, besides=_READ),
            **{key: value for key, value in own.items() if value is not None},
            "num-examples": int(metrics["num-examples"]),
            "density": self.density(masks),
            **self._structure(masks),
        }
