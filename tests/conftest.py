"""What tests share: Hypothesis profiles, seeds, a home for states, a small study.

The fast suite says the same twice: its examples are drawn from each test's own source
(profile ``fast``), and every test begins with the same global seeds, wherever it runs.
``make explore`` draws new examples instead (profile ``explore``, see explore.py).
"""

import contextlib
import functools
import gc
import os
import random
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

from tests.explore import UNTIL

# No deadlines: the first call into torch takes seconds, which is no property of the
# code under test.
settings.register_profile("fast", deadline=None, derandomize=True, max_examples=40)
settings.register_profile(
    "explore", deadline=None, max_examples=200, print_blob=True, database=None
)
settings.load_profile("fast")

# Hypothesis also draws constants that it finds in the modules loaded so far. Those
# depend on which tests ran before in this process, and so would the examples.
if hasattr(providers, "_get_local_constants"):
    _NO_CONSTANTS = providers.Constants()
    providers._get_local_constants = lambda: _NO_CONSTANTS


# Imported modules stay for good; torch and Flower are half a million objects. Do not
# look for garbage among them: not while they come, nor ever again (0.2 s each time).
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Load torch where tests run; a controller starts its workers at once."""
    if config.getoption("tx", None) and not hasattr(config, "workerinput"):
        return
    with contextlib.suppress(ImportError):
        import torch

        # small tensors; and workers of one machine do not fight over its cores
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Look for garbage from here on, among what tests make."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Explore in the seed's own order: where time is short, each has its turn."""
    if UNTIL in os.environ:
        random.Random(config.getoption("--hypothesis-seed")).shuffle(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what a library may draw from; and stop exploring when the time is up."""
    if time.time() > float(os.environ.get(UNTIL, "inf")):
        pytest.skip("the time to explore is up")
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if torch := sys.modules.get("torch"):
        # torch.manual_seed formats three call stacks for devices that are not there
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def no_overview(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave out the picture at the end of a run, which takes a second.

    Those marked ``pictures`` draw it.
    """
    reporting = sys.modules.get("flower_mcepl.strategies.reporting")
    with pytest.MonkeyPatch.context() as patch:  # the test's own must be undone by itself
        if reporting is not None and request.node.get_closest_marker("pictures") is None:
            patch.setattr(reporting, "plot_run", lambda run: "picture")
        yield


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how to repeat what was found with new examples."""
    seed = config.getoption("--hypothesis-seed")
    failed = [report.nodeid for report in terminalreporter.stats.get("failed", [])]
    if not failed or seed is None:
        return
    terminalreporter.section("FOUND: how to repeat it", sep="#", red=True, bold=True)
    profile = f"--hypothesis-profile=explore --hypothesis-seed={seed}"
    for test in failed:
        terminalreporter.line(f"python -m pytest -n 0 {profile} '{test}'")
    terminalreporter.line(
        "Or put the line @reproduce_failure(...) that stands above on top of the test. Then add "
        "the example to the test, as an @example or on its own, and mend what it shows."
    )


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk() -> Iterator[None]:
    """Let files reach the system's memory only, as no test cuts the power; and read
    once for all records which versions are installed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        patch.setattr(metadata, "version", functools.cache(metadata.version))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_state_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home for the states of agents that are played as on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield Path(os.environ["XDG_STATE_HOME"])


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a study of three runs, done."""
    from flower_mcepl.studies import read_study, run_study
    from tests.fleet.study_app import write_app, write_study

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
