"""Small copies of the shapes of Flower's example apps, each one module for FedAvg.

The frameworks that are not installed are played by stand-ins of the same shape.
"""
