"""Tests of the room personal."""
