"""What this package adds to flower_mcepl: see the entry points in pyproject.toml."""
