"""Chapter 6: the sweep survives a kill, and runs on a cluster; every claim has a verdict."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import joblib
import nbformat
import pandas
import pytest
from notebook_rules import code_cells, syntax_tree, taught
from tqdm.auto import tqdm

import labkit
from labkit import claims
from labkit.authoring import learner, notebooks
from labkit.authoring.claim_lines import claims_of
from labkit.authoring.notebooks import NAMES, chapters_in
from labkit.claims import Claim

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CHAPTER = "06_comparison"
DECIDES_NOTHING = "02c_formats_rotations"
OTHERS = tuple(
    Path(name).stem for name in NAMES if Path(name).stem not in (CHAPTER, DECIDES_NOTHING)
)
# The claims that the book set out to settle.
CLAIMS = """
    storage-75 speed-2-4x dynamic-instant static-faster calibration-needed ptq-small-loss
    attention-sensitive qat-best qat-costly dynamic-complex dynamic-rnn-cnn dynamic-shift
    mixed-near-float amp-free gpu-fp16-cpu-int8 small-model-overhead combine-ptq-qat
    combine-mixed-dynamic prune-then-quantize distil-then-quantize sensitive-tasks
"""
TASKS = [{"model": "tiny", "bits": bits, "seed": 0} for bits in (8, 4, 3, 2)]
SCORE = """
def score(task):
    import labkit as lk
    from labkit import mixed

    model, tokenizer = lk.load_model(task["model"], device="cpu")
    mixed.pack_layers(model, dict.fromkeys(mixed.layer_names(model), task["bits"]))
    nats = lk.perplexity(model, lk.windows(tokenizer, "reference-judge", 4, 64)).window_nats
    return {"task": task, "window_nats": nats.tolist()}
