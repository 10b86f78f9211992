"""MCE-PL in a training loop of the user's own, whose model becomes a `MaskedModel`."""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import nn

from flower_mcepl.agents.parts.arithmetic import keep_freed_memory
from flower_mcepl.agents.parts.masked import MaskedAgent
from flower_mcepl.agents.parts.masked_config import MaskedConfig
from flower_mcepl.agents.parts.own_metrics import further_metrics, plain_number
from flower_mcepl.agents.parts.training import check_learned
from flower_mcepl.agents.tasks.network import described
from flower_mcepl.config.checks import check
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import ConfigError
from flower_mcepl.masks.layers import NAMED
from flower_mcepl.masks.model import MaskedModel, bits_of
from flower_mcepl.streams import isolated_rng

# what a MaskedConfig says of the training that the user's functions do
_WITHOUT_EFFECT = (
    *("batch_size", "eval_batch_size", "local_epochs", "local_steps", "momentum"),
    "weight_decay",
)
_READ = ("accuracy", "loss", "num-examples")  # of what the evaluate function returns
OwnTrainFn = Callable[[MaskedModel, int], Any]
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
        mean loss, which counts as missing where it is not finite. Its parameters with
        a gradient are the scores: ``torch.optim.SGD(model.parameters(), lr=...)`` does
        what it should. The other parameters are common to all agents and in no state:
        leave them as they are. The gradient that the last ``backward`` leaves is the
        one of the fine-tuning step: do not clear it at the end.
    evaluate_fn : callable
        ``evaluate_fn(model)`` gets an ordinary module, the network under the mask, and
        returns ``loss`` and ``num-examples``, and ``accuracy`` (0..1) where there is
        one (not a number: there is none). Other metrics go into the record, too, if
        they are finite numbers.
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
        self._common_bits = _digests(self.model.module)

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
            If it returns no loss, changes weights that all agents share, or leaves no
            gradient for the fine-tuning step.
        DivergedError
            If it leaves scores that are not finite.
        """
        self.begin(round)
        keep_freed_memory()
        with (
            isolated_rng(self.seed, "local-steps", agent=self.index, round=round),
            self.learner.arithmetic(),
        ):
            returned = self._train_fn(self.model, round)
        loss = plain_number(returned)
        if loss is None:
            raise ConfigError(
                f"agent {self.index}: the train function must return the mean loss, one number; "
                f"got {described(returned)}. Let it return that of its last epoch."
            )
        self._check_common_weights()
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
        return {"train-loss": loss} if math.isfinite(loss) else {}

    def _check_common_weights(self) -> None:
        bits = _digests(self.model.module)
        changed = [n for n in self._common_bits | bits if self._common_bits.get(n) != bits.get(n)]
        if changed:
            raise ConfigError(
                f"agent {self.index}: the train function must leave the weights under the masks "
                "as they are: all agents share them, and no saved state holds them; it changed "
                f"{', '.join(changed[:NAMED])}{', ...' if len(changed) > NAMED else ''}. Train the "
                "scores alone, which are the parameters that have requires_grad, and neither "
                "initialize nor load weights."
            )

    def evaluate(self) -> dict[str, float]:
        """Let the user's function evaluate the network under the agent's mask."""
        masks = self._personal_masks()
        with isolated_rng(self.seed, "evaluation", agent=self.index), self.learner.arithmetic():
            metrics: Any = self._evaluate_fn(self.model.bake(masks))
        check(
            isinstance(metrics, Mapping),
            f"agent {self.index}: the evaluate function must return a dict of metrics, with loss "
            "and num-examples",
            described(metrics),
            'Return {"loss": ..., "accuracy": ..., "num-examples": ...}.',
        )
        own = {key: plain_number(metrics[key]) for key in _READ if key in metrics}
        if math.isnan(own.get("accuracy") or 0.0):
            del own["accuracy"]  # of no examples, say
        missing = [key for key in ("loss", "num-examples") if own.get(key) is None]
        if not math.isfinite(own.get("num-examples") or 0.0):
            missing.append("num-examples")
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


def _digests(module: nn.Module) -> dict[str, str]:
    """A digest of each parameter's bits."""
    return {
        name: hashlib.blake2b(bits_of(parameter), digest_size=16).hexdigest()
        for name, parameter in module.named_parameters()
    }
