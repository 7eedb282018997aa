"""Chapters elsewhere: what cannot be run here is parsed, and its commands are the README's."""

import json
import re
import subprocess
import sys
import types
import urllib.parse
from pathlib import Path

import nbformat
import pytest
import yaml
from IPython.testing.globalipapp import start_ipython
from nbformat import v4
from test_project import ROOT, commands_in, commands_in_readme

from labkit.authoring import elsewhere, learner, notebooks

PLACE = elsewhere.Address("https://github.com/someone/a-workbook", "v1.2.3")
each_chapter = pytest.mark.parametrize("path", learner.chapters(), ids=lambda path: path.stem)
each_state = pytest.mark.parametrize("place", [PLACE, None], ids=["published", "unpublished"])


def project(tmp_path, urls: str) -> Path:
    path = tmp_path / "pyproject.toml"
    path.write_text(f'[project]\nversion = "1.2.3"\n{urls}', encoding="utf8")
    return path


# The address


def test_the_address_is_what_the_project_names(tmp_path):
    urls = '[project.urls]\nRepository = "https://github.com/someone/a-workbook/"'
    assert elsewhere.address(project(tmp_path, urls)) == PLACE
    assert elsewhere.address(project(tmp_path, "")) is None


@pytest.mark.parametrize(
    "url", ["https://example.org/a/b", "github.com/a/b", "https://github.com/a"]
)
def test_what_is_no_repository_is_refused(tmp_path, url):
    path = project(tmp_path, f'[project.urls]\nRepository = "{url}"')
    with pytest.raises(ValueError, match="Repository must be https://github"):
        elsewhere.address(path)


def test_links_name_the_tag_and_the_file():
    colab = urllib.parse.urlsplit(PLACE.colab("01_basics.ipynb"))
    assert colab.netloc == "colab.research.google.com"
    assert colab.path == "/github/someone/a-workbook/blob/v1.2.3/notebooks/01_basics.ipynb"
    binder = urllib.parse.urlsplit(PLACE.binder("01_basics.ipynb"))
    assert binder.path == "/v2/gh/someone/a-workbook/v1.2.3"
    assert urllib.parse.parse_qs(binder.query) == {
        "urlpath": ["lab/tree/notebooks/01_basics.ipynb"]
    }


# Chapters and README, as they are and in both states


@each_chapter
def test_a_chapter_is_up_to_date(path):
    notebook = notebooks.read(path)
    before = nbformat.writes(notebook)
    assert nbformat.writes(elsewhere.prepare(notebook, path.name, elsewhere.address())) == before


def test_the_readme_is_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf8")
    assert elsewhere.readme(text, elsewhere.address()) == text


@pytest.mark.skipif(elsewhere.address() is not None, reason="the workbook is published")
@pytest.mark.parametrize("pattern", [r"mybinder\.org/v2", r"colab\.research", r"github\.com/quant"])
def test_without_an_address_nothing_leads_to_one(pattern):
    files = [ROOT / "README.md", ROOT / "notebooks" / "TEACHING.md", *learner.chapters()]
    for path in files:
        assert not re.search(pattern, path.read_text(encoding="utf8")), path.name


@each_chapter
def test_publishing_adds_both_and_taking_back_leaves_the_chapter_as_it_was(path):
    plain = elsewhere.prepare(notebooks.read(path), path.name, None)
    before = nbformat.writes(plain)
    published = elsewhere.prepare(plain, path.name, PLACE)
    assert elsewhere.links(PLACE, path.name) in published.cells[0].source
    assert published.cells[1].source == elsewhere.setup_source(PLACE)
    assert published.cells[1].id == elsewhere.SETUP_ID
    again = nbformat.writes(elsewhere.prepare(published, path.name, PLACE))
    assert nbformat.writes(published) == again
    assert nbformat.writes(elsewhere.prepare(published, path.name, None)) == before


@each_state
def test_the_readme_has_badges_only_where_they_lead_somewhere(place):
    text = elsewhere.readme((ROOT / "README.md").read_text(encoding="utf8"), place)
    assert ("colab-badge.svg" in text) == (place is not None)
    assert (PLACE.binder("01_basics.ipynb") in text) == (place is not None)
    assert elsewhere.readme(text, place) == text


def test_a_readme_without_its_part_is_refused():
    with pytest.raises(ValueError, match="lacks <!-- generated"):
        elsewhere.readme("# Title", PLACE)


def test_the_command_writes_all_and_takes_all_away(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    cells = [v4.new_markdown_cell("# A\n\nText"), v4.new_code_cell("1", execution_count=1)]
    chapter = tmp_path / "notebooks" / "01_basics.ipynb"
    notebooks.write(notebooks.normalize(v4.new_notebook(cells=cells)), chapter)
    readme = tmp_path / "README.md"
    readme.write_text("# A\n\n<!-- generated: elsewhere -->\n<!-- end -->\n", encoding="utf8")
    before = readme.read_bytes(), chapter.read_bytes()
    monkeypatch.setattr(elsewhere, "ROOT", tmp_path)
    monkeypatch.setattr(learner, "chapters", lambda: [chapter])
    for place, said in ((PLACE, "stored"), (PLACE, "unchanged"), (None, "stored")):
        monkeypatch.setattr(elsewhere, "address", lambda place=place: place)
        assert elsewhere.main() == 0
        assert capsys.readouterr().out == f"README.md: {said}\n01_basics.ipynb: {said}\n"
        links = [PLACE.repository in path.read_text(encoding="utf8") for path in (readme, chapter)]
        assert links == [place is not None] * 2
    assert (readme.read_bytes(), chapter.read_bytes()) == before


def test_counts_move_with_the_cell_for_colab():
    shown = v4.new_output("execute_result", {"text/plain": "1"}, execution_count=1)
    first = v4.new_code_cell("1", outputs=[shown], execution_count=1)
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# A\n\nText"), first])
    elsewhere.prepare(notebook, "01_basics.ipynb", PLACE)
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert notebook.cells[2].outputs[0].execution_count == 2


# The cell for Colab


def run_setup(monkeypatch, modules: dict) -> list[str]:
    """Run the setup cell with these modules in place; return what it asked IPython to do."""
    shell, asked = start_ipython() or get_ipython(), []  # noqa: F821 - IPython provides it
    monkeypatch.setattr(shell, "system", lambda line: asked.append(shell.var_expand(line)))
    note = lambda name, line, *_: asked.append(f"{name} {line}")  # noqa: E731
    monkeypatch.setattr(shell, "run_line_magic", note)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    result = shell.run_cell(elsewhere.setup_source(PLACE))
    assert result.success
    return asked


def test_the_setup_cell_does_nothing_here(monkeypatch, capsys):
    assert run_setup(monkeypatch, {}) == []
    assert capsys.readouterr().out == ""


def test_in_colab_it_runs_the_commands_of_the_readme(monkeypatch):
    asked = run_setup(monkeypatch, {"google.colab": types.ModuleType("google.colab")})
    in_a_shell = [line.replace("cd -q ", "cd ") for line in asked]
    text = elsewhere.readme((ROOT / "README.md").read_text(encoding="utf8"), PLACE)
    assert in_a_shell == [line for line in commands_in(text) if line in in_a_shell]
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
