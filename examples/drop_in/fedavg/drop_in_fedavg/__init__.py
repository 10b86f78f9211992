"""An ordinary Flower app: digits with FedAvg."""
