"""How anything reaches a disk: in one step, under a checksum, under a lock."""
