"""Texts of several kinds that share no document: some to calibrate on, others to judge on."""

import ast
import bz2
import functools
import hashlib
import html
import re
import zipfile
from pathlib import Path

from labkit.downloads import Download

EVALUATION = ("news", "docs")
CALIBRATION = ("encyclopedia", "other-docs", "code", "self-written")
# Characters of one document before the next takes its turn, so that a short cut holds many.
JUDGED_RUN, FITTED_RUN = 1500, 500
SHORTEST = 40  # characters: shorter paragraphs ("Parameters") are everywhere and prove nothing
SELF_WRITTEN = Path(__file__).parent / "self_written.txt"
_DATA = "gensim/test/test_data/"
_NEWS = f"{_DATA}lee_background.cor"
_WIKI = f"{_DATA}enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
# What each text must hash to: with another text, numbers could not be compared.
SHA256 = {
    "news": "dba1a42ca9459b227a7f6d290c5de58aa40cdeae282051399f551aeb426ebca5",
    "docs": "a3f4daf38e65266f3ffcbbed644f20e135982405b502b16afa00fcb0ecd8c67e",
    "encyclopedia": "032b278d39b2fdc34c36dfc24aefe49fc2c486ea291707ea85dd34a32bbdd73c",
    "other-docs": "9cd07c00f7ae4750b73c150c49e738c5d27cdc840ff024c872d972bc38977f4b",
    "code": "1f50963699dc3785f280d35cde2f91095e2aff80081aac2fb77505bc36481732",
    "self-written": "7fbff773893c33886a67cd5e5736f2ef74b3065751dfe11500d0f9510bd7649c",
}


def text(name: str) -> str:
    """Return a text, the same on every machine and Python version.

    Args:
        name: to judge on, `"news"` (293 short articles of 2001, 350,000 characters; nothing of
            this kind is fitted) or `"docs"` (docstrings of every second file of the library
            gensim, 260,000). To calibrate on, `"encyclopedia"` (87 articles, 2.3 million),
            `"other-docs"` (docstrings of gensim's other files, 320,000), `"code"` (Python, gensim's
            tests, 670,000) or `"self-written"` (what SmolLM2 wrote itself, see
            `labkit.authoring.self_written`; 90,000).

    Raises:
        ValueError: if there is no such text.
        Unavailable: if it must be fetched (28 MB, once) and cannot be; see `Download.fetch`.
    """
    if name not in SHA256:
        known = ", ".join(map(repr, SHA256))
        raise ValueError(f"name must be one of {known} (see also labkit.data.text), not {name!r}")
    path = SELF_WRITTEN if name == "self-written" else GENSIM.fetch() / f"{name}.txt"
    return path.read_bytes().decode("utf8")  # as it is, on Windows too


@functools.cache
def judged_paragraphs() -> dict[str, str]:
    """Return the paragraphs of all evaluation texts, each with the name of its text."""
    return {p: name for name in EVALUATION for p in paragraphs(text(name))}


def paragraphs(some: str) -> list[str]:
    """Return the paragraphs of a text that are long enough to tell where they are from."""
    return [p.strip() for p in some.split("\n\n") if len(p.strip()) >= SHORTEST]


def refuse_judged(some: str) -> None:
    """Refuse a text for calibration that shares a paragraph with a text for evaluation.

    Raises:
        ValueError: if it does; names the evaluation text and the paragraph.
    """
    judged = judged_paragraphs()
    shared = next((p for p in paragraphs(some) if p in judged), None)
    if shared is not None:
        raise ValueError(
            f"text shares a paragraph with the evaluation text {judged[shared]!r}: "
            f"{shared[:60]!r}… What was fitted must be judged on other text; leave it out"
        )


# How the texts are made


def _make(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".py"))
        sources = {name: archive.read(name).decode("utf8").replace("\r\n", "\n") for name in names}
        news = archive.read(_NEWS).decode("utf8").splitlines()
    tests = [name for name in names if name.startswith("gensim/test/")]
    docs = _docstrings([sources[name] for name in names if name not in tests])
    documents = {
        "news": [[line] for line in dict.fromkeys(line.strip() for line in news)],
        "docs": docs[::2],
        "other-docs": docs[1::2],
        "encyclopedia": articles(wheel),
        "code": [sources[name].strip().split("\n\n") for name in tests],
    }
    folder.mkdir()
    for name, of_kind in documents.items():
        path = folder / f"{name}.txt"
        run = JUDGED_RUN if name in EVALUATION else FITTED_RUN
        path.write_bytes(_in_turn(of_kind, run).encode("utf8"))
        GENSIM.check(path, SHA256[name])


def articles(wheel: Path) -> list[list[str]]:
    """Return the paragraphs of each article of the encyclopedia that the wheel holds."""
    with zipfile.ZipFile(wheel) as archive:
        dump = bz2.decompress(archive.read(_WIKI)).decode("utf8")
    pages = [_plain(page) for page in re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)]
    return [page for page in pages if sum(map(len, page)) > 2000]


def _in_turn(documents: list[list[str]], run: int) -> str:
    # Some paragraphs of each document, then the next of each: a short cut holds many documents.
    rounds: dict[int, list[str]] = {}
    for document in documents:
        size = number = 0
        for paragraph in document:
            rounds.setdefault(number, []).append(paragraph)
            size += len(paragraph)
            if size > run:
                size, number = 0, number + 1
    return "\n\n".join(paragraph for number in sorted(rounds) for paragraph in rounds[number])


def _docstrings(sources: list[str]) -> list[list[str]]:
    # The paragraphs of each file's docstrings; those seen before, and short docstrings, left out.
    seen, files = set(), []
    for source in sources:
        kept = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node) or ""
                fresh = [p for p in doc.split("\n\n") if p.strip() and p not in seen]
                seen.update(fresh)
                kept += fresh if sum(map(len, fresh)) > 200 else []
        files.append(kept)
    return files


def _plain(page: str) -> list[str]:
    # The paragraphs of an article; tables, lists, notes and markup are left out.
    page = html.unescape(page)
    page = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|\{\|.*?\|\}", "", page, flags=re.DOTALL)
    for _ in range(6):  # from the inside out
        page = re.sub(r"\{\{[^{}]*\}\}", "", page)
    page = re.sub(r"\[\[(?:File|Image):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", page)
    page = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", page)
    page = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", page)
    page = re.sub(r"<[^>]+>|'{2,}", "", page)
    lines = (line.strip() for line in page.split("\n"))
    return [line for line in lines if _is_prose(line)]


def _is_prose(line: str) -> bool:
    return len(line) > 200 and line[0] not in "*#|=:;{}!" and line[-1] in '."?”' and "|" not in line


GENSIM = Download(
    title="the texts",
    # Named after what it must hold: another version of the texts is another folder.
    name=f"texts-{hashlib.sha256(repr(SHA256).encode()).hexdigest()[:8]}",
    # Any build carries the same texts; this one is named so that all get the same file.
    requirement="gensim==4.4.0",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    nbytes=27_809_988,
    make=_make,
    disk_needed=100_000_000,
    options=(
        "--only-binary=:all:",
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
        "--platform=manylinux_2_24_x86_64",
        "--platform=manylinux_2_28_x86_64",
    ),
)
