"""Personal models by mask gossip: decentralized, communication-efficient learning on Flower (MCE-PL)."""
