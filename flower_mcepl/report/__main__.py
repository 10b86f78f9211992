"""``python -m flower_mcepl.report RECORD``."""

import sys

from flower_mcepl.report.table import main

if __name__ == "__main__":
    sys.exit(main())
