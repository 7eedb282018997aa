"""The project: versions in one place, arrows that run one way, budgets, and one test command."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import labkit
from labkit.authoring import notebooks

ROOT = Path(__file__).parent.parent
LABKIT = ROOT / "labkit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
REQUIRED = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
EXTRAS = [
    Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines
]
TESTING = [r for r in EXTRAS if r.name != "labkit"]  # the test extra takes the others along
SOURCES = sorted(LABKIT.rglob("*.py"))
APART = {"authoring", "exercises"}  # no notebook reads these, so they have no budget in common
SMALL = [path for path in SOURCES if not APART & set(path.parts)]
# The design says 4,000; texts, evaluation, W8A8, tuning, formats and refusals came on top.
MAX_LINES, MAX_MODULE_LINES, MAX_FUNCTION_LINES = 5800, 350, 40

# DESIGN section 2: a module imports from its own level or a lower one.
LEVELS = (
    {"blocks", "downloads", "models", "texts", "data", "claims", "matvec", "python_version"}
    | {"arguments", "limits", "packing", "compiling"},
    {"quant", "kernels"},
    {"plotting", "measure", "ledger", "machine"},
    {"ptq", "int8", "evaluation", "microscaling"},
    {"qat", "mixed", "decoder", "tuning", "rotations"},
    {"formats", "exercises"},
    {"widgets"},
    {"authoring"},
    {"__main__"},
)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))


def module_of(path: Path) -> str:
    return path.relative_to(LABKIT).parts[0].removesuffix(".py")


# Versions


def test_the_three_that_results_depend_on_are_pinned():
    assert str(REQUIRED["torch"].specifier) == "==2.13.0"
    for name, series in (("torchao", "0.18"), ("transformers", "5.23")):
        specifier = REQUIRED[name].specifier
        assert f"{series}.0" in specifier
        assert f"{series}.7" in specifier
        assert "0.17.9" not in specifier
        assert f"{series[:-1]}9.0" not in specifier


@pytest.mark.parametrize("requirement", [*REQUIRED.values(), *TESTING], ids=lambda r: r.name)
def test_requirement_is_bounded_and_met(requirement):
    assert requirement.url is None
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators, f"{requirement.name} has no version"
    installed = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(installed, prereleases=True), installed


def test_the_tests_need_every_extra():
    (ours,) = [r for r in EXTRAS if r.name == "labkit"]
    assert ours.extras == set(PROJECT["optional-dependencies"]) - {"test"}


def test_the_conda_environment_holds_no_second_list_of_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))
    listed = environment["dependencies"]
    (section,) = [entry for entry in listed if isinstance(entry, dict)]
    assert sorted(entry for entry in listed if isinstance(entry, str)) == ["pip", "python=3.11"]
    assert list(section) == ["pip"]
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert section["pip"] == [index, "-e .[test]"]
    assert index.split()[1] in (ROOT / "README.md").read_text(encoding="utf8")


def test_the_package_declares_every_module_it_ships():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]
    modules = [path for path in SOURCES if path.name != "conf.py"]  # an asset, copied for Sphinx
    folders = {path.parent.relative_to(ROOT).as_posix() for path in modules}
    assert {folder.replace("/", ".") for folder in folders} == set(tool["setuptools"]["packages"])


# Arrows


def imported_modules(tree: ast.AST) -> set[str]:
    """Name the labkit modules that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name.split(".")[1] for name in names if name.startswith("labkit.")}
            found |= {"labkit" for name in names if name == "labkit"}
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            assert node.level == 0, "relative import; write from labkit import …"
            if parts == ["labkit"]:
                found |= {labkit._HOME.get(alias.name, alias.name) for alias in node.names}
            elif parts[0] == "labkit":
                found.add(parts[1])
    return found


def arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        if path != LABKIT / "__init__.py":
            found.setdefault(module_of(path), set()).update(imported_modules(tree_of(path)))
    return {name: targets - {name} for name, targets in found.items()}


def wrong_arrows(found: dict[str, set[str]]) -> list[str]:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    wrong = [f"{name} has no level" for name in found if name not in level]
    wrong += [
        f"{name} must not import {target}"
        for name, targets in found.items()
        for target in targets
        if name in level and level[name] < level.get(target, 99)
    ]
    try:
        graphlib.TopologicalSorter(found).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"a circle: {error.args[1]}")
    return wrong


