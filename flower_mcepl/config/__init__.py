"""Reading settings, and refusing wrong ones by name."""

from flower_mcepl.config.checks import check

__all__ = ["check"]
