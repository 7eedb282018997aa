"""The command line of the workbook: `python -m labkit --help` lists its commands."""

import sys

from labkit.authoring.commands import main

if __name__ == "__main__":
    sys.exit(main())
