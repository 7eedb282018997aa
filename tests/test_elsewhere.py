"""Chapters elsewhere: what cannot be run here is parsed, and its commands are the README's."""

import json
import subprocess
import sys
import tomllib
import types
import urllib.parse

import nbformat
import pytest
import yaml
from IPython.testing.globalipapp import start_ipython
from nbformat import v4
from test_project import ROOT, commands_in_readme

from labkit.authoring import elsewhere, learner, notebooks

each_chapter = pytest.mark.parametrize("path", learner.chapters(), ids=lambda path: path.stem)


@each_chapter
def test_links_and_setup_cell_are_up_to_date(path):
    notebook = notebooks.read(path)
    before = nbformat.writes(notebook)
    assert nbformat.writes(elsewhere.prepare(notebook, path.name)) == before
    assert notebook.cells[1].id == elsewhere.SETUP_ID
    assert notebook.cells[1].outputs == []
    assert elsewhere.links(path.name) in notebook.cells[0].source


def test_links_name_the_tag_and_the_file():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    tag, name = f"v{version['version']}", "01_basics.ipynb"
    colab = urllib.parse.urlsplit(elsewhere.colab_url(name))
    assert colab.netloc == "colab.research.google.com"
    owner_and_repository = colab.path.removeprefix("/github/").partition("/blob/")[0]
    assert owner_and_repository.count("/") == 1
    assert colab.path.endswith(f"/blob/{tag}/notebooks/{name}")
    binder = urllib.parse.urlsplit(elsewhere.binder_url(name))
    assert binder.path == f"/v2/gh/{owner_and_repository}/{tag}"
    assert urllib.parse.parse_qs(binder.query) == {"urlpath": [f"lab/tree/notebooks/{name}"]}
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert elsewhere.colab_url(name) in readme
    assert elsewhere.binder_url(name) in readme


def test_a_chapter_without_them_gets_them_and_its_counts_move():
    shown = v4.new_output("execute_result", {"text/plain": "1"}, execution_count=1)
    first = v4.new_code_cell("1", outputs=[shown], execution_count=1)
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# A\n\nText"), first])
    elsewhere.prepare(notebook, "01_basics.ipynb")
    title, links, text = notebook.cells[0].source.split("\n\n")
    assert (title, links, text) == ("# A", elsewhere.links("01_basics.ipynb"), "Text")
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert notebook.cells[2].outputs[0].execution_count == 2


# The setup cell


def run_setup(monkeypatch, modules: dict) -> list[str]:
    """Run the setup cell with these modules in place; return what it asked IPython to do."""
    shell, asked = start_ipython() or get_ipython(), []  # noqa: F821 - IPython provides it
    monkeypatch.setattr(shell, "system", lambda line: asked.append(shell.var_expand(line)))
    note = lambda name, line, *_: asked.append(f"{name} {line}")  # noqa: E731
    monkeypatch.setattr(shell, "run_line_magic", note)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    result = shell.run_cell(elsewhere.setup_source())
    assert result.success
    return asked


def test_the_setup_cell_does_nothing_here(monkeypatch, capsys):
    assert run_setup(monkeypatch, {}) == []
    assert capsys.readouterr().out == ""


def test_in_colab_it_runs_the_commands_of_the_readme(monkeypatch):
    asked = run_setup(monkeypatch, {"google.colab": types.ModuleType("google.colab")})
    in_a_shell = [line.replace("cd -q ", "cd ") for line in asked]
    assert in_a_shell == [line for line in commands_in_readme() if line in in_a_shell]
    assert [line.split()[0] for line in in_a_shell] == ["git", "cd", "pip"]


# A devcontainer and Binder


def test_the_devcontainer_installs_as_the_readme_does():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    known = commands_in_readme()
    assert all(c in known for c in container["postCreateCommand"].split(" && "))
    assert container["image"].endswith(":3.11")
    assert container["containerEnv"] == {"PIP_EXTRA_INDEX_URL": elsewhere.CPU_INDEX}
    (opened,) = container["customizations"]["codespaces"]["openFiles"]
    assert (ROOT / opened).is_file()


def test_binder_builds_from_the_environment_and_fetches_the_model():
    script = ROOT / "postBuild"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text(encoding="utf8").splitlines()
    commands = [line for line in lines if not line.startswith(("#", "set "))]
    assert commands == ["python -m labkit fetch"]
    assert commands[0] in commands_in_readme()
    assert script.stat().st_mode & 0o111 or sys.platform == "win32"
    assert yaml.safe_load((ROOT / "environment.yml").read_text())["name"]
    for folder in ("binder", ".binder"):  # Binder would read that one in place of the root
        assert not (ROOT / folder).exists()
