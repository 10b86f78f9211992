"""DFedAvgM: decentralized federated averaging with momentum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.averaging import MixingAgent
from flower_mcepl.agents.parts.dense import SgdConfig
from flower_mcepl.agents.parts.depth import DepthConfig
from flower_mcepl.agents.parts.sharing import SharingConfig
from flower_mcepl.config.checks import check
from flower_mcepl.wire import PRECISIONS


@dataclass(frozen=True, kw_only=True)
class DfedavgmConfig(SgdConfig, SharingConfig, DepthConfig):
    """Parameters of DFedAvgM (arXiv:2104.11375).

    The step size is tuned on the quickstart's digits (10 agents of 3 classes on a ring,
    validation split, two seeds, 30 rounds): of 0.005, 0.01, 0.02, 0.05 and 0.1 the best
    (0.1 on one seed only). K and θ are common choices. With ``share`` less than all
    weights the others are personal, as the head of FedPer (Arivazhagan et al. 2019,
    arXiv:1912.00818).

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float = 0.05  # η > 0
    momentum: float = 0.9  # θ: of the heavy ball within one round
    local_steps: int = 5  # K: mini-batches a round
    # of the weights on the wire; "int8", "int8-differences": 8 bits each
    precision: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.precision in PRECISIONS,
            f"precision must be one of {', '.join(PRECISIONS)}",
            self.precision,
        )


@final
class DfedavgmAgent(MixingAgent[DfedavgmConfig]):
    """One DFedAvgM agent: K local steps with heavy-ball momentum, then an average.

    ``y^{k+1} = y^k - η g(y^k) + θ (y^k - y^{k-1})`` from ``y^0 = y^{-1} = x_i^t``, and
    ``z_i^t = y^K`` is what goes out, and ``x_i^{t+1} = Σ_j W_ij z_j^t``. The momentum
    starts anew every round. W is that of `MixingAgent`.

    Notes
    -----
    ``precision`` is what the wire does to ``z_i`` on its way out; the agent's own
    ``z_i`` in the sum stays whole. With ``"int8"`` (and ``"float16"``, ``"bfloat16"``)
    the weights themselves are rounded, and each frame stands alone.
    ``"int8-differences"`` rounds the change: with ``x^_i`` for what the neighbors hold
    of agent i, the common initial weights at first, ``Q(z_i - x^_i)`` goes out, both
    ends add it to ``x^_i``, and that stands for ``z_i`` in the neighbors' sums. A step
    is 1/127 of a layer's largest change, not of its largest weight, and errors do not
    add up: what one round rounds away is part of the next one's difference. For
    neighbors that missed frames ``x^_i`` itself goes up to the relay as float32,
    whenever the differences since the last time have as many bytes.

    Differs from the paper: its quantized variant sends ``Q(z_i - x_i)``, where ``x_i``
    is the sender's own model before its local steps, which its neighbors do not hold.
    Differences from what both ends hold are those of CHOCO-SGD.

    Sources: Sun, Li, Wang 2021, arXiv:2104.11375, algorithm 1, and algorithm 2 for
    quantized differences; Koloskova, Stich, Jaggi 2019, arXiv:1902.00340, for ``x^``.
    """

    algorithm = "dfedavgm"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.precision = self.config.precision

    def train(self, *, round: int) -> dict[str, float]:
        """Take the K local steps, from a ball at rest."""
        self.velocity = {}
        metrics = super().train(round=round)
        self.velocity = {}
        return metrics

    def mixed_weights(self) -> Mapping[str, Tensor]:
        """Return the trained ``z_i``."""
        return self.weights


DFEDAVGM = Algorithm(DfedavgmAgent, DfedavgmConfig)
