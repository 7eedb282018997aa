"""The book as a reader meets it: built, served on loopback, and opened in a real Chromium.

`python -m labkit book` must give pages that need no other host, work by keyboard and for screen
readers (axe finds nothing), fit a phone, and never replace what is not a book.
"""

import functools
import http.server
import importlib.util
import itertools
import re
import shutil
import threading
import urllib.parse
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from labkit.authoring import book, notebooks
from labkit.authoring import commands as command_line

ROOT = Path(__file__).parent.parent
CHAPTERS = [Path(name).stem for name in notebooks.NAMES]
PAGES = ["index", *CHAPTERS, "99_extra", "records_of_long_runs", "search"]
needs_sphinx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, book.MODULES)),
    reason='the packages that build the book are missing: pip install -e ".[book]"',
)
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EXTRA = """\
# A page of the test

[to a chapter](01_basics.ipynb#6--real-bytes-packing-int4), [a record](records/05_llama_cpp.json),
and the word xylophone. Display: $$\\sum_i x_i = \\begin{cases} 1 \\\\ 0 \\end{cases}$$"""


def figure(alt: str):
    data = {"image/png": PIXEL, "text/plain": f"Figure: {alt}"}
    return v4.new_output("display_data", data, metadata={"image/png": {"alt": alt}})


def extra_notebook():
    explorer = v4.new_output("execute_result", {"text/plain": "VBox(children=(HBox(),))"})
    outputs = [figure('The "first" dot.'), figure("The second dot."), explorer]
    code = v4.new_code_cell("dots()", outputs=outputs, execution_count=1)
    return v4.new_notebook(cells=[v4.new_markdown_cell(EXTRA), code])


# Where it may be built


