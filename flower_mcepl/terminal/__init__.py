"""Output for a person's terminal, or whatever stands behind the standard streams."""

from flower_mcepl.terminal.encoding import any_encoding, spell_unknown, spelled

__all__ = ["any_encoding", "spell_unknown", "spelled"]
