"""Which cells of a notebook are folded: those that make a figure, and nothing needed later."""

import pytest
from nbformat import v4

from labkit.authoring import folding, notebooks

DRAW = "figure, axes = lk.subplots()\naxes.plot(x)\nlk.show(figure, alt='A line rises.')"
AGAIN = (
    "figure, axes = lk.subplots()\nfor name in x:\n    axes.plot(name)\nlk.show(figure, alt='b')"
)


def folded(*sources: str) -> list[bool]:
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])
    folding.fold(notebook)
    hidden = [c.metadata.get("jupyter", {}).get("source_hidden", False) for c in notebook.cells]
    assert hidden == [folding.TAG in c.metadata.get("tags", []) for c in notebook.cells]
    return hidden


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["x = [1, 2]", DRAW, "print(x)"], [False, True, False]),
        # A later cell that draws into a figure of its own needs nothing of the first.
        (["x = [1]", DRAW, AGAIN], [False, True, True]),
        ([DRAW.replace("x)", "y := x)"), "print(y)"], [False, False]),
        ([DRAW + "\nprint(x)"], [False]),
        ([DRAW + "\nlk.claim('a', 'A', 1, 1, 1)"], [False]),
        (
            ["def draw_it(n):\n    figure, _ = lk.subplots()\n    return figure", "f(draw_it)"],
            [True, False],
        ),
        (
            ["def count(n):\n    figure, _ = lk.subplots()\n    return n", "count(3)"],
            [False, False],
        ),
        (["def plot_it(n):\n    return drawing(n)", "f(plot_it)"], [True, False]),
        (["def draw_it(n):\n    return n\nx = draw_it(1)", "print(x)"], [False, False]),
        (["def drawn(n):\n    return n", "drawn(1)"], [False, False]),
        (["%matplotlib inline\n" + DRAW], [True]),
        (["def f(:"], [False]),
    ],
)
def test_what_only_draws_is_folded(sources, expected):
    assert folded(*sources) == expected


def test_other_tags_stay_and_an_old_fold_goes():
    cell = v4.new_code_cell("x = 1", metadata={"tags": ["hide-input", "kept"]})
    cell.metadata["jupyter"] = {"source_hidden": True}
    notebook = v4.new_notebook(cells=[cell])
    folding.fold(notebook)
    assert cell.metadata == {"tags": ["kept"]}


def test_normal_form_folds():
    notebook = notebooks.normalize(v4.new_notebook(cells=[v4.new_code_cell(DRAW)]))
    assert notebook.cells[0].metadata["jupyter"] == {"source_hidden": True}


def test_names_are_read_before_they_are_bound():
    cell = v4.new_code_cell("y = x\nx = 1\n[x for z in range(y)]\ndef f():\n    return outside + x")
    assert folding.names(cell) == ({"x", "range", "outside"}, {"x", "y", "f"})