def fails_to_build(folder: Path, capsys) -> str:
    assert command_line.main(["book", str(folder)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("labkit book: ")
    assert str(folder) in message
    return message


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    message = fails_to_build(tmp_path, capsys)
    assert "holds other files; name a new or an empty folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert mine.read_text() == "mine"


def test_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "is not a folder; name" in fails_to_build(tmp_path / "file", capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_book_with_a_file_of_the_reader_is_refused(tmp_path, capsys):
    (tmp_path / book.MARKER).write_text("index.html\n")
    (tmp_path / "index.html").write_text("a page")
    (tmp_path / "CNAME").write_text("mine")
    assert "also CNAME, which a new book would remove" in fails_to_build(tmp_path, capsys)
    assert (tmp_path / "CNAME").read_text() == "mine"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "MODULES", ("json", "no_such_package"))
    with pytest.raises(
        book.BookError, match=r'needs no_such_package; .*pip install -e "\.\[book\]"'
    ):
        book.build(tmp_path / "book")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_notebooks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "MODULES", ())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no notebook in .*empty"):
        book.build(tmp_path / "book", tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_figure_without_alt_text_is_refused(tmp_path):
    cell = v4.new_code_cell("dot()", outputs=[figure("")])
    with pytest.raises(book.BookError, match="01_dots, cell 0: a figure has no alt text"):
        book.prepare(v4.new_notebook(cells=[cell]), tmp_path, "01_dots")


# What it looks like


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a book: all chapters and one more page, built over an older book."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    shutil.copytree(ROOT / "notebooks", source / "notebooks")
    shutil.copy(ROOT / "README.md", source)
    for name in ("99_extra.ipynb", "01_basics-Copy1.ipynb", "01_basics_mine.ipynb"):
        nbformat.write(extra_notebook(), source / "notebooks" / name)
    older = target / "book"
    older.mkdir()
    (older / book.MARKER).write_text("old.html\n")
    (older / "old.html").write_text("an older book")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "NAMES", (*notebooks.NAMES, "99_extra.ipynb"))
        assert book.build(older, source / "notebooks") == older / "index.html"
    assert not (older / "old.html").exists()
    assert [path.name for path in target.iterdir()] == ["book"]  # nothing is left beside it
    return older


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def url(site):
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def reader(browser, url):
    """A page with no way to another host, and lists of what went wrong: requests, errors."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    page, tried, errors = context.new_page(), [], []

    def guard(route) -> None:
        if route.request.url.startswith((f"{url}/", "data:")):
            return route.continue_()
        tried.append(route.request.url)
        return route.abort()

    context.route("**/*", guard)
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
    yield page, tried, errors
    context.close()


def open_page(reader, url: str, name: str):
    page, tried, errors = reader
    page.goto(f"{url}/{name}.html")
    page.evaluate("window.MathJax?.startup?.promise?.then(() => null)")
    seen = list(tried), list(errors)
    tried.clear()
    errors.clear()
    return page, *seen


def axe_violations(page, **options) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, **options).response["violations"]
    return [f"{v['id']}: {node['html'][:200]}" for v in found for node in v["nodes"]]


@needs_sphinx
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_without_other_hosts(reader, url, name):
    page, tried, errors = open_page(reader, url, name)
    assert tried == []
    assert errors == []
    sides = "[i.naturalWidth, i.naturalHeight, i.width, i.height]"
    images = page.locator("img").evaluate_all(f"all => all.map(i => [{sides}, i.alt, i.src])")
    for (natural_width, natural_height, width, height), alt, source in images:
        assert natural_width > 0, source
        assert width / height == pytest.approx(natural_width / natural_height, rel=0.02), source
        assert len(alt) > 10, source
    assert len(images) > 2 or name not in CHAPTERS
    assert page.locator("article h1").count() == (name != "search")
    assert "children=(" not in page.locator("main").inner_text()
    formulas = page.locator(".math")
    assert page.locator(".math > mjx-container svg").count() == formulas.count()
    assert page.locator(".math > mjx-container mjx-assistive-mml").count() == formulas.count()
    assert page.locator("[data-mjx-error], mjx-merror").count() == 0
    if name in CHAPTERS[:5]:
        assert formulas.count() > 0


# What a page repeats a hundred times, in the same colors. axe takes ten seconds for the words of
# all code, and as long to find how well each word of a text stands out: some of each are enough.
CODE, REPEATED = ".highlight", (".output", "article p", "article li", "article tr")
ONLY_CONTRAST = {"runOnly": ["color-contrast"]}


def leave_some(page, selector: str) -> None:
    page.locator(selector).evaluate_all("all => all.slice(6).forEach(one => one.remove())")


@needs_sphinx
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_in_either_theme(reader, url, name):
    page, *_ = open_page(reader, url, name)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    leave_some(page, CODE)
    assert axe_violations(page, options={"rules": {"color-contrast": {"enabled": False}}}) == []
    for selector in REPEATED:
        leave_some(page, selector)
    page.add_style_tag(content="* { transition: none !important }")
    assert axe_violations(page, options=ONLY_CONTRAST) == []
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert axe_violations(page, options=ONLY_CONTRAST) == []
    reader[2].clear()  # axe reads style sheets again, one of them from a place where it is not


@needs_sphinx
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone(reader, url, name):
    reader[0].set_viewport_size({"width": 390, "height": 844})
    page, *_ = open_page(reader, url, name)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    try:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        stretch = "i => i.width / i.height / (i.naturalWidth / i.naturalHeight)"
        stretched = page.locator("img").evaluate_all(f"all => all.map({stretch})")
        assert stretched == pytest.approx([1] * len(stretched), rel=0.02)
        sides = "all => all.map(e => e.getBoundingClientRect()).map(box => [box.left, box.right])"
        boxes = page.locator("article :is(pre, .scroll, div.math)").evaluate_all(sides)
        assert all(0 <= left < right <= 390 for left, right in boxes)
    finally:
        page.set_viewport_size({"width": 1440, "height": 900})


@needs_sphinx
def test_solutions_open_on_a_click_and_are_highlighted(reader, url):
    page, *_ = open_page(reader, url, CHAPTERS[0])
    folded = page.locator("details")
    assert folded.count() > 15
    assert page.locator("details[open]").count() == 0
    solution = folded.filter(has=page.get_by_text("Solution", exact=True)).first
    code = solution.locator("pre span.k").first
    assert not code.is_visible()
    solution.locator("summary").click()
    assert code.is_visible()


@needs_sphinx
def test_search_finds_a_word_of_one_page(reader, url):
    page = reader[0]
    page.goto(f"{url}/search.html?q=xylophone")
    results = page.locator("#search-results ul.search li")
    results.first.wait_for()
    assert results.count() == 1
    results.locator("a").first.click()
    page.wait_for_url("**/99_extra.html*")
    assert reader[1] == []


@needs_sphinx
def test_chapters_follow_each_other(site):
    front = (site / "index.html").read_text(encoding="utf8")
    table = front.partition("<tbody>")[2].partition("</tbody>")[0]
    assert re.findall(r'href="([^"]+)"', table) == [f"{name}.html" for name in CHAPTERS]
    for name, following in itertools.pairwise(["index", *CHAPTERS]):
        page, after = ((site / f"{n}.html").read_text(encoding="utf8") for n in (name, following))
        assert re.search(rf'class="right-next"\s+href="{following}.html"', page)
        assert re.search(rf'class="left-prev"\s+href="{name}.html"', after)


@needs_sphinx
def test_every_local_link_leads_somewhere(site):
    pages = {path.name: path.read_text(encoding="utf8") for path in site.glob("*.html")}
    link = re.compile(r'<a [^>]*href="([^":]+)"')
    local = [(page, href) for page, text in pages.items() for href in link.findall(text)]
    assert len(local) > 200
    for page, href in local:
        path, _, anchor = urllib.parse.unquote(href).partition("#")
        assert (site / (path or page)).is_file(), f"{page}: {href}"
        if anchor:
            assert f'id="{anchor}"' in pages[path or page], f"{page}: {href}"
    record = next(href for _, href in local if href.endswith("05_llama_cpp.json"))
    stored = ROOT / "notebooks" / "records" / "05_llama_cpp.json"
    assert (site / record).read_bytes() == stored.read_bytes()


@needs_sphinx
def test_outputs_become_what_a_page_can_show(reader, url):
    page, *_ = open_page(reader, url, "99_extra")
    alts = [image.get_attribute("alt") for image in page.locator("img").all()]
    assert alts == ['The "first" dot.', "The second dot."]
    assert page.get_by_text(book.EXPLORER).is_visible()
    page.get_by_role("link", name="to a chapter").click()
    page.wait_for_url("**/01_basics.html#*")
    assert page.evaluate("!!document.getElementById(location.hash.slice(1))")


# The same in JupyterLab: what we write into an open notebook

LAB_CELLS = (
    "import pandas as pd\nimport labkit as lk\nfrom labkit.widgets import bits_explorer",
    "lk.show(lk.subplots()[0], alt='Two empty axes, nothing more.')",
    "pd.DataFrame({'loss': [0.1, 0.2]}, index=['FP32', 'INT8']).style.format('{:.2f}')",
    "bits_explorer(0.1, 'FP16')",
    "lk.claim('one', 'One is one', 1, 1, 1)",
    "def decode_fp16(pattern: int) -> float:\n    ...",
    "lk.check('1.1', decode_fp16)",
)
OURS = (".jp-OutputArea-output", ".jp-RenderedMarkdown")
NOT_OURS = {
    # JupyterLab gives the picture of an output no alt, whatever the output's metadata say.
    'image-alt: <img src="data:image/png;base6...">',
    # pandas makes the corner of a styled table a heading.
    'empty-table-header: <th class="blank level0">&nbsp;</th>',
}


def test_axe_finds_nothing_of_ours_in_jupyterlab(lab_page, tmp_path):
    from conftest import run_all_cells

    text = "# A title\n\nText, `code` and $x^2$.\n\n"
    text += "<details><summary>Hint</summary>\n\nHere.\n\n</details>"
    cells = [v4.new_markdown_cell(text), *map(v4.new_code_cell, LAB_CELLS)]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "outputs.ipynb")
    page = lab_page(tmp_path / "outputs.ipynb")
    run_all_cells(page)
    page.locator("img.labkit-picture").wait_for()
    found = axe_violations(page, context={"include": [[selector] for selector in OURS]})
    assert [violation for violation in found if violation not in NOT_OURS] == []
