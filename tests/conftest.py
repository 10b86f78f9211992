"""What every test shares: a Hypothesis profile without deadlines, one torch thread, and a home for agents' states."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The first call into torch takes seconds, which is no property of the code under test.
settings.register_profile("flower_mcepl", deadline=None)
settings.load_profile("flower_mcepl")

with contextlib.suppress(ImportError):
    import torch

    torch.set_num_threads(1)  # small tensors; and workers of one machine do not fight over its cores


@pytest.fixture(autouse=True, scope="session")
def no_state_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let an agent that is played as on a device keep its state elsewhere than in the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield Path(os.environ["XDG_STATE_HOME"])
