"""What goes between agents, and who holds what of whom."""
