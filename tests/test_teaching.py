"""The teacher's guide: what is generated is fresh, and what is written by hand fits the book."""

import builtins
import dis
import functools
import html
import json
import re
import types
from dataclasses import dataclass

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from test_grading import leaks, secret_lines

from labkit.authoring import learner, teaching
from labkit.authoring.notebooks import NAMES
from labkit.exercises import registry

NOTEBOOKS = teaching.GUIDE.parent
GUIDE = teaching.GUIDE.read_text(encoding="utf8")
EXERCISES = list(registry().values())
CHAPTERS = sorted({exercise.id.split(".")[0] for exercise in EXERCISES})
HEADING = re.compile(r"^(#{1,6}) (.+)$", re.MULTILINE)


def below(text: str, level: int, title: str) -> str:
    """Return what stands under a heading of the guide, down to the next as high or higher."""
    found = [m for m in HEADING.finditer(text) if (len(m[1]), m[2]) == (level, title)]
    assert len(found) == 1, f"{len(found)} headings {title!r} of level {level}"
    ends = [m.start() for m in HEADING.finditer(text) if len(m[1]) <= level]
    return text[found[0].end() : min((e for e in ends if e > found[0].start()), default=None)]


def chapter_titles(text: str = GUIDE) -> dict[str, str]:
    return {m[1]: m[0][4:] for m in re.finditer(r"^### Chapter (\d) · .+$", text, re.MULTILINE)}


def chapter_part(number: str) -> str:
    return below(GUIDE, 3, chapter_titles()[number])


def generated(text: str, name: str) -> str:
    pattern = rf"^<!-- generated: {re.escape(name)} -->\n\n(.*?)\n\n<!-- end -->$"
    (found,) = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    return found


# What is generated -----------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_the_guide_has_each_exercise_with_its_answers(exercise):
    part = below(GUIDE, 4, f"Exercise {exercise.id} — {exercise.title}")
    assert generated(part, f"answers {exercise.id}") == teaching.answers(exercise), (
        "run: python -m labkit.authoring.teaching"
    )
    by_hand, asks, questions = part.partition("**Ask.**")
    by_hand = " ".join(by_hand.split())
    assert asks
    assert len(by_hand.split()) >= 10, "what the exercise is really about"
    questions = questions.partition("<!-- generated")[0]
    assert questions.count("?") >= 2
    for line in re.findall(r"^- (.+)$", questions, re.MULTILINE):
        assert line.startswith("*"), f"which mistake is this asked about: {line}"
    assert bool(exercise.broken) == ("**Order of the hunt:**" in by_hand)


def test_the_times_are_those_of_the_record():
    record = teaching.read_times(teaching.GUIDE)
    if record is None:
        pytest.skip("there is no notebooks/records/00_times.json yet")
    assert generated(GUIDE, "times") == teaching.times(record), (
        "run: python -m labkit.authoring.teaching"
    )


def made_up_record() -> dict:
    one = {"seconds": 119.6, "peak_nbytes": 2.64e9, "cells": 3, "slowest": [["a | b", 14.2]]}
    machine = {"cpu": "Some CPU", "physical cores": "2"}
    return {
        "date": "2026-11-26",
        "command": "pytest",
        "machine": machine,
        "notebooks": {name: dict(one) for name in NAMES},
    }


def test_times_adds_up():
    record = made_up_record()
    for name in ("02_ptq.ipynb", "02b_weights.ipynb", "02c_formats_rotations.ipynb"):
        record["notebooks"][name] |= {"seconds": 61, "peak_nbytes": 3.2e9, "slowest": []}
    record["notebooks"]["03_qat.ipynb"] |= {"slowest": [["x" * 41, 1.6], ["y", 1]]}
    lines = teaching.times(record).splitlines()
    inside = [e.minutes for e in EXERCISES if e.id.startswith("1.")]
    assert lines[2] == (
        f"| 1 (01\\_basics.ipynb) | {len(inside)}, {sum(inside)} min | 2:00 | 2.6 | "
        "a \\| b (14 s) |"
    )
    assert lines[3].startswith("| 2 (02\\_ptq.ipynb, 02b\\_weights.ipynb, 02c")
    assert lines[3].endswith("| 3:03 | 3.2 |  |")
    assert lines[4].endswith(f"| {'x' * 39}… (2 s) |")
    total = f"{len(EXERCISES)}, {sum(e.minutes for e in EXERCISES)} min"
    assert lines[2 + len(CHAPTERS)] == f"| all | {total} | 15:01 | at most 3.2 |  |"
    for said in ("Some CPU", "2 cores", "2026-11-26", "Another machine"):
        assert said in lines[-1]


