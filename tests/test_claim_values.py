"""The ledger of what claims measured: runs under settings, and the spread against the bands."""

import json
import math

import nbformat
import pytest
from nbformat import v4

from labkit.authoring import claim_values, notebooks
from labkit.authoring.claim_lines import claims_in

CELLS = [
    "import os\nimport labkit as lk",
    "gain = 1 if os.environ.get('LABKIT_ENGINE') else 2",
    "lk.claim('gain', 'Gain = of two', gain, 2, 4, null=1)",
    "lk.claim('never', 'One', 1 / 3, 0.3, 0.4)",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "records").mkdir()
    cells = [v4.new_code_cell(source) for source in CELLS]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "01_made.ipynb")
    return tmp_path


def entries(folder) -> list[dict]:
    text = (folder / "records" / claim_values.RECORD).read_text(encoding="utf8")
    return [json.loads(line) for line in text.splitlines()]


def printed(folder, text: str) -> None:
    """Give the notebook of the folder this output, as if it had been run."""
    notebook = nbformat.read(folder / "01_made.ipynb", as_version=4)
    notebook.cells[1].outputs = [v4.new_output("stream", text=text)]
    nbformat.write(notebook, folder / "01_made.ipynb")


def recorded(folder, *values: tuple[float, str], id: str = "a") -> None:
    lines = [
        json.dumps({"notebook": "01_made.ipynb", "claims": {id: [value, sentence]}})
        for value, sentence in values
    ]
    (folder / "records" / claim_values.RECORD).write_text("\n".join(lines), encoding="utf8")


def test_a_run_appends_every_value_and_goes_on_after_a_claim_that_fails(folder, capsys):
    stored = (folder / "01_made.ipynb").read_bytes()
    assert claim_values.run(folder, ["01"], "qnnpack") == 1
    assert claim_values.run(folder, [], "AVX2") == 0
    first, second = entries(folder)
    assert first["claims"] == {"gain": [1, "Gain = of two"], "never": [0.33333, "One"]}
    assert second["claims"]["gain"] == [2, "Gain = of two"]
    assert first["setting"] == "qnnpack"
    assert first["errors"][0].startswith("code cell 2: AssertionError: gain: Gain = of two = 1")
    assert second["errors"] == []
    assert {"cpu", "instruction sets", "exact at 8 bits", "python"} <= set(first["machine"])
    assert (folder / "01_made.ipynb").read_bytes() == stored
    said = capsys.readouterr().out
    assert "01_made.ipynb, qnnpack: 2 claims in" in said
    assert "outside its band" in said


@pytest.mark.parametrize(
    ("setting", "code", "expected"),
    [
        ("AVX2", "print(torch.backends.cpu.get_cpu_capability())", ("AVX2", "DEFAULT")),
        ("one thread", "print(torch.get_num_threads())", ("1",)),
        ("qnnpack", "import labkit as lk; print(lk.quantized_engine())", ("qnnpack",)),
    ],
)
def test_a_setting_reaches_the_kernel(folder, setting, code, expected):
    made = v4.new_notebook(cells=[])
    environment = claim_values.SETTINGS[setting]
    done = notebooks.execute(made, folder, environment=environment, last=f"import torch; {code}")
    assert done.printed.strip() in expected


def test_an_unknown_setting_is_refused(folder, capsys):
    from labkit.authoring.commands import main

    assert main(["values", "run", "--setting", "ARM", "--folder", str(folder)]) == 2
    assert "--setting must be one of 'as it is', 'one thread', 'AVX2'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("band", "values", "room"),
    [
        ("1.8 to 6", [2.0, 3.0], 1 / 9),
        ("1.8 to 6", [2.0, 5.7], 0.05),
        ("at least 2", [3.0, 8.0], 0.5),
        ("at most 0.5", [0.4], 0.2),
        ("-2 to -1", [-1.2], 0.2),
        ("1.8 to 6", [1.7, 3.0], -1 / 18),
        ("exactly 16", [16.0, 16.0], math.inf),
        ("exactly 16", [16.0, 15.0], -1),
        ("must be yes", [1.0], math.inf),
    ],
)
def test_room_is_the_distance_to_the_nearer_end(band, values, room):
    (line,) = claims_in(f"✓ a: One = 3 (band {band})\n")
    assert claim_values.Spread(line, values, 0).room == pytest.approx(room)


def test_show_counts_what_left_its_band(folder, capsys):
    printed(folder, "✓ a: One = 3 (band 2 to 4; null 1)\n")
    recorded(folder, (3, "One"), (2.2, "One"))
    assert claim_values.show(folder) == 0
    assert "a                               2       2.2         3     10%  2 to 4; null 1" in (
        capsys.readouterr().out
    )
    recorded(folder, (3, "One"), (5, "One"))
    assert claim_values.show(folder) == 1
    assert "1 measured claim(s) left their band" in capsys.readouterr().out


def test_a_time_that_left_its_band_is_shown_and_counts_as_no_failure(folder, capsys):
    printed(folder, "◷ a: One = 3 (band at least 2; null 1): holds here, one run each\n")
    recorded(folder, (0.5, "One"))
    assert claim_values.show(folder) == 0
    assert "-75%  2 to inf; null 1; timed" in capsys.readouterr().out


def test_a_record_of_another_sentence_is_said_and_not_used(folder, capsys):
    printed(folder, "✓ a: One = 3 (band 2 to 4; null 1)\n")
    recorded(folder, (3, "One"), (9, "Another one"))
    assert claim_values.show(folder) == 0
    assert "null 1; 1 run(s) of another sentence left out" in capsys.readouterr().out


def test_a_claim_without_a_record_is_shown(folder, capsys):
    printed(folder, "✓ a: One = 3 (band 2 to 4; null 1)\n")
    assert claim_values.show(folder) == 0
    assert (
        "a                               0         –         –       –" in capsys.readouterr().out
    )
