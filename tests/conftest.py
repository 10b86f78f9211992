"""What every test shares: a Hypothesis profile without deadlines, and one torch thread."""

import contextlib

from hypothesis import settings

# The first call into torch takes seconds, which is no property of the code under test.
settings.register_profile("flower_mcepl", deadline=None)
settings.load_profile("flower_mcepl")

with contextlib.suppress(ImportError):
    import torch

    torch.set_num_threads(1)  # small tensors; and workers of one machine do not fight over its cores