"""


SWEEP = "\n".join(taught(CHAPTER, name) for name in ("whole_lines", "sweep"))


@pytest.fixture
def sweep():
    namespace = {"joblib": joblib, "json": json, "Path": Path, "tqdm": tqdm}
    exec(SWEEP, namespace)
    return namespace["sweep"]


@pytest.fixture
def score():
    namespace = {}  # not a module: so it travels to the workers by value
    exec(SCORE, namespace)
    return namespace["score"]


def test_a_cluster_gives_the_same_records(sweep, score, tmp_path):
    distributed = pytest.importorskip("distributed")
    here = sweep(score, TASKS, tmp_path / "here.jsonl")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)
    )
    with cluster, distributed.Client(cluster), joblib.parallel_config(backend="dask"):
        there = sweep(score, TASKS, tmp_path / "there.jsonl")
    bits = [record["task"]["bits"] for record in here]
    assert bits == [8, 4, 3, 2]
    there = sorted(there, key=lambda record: bits.index(record["task"]["bits"]))
    assert [record["task"] for record in there] == TASKS
    for a, b in zip(here, there, strict=True):  # other threads, other order of sums
        assert a["window_nats"] == pytest.approx(b["window_nats"], abs=1e-4)


def test_kernels_do_not_inherit_what_the_cluster_set():
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
    side_by_side = "PYTEST_XDIST_WORKER_COUNT" in os.environ  # there the root conftest sets threads
    assert side_by_side or "OMP_NUM_THREADS" not in os.environ


def test_a_killed_sweep_repeats_nothing_and_loses_nothing(sweep, tmp_path):
    path, log = tmp_path / "night.jsonl", tmp_path / "log.txt"
    script = f"""
        import json, os, joblib
        from pathlib import Path
        from tqdm.auto import tqdm

        def run(task):
            with open({str(log)!r}, "a") as file:
                file.write(f"{{task['seed']}}\\n")
            if task["seed"] == 3 and not Path({str(path)!r} + ".again").exists():
                os._exit(9)  # as a killed process ends: nothing is cleaned up
            return {{"task": task, "square": task["seed"] ** 2}}
    """
    call = f"sweep(run, [{{'seed': s}} for s in range(6)], {str(path)!r})"
    program = f"{textwrap.dedent(script)}\n{SWEEP}\n{call}\n"
    first = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert first.returncode == 9
    kept = path.read_text().splitlines()
    assert [json.loads(line)["square"] for line in kept] == [0, 1, 4]
    path.write_text("\n".join([*kept, '{"task": {"seed": 3}, "squ']))  # half a line
    Path(f"{path}.again").touch()
    second = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert second.returncode == 0, second.stderr.decode()
    squares = [json.loads(line)["square"] for line in path.read_text().splitlines()]
    assert squares == [0, 1, 4, 9, 16, 25]
    assert log.read_text().split() == ["0", "1", "2", "3", "3", "4", "5"]


def test_a_broken_line_inside_a_record_is_an_error(sweep, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"task": {"se\n{"task": {"seed": 1}}\n')
    with pytest.raises(json.JSONDecodeError):
        sweep(dict, [{"seed": 1}], path)
    assert path.read_text().count("\n") == 2


@pytest.fixture
def verdicts():
    """Run the cells of the verdict that need nothing else of the chapter."""
    cells = code_cells(nbformat.read(NOTEBOOKS / f"{CHAPTER}.ipynb", as_version=4))
    no_claims = SimpleNamespace(claims=SimpleNamespace(REGISTRY={}))
    namespace = {"json": json, "re": re, "Path": Path, "namedtuple": namedtuple, "lk": no_claims}
    starts = ("LINE = re", "EVIDENCE", "# The notebooks", "HOLDS_WHEN = {", "DOES_NOT_HOLD = {")
    starts += ("def printed_by", "def claims_made", "def verdict_on", "def still_to_state")
    for cell in cells:
        if cell.source.startswith(starts):
            exec(cell.source, namespace)
    return namespace


def test_every_claim_of_the_book_has_a_verdict(verdicts):
    assert list(verdicts["EVIDENCE"]) == CLAIMS.split()
    assert not verdicts["HOLDS_WHEN"].keys() & verdicts["DOES_NOT_HOLD"].keys()
    assert verdicts["HOLDS_WHEN"].keys() | verdicts["DOES_NOT_HOLD"].keys() < set(CLAIMS.split())


def printed_claims() -> dict[str, set[str]]:
    """Return the ids of the claims that all notebooks printed, by their sign."""
    found = {"✓": set(), "◷": set(), "✎": set()}
    for path in chapters_in(NOTEBOOKS):
        stored = nbformat.read(path, as_version=4)
        printed = "".join(o.get("text", "") for c in code_cells(stored) for o in c.outputs)
        for sign, id in re.findall(r"^([✓◷✎]) (.+?): ", printed, flags=re.MULTILINE):
            found[sign].add(id)
    return found


def test_what_a_verdict_names_was_printed(verdicts):
    assert all(verdicts["EVIDENCE"].values())
    named = set(" ".join(verdicts["EVIDENCE"].values()).split())
    assert named <= set().union(*printed_claims().values())


def test_no_verdict_rests_on_records_alone(verdicts):
    printed = printed_claims()
    executed = printed["✓"] | printed["◷"]
    assert not executed & printed["✎"]
    for id, names in verdicts["EVIDENCE"].items():
        assert executed & {*names.split()}, id


LINES = """
✓ one: A (b), c = 0.25 (band at most 0.3; null 1)
✓ yes: The same = yes (band must be yes)
✎ read: B over C = 1,024 (band 1,000 to 2,000; null 1; recorded: x.json, Xeon(R) 2)
◷ fast: D over E = 2.1 (band at least 1.2; null 1): holds here, quartiles 2 to 2.2 over 5 rounds
◷ slow: F over G = 0.9 (band 1.2 to 3; null 1): does not hold here, one run each, on a busy machine
✓ old: H (between 1 and 2)
a line about ✓ nothing: = 1 (band 1 to 2)
"""


OF_A_COPY = nbformat.v4.new_output("stream", text="✓ one: Of a copy = 3 (band exactly 3)\n")
COPIED = [nbformat.v4.new_code_cell("x", outputs=[OF_A_COPY])]


@pytest.fixture
def made(verdicts, tmp_path, monkeypatch):
    """Return what the verdict reads from another notebook, beside one claim of its own."""
    output = nbformat.v4.new_output("stream", text=LINES)
    cells = [nbformat.v4.new_code_cell("x", outputs=[output]), nbformat.v4.new_markdown_cell("y")]
    for name in ("03_qat", "03_qat-Copy1", "08_mine", CHAPTER):
        notebook = nbformat.v4.new_notebook(cells=cells if name == "03_qat" else COPIED)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    own = Claim("own", "I", 3.0, 1.0, 2.0, None, "timed", False)
    verdicts["lk"].claims.REGISTRY["own"] = own
    monkeypatch.chdir(tmp_path)
    return verdicts["claims_made"]()


def test_claims_are_read_by_sign(made):
    assert [claim.sign for claim in made.values()] == ["✓", "✓", "✎", "◷", "◷", "◷"]
    assert list(made) == ["one", "yes", "read", "fast", "slow", "own"]  # not the old form
    assert [id for id, claim in made.items() if not claim.held] == ["slow", "own"]
    assert made["one"].words == "A (b), c = 0.25"
    assert made["read"].words == "B over C = 1,024"
    assert (made["slow"].chapter, made["own"].chapter) == ("3", "6")


def test_a_verdict_says_what_did_not_hold_and_what_was_not_executed(verdicts, made):
    id = "qat-costly"  # holds, without conditions
    assert verdicts["verdict_on"](id, [made["one"], made["fast"]]) == ("holds", "")
    assert "did not hold" in verdicts["verdict_on"](id, [made["one"], made["slow"]])[0]
    assert "records alone" in verdicts["verdict_on"](id, [])[0]
    assert "did not hold" in verdicts["told"](made["slow"])
    assert "did not hold" not in verdicts["told"](made["read"])


def own_claims() -> dict[str, Claim]:
    """Return what the chapter itself states, as its kernel would hold it."""
    lines = claims_of(nbformat.read(NOTEBOOKS / f"{CHAPTER}.ipynb", as_version=4))
    return {c.id: Claim(c.id, c.sentence, 1.0, 1.0, 1.0, None, c.kind, True) for c in lines}


def cleared(notebook, first: int = 0):
    """Return the notebook, cleared of outputs from a cell on."""
    for cell in code_cells(notebook)[first:]:
        cell.outputs = []
    return notebook


def as_they_are(chapter: str):
    return nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4)


STATES = {
    "all have run": {},
    "none has run": dict.fromkeys(OTHERS, cleared),
    "learner copies": dict.fromkeys(OTHERS, learner.learner_copy),
    "chapter 7 comes later": {"07_pruning_distillation": cleared},
    "chapter 3 stopped half-way": {"03_qat": lambda notebook: cleared(notebook, 30)},
    "copies of the others": dict.fromkeys(OTHERS, "Copy1"),
    "it stands alone": dict.fromkeys(OTHERS),
    "files that are no notebooks": dict(
        zip(OTHERS, itertools.cycle(("", "{", "[]", "null", "<<<<<<<", '{"cells": 1}')))
    ),
}


def lay_out(folder: Path, change: dict, apart: bool) -> Path:
    """Put the other chapters beside chapter 6, or each in a folder; return where chapter 6 is."""
    for chapter in OTHERS:
        work = change.get(chapter, lambda notebook: notebook)
        home = folder / chapter if apart else folder
        home.mkdir(exist_ok=True)
        if callable(work):
            nbformat.write(work(as_they_are(chapter)), home / f"{chapter}.ipynb")
        elif work == "Copy1":
            shutil.copy(NOTEBOOKS / f"{chapter}.ipynb", home / f"{chapter}-Copy1.ipynb")
        elif work is not None:
            (home / f"{chapter}.ipynb").write_text(work, encoding="utf8")
    here = folder / CHAPTER if apart else folder
    here.mkdir(exist_ok=True)
    return here


@pytest.mark.parametrize("apart", [False, True], ids=["beside it", "as nbgrader lays them out"])
@pytest.mark.parametrize("state", STATES)
def test_the_verdicts_that_are_there_are_shown(state, apart, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "class"
    folder.mkdir()
    monkeypatch.chdir(lay_out(folder, STATES[state], apart))
    monkeypatch.setattr(claims, "REGISTRY", own_claims())
    namespace = {"json": json, "re": re, "Path": Path, "namedtuple": namedtuple, "lk": labkit}
    namespace["pd"] = pandas
    for cell in section_12():
        exec(cell.source, namespace)  # raises nothing, whatever is there
    said = capsys.readouterr().out
    home = folder.glob("*/*.ipynb" if apart else "*.ipynb")
    stated = {name for path in home for name in printed_in(path)} | own_claims().keys()
    named = {id: names.split() for id, names in namespace["EVIDENCE"].items()}
    complete = {id for id, names in named.items() if stated.issuperset(names)}
    assert f"{len(complete)} of 21 verdicts have all claims" in said
    assert "✓ verdicts-all: " in said
    table = namespace["verdicts"].set_index("claim")
    assert {id for id in table.index if table.verdict[id] != "open"} == complete
    for chapter in OTHERS:
        lost = {*namespace["MADE_IN"][chapter].split()} - stated
        lines = [line for line in said.splitlines() if line.startswith(f"{chapter}.ipynb: run it")]
        assert [set(re.findall(r"[\w-]+", line.partition("yet: ")[2])) for line in lines] == (
            [lost] if lost else []
        )
        needy = [id for id, names in named.items() if lost.intersection(names)]
        assert all(f"{chapter}.ipynb" in table["when, or why not"][id] for id in needy)


def section_12() -> list:
    cells = code_cells(as_they_are(CHAPTER))
    first = next(i for i, cell in enumerate(cells) if cell.source.startswith("LINE = re"))
    return cells[first:]


def printed_in(path: Path) -> set[str]:
    """Return the ids of the claims that a chapter printed; none if the file is no chapter."""
    try:
        notebook = notebooks.read(path) if path.name in NAMES else nbformat.v4.new_notebook()
    except notebooks.NotebookError:
        return set()
    return {claim.id for claim in claims_of(notebook)}


def test_it_knows_which_notebook_states_what(verdicts):
    named = set(" ".join(verdicts["EVIDENCE"].values()).split())
    for chapter, names in verdicts["MADE_IN"].items():
        assert set(names.split()) == named & printed_in(NOTEBOOKS / f"{chapter}.ipynb"), chapter
    assert tuple(verdicts["MADE_IN"]) == OTHERS


def test_the_record_holds_every_strategy_once():
    cells = code_cells(nbformat.read(NOTEBOOKS / f"{CHAPTER}.ipynb", as_version=4))
    named = [
        key.value
        for cell in cells
        for node in syntax_tree(cell).body
        if ast.unparse(node).startswith(("STRATEGIES = {", "STRATEGIES |= {"))
        for key in node.value.keys
    ]
    lines = (NOTEBOOKS / "records" / "06_smollm2.jsonl").read_text(encoding="utf8").splitlines()
    recorded = [json.loads(line)["task"]["strategy"] for line in lines]
    assert sorted(recorded) == sorted(named)
