"""The chapters as they were released, packed with labkit: what `reset` puts back.

Neither the folder nor the last commit is trusted for that: a learner works in the one, and
nbgitpuller commits to the other. `python -m labkit.authoring.released` packs the notebooks anew
once they are refreshed.
"""

import sys
from pathlib import Path

from labkit.authoring import notebooks

ROOT = Path(__file__).parents[2]


class NotPacked(RuntimeError):
    """A chapter is not packed with labkit; the message says what to do."""


def packed(name: str, root: Path = ROOT) -> Path:
    """Return where a chapter lies as it was released.

    Args:
        name: its file name.
        root: the folder of a workbook.

    Raises:
        NotPacked: if it is not there.
    """
    path = _place(name, root)
    if not path.is_file():
        raise NotPacked(f"{path} is missing: install the workbook again, in another folder")
    return path


def _place(name: str, root: Path) -> Path:
    # No `.ipynb`: Jupyter, pytest and ruff leave it alone.
    return root / "labkit" / "authoring" / "released" / Path(name).with_suffix(".json")


def main() -> int:
    """Pack every chapter, and say which changed; return the exit status."""
    for path in notebooks.chapters_in(ROOT / "notebooks"):
        content, target = path.read_bytes(), _place(path.name, ROOT)
        changed = not target.is_file() or target.read_bytes() != content
        if changed:
            notebooks.write_whole(target, content)
        print(f"{path.name}: {'packed' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
