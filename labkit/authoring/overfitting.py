"""What GPTQ learns from its text: the error of layers on a text that it never saw, a record.

`python -m labkit.authoring.overfitting` writes `notebooks/records/02_overfitting.json`: for
calibration texts of one document and of many, cut short and long, the squared output error of GPTQ
over that of rounding, on the text that it was fitted to and on news.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from labkit import data, machine, models, ptq, quant

RECORD = Path(__file__).parents[2] / "notebooks" / "records" / "02_overfitting.json"
SOURCES = ("reference-fit", "encyclopedia", "calibration")
WINDOWS, LENGTH = (8, 32, 128), 128
BLOCKS = (2, 9, 16, 23)
# How far GPTQ trusts what it saw: damping, and the share of correlations that goes.
CARE = {"as it is": (0.01, 0.0), "damping 0.1": (0.1, 0.0), "damping 1": (1.0, 0.0)}
CARE |= {"shrink 0.1": (0.01, 0.1), "shrink 0.5": (0.01, 0.5)}


def hessians(
    model, ids: torch.Tensor, sizes: tuple[int, ...], blocks: tuple[int, ...] = BLOCKS
) -> Iterator[tuple[int, dict]]:
    """Yield the Hessian of each kind of layer in some blocks after some numbers of windows."""
    total: dict = {}
    done = 0
    for size in sizes:
        passes = ptq.calibrate(model, ids[done:size], propagate=False)
        for number, (_, inputs) in enumerate(passes):
            for name in inputs if number in blocks else ():
                new = (size - done) * inputs[name].hessian
                total[number, name] = total.get((number, name), 0) + new
            if number == blocks[-1]:
                break
        done = size
        yield size, {place: sums / size for place, sums in total.items()}


@torch.no_grad()
def shares(model, fitted: dict, judged: dict, damping: float, shrink: float) -> list[list[float]]:
    """Return by layer the output error of GPTQ over rounding's: on its own text, on the other."""
    rows = []
    for (number, name), hessian in fitted.items():
        weight = model.model.layers[number].get_submodule(ptq.LINEARS[name][0]).weight
        grid = quant.group_qparams(weight, 64)
        trusted = hessian.lerp(torch.diag(hessian.diagonal()), shrink)
        codes = quant.gptq(weight, trusted, *grid, 64, damping=damping)
        found = codes, quant.quantize_groups(weight, *grid, 64)
        errors = [quant.dequantize_groups(c, *grid, 64) - weight for c in found]
        on = [[ptq.output_error(e, h[number, name]) for e in errors] for h in (fitted, judged)]
        rows.append([float(f"{mine / rounding:.4g}") for mine, rounding in on])
    return rows


def main() -> None:
    """Measure everything and write the record."""
    model, tokenizer = models.load_model("smollm2", device="cpu")
    judged_ids = data.windows(tokenizer, "news", 32, LENGTH)
    judged = dict(hessians(model, judged_ids, (32,)))[32]
    lines = []
    for source in SOURCES:
        ids = data.windows(tokenizer, source, WINDOWS[-1], LENGTH)
        for size, fitted in hessians(model, ids, WINDOWS):
            for care, numbers in CARE.items() if size == 32 else [("as it is", (0.01, 0.0))]:
                found = shares(model, fitted, judged, *numbers)
                lines.append({"text": source, "windows": size, "care": care, "shares": found})
                means = torch.tensor(found).mean(0).tolist()
                print(source, size, care, means, flush=True)
    layers = [f"block {number}, {name}" for number, name in judged]
    where = f"{machine.hardware()['cpu']}, torch {torch.__version__}"
    record = {"where": where, "length": LENGTH, "judged": "news", "layers": layers, "rows": lines}
    RECORD.write_text(json.dumps(record, indent=0) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
