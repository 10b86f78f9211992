"""What tests share: a Hypothesis profile without deadlines, one torch thread, a home for states, a small study."""

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

    # small tensors; and workers of one machine do not fight over its cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_state_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let an agent that is played as on a device keep its state elsewhere than in the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield Path(os.environ["XDG_STATE_HOME"])


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a study of three runs, done."""
    from flower_mcepl.studies import read_study, run_study
    from tests.study_app import write_app, write_study

    folder = tmp_path_factory.mktemp("study")
    head = (
        "target = 0.2\n[[runs]]\nalgorithm = 'mcepl'\nseed = [1, 2]\n[[runs]]\nalgorithm = 'dsgd'\n"
    )
    file = write_study(folder, write_app(folder, "page"), head)
    assert all(outcome.error is None for outcome in run_study(read_study(file)))
    return file


@pytest.fixture(scope="session")
def small_study_page(small_study: Path) -> Path:
    """The page of that study."""
    from flower_mcepl.report.page.report_page import report_page
    from flower_mcepl.studies.sources import read_source

    page = small_study.parent / "page.html"
    page.write_text(report_page(read_source(small_study)), encoding="utf-8")
    return page
