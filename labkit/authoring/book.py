"""The workbook as a static site: what `python -m labkit book` does.

The pages come from the outputs stored in the notebooks. They ask no other host for anything.
"""

import base64
import html
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from labkit.authoring import elsewhere, notebooks

CHAPTERS = Path(__file__).parents[2] / "notebooks"
ASSETS = Path(__file__).with_name("book_assets")
MARKER = ".quantization-workbook"
MODULES = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline")
RECORDS_PAGE = "records_of_long_runs"
FRONT_SECTIONS = ("The chapters", "What you will see", "Open it")
EXPLORER = "The explorer needs a running kernel, in JupyterLab; here, the still figure follows."
_MENDED = (
    # The theme's sidebar is no landmark.
    ('(<div id="pst-primary-sidebar")', r'\1 role="region" aria-label="Chapters and search"'),
    # docutils and pandas make an empty corner of a table a heading.
    (r"<th\b([^>]*)>(?:\s|&nbsp;|<p></p>)*</th>", r"<td\1></td>"),
    # A long formula scrolls in its box, so keys must reach it.
    ('<div (class="math )', r'<div tabindex="0" role="group" aria-label="Formula" \1'),
)
_EXPLORER_TEXT = re.compile(r"[HV]Box\(children=\(")


class BookError(RuntimeError):
    """The book could not be built; the message says why and what to do."""


def build(destination: Path, chapters: Path = CHAPTERS) -> Path:
    """Build the book, complete or not at all.

    Args:
        destination: where the site goes: a folder that does not exist, is empty, or holds
            nothing but a book built before, which is replaced.
        chapters: the folder of the notebooks; `records/` in it goes along, and so do sections of
            the README.md beside it, if there is one.

    Returns:
        The front page.

    Raises:
        BookError: if `destination` is something else, a package is missing, or Sphinx fails or
            warns.
        FileNotFoundError: if there is no chapter in `chapters`.
        notebooks.NotebookError: if one cannot be read.
    """
    destination = destination.resolve()
    _check_destination(destination)
    _check_modules()
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, so that the last step is a rename.
    with tempfile.TemporaryDirectory(
        prefix=f".{destination.name}.", dir=destination.parent
    ) as aside:
        source, site, old = (Path(aside) / name for name in ("source", "site", "old"))
        write_source(chapters, source)
        _run_sphinx(source, site)
        for page in site.glob("*.html"):
            page.write_text(mend(page.read_text(encoding="utf8")), encoding="utf8")
        files = sorted(path.relative_to(site).as_posix() for path in _files(site))
        (site / MARKER).write_text("\n".join(files) + "\n", encoding="utf8")
        site.chmod(0o755)
        if destination.exists():
            _check_destination(destination)  # again: the build took a while
            destination.rename(old)
        site.rename(destination)
    return destination / "index.html"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _check_destination(destination: Path) -> None:
    remedy = "name a new or an empty folder, or one that holds a book built before"
    if destination.exists() and not destination.is_dir():
        raise BookError(f"the destination {destination} is not a folder; {remedy}")
    if not destination.exists() or not any(destination.iterdir()):
        return
    marker = destination / MARKER
    if not marker.is_file():
        raise BookError(f"the destination {destination} holds other files; {remedy}")
    own = {MARKER, *marker.read_text(encoding="utf8").splitlines()}
    found = {path.relative_to(destination).as_posix() for path in _files(destination)}
    if found - own:
        raise BookError(
            f"the destination {destination} holds a book and also {min(found - own)}, which a new "
            f"book would remove; move it away, or {remedy}"
        )


def _check_modules() -> None:
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise BookError(
            f"building the book needs {', '.join(missing)}; in the folder of the workbook, run: "
            'python -m pip install -e ".[book]"'
        )


# The source of the site


def write_source(chapters: Path, source: Path) -> None:
    """Write what Sphinx reads: settings, a front page, chapters prepared for reading, records.

    Args, errors: as in `build`; `source` is a folder that does not exist.
    """
    paths = notebooks.chapters_in(chapters)
    if not paths:
        raise FileNotFoundError(f"no notebook in {chapters.absolute()} is a chapter")
    figures = source / "extra" / "figures"
    figures.mkdir(parents=True)
    (source / "extra" / ".nojekyll").touch()  # else GitHub Pages would leave out _static
    shutil.copy(ASSETS / "conf.py", source)
    (source / "_static").mkdir()
    shutil.copy(ASSETS / "book.css", source / "_static")
    shutil.copy(_mathjax(), source / "_static")
    pages = [path.stem for path in paths]
    if (chapters / "records").is_dir():
        shutil.copytree(chapters / "records", source / "records")
        page = records_page(source / "records")
        (source / f"{RECORDS_PAGE}.md").write_text(page, encoding="utf8")
        pages.append(RECORDS_PAGE)
    for path in paths:
        notebook = prepare(notebooks.read(path), figures, path.stem)
        notebooks.write(notebook, source / path.name)
    readme = chapters.absolute().parent / "README.md"
    text = readme.read_text(encoding="utf8") if readme.is_file() else "# The chapters"
    text = front_page(text, chapters.name, pages)
    (source / "index.md").write_text(text, encoding="utf8")


