"""Where the network's first weights come from: the model function, or pretrained."""

from dataclasses import dataclass

from torch import nn

from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig, read_fields
from flower_mcepl.masks.pretrained import check_source, load_weights
from flower_mcepl.masks.weight_init import MODULE


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Pretrained weights of a network; a SuperNode's node config may set the same keys.

    Raises
    ------
    ConfigError
        If a value does not say where weights come from.
    """

    # state dict that the network begins from, on all agents:
    # "file:/path.safetensors" (or .pt, .pth, .bin),
    # "torchvision:resnet18/IMAGENET1K_V1", "timm:NAME"; "": weights as the model
    # function makes them
    weights: str = ""
    # names or patterns of tensors that stay as the model function makes them, such as
    # "fc*"
    weights_except: str = ""

    def __post_init__(self) -> None:
        if self.weights:
            check_source(self.weights)
        check(
            bool(self.weights) or not self.weights_except,
            "weights-except says which tensors of weights are left out, and needs weights",
            self.weights_except,
        )
        check(
            all(self.excepted) or not self.weights_except,
            "weights-except must be names or patterns, separated by commas",
            self.weights_except,
        )

    @property
    def excepted(self) -> list[str]:
        """Patterns of the tensors that are left out."""
        parts = [part.strip() for part in self.weights_except.split(",")]
        return parts if self.weights_except else []

    @classmethod
    def of(cls, run_config: RunConfig, node_config: RunConfig | None) -> "InitialWeights":
        """Read the settings; a device's own stand above those of the run."""
        return read_fields(cls, {**run_config, **(node_config or {})})

    def check_with(self, config: TrainingConfig) -> None:
        """Raise ConfigError where the algorithm would draw the weights anew at once."""
        init = getattr(config, "weight_init", MODULE)
        check(
            not self.weights or init == MODULE,
            "weight-init draws the frozen weights anew, and weights would count for nothing",
            init,
            f'Set weight-init = "{MODULE}", or leave weights out.',
        )

    def begin(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Network that an agent begins from, and where its weights come from.

        Raises
        ------
        ConfigError
            If the weights cannot be read or do not fit the network.
        """
        if not self.weights:
            return module, ""
        return load_weights(module, self.weights, excepted=self.excepted)
