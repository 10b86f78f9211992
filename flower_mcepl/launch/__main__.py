"""``python -m flower_mcepl.launch``."""

import sys

from flower_mcepl.launch.command import main

if __name__ == "__main__":
    sys.exit(main())