def _mathjax() -> Path:
    package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
    return package / "static" / "mathjax" / "tex-svg.js"


def front_page(readme: str, folder: str, pages: list[str]) -> str:
    """Make the front page from a README: what stands before its sections, and some of these.

    Args:
        readme: its text, in Markdown.
        folder: of the notebooks, as the README's links name it.
        pages: names of the other pages, in reading order.
    """
    opening, *rest = re.split(r"(?m)^## ", readme)
    sections = {section.partition("\n")[0].strip(): section for section in rest}
    kept = [f"## {sections[name].strip()}\n\n" for name in FRONT_SECTIONS if name in sections]
    text = f"{opening.strip()}\n\n{''.join(kept)}".replace(f"]({folder}/", "](")
    listed = "\n".join(pages)
    return f"{text}```{{toctree}}\n:hidden:\n\n{listed}\n```\n"


def records_page(folder: Path) -> str:
    """Make the page, in Markdown, that lists the records of a folder."""
    files = sorted(path.name for path in folder.glob("*.json*"))
    listed = "\n".join(f"- [`{name}`]({folder.name}/{name})" for name in files)
    return f"# Records of long runs\n\nWhat took too long for a lesson.\n\n{listed}\n"


def prepare(notebook, figures: Path, prefix: str):
    """Change the stored outputs of a notebook, in place, to what a page can show.

    A figure becomes a file with the alt text of its metadata, a table gets a box to scroll in, and
    an explorer a sentence, since there is no kernel behind a page. The setup cell for Colab goes,
    and where the text names the folder of records, it links to their page.

    Args:
        notebook: an `nbformat.NotebookNode`.
        figures: where the files of the figures go.
        prefix: how their names start.

    Returns:
        The same notebook.

    Raises:
        BookError: if a figure has no alt text.
    """
    notebook.cells = [cell for cell in notebook.cells if cell.id != elsewhere.SETUP_ID]
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("`records/`", f"[`records/`]({RECORDS_PAGE}.md)")
        for place, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            if "image/png" in data:
                file = figures / f"{prefix}-{number}-{place}.png"
                alt = output.metadata.get("image/png", {}).get("alt", "").strip()
                if not alt:
                    raise BookError(f"{prefix}, cell {number}: a figure has no alt text")
                file.write_bytes(base64.b64decode(data["image/png"]))
                output.data = {"text/html": _scroll_box(_picture(file, alt), "Figure")}
            elif "text/html" in data:
                output.data = {"text/html": _scroll_box(data["text/html"], "Table")}
            elif _EXPLORER_TEXT.match(data.get("text/plain", "")):
                output.data = {"text/html": f'<p class="explorer">{EXPLORER}</p>'}
    return notebook


def _picture(file: Path, alt: str) -> str:
    width, height = (int.from_bytes(file.read_bytes()[at : at + 4]) for at in (16, 20))  # IHDR
    return (
        f'<img class="figure-picture" src="figures/{file.name}" alt="{html.escape(alt)}" '
        f'width="{width}" height="{height}">'
    )


def _scroll_box(inside: str, label: str) -> str:
    # No region: a page has many, and each region would be a landmark.
    return f'<div class="scroll" role="group" aria-label="{label}" tabindex="0">{inside}</div>'


def _run_sphinx(source: Path, site: Path) -> None:
    # A process of its own: Sphinx leaves settings behind in docutils and in the locale.
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    command += ["-d", str(source.with_name("doctrees")), str(source), str(site)]
    done = subprocess.run(
        command, capture_output=True, encoding="utf8", errors="replace", check=False
    )
    if done.returncode:
        raise BookError(f"Sphinx did not build the book; it said:\n{done.stderr.strip()[-2000:]}")


def mend(page: str) -> str:
    """Correct, in the HTML of a page, what keeps it from readers with a screen reader or keys."""
    for wrong, right in _MENDED:
        page = re.sub(wrong, right, page)
    return page
