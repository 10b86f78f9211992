"""Tests of the room masks."""
