"""The same Flower app, gossiping: digits without a server's model."""