def test_arrows_run_one_way():
    found = arrows()
    assert wrong_arrows(found) == []
    assert found["kernels"] == {"blocks", "quant", "matvec"}, (
        "the test should see at least this arrow"
    )
    assert "quant" not in found["exercises"], "a check must not trust what it checks"


def test_no_notebook_imports_the_authoring_side():
    for path in notebooks.chapters_in(ROOT / "notebooks"):
        assert "labkit.authoring" not in path.read_text(encoding="utf8"), path.name


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("from labkit import kernels", "a circle"),
        ("from labkit.authoring import notebooks", "quant must not import authoring"),
        ("def f():\n    from labkit.measure import latency", "quant must not import measure"),
        ("import labkit.plotting", "quant must not import plotting"),
        ("from labkit import perplexity", "quant must not import measure"),
        ("import labkit as lk", "quant must not import labkit"),
        ("from labkit.kernels import PackedLinear", "a circle"),
    ],
)
def test_a_wrong_arrow_is_found(code, problem):
    found = arrows()
    found["quant"] = imported_modules(ast.parse(code))
    assert any(problem in wrong for wrong in wrong_arrows(found))


HEAVY = {"transformers", "torchao", "matplotlib", "numba"}


def test_importing_labkit_pulls_in_nothing_slow():
    code = "import sys, labkit; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not (HEAVY | {"torch", "numpy", "scipy", "pandas"}) & set(done.stdout.split())


def test_importing_a_module_pulls_in_nothing_heavy():
    heavy = {"widgets", "exercises", "decoder", "authoring", "matvec", "compiling"}
    names = sorted(labkit._MODULES - heavy)
    code = f"""
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module("labkit." + name)
    print(name, *({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == names  # each without anything behind it


def test_every_lazy_name_exists():
    for name in labkit.__all__:
        assert getattr(labkit, name) is not None
    with pytest.raises(AttributeError, match=r"labkit has no 'quantise'; it has .*quant"):
        _ = labkit.quantise


# Budgets


def test_labkit_stays_small():
    lines = {path.name: len(path.read_text(encoding="utf8").splitlines()) for path in SMALL}
    assert sum(lines.values()) <= MAX_LINES, lines


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_module_stays_small(path):
    assert len(path.read_text(encoding="utf8").splitlines()) <= MAX_MODULE_LINES


def function_lengths(tree: ast.AST) -> dict[str, int]:
    """Count the lines of every function, its docstring apart."""
    lengths = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            lengths[node.name] = length
    return lengths


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_functions_stay_short(path):
    lengths = function_lengths(tree_of(path))
    assert {k: n for k, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_a_long_function_is_found():
    body = "\n".join(["    x = 1"] * 40)
    assert function_lengths(ast.parse(f"def f():\n{body}")) == {"f": 41}
    assert function_lengths(ast.parse(f'def f():\n    """A\n    b."""\n{body}')) == {"f": 41}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_public_things_have_docstrings(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    for node in tree.body:
        public = not getattr(node, "name", "_").startswith("_")
        if public and isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_ruff_has_nothing_to_say():
    paths = ["conftest.py", "classroom", "labkit", "tests"]
    paths += [f"notebooks/{name}" for name in notebooks.NAMES]  # not what learners keep there
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *paths],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


# Commands


def commands_in_readme() -> list[str]:
    return commands_in((ROOT / "README.md").read_text(encoding="utf8"))


def commands_in(text: str) -> list[str]:
    """Return the shell commands in the code blocks of a Markdown text."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    joined = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in joined for part in line.split("&&")]
    return [" ".join(part.split()) for part in parts if part.strip()]


def test_readme_shows_the_two_commands_and_the_conda_way():
    commands = commands_in_readme()
    assert any(re.search(r"\bjupyter[ -]lab\b", command) for command in commands), commands
    assert any(re.search(r"\bpytest --nbval$", command) for command in commands), commands
    assert any("conda env create -f environment.yml" in command for command in commands), commands
    assert any("-m venv" in command for command in commands), commands


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = {c for c in commands_in_readme() if re.search(r"\bpytest --nbval$", c)}
    script = (ROOT / ".ci" / "run").read_text(encoding="utf8")
    lines = [" ".join(line.split()) for line in script.splitlines() if not line.startswith("#")]
    assert any(command in line for line in lines), f".ci/run does not run: {command}"
    assert "-m venv" in script
