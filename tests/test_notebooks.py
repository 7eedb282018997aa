"""The notebooks as documents: every rule, each tried on notebooks that break it."""

import ast

import nbformat
import pytest
from nbformat import v4
from notebook_rules import LABKIT, ROOT, code_cells, problems_of, tags, unpinned_imports

from labkit.authoring import notebooks

PATHS = notebooks.chapters_in(ROOT / "notebooks")
MAX_NBYTES = 2_500_000


def test_there_are_notebooks():
    assert PATHS, "no notebook in notebooks/"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems_of(notebook) == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_small_and_in_normal_form(path):
    assert path.stat().st_size <= MAX_NBYTES
    stored = path.read_text(encoding="utf8")
    normal = nbformat.writes(notebooks.normalize(notebooks.read(path))).rstrip("\n") + "\n"
    assert stored == normal, f"run: python -m labkit refresh {path.stem[:2]}"


@pytest.mark.parametrize("path", sorted(LABKIT.rglob("*.py")), ids=lambda path: path.stem)
def test_labkit_imports_what_is_pinned(path):
    teachers = "authoring" in path.parts  # they install the extras
    assert unpinned_imports(ast.parse(path.read_text(encoding="utf8")), teachers) == []


# The rules, tried


def code(source: str, *tags: str, outputs=()):
    metadata = {"tags": list(tags)} if tags else {}
    return v4.new_code_cell(source, metadata=metadata, outputs=list(outputs))


def figure(**metadata):
    return v4.new_output("display_data", {"image/png": "iVBORw0KGgo="}, metadata=metadata)


def html(text: str):
    return v4.new_output("display_data", {"text/html": text})


def stream(text: str, name: str = "stdout"):
    return v4.new_output("stream", text=text, name=name)


def error():
    return v4.new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])


CLAIM = "✓ a-claim: One = 1 (band exactly 1)\n"


def claims(text: str):
    """Return a cell that printed claims."""
    return code("x", outputs=[stream(text)])


def sample(*extra):
    """Build a notebook that keeps every rule, with some cells put into its middle."""
    source = (LABKIT / "claims.py").read_text(encoding="utf8")
    taught = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "_band")
    closing = "## What held, and what did not\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"
    cells = [
        v4.new_markdown_cell("# Title\n\n10 minutes, 1 GB of memory, no download"),
        v4.new_markdown_cell("## Idea\n\n```python\n# no heading\n```\n\n### Detail"),
        code("import math\nimport labkit as lk\nimport sklearn.datasets, torch.nn"),
        code(ast.unparse(taught)),
        code("lk.claim('a-claim', 'One', 1, 1, 1)", outputs=[stream(CLAIM)]),
        code("lk.show(figure, alt='text')", outputs=[figure(**{"image/png": {"alt": "A line."}})]),
        code("%timeit 1", "nbval-ignore-output", outputs=[stream("1 s, see https://a.b/home/x\n")]),
        code("1 / 0", "raises-exception", outputs=[error()]),
        code("def claim(x):\n    ..."),
        code("lk.check('1.1', claim)"),
        *extra,
        v4.new_markdown_cell(closing),
        v4.new_markdown_cell("## Further reading"),
    ]
    notebook = v4.new_notebook(cells=cells)
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = number
    return notebook


def test_a_good_notebook_has_no_problems():
    assert problems_of(sample()) == []
    assert problems_of(sample(code("x = 1", outputs=[html('<img src="x" alt="A dot.">')]))) == []


