"""Launcher: a Flower app in a private SuperLink, and whether it really ended well.

``flwr run`` exits 0 even when the run failed, reuses whatever SuperLink answers on its
port, and leaves one behind. This launcher owns its SuperLink instead: own settings
folder, own loopback port, own process family::

    python -m flower_mcepl.launch examples/quickstart --run-config 'num-rounds=3'

It exits 0 only when Flower says ``finished:completed``, and nothing that it started
outlives it. Flower is not imported here: its programs run beside us, from the same
environment.
"""

from flower_mcepl.launch.run import RunOutcome, run_app

__all__ = ["RunOutcome", "run_app"]
