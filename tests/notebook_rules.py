"""The rules that a notebook keeps as a document. Each yields what breaks it."""

import ast
import functools
import importlib.metadata
import itertools
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from labkit.authoring import elsewhere, folding
from labkit.authoring.claim_lines import ClaimLine, claims_of

ROOT = Path(__file__).parent.parent
LABKIT = ROOT / "labkit"
RECORDS = ROOT / "notebooks" / "records"
NOT_STRICT = {"nbval-ignore-output", "nbval-skip"}
MACHINE_PATH = re.compile(
    r"(?<![\w./-])/(home|root|work|tmp|Users|private|var|opt|mnt)/|[A-Za-z]:\\\\?Users"
)
NBVAL_COMMENT = re.compile(r"#\s*(NBVAL_|PYTEST_VALIDATE_IGNORE_OUTPUT)")
INSTALLER = re.compile(r"^\s*[!%]\s*(pip|conda|uv|mamba)\b", re.MULTILINE)
IMAGE_TYPES = ("image/png", "image/jpeg", "image/svg+xml")
OPENING_WORDS = ("minute", "memory", "download")
CLOSING_WORDS = ("held", "further reading")


# Reading a notebook


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def syntax_tree(cell) -> ast.Module:
    return ast.parse(TransformerManager().transform_cell(cell.source))


def called_name(node: ast.AST) -> str | None:
    """Return `f` for a call of `f(...)` or `x.f(...)`."""
    if not isinstance(node, ast.Call):
        return None
    return getattr(node.func, "attr", None) or getattr(node.func, "id", None)


def calls(cell, name: str) -> list[ast.Call]:
    return [node for node in ast.walk(syntax_tree(cell)) if called_name(node) == name]


def output_texts(cell) -> Iterator[str]:
    """Yield every text a reader sees or copies in the outputs, pictures apart."""
    for output in cell.outputs:
        yield from (output.get("text", ""), output.get("evalue", ""))
        yield from output.get("traceback", [])
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield re.sub(r"data:image/[^\"']+", "", data)


def headings(notebook) -> list[tuple[int, str]]:
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"^(```|~~~).*?^\1", "", prose, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^(#{1,6})\s+(.+)$", prose, flags=re.MULTILINE)
    return [(len(signs), title) for signs, title in found]


def taught(notebook: str, function: str) -> str:
    """Return the source of a function that a notebook defines and labkit does not."""
    cells = code_cells(nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4))
    parts = [node for cell in cells for node in syntax_tree(cell).body]
    (found,) = [ast.unparse(node) for node in parts if getattr(node, "name", "") == function]
    return found


def chapter1_explorer() -> str:
    """Return the code of chapter 1's explorer, which runs wherever there is a `weight`."""
    cells = code_cells(nbformat.read(ROOT / "notebooks" / "01_basics.ipynb", as_version=4))
    parts = [node for cell in cells for node in syntax_tree(cell).body]
    (snr_db,) = [ast.unparse(node) for node in parts if getattr(node, "name", "") == "snr_db"]
    sources = [cell.source for cell in cells]
    first = next(i for i, source in enumerate(sources) if "def plot_rounding" in source)
    last = next(i for i, source in enumerate(sources) if "draw_grid, start=" in source)
    imports = "import torch\nimport labkit as lk\nfrom labkit.quant import *"
    return "\n\n\n".join([imports, snr_db, *sources[first : last + 1]])


DEFINITIONS = (ast.FunctionDef, ast.ClassDef)

# The rules


def counts_run_from_one(notebook) -> Iterator[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}, not 1…{len(counts)}"


