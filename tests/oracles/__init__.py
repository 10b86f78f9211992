"""Slow and obvious versions that compute the same, and what the reference computed."""
