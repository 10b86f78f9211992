"""One run: its settings, its rounds, and what of it survives."""