def errors_are_wanted_and_stderr_is_empty(notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        raised = any(output.output_type == "error" for output in cell.outputs)
        wanted = bool(tags(cell) & {"raises-exception", "nbval-raises-exception"})
        if raised and not wanted:
            yield f"cell {cell.execution_count} stores an error"
        if wanted and not raised:
            yield f"cell {cell.execution_count} is tagged raises-exception but raises nothing"
        if any(output.get("name") == "stderr" for output in cell.outputs):
            yield f"cell {cell.execution_count} stores stderr"


def half_is_strict(notebook) -> Iterator[str]:
    cells = code_cells(notebook)
    strict = [cell for cell in cells if not tags(cell) & NOT_STRICT]
    if 2 * len(strict) < len(cells):
        yield f"only {len(strict)} of {len(cells)} code cells are strict"
    for cell in cells:
        if NBVAL_COMMENT.search(cell.source):
            yield f"cell {cell.execution_count} steers nbval by a comment; use a tag"


def images_have_alt_text(notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            html = output.get("data", {}).get("text/html", "")
            described = bool(re.search(r"<img\b[^>]*\balt=", html))
            for kind in set(IMAGE_TYPES) & set(output.get("data", {})):
                alt = output.metadata.get(kind, {}).get("alt", "")
                if not alt.strip() and not described:
                    yield f"cell {cell.execution_count} shows {kind} without alt text"
            if _undescribed_image(html):
                yield f"cell {cell.execution_count} shows <img> without alt text"
    for cell in notebook.cells:
        empty = re.search(r"!\[\s*\]\(", cell.source)
        if cell.cell_type == "markdown" and (empty or _undescribed_image(cell.source)):
            yield f"a Markdown image has no alt text: {cell.source[:60]!r}"


def _undescribed_image(html: str) -> bool:
    images = re.findall(r"<img\b[^>]*>", html)
    return not all(re.search(r"\balt=(\"[^\"]+\"|'[^']+')", image) for image in images)


def no_machine_paths(notebook) -> Iterator[str]:
    for cell in notebook.cells:
        texts = [cell.source, *(output_texts(cell) if cell.cell_type == "code" else ())]
        for text in texts:
            if found := MACHINE_PATH.search(text):
                start, end = max(0, found.start() - 20), found.end() + 30
                yield f"a path of a machine: {text[start:end]!r}"


def nothing_is_installed_or_hidden(notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        if INSTALLER.search(cell.source) and cell.get("id") != elsewhere.SETUP_ID:
            yield f"cell {cell.execution_count} installs packages"
        for node in ast.walk(syntax_tree(cell)):
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            if name == "path" and getattr(getattr(node, "value", None), "id", "") == "sys":
                yield f"cell {cell.execution_count} uses sys.path"
            if name in {"clear_output", "update_display", "Output"}:
                yield f"cell {cell.execution_count} uses {name}, which nbval cannot compare"
        if any(text.startswith("Output(") for text in output_texts(cell)):
            yield f"cell {cell.execution_count} shows an Output widget"
    if "widgets" in notebook.metadata:
        yield "the metadata holds widget state"


def imports_are_pinned(notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        for name in unpinned_imports(syntax_tree(cell)):
            yield f"cell {cell.execution_count} imports {name}, which pyproject.toml does not name"


def cells_are_short(notebook) -> Iterator[str]:
    open_cells = [cell for cell in code_cells(notebook) if folding.TAG not in tags(cell)]
    lengths = [sum(bool(line.strip()) for line in c.source.splitlines()) for c in open_cells]
    if max(lengths, default=0) > 30:
        yield f"the longest code cell has {max(lengths)} lines that are not blank; 30 at most"
    over = sum(length > 15 for length in lengths)
    if over > 0.2 * len(lengths):
        yield f"{over} of {len(lengths)} open code cells have more than 15 lines; a fifth at most"


def opens_and_closes_as_agreed(notebook) -> Iterator[str]:
    first = notebook.cells[0].source if notebook.cells else ""
    if not notebook.cells or notebook.cells[0].cell_type != "markdown" or first[:2] != "# ":
        yield "the opening cell does not start with a title"
    for word in OPENING_WORDS:
        if word not in first.lower():
            yield f"the opening cell does not mention {word!r}"
    titles = [title.lower() for _, title in headings(notebook)]
    for word in CLOSING_WORDS:
        if not any(word in title for title in titles[-4:]):
            yield f"no closing heading mentions {word!r}"
    prose = [cell.source for cell in notebook.cells[-4:] if cell.cell_type == "markdown"]
    if not re.search(r"^\s*\|?[ :|-]*-{3}[ :|-]*\|", "\n".join(prose), re.MULTILINE):
        yield "the closing cells hold no table to keep"


def headings_skip_no_level(notebook) -> Iterator[str]:
    levels = headings(notebook)
    if [level for level, _ in levels].count(1) != 1:
        yield "there must be one heading of level 1"
    for (before, _), (level, title) in itertools.pairwise(levels):
        if level > before + 1:
            yield f"heading {title!r} skips from level {before} to {level}"


def claims_are_strict_and_unique(notebook) -> Iterator[str]:
    seen = set()
    for cell in code_cells(notebook):
        for call in calls(cell, "claim") + calls(cell, "timed_claim"):
            named = [k.value for k in call.keywords if k.arg == "id"]
            id = (call.args + named)[0] if call.args or named else None
            # In a loop over cases the id is an f-string: "6db-{name}".
            written = isinstance(id, (ast.Constant, ast.JoinedStr))
            id = ast.unparse(id).strip("f'\"") if written else None
            if id is None:
                yield f"cell {cell.execution_count} makes a claim whose id is not written out"
            elif id in seen:
                yield f"claim {id!r} is made twice"
            seen.add(id)
            if tags(cell):
                yield f"claim {id!r} is in a tagged cell, where its output is not compared"


# What a sentence promises, and what its band must then rule out.
PROMISES: dict[str, Callable[[ClaimLine], bool]] = {
    r"\b(less than|at most|under) (a )?half\b": lambda line: line.high <= 0.5,
    r"\b(more than|at least|over) (a )?half\b|\bmost of\b": lambda line: line.low >= 0.5,
    r"\b(less than|at most|under) a third\b": lambda line: line.high <= 1 / 3,
    r"\b(less than|at most|under) a quarter\b": lambda line: line.high <= 0.25,
    r"\b(less than|at most|under) a tenth\b": lambda line: line.high <= 0.1,
    r"\b(more than|at least) two thirds\b": lambda line: line.low >= 2 / 3,
    r"\b(more than|at least) twice\b|\bmore than doubles\b": lambda line: line.low >= 2,
    r"(?<!than )\btwice\b|\bdoubles\b": lambda line: line.low >= 1.5,
    r"\btimes as (fast|many|large)\b|\bspeed-up\b": lambda line: line.low >= 1,
    r"\bties?\b|\bno (loss|difference|gain|change)\b|\bas (good|fast|large) as\b": (
        lambda line: line.low <= 0 <= line.high or line.low <= 1 <= line.high
    ),
    r"\b(faster|slower|better|worse|larger|smaller|cheaper|beats|wins|helps|hurts|gains)\b": (
        lambda line: line.null is not None
    ),
}


_TIMED = re.compile(r"quartiles .* rounds in turn|one run each")


def claims_promise_what_their_bands_say(notebook) -> Iterator[str]:
    try:
        lines = list(claims_of(notebook))
    except ValueError as error:
        yield str(error)
        return
    for line in lines:
        for words, keeps in PROMISES.items():
            found = re.search(words, line.sentence, re.IGNORECASE)
            if found and not keeps(line):
                yield f"claim {line.id!r} says {found[0]!r}, which its band does not promise"
        if line.null is not None and line.low <= line.null <= line.high:
            yield f"claim {line.id!r}: its band holds its null"
        if line.kind == "timed" and not _TIMED.search(line.rest):
            yield f"claim {line.id!r} does not say how it was timed"
        if line.record and not (RECORDS / line.record.partition(", ")[0]).exists():
            yield f"claim {line.id!r} names a record that is not in notebooks/records"


def times_are_warm(notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        for call in calls(cell, "alternate"):
            given = {k.arg: k.value for k in call.keywords}
            given.update(zip(("functions", "repeats", "warmup"), call.args, strict=False))
            if ast.unparse(given.get("warmup", ast.Constant(1))) == "0":
                yield f"cell {cell.execution_count} times without a warm-up"
            if ast.unparse(given.get("repeats", ast.Constant(5))) in ("1", "2"):
                yield f"cell {cell.execution_count} has too few rounds for quartiles"


def taught_code_is_library_code(notebook) -> Iterator[str]:
    cells = code_cells(notebook)
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        if following is not None and calls(following, "check"):
            continue  # an exercise stub
        for node in syntax_tree(cell).body:
            if not isinstance(node, DEFINITIONS) or node.name not in library_definitions():
                continue
            if without_docstring(node) not in library_definitions()[node.name]:
                yield f"{node.name} differs from the one in labkit"


RULES: tuple[Callable, ...] = (
    counts_run_from_one,
    errors_are_wanted_and_stderr_is_empty,
    half_is_strict,
    images_have_alt_text,
    no_machine_paths,
    nothing_is_installed_or_hidden,
    imports_are_pinned,
    cells_are_short,
    opens_and_closes_as_agreed,
    headings_skip_no_level,
    claims_are_strict_and_unique,
    claims_promise_what_their_bands_say,
    times_are_warm,
    taught_code_is_library_code,
)


def problems_of(notebook) -> list[str]:
    for cell in code_cells(notebook):
        try:
            syntax_tree(cell)
        except SyntaxError as error:
            return [f"cell {cell.execution_count} is not Python: {error}"]
    return [problem for rule in RULES for problem in rule(notebook)]


# What the rules look up


@functools.cache
def pinned_distributions(extras: bool = False) -> frozenset[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    lines = list(project["dependencies"])
    for some in project["optional-dependencies"].values() if extras else ():
        lines += some
    return frozenset(canonicalize_name(Requirement(line).name) for line in lines)


@functools.cache
def distributions_of() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def unpinned_imports(tree: ast.AST, extras: bool = False) -> list[str]:
    names, pinned = set(), pinned_distributions(extras)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    names -= {*sys.stdlib_module_names, "labkit"}
    return sorted(name for name in names if not _distributions(name) & pinned)


def _distributions(name: str) -> set[str]:
    return {canonicalize_name(found) for found in distributions_of().get(name, [])}


@functools.cache
def library_definitions() -> dict[str, set[str]]:
    """Return the syntax of labkit's functions and classes by name; checks are independent of it."""
    found: dict[str, set[str]] = {}
    for path in LABKIT.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf8")).body:
            if isinstance(node, DEFINITIONS):
                found.setdefault(node.name, set()).add(without_docstring(node))
    return found


def without_docstring(node: ast.FunctionDef | ast.ClassDef) -> str:
    tree = ast.parse(ast.unparse(node))
    for inner in ast.walk(tree):
        if isinstance(inner, DEFINITIONS) and ast.get_docstring(inner, clean=False) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.dump(tree)
