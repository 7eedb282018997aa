"""The commands of `python -m labkit`."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command (None: the one of the command line) and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not know every sign we print
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(
        prog="python -m labkit", description="Commands of the quantization workbook."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("doctor", help="check this machine and say how to mend it")
    commands.add_parser("fetch", help="download and convert SmolLM2 ahead of a class")
    refresh = commands.add_parser("refresh", help="execute notebooks and store them in normal form")
    starts = "how the file name starts (default: every one)"
    refresh.add_argument("chapters", nargs="*", metavar="01", help=starts)
    refresh.add_argument("--folder", type=Path, default="notebooks", help="where the notebooks are")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "doctor":
            from workshop import doctor

            return doctor.examine()
        if chosen.command == "fetch":
            return _fetch()
        if chosen.command == "refresh":
            from workshop import notebooks

            return notebooks.refresh_folder(chosen.folder, chosen.chapters)
    except (RuntimeError, OSError) as error:
        # torch and others raise RuntimeError as well: a bug, whose traceback we want.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("labkit."):
            raise
        print(f"labkit {chosen.command}: {error}", file=sys.stderr)
        return 1
    parser.print_help()
    return 0


def _fetch() -> int:
    from labkit import models

    folder = models.fetch_smollm2()
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    print(f"SmolLM2 is ready: {folder} ({nbytes / 1e6:.0f} MB)")
    return 0
