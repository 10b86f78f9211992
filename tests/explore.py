"""Search for examples that break a property: every pass draws from another seed.

python -m tests.explore --seconds 300

It ends with exit code 0 when the time is up, or with exit code 1 as soon as a pass
fails; conftest.py then prints how to repeat what was found. A find becomes a test: as
an ``@example``, which the fast suite plays forever after.
"""

import argparse
import os
import secrets
import subprocess
import sys
import time

UNTIL = "FLOWER_MCEPL_EXPLORE_UNTIL"  # seconds since 1970: no test begins after that
SHRINKING = 400  # seconds that the last test may take longer: Hypothesis shrinks for up to 300
OPTIONS = ["-q", "--durations=0", "--durations-min=30", "-m", "hypothesis and not slow"]


def explore(seconds: float, arguments: list[str]) -> int:
    """Play passes until the time is up or one fails; return the exit code."""
    until, seeds = time.time() + seconds, []
    while not seeds or time.time() < until:
        seeds.append(secrets.randbits(32))
        code = play(seeds[-1], until, arguments)
        if code:
            print(f"explore: the pass with seed {seeds[-1]} failed (pytest's exit code: {code})")
            return 1
    print(f"explore: nothing found in {seconds:.0f} s with the seeds {', '.join(map(str, seeds))}")
    return 0


def play(seed: int, until: float, arguments: list[str]) -> int | str:
    """Play all property tests with one seed; return pytest's exit code or why not."""
    profile = ["--hypothesis-profile=explore", f"--hypothesis-seed={seed}"]
    command = [sys.executable, "-m", "pytest", *OPTIONS, *profile, *arguments]
    limit = max(until - time.time(), 0) + SHRINKING
    try:
        return subprocess.run(
            command, env={**os.environ, UNTIL: str(until)}, timeout=limit, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return f"none, it did not end in {limit:.0f} s"


def main() -> int:
    """Read the command line; all that is not ours goes to pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300, help="how long (default: 300)")
    options, arguments = parser.parse_known_args()
    return explore(options.seconds, arguments)


if __name__ == "__main__":
    sys.exit(main())