@pytest.mark.parametrize("lost", ["machine", "date", "notebooks", "seconds", "chapter"])
def test_a_record_that_does_not_fit_is_refused(lost):
    record = made_up_record()
    if lost == "chapter":
        del record["notebooks"]["07_pruning_distillation.ipynb"]
    elif lost == "seconds":
        del record["notebooks"]["03_qat.ipynb"]["seconds"]
    else:
        del record[lost]
    with pytest.raises(teaching.GuideError, match="lacks 07_pru" if lost == "chapter" else lost):
        teaching.times(record)


ODD = [
    "a | b",
    "`x|y`",
    "*not* _this_ __dunder__",
    "x < y > z & <b>",
    "[-n:](link)",
    "\\ $x$ ~~y~~",
]


@pytest.mark.parametrize("text", [*ODD, "one\ntwo", "three\r\nfour"])
def test_a_table_shows_its_texts_as_they_are(text):
    table = teaching.table(("left", "right"), [(text, "next"), ("last", text)])
    assert len(table.splitlines()) == 4
    rendered = markdown2html_mistune(table)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rendered, re.DOTALL)
    assert [html.unescape(re.sub(r"<br ?/?>", "\n", c)) for c in cells] == [
        "\n".join(text.splitlines()),
        "next",
        "last",
        "\n".join(text.splitlines()),
    ]


# update ----------------------------------------------------------------------------------------


@pytest.fixture
def guide(tmp_path):
    path = tmp_path / "guide.md"
    path.write_text(GUIDE, encoding="utf8", newline="\n")
    return path


def test_update_rewrites_what_lies_between_markers_and_nothing_else(guide):
    stale = re.sub(
        r"(<!-- generated: answers 1.1 -->).*?(<!-- end -->)", r"\1\n\2", GUIDE, flags=re.S
    )
    stale = stale.replace("# For teachers", "# My own title")
    guide.write_text(stale, encoding="utf8")
    assert teaching.update(guide)
    text = guide.read_text(encoding="utf8")
    fresh = teaching.answers(registry()["1.1"])
    assert generated(text, "answers 1.1") == fresh
    assert "# My own title" in text
    assert generated(text, "times") == generated(GUIDE, "times"), "no record beside it: it stays"
    assert not teaching.update(guide)
    assert [path.name for path in guide.parent.iterdir()] == ["guide.md"]


def test_update_takes_the_record_beside_the_guide(guide):
    (guide.parent / "records").mkdir()
    record = guide.parent / "records" / "00_times.json"
    record.write_text(json.dumps(made_up_record()), encoding="utf8")
    assert teaching.update(guide)
    found = generated(guide.read_text(encoding="utf8"), "times")
    assert found == teaching.times(made_up_record())
    record.write_text('{"notebooks": ', encoding="utf8")
    with pytest.raises(teaching.GuideError, match="no JSON"):
        teaching.update(guide)


