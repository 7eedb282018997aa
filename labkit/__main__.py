"""The command line of the workbook: `python -m labkit --help` lists its commands."""

import sys

from labkit import python_version

if __name__ == "__main__":
    if sys.version_info < python_version.OLDEST:  # before anything that it could not read
        version = sys.version.split()[0]
        sys.exit(f"labkit: this is Python {version}. {python_version.advice()}")
    from labkit.authoring.commands import main

    sys.exit(main())
