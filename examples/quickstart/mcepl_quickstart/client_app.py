"""Device side: which network, which data.

They are named, not imported: on a device, whose every message is a process of its own,
torch and the data are then loaded once, in its resident worker.
"""

from flower_mcepl.clients import make_client_app

app = make_client_app("mcepl_quickstart.task:model_fn", "mcepl_quickstart.task:data_fn")
