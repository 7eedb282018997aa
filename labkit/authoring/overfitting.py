"""What GPTQ learns from its text: the error of layers on texts that it never saw, a record.

`python -m labkit.authoring.overfitting` writes `notebooks/records/02_overfitting.json`: for
calibration texts of one document and of many, of a kind near to what is judged on and of others,
the squared output error of GPTQ over that of rounding, on the text that it was fitted to and on
both evaluation texts. It fetches the wheel of the texts once more, for whole articles.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from labkit import data, machine, models, ptq, quant, texts

RECORD = Path(__file__).parents[2] / "notebooks" / "records" / "02_overfitting.json"
MANY = ("encyclopedia", "other-docs", "code", "self-written", "calibration")
WINDOWS, LENGTH, N_ARTICLES = (8, 32, 128), 128, 4
BLOCKS = (2, 9, 16, 23)
# How far GPTQ trusts what it saw: damping, and the share of correlations that goes.
CARE = {"as it is": (0.01, 0.0), "damping 0.1": (0.1, 0.0), "damping 1": (1.0, 0.0)}
CARE |= {"shrink 0.1": (0.01, 0.1), "shrink 0.5": (0.01, 0.5)}
CROSSED = "reference-fit", 128  # much text and much caution together


def articles(tokenizer, n_articles: int, n_windows: int) -> list[torch.Tensor]:
    """Return windows `(n_windows, LENGTH)` of the first whole articles that are long enough."""
    found = []
    for text in (ARTICLES.fetch() / "articles.txt").read_text(encoding="utf8").split("\f"):
        try:
            found.append(data.own_windows(tokenizer, text, n_windows, LENGTH))
        except ValueError:
            continue  # too short
        if len(found) == n_articles:
            break
    return found


def _make_articles(wheel: Path, folder: Path) -> None:
    whole = "\f".join("\n\n".join(page) for page in texts.articles(wheel))
    folder.mkdir()
    (folder / "articles.txt").write_text(whole, encoding="utf8")


ARTICLES = dataclasses.replace(texts.GENSIM, name="whole-articles", make=_make_articles)


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
def shares(model, fitted: dict, judged: list[dict], damping: float, shrink: float) -> list:
    """Return by layer the output error of GPTQ over rounding's: on its own text, on the others."""
    rows = []
    for (number, name), hessian in fitted.items():
        weight = model.model.layers[number].get_submodule(ptq.LINEARS[name][0]).weight
        grid = quant.group_qparams(weight, 64)
        trusted = hessian.lerp(torch.diag(hessian.diagonal()), shrink)
        codes = quant.gptq(weight, trusted, *grid, 64, damping=damping)
        found = codes, quant.quantize_groups(weight, *grid, 64)
        errors = [quant.dequantize_groups(c, *grid, 64) - weight for c in found]
        on = [[ptq.output_error(e, h[number, name]) for e in errors] for h in (fitted, *judged)]
        rows.append([float(f"{mine / rounding:.4g}") for mine, rounding in on])
    return rows


def main() -> None:
    """Measure everything and write the record."""
    model, tokenizer = models.load_model("smollm2", device="cpu")
    judged = [
        dict(hessians(model, data.windows(tokenizer, name, 32, LENGTH), (32,)))[32]
        for name in texts.EVALUATION
    ]
    sources = {
        name: (data.windows(tokenizer, name, WINDOWS[-1], LENGTH), WINDOWS)
        for name in ("reference-fit", *MANY)
    }
    for number, ids in enumerate(articles(tokenizer, N_ARTICLES, 32), 1):
        sources[f"article {number}"] = ids, (32,)
    lines = []
    for source, (ids, sizes) in sources.items():
        for size, fitted in hessians(model, ids, sizes):
            cares = CARE if size == 32 or (source, size) == CROSSED else ("as it is",)
            for care in cares:
                found = shares(model, fitted, judged, *CARE[care])
                lines.append({"text": source, "windows": size, "care": care, "shares": found})
                means = torch.tensor(found).mean(0).tolist()
                print(source, size, care, means, flush=True)
    layers = [f"block {number}, {name}" for number, name in judged[0]]
    where = f"{machine.hardware()['cpu']}, torch {torch.__version__}"
    record = {"where": where, "length": LENGTH, "judged": texts.EVALUATION, "layers": layers}
    RECORD.write_text(json.dumps(record | {"rows": lines}, indent=0) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
