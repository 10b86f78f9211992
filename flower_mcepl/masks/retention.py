"""Retention ratios by layer: one for all, by kind, by name or by pattern."""

from collections.abc import Mapping

from flower_mcepl.config.patterns import best_key, matches_any
from flower_mcepl.errors import ConfigError
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.layers import LayerSpec

Retention = float | Mapping[str, float]
"""One ratio for all layers, or ratios by kind, weight name or pattern (``head.*``)."""


def check_retentions(retention: Retention) -> None:
    """Raise ConfigError unless every ratio is in (0, 1]."""
    if not isinstance(retention, Mapping):
        maths.check_retention(retention, of="every layer")
        return
    for key, value in retention.items():
        maths.check_retention(value, of=repr(key))


def resolve_retention(retention: Retention, layers: Mapping[str, LayerSpec]) -> dict[str, float]:
    """Ratio of each layer: the exact name wins over a pattern, a pattern over the kind.

    Raises
    ------
    ConfigError
        If a ratio is out of range, a key fits no layer, or a layer is left without a
        ratio.
    """
    check_retentions(retention)
    if not isinstance(retention, Mapping):
        return {name: float(retention) for name in layers}
    kinds = {spec.kind for spec in layers.values()}
    for key in retention:
        if key not in ("conv", "linear") and not matches_any(key, layers):
            raise ConfigError(
                f"the retention key {key!r} fits no layer; use a kind "
                f"({', '.join(sorted(kinds))}), a name or a pattern of: {', '.join(layers)}."
            )
    return {name: _ratio_of(spec, retention) for name, spec in layers.items()}


def _ratio_of(spec: LayerSpec, retention: Mapping[str, float]) -> float:
    key = best_key(spec.name, [key for key in retention if key != spec.kind])
    if key is not None:
        return float(retention[key])
    if spec.kind in retention:
        return float(retention[spec.kind])
    raise ConfigError(
        f"no retention ratio for {spec.name} (kind {spec.kind}); got keys {', '.join(retention)}. "
        f"Add {spec.kind!r} or {spec.name!r}."
    )