BROKEN_CELLS = [
    (code("x", outputs=[stream("careful", "stderr")]), "stores stderr"),
    (code("x", outputs=[error()]), "stores an error"),
    (code("x", "raises-exception"), "raises nothing"),
    (code("# NBVAL_IGNORE_OUTPUT\nx"), "steers nbval by a comment"),
    (code("x", outputs=[figure()]), "image/png without alt text"),
    (code("x", outputs=[figure(**{"image/png": {"alt": " "}})]), "image/png without alt text"),
    (code("x", outputs=[html("<img src='a.png'>")]), "<img> without alt text"),
    (code("x", outputs=[html("<img src='a' alt=''>")]), "<img> without alt text"),
    (v4.new_markdown_cell("![](a.png)"), "Markdown image has no alt text"),
    (v4.new_markdown_cell('<img src="a.png">'), "Markdown image has no alt text"),
    (code("open('/home/me/x')"), "path of a machine"),
    # \x2f is a slash: this file must not hold such a path itself.
    (code("x", outputs=[stream("saved as \x2ftmp/x.pt\n")]), "path of a machine"),
    (code("x", outputs=[stream("C:\\Users\\me\n")]), "path of a machine"),
    (code("x", outputs=[html("in \x2fwork/main/labkit")]), "path of a machine"),
    (v4.new_markdown_cell("see `\x2froot/.cache`"), "path of a machine"),
    (code("!pip install x"), "installs packages"),
    (code("x = 1\n%pip install x"), "installs packages"),
    (code("import sys\nsys.path.insert(0, '..')"), "uses sys.path"),
    (code("from IPython.display import display as d\nd.clear_output()"), "uses clear_output"),
    (code("out = ipywidgets.Output()"), "uses Output"),
    (code("x", outputs=[v4.new_output("display_data", {"text/plain": "Output()"})]), "an Output"),
    (code("import seaborn"), "imports seaborn"),
    (code("def f():\n    from no_such_package.x import y"), "imports no_such_package"),
    (code("\n".join(["x = 1"] * 31)), "the longest code cell has 31 lines"),
    (v4.new_markdown_cell("# Another title"), "one heading of level 1"),
    (v4.new_markdown_cell("## A\n\n#### B"), "skips from level 2 to 4"),
    (code("lk.claim('a-claim', 'Again', 1, 1, 1)"), "'a-claim' is made twice"),
    (code("claim(id='a-claim', sentence='Again', value=1)"), "'a-claim' is made twice"),
    (code("lk.claim(name, 'Again', 1, 1, 1)"), "id is not written out"),
    (code("lk.claim('b', 'New', 1, 1, 1)", "nbval-ignore-output"), "'b' is in a tagged cell"),
    (code("lk.timed_claim('a-claim', 'Again', r, 1.2)"), "'a-claim' is made twice"),
    (
        claims("✓ x: Half of it is less than half = 0.4 (band 0.3 to 0.6; null 1)\n"),
        "does not prom",
    ),
    (claims("✓ x: It doubles = 1.4 (band 1.3 to 2)\n"), "'doubles', which its band"),
    (claims("✓ x: INT8 is better by = 1.4 (band 1.3 to 2)\n"), "'better', which its band"),
    (claims("✓ x: They tie, nats = 0.1 (band 0.05 to 0.2)\n"), "'tie', which its band"),
    (claims("✓ x: One over the other = 1.4 (band 0.7 to 2; null 1)\n"), "its band holds its null"),
    (claims("✓ x: One over the other (between 0.7 and 2)\n"), "not a claim in today's form"),
    (claims("◷ x: Speed = 2 (band at least 1.2; null 1): holds here, yes\n"), "how it was timed"),
    (claims("✎ x: Loss = 2 (band 1 to 2; recorded: none.json, Xeon)\n"), "names a record that"),
    (code("lk.alternate(calls, 5, 0)"), "times without a warm-up"),
    (code("lk.alternate(calls, warmup=0, own_clock=True)"), "times without a warm-up"),
    (code("lk.alternate(calls, repeats=2)"), "too few rounds"),
    (code("def windows(tokenizer):\n    return 1"), "windows differs"),
    (code("class QATLinear:\n    bits = 4"), "QATLinear differs"),
    (code("def f(:"), "is not Python"),
]


@pytest.mark.parametrize(
    ("cell", "problem"), BROKEN_CELLS, ids=[problem for _, problem in BROKEN_CELLS]
)
def test_a_broken_cell_is_found(cell, problem):
    found = problems_of(sample(cell))
    assert len(found) == 1, found
    assert problem in found[0]


def _without_counts(notebook):
    notebook.cells[3].execution_count = None


def _counted_from_two(notebook):
    for cell in code_cells(notebook):
        cell.execution_count += 1


def _mostly_ignored(notebook):
    for cell in code_cells(notebook)[:2] + code_cells(notebook)[3:6]:
        cell.metadata["tags"] = [*tags(cell), "nbval-ignore-output"]


def _long_cells(notebook):
    for cell in code_cells(notebook)[:3]:
        cell.source += "\nx = 1" * 15


def _without_title(notebook):
    notebook.cells[0].source = "Ten minutes, memory, download\n# Title"


def _without_minutes(notebook):
    notebook.cells[0].source = "# Title\n\nmemory, download"


def _without_reading(notebook):
    del notebook.cells[-1]


def _without_table(notebook):
    notebook.cells[-2].source = "## What held"


def _with_widget_state(notebook):
    notebook.metadata["widgets"] = {}


def _drifted(notebook):
    notebook.cells[3].source = notebook.cells[3].source.replace("at most", "below")


BROKEN_NOTEBOOKS = [
    (_without_counts, "execution counts"),
    (_counted_from_two, "execution counts"),
    (_mostly_ignored, "code cells are strict"),
    (_long_cells, "open code cells have more than 15 lines"),
    (_without_title, "does not start with a title"),
    (_without_minutes, "does not mention 'minute'"),
    (_without_reading, "no closing heading mentions 'further reading'"),
    (_without_table, "no table to keep"),
    (_with_widget_state, "holds widget state"),
    (_drifted, "_band differs"),
]


@pytest.mark.parametrize(("breaks", "problem"), BROKEN_NOTEBOOKS)
def test_a_broken_notebook_is_found(breaks, problem):
    notebook = sample()
    breaks(notebook)
    assert any(problem in found for found in problems_of(notebook))


def test_a_docstring_is_no_drift():
    notebook = sample()
    notebook.cells[3].source = notebook.cells[3].source.replace(
        "-> str:\n", '-> str:\n    """Name the band."""\n'
    )
    assert "Name the band" in notebook.cells[3].source
    assert problems_of(notebook) == []
