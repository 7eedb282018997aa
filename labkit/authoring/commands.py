"""The commands of `python -m labkit`."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command (None: the one of the command line) and return its exit status."""
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
        # torch and others raise RuntimeError as well: a bug, whose traceback we want.
        ours = type(error).__module__.startswith("labkit.")
        if not isinstance(error, OSError) and not ours:
            raise
        print(f"labkit {chosen.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m labkit", description="Commands of the quantization workbook."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    add("doctor", _doctor, "check this machine and say how to mend it")
    add("fetch", _fetch, "download and convert SmolLM2 ahead of a class")
    refresh = add("refresh", _refresh, "execute notebooks and store them in normal form")
    starts = "how the file name starts (default: every one)"
    refresh.add_argument("chapters", nargs="*", metavar="01", help=starts)
    refresh.add_argument("--folder", type=Path, default="notebooks", help="where the notebooks are")
    release = add("release", _release, "write copies for learners, without outputs and solutions")
    release.add_argument("folder", type=Path, metavar="DIR", help="where to; work in it stays")
    kind = release.add_mutually_exclusive_group()
    kind.add_argument("--without-hints", action="store_true", help="take the folded hints out too")
    kind.add_argument("--nbgrader", action="store_true", help="write a course for nbgrader instead")
    reset = add("reset", _reset, "put a fresh copy of a chapter beside the one you worked in")
    reset.add_argument("chapter", metavar="01", help="how the file name starts")
    reset.add_argument("--folder", type=Path, help="where you work (default: here, or notebooks)")
    values = add("values", _values, "what claims measured on other settings, against their bands")
    values.add_argument("action", choices=("run", "show"))
    values.add_argument("chapters", nargs="*", metavar="01", help=starts)
    values.add_argument("--setting", default="as it is", help="the setting of a run")
    values.add_argument("--folder", type=Path, default="notebooks", help="where the notebooks are")
    book = add("book", _book, "build the chapters as a web site to be read offline")
    book.add_argument("folder", type=Path, metavar="DIR", help="where to; new, or an older book")
    return parser


def _doctor(chosen: argparse.Namespace) -> int:
    from labkit.authoring import doctor

    return doctor.examine()


def _fetch(chosen: argparse.Namespace) -> int:
    from labkit import models, texts

    for thing in (models.SMOLLM2, texts.GENSIM):
        folder = thing.fetch()
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
        title = thing.title[0].upper() + thing.title[1:]
        print(f"{title}, ready: {folder} ({nbytes / 1e6:.0f} MB)")
    return 0


def _refresh(chosen: argparse.Namespace) -> int:
    from labkit.authoring import notebooks

    return notebooks.refresh_folder(chosen.folder, chosen.chapters)


def _release(chosen: argparse.Namespace) -> int:
    if chosen.nbgrader:
        from labkit.authoring import grading

        return grading.release_course(chosen.folder)
    from labkit.authoring import learner

    return learner.release(chosen.folder, hints=not chosen.without_hints)


def _reset(chosen: argparse.Namespace) -> int:
    from labkit.authoring import learner

    kept = learner.reset(chosen.chapter, chosen.folder)
    mine = kept.stem.endswith("_mine")
    print(f"Your work is now {kept}." if mine else f"{kept} is fresh; there was nothing to keep.")
    copies = [path for path in learner.copies_of(chosen.chapter, kept.parent) if path != kept]
    if copies:
        print(f"Copies, left as they are: {', '.join(map(str, copies))}.")
    return 0


def _values(chosen: argparse.Namespace) -> int:
    from labkit.authoring import claim_values

    if chosen.setting not in claim_values.SETTINGS:
        names = ", ".join(map(repr, claim_values.SETTINGS))
        print(f"--setting must be one of {names}, not {chosen.setting!r}", file=sys.stderr)
        return 2
    if chosen.action == "run":
        return claim_values.run(chosen.folder, chosen.chapters, chosen.setting)
    return claim_values.show(chosen.folder, chosen.chapters)


def _book(chosen: argparse.Namespace) -> int:
    from labkit.authoring import book

    print(f"The book is ready: {book.build(chosen.folder)}")
    return 0
