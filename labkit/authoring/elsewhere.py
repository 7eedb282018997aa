"""Opening a chapter on somebody else's machine: its links, and its first code cell.

`python -m labkit.authoring.elsewhere` writes both into every chapter, from the repository's
address and the version in `pyproject.toml`: run it after changing either.
"""

import sys
import tomllib
import urllib.parse
from pathlib import Path

import nbformat

from labkit.authoring import learner, notebooks

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SETUP_ID = "elsewhere"


def address() -> tuple[str, str]:
    """Return the URL of the repository on GitHub and the tag of this version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    return project["urls"]["Repository"].rstrip("/"), f"v{project['version']}"


def colab_url(name: str) -> str:
    """Return where a notebook opens in Colab."""
    url, tag = address()
    repository = urllib.parse.urlsplit(url).path.strip("/")
    return f"https://colab.research.google.com/github/{repository}/blob/{tag}/notebooks/{name}"


def binder_url(name: str) -> str:
    """Return where a notebook opens in Binder."""
    url, tag = address()
    repository = urllib.parse.urlsplit(url).path.strip("/")
    opened = urllib.parse.quote(f"lab/tree/notebooks/{name}", safe="")
    return f"https://mybinder.org/v2/gh/{repository}/{tag}?urlpath={opened}"


def links(name: str) -> str:
    """Return the line of a chapter's opening cell that leads to other machines."""
    return f"Without installing: [Colab]({colab_url(name)}) · [Binder]({binder_url(name)})"


def setup_source() -> str:
    """Return the first code cell of every chapter: it installs the workbook in Colab only."""
    url, tag = address()
    return f"""\
import sys

if "google.colab" in sys.modules:  # on your own machine this cell does nothing
    address = "{url}"
    !git clone --quiet --depth 1 --branch {tag} {{address}} workbook
    %cd -q workbook/notebooks
    %pip install --quiet --extra-index-url {CPU_INDEX} .."""


def prepare(notebook, name: str):
    """Bring a chapter's links and setup cell up to date, in place; return the notebook."""
    opening = notebook.cells[0]
    title, _, rest = learner.LINKS.sub("", opening.source).partition("\n\n")
    opening.source = f"{title}\n\n{links(name)}\n\n{rest}"
    setup = next((cell for cell in notebook.cells if cell.get("id") == SETUP_ID), None)
    if setup is None:
        setup = nbformat.v4.new_code_cell(id=SETUP_ID)
        notebook.cells.insert(1, setup)
        _count_again(notebook)
    setup.source = setup_source()
    return notebook


def _count_again(notebook) -> None:
    # An inserted cell that prints nothing moves the numbers of those below it, and only them.
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number


def main() -> int:
    """Prepare every chapter and say which changed; return the exit status."""
    for path in learner.chapters():
        changed = notebooks.write(prepare(notebooks.read(path), path.name), path)
        print(f"{path.name}: {'stored' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
