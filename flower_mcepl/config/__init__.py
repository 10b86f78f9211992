"""Reading settings, and refusing wrong ones by name."""
