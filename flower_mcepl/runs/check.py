"""Check of a run config in a process of its own: ``python -m flower_mcepl.runs.check``.

Whoever must stay free of torch, as the launcher, asks here. The standard input holds
JSON: ``config``, the whole run config, and ``app_keys``, those that the app may read
for itself. What is wrong stands on the standard output, and the exit code is 1.
"""

import json
import sys

from flower_mcepl.errors import FlowerMceplError
from flower_mcepl.runs.settings import RunSettings


def main() -> int:
    """Read, check and answer."""
    asked = json.load(sys.stdin)
    try:
        RunSettings.from_run_config(asked["config"], app_keys=asked["app_keys"])
    except FlowerMceplError as error:
        sys.stdout.write(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
