"""Opening a chapter on somebody else's machine: links, badges, and a first code cell for Colab.

They exist only while `[project.urls]` in `pyproject.toml` names a repository. After adding,
changing or removing it, `python -m labkit.authoring.elsewhere` writes them all, or takes them away.
"""

import re
import sys
import tomllib
import urllib.parse
from pathlib import Path
from typing import NamedTuple

import nbformat

from labkit.authoring import learner, notebooks

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SETUP_ID = "elsewhere"
_GENERATED = re.compile(r"(<!-- generated: elsewhere -->\n).*?(<!-- end -->)", re.DOTALL)
_FIRST = "01_basics.ipynb"


class Address(NamedTuple):
    """Where the workbook is published: the URL of a repository on GitHub, and a tag in it."""

    url: str
    tag: str

    @property
    def repository(self) -> str:
        """Owner and name."""
        return urllib.parse.urlsplit(self.url).path.strip("/")

    def colab(self, name: str) -> str:
        """Return where a notebook opens in Colab."""
        start = "https://colab.research.google.com/github"
        return f"{start}/{self.repository}/blob/{self.tag}/notebooks/{name}"

    def binder(self, name: str) -> str:
        """Return where a notebook opens in Binder."""
        opened = urllib.parse.quote(f"lab/tree/notebooks/{name}", safe="")
        return f"https://mybinder.org/v2/gh/{self.repository}/{self.tag}?urlpath={opened}"


def address(pyproject: Path = ROOT / "pyproject.toml") -> Address | None:
    """Return the address that `[project.urls]` names as `Repository`, or None if it names none.

    Raises:
        ValueError: if it names something that is no repository on GitHub.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf8"))["project"]
    url = project.get("urls", {}).get("Repository", "").rstrip("/")
    if not url:
        return None
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(f"Repository must be https://github.com/OWNER/NAME, not {url!r}")
    return Address(url, f"v{project['version']}")


def links(place: Address, name: str) -> str:
    """Return the line of a chapter's opening cell that leads to other machines."""
    return f"Without installing: [Colab]({place.colab(name)}) · [Binder]({place.binder(name)})"


def setup_source(place: Address) -> str:
    """Return the first code cell of every chapter: it installs the workbook in Colab only."""
    return f"""\
import sys

if "google.colab" in sys.modules:  # on your own machine this cell does nothing
    address = "{place.url}"
    !git clone --quiet --depth 1 --branch {place.tag} {{address}} workbook
    %cd -q workbook/notebooks
    %pip install --quiet --extra-index-url {CPU_INDEX} .."""


def prepare(notebook, name: str, place: Address | None):
    """Bring a chapter's links and setup cell up to date, in place; return the notebook.

    Args:
        notebook: an `nbformat.NotebookNode`.
        name: its file name.
        place: None takes both away.
    """
    opening = notebook.cells[0]
    title, _, rest = learner.LINKS.sub("", opening.source).partition("\n\n")
    parts = [title, *([links(place, name)] if place else []), rest]
    opening.source = "\n\n".join(parts)
    without = [cell for cell in notebook.cells if cell.get("id") != SETUP_ID]
    setup = [nbformat.v4.new_code_cell(setup_source(place), id=SETUP_ID)] if place else []
    notebook.cells = [without[0], *setup, *without[1:]]
    _count_again(notebook)
    return notebook


def _count_again(notebook) -> None:
    # A cell that prints nothing moves the numbers of those below it, and only them.
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number


def readme(text: str, place: Address | None) -> str:
    """Return the README with its generated part up to date: badges, and what Colab runs.

    Raises:
        ValueError: if it has no generated part.
    """
    if not _GENERATED.search(text):
        raise ValueError("README.md lacks <!-- generated: elsewhere --> … <!-- end -->")
    part = _readme_part(place) if place else ""
    return _GENERATED.sub(lambda found: found[1] + part + found[2], text)


def _readme_part(place: Address) -> str:
    colab = "https://colab.research.google.com/assets/colab-badge.svg"
    binder = "https://mybinder.org/badge_logo.svg"
    return f"""
[![Open in Colab]({colab})]({place.colab(_FIRST)})
[![Open in Binder]({binder})]({place.binder(_FIRST)})

In Colab the first code cell of every chapter runs these commands, and nothing on your own machine:

```bash
git clone --quiet --depth 1 --branch {place.tag} {place.url} workbook
cd workbook/notebooks
pip install --quiet --extra-index-url {CPU_INDEX} ..
```

"""


def main() -> int:
    """Prepare the README and every chapter, and say which changed; return the exit status."""
    place = address()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf8")
    after = readme(before, place)
    if after != before:
        notebooks.write_whole(path, after.encode())
    print(f"{path.name}: {'unchanged' if after == before else 'stored'}")
    for path in learner.chapters():
        changed = notebooks.write(prepare(notebooks.read(path), path.name, place), path)
        print(f"{path.name}: {'stored' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
