"""Windows of text, and images: no hub, and after one fetch no network."""

import ast
import contextlib
import functools
import gc
import hashlib
import importlib.util
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from labkit import texts

# Of one document, of which each Python version has its own: chapters not yet rebuilt use them.
REFERENCE = ("reference-fit", "reference-judge")
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


def text(name: str) -> str:
    """Return a text by name.

    Args:
        name: one of `labkit.texts.EVALUATION` or `labkit.texts.CALIBRATION`, the same everywhere,
            see `labkit.texts.text`. Or one that depends on the Python version: `"train"` (the
            docstrings of the standard library, 1.4 million characters), `"reference-fit"` or
            `"reference-judge"` (190,000 each, cut in turn from the language reference that CPython
            ships for `help()`: no paragraph in both, but one document).

    Raises:
        ValueError: if there is no such text.
        Unavailable: if it must be fetched and cannot be, see `labkit.texts.text`.
    """
    if name == "train":
        return "\n\n".join(docstrings(("stdlib",)))
    if name not in REFERENCE:
        return texts.text(name)
    # Cut in long runs, not paragraph by paragraph: a window of 512 tokens should read as one text.
    paragraphs, first = _reference_paragraphs(), 50 * REFERENCE.index(name)
    runs = (paragraphs[start : start + 50] for start in range(first, len(paragraphs), 100))
    return "\n\n".join(paragraph for run in runs for paragraph in run)


@functools.cache
def _reference_paragraphs() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    paragraphs = (p for name in sorted(topics) for p in topics[name].split("\n\n"))
    return tuple(dict.fromkeys(p.rstrip() for p in paragraphs if p.strip()))


def docstrings(packages: Iterable[str], held_out: bool = False) -> list[str]:
    """Collect the docstrings in the source files of installed packages, without importing them.

    Paragraphs that the language reference holds, and paragraphs seen before, are dropped.

    Args:
        packages: importable top-level names; `"stdlib"` stands for the standard library.
        held_out: False returns 98 % of the docstrings, True the other 2 %, chosen by their hash.

    Raises:
        ValueError: if a package is not installed.
    """
    return list(_fresh_docstrings(packages, held_out))


def _fresh_docstrings(packages: Iterable[str], held_out: bool = False) -> Iterator[str]:
    seen = set(_reference_paragraphs())
    paths = (path for package in packages for path in _source_files(package))
    for doc in (doc for path in paths for doc in _docstrings_in(path)):
        fresh = [p for p in doc.split("\n\n") if p.strip() and p.rstrip() not in seen]
        seen.update(p.rstrip() for p in fresh)
        body, is_held_out = "\n\n".join(fresh), hashlib.sha256(doc.encode()).digest()[0] < 5
        if len(body) > 80 and is_held_out == held_out:
            yield body


def _source_files(package: str) -> list[Path]:
    if package == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f"packages: {package!r} is not installed; pip install it first")
        root = Path(spec.origin).parent
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if not _SKIPPED_FOLDERS & set(path.parts)]


@functools.cache  # parsing takes nearly all of the time, and each text asks for the same files
def _docstrings_in(path: Path) -> tuple[str, ...]:
    with _uncollected():
        try:
            tree = ast.parse(path.read_text(encoding="utf8"))
        except (SyntaxError, ValueError):  # the standard library has broken files, on purpose
            return ()
        return tuple(doc for node in _documented(tree) if (doc := ast.get_docstring(node)))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    # A tree is many objects without cycles: the search for cycles takes half of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _documented(tree: ast.Module) -> Iterator[ast.AST]:
    # As `ast.walk`, but past statements alone: expressions are most of a tree and document nothing.
    todo = deque([tree])
    while todo:
        node = todo.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            todo.extend(getattr(node, part, ()))


def windows(tokenizer, name: str, n_windows: int, length: int, spread=False) -> torch.Tensor:
    """Cut a text into windows that do not overlap, from its first tokens on.

    Args:
        tokenizer: a tokenizer as `transformers` makes them.
        name: of a text, see `text`; or `"calibration"`: a window of each kind of text in
            `labkit.texts.CALIBRATION`, then another of each, and so on.
        n_windows, length: how many windows, of how many tokens each.
        spread: take windows at equal distances over the whole text, each from the start of a
            paragraph; not with `"train"` and `"calibration"`.

    Returns:
        int64 tensor `(n_windows, length)`.

    Raises:
        ValueError: if a count is below 1, there is no such text, it is too short, or `spread` does
            not go with it.
        Unavailable: if a text must be fetched and cannot be, see `labkit.texts.text`.
    """
    if spread and name in ("train", "calibration"):
        raise ValueError(f"spread does not go with {name!r}: name one whole text")
    _check_counts(n_windows, length)
    if name == "calibration":
        kinds = texts.CALIBRATION
        of_each = [windows(tokenizer, kind, -(-n_windows // len(kinds)), length) for kind in kinds]
        return torch.stack(of_each, dim=1).flatten(0, 1)[:n_windows]
    # To read all docstrings takes seconds: as many as needed, see `_cut`.
    some = _start_of_train(12 * n_windows * length) if name == "train" else text(name)
    if not spread:
        return _cut(tokenizer, some, n_windows, length, repr(name))
    halves = [len(some) * i // (2 * n_windows) for i in range(2 * n_windows + 1)]
    second = (some[a:b] for a, b in zip(halves[1::2], halves[2::2], strict=True))
    parts = [half.partition("\n\n")[2] for half in second]  # from the first whole paragraph on
    title = f"{name!r}, cut into {2 * n_windows} parts,"
    return torch.cat([_cut(tokenizer, part, 1, length, title) for part in parts])


def _start_of_train(n_characters: int) -> str:
    bodies, missing = [], n_characters
    for body in _fresh_docstrings(("stdlib",)):
        bodies.append(body)
        missing -= len(body)
        if missing <= 0:
            break
    return "\n\n".join(bodies)


def own_windows(tokenizer, some: str, n_windows: int, length: int) -> torch.Tensor:
    """Cut windows from a text of your own, to calibrate or to train on.

    Args, return: as of `windows`; `some` is the text, its paragraphs apart by empty lines.

    Raises:
        ValueError: see `windows`; and if a paragraph is in a text that models are judged on.
    """
    texts.refuse_judged(some)
    return _cut(tokenizer, some, n_windows, length, "of your own")


def _cut(tokenizer, some: str, n_windows: int, length: int, title: str) -> torch.Tensor:
    _check_counts(n_windows, length)
    # A token covers a character or more, so 12 characters a token are plenty and spare the rest.
    needed = n_windows * length
    ids = tokenizer(some[: 12 * needed], verbose=False, add_special_tokens=False)["input_ids"]
    if len(ids) < needed:
        wanted = f"n_windows × length = {needed} tokens"
        raise ValueError(f"{wanted}, but the text {title} has only {len(ids)}")
    return torch.tensor(ids[:needed]).view(n_windows, length)


def _check_counts(n_windows: int, length: int) -> None:
    for name, value in (("n_windows", n_windows), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def digits(size: int = 28) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Load scikit-learn's 1,797 handwritten digits, enlarged from 8×8 to `size`×`size` pixels.

    Source: UCI Optical Recognition of Handwritten Digits.

    Returns:
        `x_train (1347, size²)`, `y_train (1347,)`, `x_test (450, size²)`, `y_test (450,)`; images
        are float32 in [0, 1], labels int64.

    Raises:
        ValueError: if `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = images.flatten(1)[order], torch.tensor(raw.target)[order]
    return x[:1347], y[:1347], x[1347:], y[1347:]
