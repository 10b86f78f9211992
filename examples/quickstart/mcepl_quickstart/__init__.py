"""Quickstart of flower_mcepl: digits, ten unequal agents."""