ONE = "<!-- generated: answers 1.1 -->"
BROKEN = [
    (lambda t: t.replace(ONE, ""), "nothing is open"),
    (lambda t: t.replace(ONE, f"{ONE}\n{ONE}"), "still open"),
    (lambda t: t + f"\n{ONE}\n<!-- end -->\n", "twice"),
    (lambda t: t + "\n<!-- generated: answers 9.9 -->\n<!-- end -->\n", "unknown"),
    (lambda t: t + "\n<!-- end -->\n", "nothing is open"),
    (lambda t: t[: t.rindex("<!-- end -->")], "has no <!-- end -->"),
    (lambda t: re.sub(rf"{ONE}.*?<!-- end -->", "", t, flags=re.S), "answers 1.1 -->, 1 in all"),
    (lambda t: t.replace("generated: times", "generated: time"), "unknown"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN, ids=[m for _, m in BROKEN])
def test_update_refuses_broken_markers_and_changes_nothing(guide, break_it, message):
    broken = break_it(GUIDE.replace("what the check answers", "stale"))
    guide.write_text(broken, encoding="utf8", newline="\n")
    with pytest.raises(teaching.GuideError, match=re.escape(message)):
        teaching.update(guide)
    assert guide.read_text(encoding="utf8") == broken
    assert [path.name for path in guide.parent.iterdir()] == ["guide.md"]


# What is written by hand -----------------------------------------------------------------------


def test_every_chapter_of_the_book_is_there():
    assert list(chapter_titles()) == CHAPTERS
    found = [m[2] for m in HEADING.finditer(GUIDE) if m[2].startswith("Exercise ")]
    assert found == [f"Exercise {e.id} — {e.title}" for e in EXERCISES], "in this order"


@pytest.mark.parametrize("number", CHAPTERS)
def test_every_chapter_has_outcomes_and_what_to_watch(number):
    part = chapter_part(number).partition("\n#### ")[0]
    outcomes = re.search(r"^\*\*Outcomes\.\*\*.*?\n\n((?:- |  ).*?)\n\n", part, re.M | re.S)
    assert outcomes
    assert 3 <= len(re.findall(r"^- ", outcomes[1], re.MULTILINE)) <= 5
    assert "**Make sure of.**" in part
    assert "**Where learners stumble.**" in part


@pytest.mark.parametrize("number", CHAPTERS)
def test_every_chapter_has_questions_with_folded_answers(number):
    part = below(chapter_part(number), 4, f"Discussion, chapter {number}")
    pattern = r"^\*\*(\d)\.\*\* (.+?)\n\n<details><summary>Answer</summary>\n\n(.+?)\n\n</details>$"
    found = re.findall(pattern, part, re.MULTILINE | re.DOTALL)
    assert [n for n, _, _ in found] == [str(i + 1) for i in range(len(found))]
    assert 3 <= len(found) <= 5
    assert part.count("<details>") == len(found)
    for _, question, answer in found:
        answer = " ".join(answer.split())
        assert "?" in question or question.startswith('"')
        assert "<" not in question
        assert 3 <= len(re.findall(r"[.?][\")]?(?= [A-Z0-9\"*(`$]|$)", answer)) <= 8, answer
        assert re.search(r"\d", answer), "an answer argues with figures"


def test_the_guide_gives_no_solution_away():
    assert "```python" not in GUIDE
    assert not re.search(r"^\s*(def|return|import) ", GUIDE, re.MULTILINE)
    for path in learner.chapters():
        assert leaks(GUIDE, secret_lines(path)) == set(), path.name


@pytest.mark.parametrize("title", ["Hand out, collect, grade", "JupyterHub", "Without internet"])
def test_how_to_serve_a_class_has_its_sections(title):
    assert re.search(rf"^### {title}$", GUIDE, re.MULTILINE)


def slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_links_lead_somewhere():
    links = [x for x in re.findall(r"\]\(([^)]+)\)", GUIDE) if not x.startswith("http")]
    anchors = {f"#{slug(m[2])}" for m in HEADING.finditer(GUIDE)}
    lost = [x for x in links if x[0] == "#" and x not in anchors]
    lost += [x for x in links if x[0] != "#" and not (NOTEBOOKS / x.split("#")[0]).exists()]
    assert lost == []
    assert len(links) >= 20


# The paths -------------------------------------------------------------------------------------


@dataclass
class Row:
    start: int
    stop: int
    how: str
    notebook: str
    titles: list[str]


def rows_of(title: str) -> list[Row]:
    rows = []
    for line in below(GUIDE, 3, title).splitlines():
        if found := re.match(r"\| (\d+)–(\d+) \| (\w+) \| (.+?) \| (.+?) \| .+ \|$", line):
            start, stop, how, chapter, titles = found.groups()
            link = re.fullmatch(r"\[(\d[a-z]?)\]\((\S+)\)", chapter)
            assert link or (chapter, titles) == ("–", "–"), line
            assert not link or link[2].startswith(f"0{link[1]}_"), line
            names = titles.split("<br>") if link else []
            rows.append(Row(int(start), int(stop), how, link[2] if link else "", names))
    return rows


PATHS = {
    m[0][4:]: rows_of(m[0][4:]) for m in re.finditer(r"^### \d+ minutes: .+$", GUIDE, re.MULTILINE)
}
each_path = pytest.mark.parametrize("title", PATHS)


def cells_of(notebook: str) -> list[dict]:
    return json.loads((NOTEBOOKS / notebook).read_text(encoding="utf8"))["cells"]


@functools.cache
def parts_of(notebook: str) -> dict[str | None, list[tuple[int, str]]]:
    """Return the code cells under each heading, down to the next; exercises by themselves.

    What stands before the first heading has the key None: imports, which every path runs.
    """
    parts, title, left = {None: []}, None, 0
    for at, cell in enumerate(cells_of(notebook)):
        kind, source = cell["cell_type"], "".join(cell["source"])
        headings = [m for m in HEADING.finditer(source) if len(m[1]) in (2, 3)]
        if kind == "markdown" and headings and not left:
            last = headings[-1][2]
            for heading in headings:
                parts.setdefault(heading[2], [])
            if exercise := re.match(r"Exercise [\d.]+", last):
                parts[exercise[0]], left = [], 4
            else:
                title = last
        if kind == "code" and not left:
            parts[title].append((at, source))
        left = max(0, left - 1)
    return parts


def test_there_are_three_paths():
    assert [int(title.split()[0]) for title in PATHS] == [45, 90, 180]
    for title in PATHS:
        part = below(GUIDE, 3, title)
        assert all(f"**{word}:**" in part for word in ("Before", "Skip"))
        assert part.count("\n| ") == len(PATHS[title]) + 2, "a row that the test cannot read"


@each_path
def test_minutes_add_up(title):
    rows = PATHS[title]
    assert rows[0].start == 0
    assert [row.start for row in rows[1:]] == [row.stop for row in rows[:-1]]
    assert all(row.start < row.stop for row in rows)
    assert rows[-1].stop == int(title.split()[0])


@each_path
def test_sections_and_exercises_exist(title):
    for row in PATHS[title]:
        assert row.how in {"run", "read", "exercise", "break"}
        for name in row.titles:
            assert name in parts_of(row.notebook), f"{row.notebook} has no {name!r}"
        if row.how == "exercise":
            minutes = [registry()[name.split()[1]].minutes for name in row.titles]
            assert sum(minutes) == row.stop - row.start, row
        else:
            assert not any(name.startswith("Exercise") for name in row.titles)


def test_the_ids_named_beside_the_tables_exist():
    part = below(GUIDE, 2, "Paths through the book")
    named = re.findall(r"\b([1-9]\.[1-9])\b", part)
    assert named
    assert set(named) <= {exercise.id for exercise in EXERCISES}


def names_in(source: str) -> tuple[set[str], set[str], set[str]]:
    """Return what a cell reads as it runs, what its functions read, and what it binds."""
    code = compile(TransformerManager().transform_cell(source), "cell", "exec")
    inside = set().union(*map(reads_inside, code.co_consts))
    return names(code, "LOAD_NAME", "LOAD_GLOBAL"), inside, names(code, "STORE_NAME")


def names(code: types.CodeType, *operations: str) -> set[str]:
    return {s.argval for s in dis.get_instructions(code) if s.opname in operations}


def reads_inside(code) -> set[str]:
    if not isinstance(code, types.CodeType):
        return set()
    of_a_class = names(code, "STORE_NAME") | {"__name__"}
    found = names(code, "LOAD_NAME", "LOAD_GLOBAL") - of_a_class
    return found.union(*map(reads_inside, code.co_consts))


def unbound(notebook: str, titles: list[str]) -> set[str]:
    """Return the names that some sections of a notebook read and none of them binds in time."""
    parts = parts_of(notebook)
    cells = sorted(cell for title in [None, *titles] for cell in parts[title])
    known = set(dir(builtins)) | {"display", "get_ipython"}
    lost, late = set(), set()
    for _, source in cells:
        now, inside, bound = names_in(source)
        lost |= now - known - bound
        known |= bound
        late |= inside
    return lost | (late - known)  # a function may read what is bound after it


@each_path
def test_what_a_path_runs_needs_nothing_that_it_skips(title):
    for notebook in {row.notebook for row in PATHS[title] if row.how == "run"}:
        rows = [row for row in PATHS[title] if row.notebook == notebook and row.how == "run"]
        titles = [name for row in rows for name in row.titles]
        order = list(parts_of(notebook))
        assert titles == sorted(titles, key=order.index), "in the order of the notebook"
        assert unbound(notebook, titles) == set(), notebook


def test_a_skipped_section_that_is_needed_is_found():
    assert "dynamic" in unbound("01_basics.ipynb", ["8 · Where the bytes went"])
    needs = unbound("03_qat.ipynb", ["2 · Learned step sizes", "6 · The control"])
    assert {"train_text", "FakeQuantize"} <= needs, "inside functions too"


def test_the_program_says_what_it_did(capsys, monkeypatch, guide):
    monkeypatch.setattr(teaching, "GUIDE", guide)
    assert teaching.main() == 0
    said = capsys.readouterr().out
    assert "00_times.json is not there" in said
    assert "guide.md: unchanged" in said
    guide.write_text("no markers", encoding="utf8")
    assert teaching.main() == 1
    assert "no <!-- generated" in capsys.readouterr().err
