"""The explorers as a reader meets them: in a real JupyterLab, in a real Chromium."""

import nbformat
import pytest
from notebook_rules import chapter1_explorer

EXPLORERS = """\
import torch
from labkit import subplots
from labkit.widgets import bits_explorer, explorer

weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
weight[3, 7] = 0.4


def draw(bits, reach):
    figure, axes = subplots()
    axes.plot(range(bits), [reach] * bits)
    text = f"{bits} bits, range cut to {reach} %"
    return figure, text, text + "."


choices = {"Bits": range(2, 9), "Range kept": {"100 %": 100, "25 %": 25}}"""


@pytest.fixture(scope="module")
def page(lab_page, tmp_path_factory):
    """All explorers, run. The tests share the page: none needs the state another leaves."""
    from conftest import run_all_cells

    own = "explorer(choices, draw, start=(4, 100))"
    cells = [EXPLORERS, 'bits_explorer(0.1, "FP16")', own, chapter1_explorer()]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    path = tmp_path_factory.mktemp("source") / "explorers.ipynb"
    nbformat.write(notebook, path)
    page = lab_page(path)
    run_all_cells(page)
    return page


class Explorer:
    """The output of one cell: its picture and its sentence, and waiting for new ones."""

    def __init__(self, page, cell: int):
        self.area = page.locator(".jp-Notebook .jp-CodeCell").nth(cell)
        self.picture = self.area.locator("img.labkit-picture")
        self.sentence = self.area.locator("p.labkit-sentence")
        self.picture.wait_for()

    def state(self) -> tuple[str, str]:
        return self.picture.get_attribute("src"), self.sentence.inner_text()

    def wait_for_sentence(self, words: str) -> None:
        from playwright.sync_api import expect

        expect(self.sentence).to_contain_text(words, timeout=20_000)


@pytest.fixture
def bits(page):
    return Explorer(page, 1)


@pytest.fixture
def own(page):
    return Explorer(page, 2)


@pytest.fixture
def grid(page):
    return Explorer(page, 3)


def assert_both_changed(explorer: Explorer, before: tuple[str, str]) -> None:
    from playwright.sync_api import expect

    # Widgets update one by one, so the picture may come a moment after the sentence.
    expect(explorer.picture).not_to_have_attribute("src", before[0])
    picture, sentence = explorer.state()
    assert picture.startswith("data:image/png;base64,")
    assert sentence != before[1]


def assert_loaded_and_described(explorer: Explorer) -> None:
    assert explorer.picture.evaluate("image => image.naturalWidth") > 300
    assert len(explorer.picture.get_attribute("alt")) > 20
    assert explorer.sentence.get_attribute("role") == "status"


def test_bits_explorer_changes_with_a_typed_value(bits):
    assert_loaded_and_described(bits)
    value = bits.area.get_by_label("Value")
    value.fill("1")
    value.press("Enter")
    bits.wait_for_sentence(" = 1. Error: none")
    before = bits.state()
    value.fill("70000")
    value.press("Enter")
    bits.wait_for_sentence("70000 is out of range")
    assert_both_changed(bits, before)


def test_bits_explorer_changes_with_the_format_and_with_one_bit(bits):
    from playwright.sync_api import expect

    bits.area.get_by_label("Format").select_option("INT4")
    bits.area.get_by_label("Value").fill("-3")
    bits.area.get_by_label("Value").press("Enter")
    bits.wait_for_sentence("INT4 1 101")
    buttons = bits.area.locator("button.widget-toggle-button")
    expect(buttons).to_have_text(["1", "1", "0", "1"])
    before = bits.state()
    bits.area.get_by_title("value bit 1").click()
    bits.wait_for_sentence("INT4 1 111")
    assert_both_changed(bits, before)
    expect(bits.area.get_by_label("Value")).to_have_value("-1")


def test_bits_explorer_keeps_its_picture_on_bad_input(bits):
    value = bits.area.get_by_label("Value")
    value.fill("2")
    value.press("Enter")
    bits.wait_for_sentence("= 2.")
    picture, _ = bits.state()
    value.fill("abc")
    value.press("Enter")
    bits.wait_for_sentence("'abc' is not a number")
    assert bits.state()[0] == picture


def test_grid_explorer_of_chapter_1_changes_with_each_dropdown(grid):
    assert_loaded_and_described(grid)
    for label, choice, words in [
        ("Bits", "3", "3 bits, asymmetric, per channel"),
        ("Row", "3", "Row 3 (256 weights)"),
        ("Grid", "symmetric", "3 bits, symmetric, per channel"),
        ("Granularity", "per tensor", "3 bits, symmetric, per tensor"),
        ("Clip at percentile", "99", "163 weights clipped"),
    ]:
        before = grid.state()
        grid.area.get_by_label(label, exact=True).select_option(choice)
        grid.wait_for_sentence(words)
        assert_both_changed(grid, before)


def test_an_explorer_of_a_notebook_changes_with_each_dropdown(own):
    assert_loaded_and_described(own)
    for label, choice, words in [
        ("Range kept", "25 %", "4 bits, range cut to 25 %"),
        ("Bits", "8", "8 bits, range cut to 25 %"),
    ]:
        before = own.state()
        own.area.get_by_label(label, exact=True).select_option(choice)
        own.wait_for_sentence(words)
        assert_both_changed(own, before)


def test_nothing_is_cut_off(bits, grid, own):
    for explorer in (bits, grid, own):
        output = explorer.area.locator(".jp-OutputArea-output").last
        assert output.evaluate("element => element.scrollWidth <= element.clientWidth + 1")


@pytest.mark.parametrize(("theme", "contrast"), [("Dark", "> 180"), ("Light", "< 80")])
def test_sentence_is_readable_in_both_themes(page, theme, contrast):
    page.evaluate(
        "name => { jupyterapp.commands.execute('apputils:change-theme', {theme: name}) }",
        f"JupyterLab {theme}",
    )
    page.locator(f"body[data-jp-theme-name='JupyterLab {theme}']").wait_for(state="attached")
    brightness = """
        [...document.querySelectorAll('p.labkit-sentence')].map(sentence => {
            const [red, green, blue] = getComputedStyle(sentence).color.match(/[0-9.]+/g);
            return (+red + +green + +blue) / 3;
        })"""
    # The style sheet of a theme comes after its name.
    page.wait_for_function(f"{brightness}.every(value => value {contrast})")
    assert len(page.evaluate(brightness)) == 3
