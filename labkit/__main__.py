"""The command line: `python -m labkit doctor · fetch · refresh`."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: what follows `python -m labkit`. None: from the command line.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not know every sign we print
            stream.reconfigure(errors="replace")
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 0
    try:
        return chosen.run(chosen)
    except (RuntimeError, OSError) as error:
        ours = isinstance(error, OSError) or type(error).__module__.startswith("labkit.")
        if not ours:
            raise  # torch and others raise RuntimeError as well: a bug, whose traceback we want
        print(f"labkit {chosen.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m labkit", description="Commands of the quantization workbook."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    doctor = commands.add_parser("doctor", help="check this machine and say how to mend it")
    doctor.set_defaults(run=_doctor)
    fetch = commands.add_parser("fetch", help="download and convert SmolLM2 ahead of a class")
    fetch.set_defaults(run=_fetch)
    refresh = commands.add_parser("refresh", help="execute notebooks and store them in normal form")
    refresh.add_argument(
        "chapters", nargs="*", metavar="01", help="how the file name starts (default: every one)"
    )
    refresh.add_argument(
        "--folder", type=Path, default=Path("notebooks"), help="where the notebooks are"
    )
    refresh.set_defaults(run=_refresh)
    return parser


def _doctor(chosen: argparse.Namespace) -> int:
    from labkit import doctor

    return doctor.examine()


def _fetch(chosen: argparse.Namespace) -> int:
    from labkit import models

    folder = models.fetch_smollm2()
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"SmolLM2 is ready: {folder} ({nbytes / 1e6:.0f} MB)")
    return 0


def _refresh(chosen: argparse.Namespace) -> int:
    from labkit import notebooks

    status = 0
    for path in _selected(chosen.folder, chosen.chapters):
        print(f"{path} …", flush=True)
        try:
            done = notebooks.refresh(path)
        except notebooks.NotebookError as error:
            print(f"{path}, {error}\n{path} was left as it was.", file=sys.stderr)
            status = 1
            continue
        print(
            f"{path}: {done.n_cells} code cells, {done.seconds:.0f} s, peak memory "
            f"{done.peak_nbytes / 1e9:.2f} GB, {'stored' if done.changed else 'unchanged'}"
        )
        if done.stderr_cells:
            numbers = ", ".join(map(str, done.stderr_cells))
            print(f"{path}: stderr must stay empty, but these code cells wrote to it: {numbers}")
    return status


def _selected(folder: Path, chapters: list[str]) -> list[Path]:
    every = sorted(folder.glob("*.ipynb"))
    if not every:
        raise FileNotFoundError(f"no notebook in {folder.resolve()}; --folder says where they are")
    names = ", ".join(path.name for path in every)
    for chapter in chapters:
        if not any(path.name.startswith(chapter) for path in every):
            raise FileNotFoundError(f"no notebook starts with {chapter!r}; there are {names}")
    return [path for path in every if path.name.startswith(tuple(chapters) or "")]


if __name__ == "__main__":
    sys.exit(main())
