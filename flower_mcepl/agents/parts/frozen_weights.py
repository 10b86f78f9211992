"""Parameter of algorithms whose weights stay as they were drawn: how they are drawn."""

from dataclasses import dataclass

from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.masks.weight_init import MODULE, check_weight_init


@dataclass(frozen=True, kw_only=True)
class FrozenWeightsConfig(TrainingConfig):
    """Parameters of local training over frozen weights.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    # "module": frozen weights as the model function makes them; "signed-constant":
    # ± sqrt(1 / fan_in) in place of the maskable ones, signs drawn by layer name
    weight_init: str = MODULE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight_init(self.weight_init)
