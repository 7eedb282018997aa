"""Write the float model and the calibration tokens to a folder that every other library can read.

    python tests/peers/export.py FOLDER

Runs in the environment of the workbook.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

import labkit as lk

N_WINDOWS, LENGTH = 30, 512


def export(folder: Path) -> None:
    """Write SmolLM2 in the layout of the hub, and `calibration.safetensors` beside it."""
    model, tokenizer = lk.load_model("smollm2", "cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = lk.windows(tokenizer, "calibration", N_WINDOWS, LENGTH)
    save_file({"input_ids": ids}, folder / "calibration.safetensors")
    facts = {"model": "SmolLM2-135M-Instruct", "windows": N_WINDOWS, "tokens a window": LENGTH}
    (folder / "calibration.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    export(arguments.folder)
    print(*sorted(path.name for path in arguments.folder.iterdir()), sep="\n")
