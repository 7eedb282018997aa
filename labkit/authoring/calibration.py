"""Calibration text × method, on texts that nothing was fitted to: the record of chapter 2.

`python -m labkit.authoring.calibration --text calibration --method all` appends one line to
`notebooks/records/02_calibration.jsonl`; without options every pair that is not there yet is run,
which takes hours.
"""

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from labkit import data, evaluation, machine, models, ptq, texts, tuning
from labkit.blocks import LINEARS

RECORD = Path(__file__).parents[2] / "notebooks" / "records" / "02_calibration.jsonl"
METHODS = {
    "rounding": {},
    "clipping": {"clipping": True},
    "AWQ": {"scaling": True},
    "AWQ and clipping": {"scaling": True, "clipping": True},
    "GPTQ": {"compensation": True},
    "clipping and GPTQ": {"clipping": True, "compensation": True},
    "AWQ and GPTQ": {"scaling": True, "compensation": True},
    "all": {"scaling": True, "clipping": True, "compensation": True},
    "all, tuned": {"scaling": True, "clipping": True, "compensation": True},
}
# One document, as the first edition had; each kind alone; all kinds in turn.
TEXTS = ("reference-fit", *texts.CALIBRATION, "calibration")


def measure(
    model,
    reference,
    ids: torch.Tensor | None,
    method: str,
    rate: float = 2e-3,
    first: float = 1.0,
    **grid,
) -> dict:
    """Quantize a copy of a model; return seconds, and loss, KL and agreement by text and window.

    Args:
        model: a Llama-type causal LM.
        reference: what it is held against, see `evaluation.reference`.
        ids: calibration windows, int64 `(n_windows, length)`; None for rounding.
        method: a key of `METHODS`.
        rate: of the scales that learn, see `tuning.tune`; other methods have none.
        first: weight of each window's first token in the Hessians; that of the others is 1.
        grid: `group_size` and `bits`; for GPTQ also `shrink`, see `ptq.quantize_block`.
    """
    quantized, start = copy.deepcopy(model), time.perf_counter()
    if method == "rounding":
        ids = next(iter(reference.ids.values()))[:1]  # statistics that nothing uses
    grids = [
        ptq.quantize_block(block, inputs, **grid, **METHODS[method])
        for block, inputs in _calibrate(quantized, ids, first)
    ]
    if method.endswith("tuned"):
        tuning.tune(quantized, grids, grid["group_size"], model, ids, rate=rate)
    seconds = time.perf_counter() - start
    found = {}
    for name, on in evaluation.quality(quantized, reference).items():
        estimates = {"loss": on.loss, "kl": on.kl, "same": on.same}
        found[name] = {key: _by_window(estimate) for key, estimate in estimates.items()}
    return {"seconds": round(seconds, 1), "peak_nbytes": machine.peak_nbytes(), "on": found}


def _calibrate(model, ids: torch.Tensor, first: float):
    # What `ptq.calibrate` yields, with another weight of first tokens. Their x xᵀ is summed up
    # beside it, when a block reads the windows for the first time: then it is not yet quantized.
    if first == 1:
        yield from ptq.calibrate(model, ids)
        return
    seen = {}

    def watch(layer, arguments):
        read, gram = seen.get(layer, (0, 0))
        whole = arguments[0].shape[1] == ids.shape[1]  # not the two tokens that check the wiring
        if whole and read < len(ids):
            x = arguments[0][:, 0]
            seen[layer] = read + len(x), gram + x.T @ x

    hooks = [
        block.get_submodule(layers[0]).register_forward_pre_hook(watch)
        for block in model.model.layers
        for layers in LINEARS.values()
    ]
    for block, inputs in ptq.calibrate(model, ids):
        for name, layers in LINEARS.items():
            _, gram = seen[block.get_submodule(layers[0])]
            added = (first - 1) * gram / ids.numel()
            inputs[name] = dataclasses.replace(inputs[name], hessian=inputs[name].hessian + added)
        yield block, inputs
    for hook in hooks:
        hook.remove()


def _by_window(estimate: evaluation.Estimate) -> list[float]:
    return [float(f"{value:.4g}") for value in estimate.by_window]


def run(
    name: str,
    chosen: Sequence[tuple[str, str]],
    record: Path = RECORD,
    n_windows: int = 128,
    length: int = 128,
    judged: tuple[int, int] = (16, 256),
    rate: float = 2e-3,
    first: float = 1.0,
    mix: Mapping[str, int] | None = None,
    **grid,
) -> None:
    """Measure pairs of calibration text and method that a record does not hold yet, and append.

    Args:
        name: of the model, see `models.load_model`.
        chosen: pairs of a text (`data.windows` takes it) and a key of `METHODS`.
        record: one JSON line a pair.
        n_windows, length: of the calibration text.
        judged: how many windows of each evaluation text, of how many tokens.
        rate: of the scales that learn, see `tuning.tune`.
        first: weight of first tokens, see `measure`.
        mix: in place of as many windows of each kind in `"calibration"`: how many of which.
        grid: `group_size` and `bits`, see `measure`.
    """
    model, tokenizer = models.load_model(name, device="cpu")
    reference = evaluation.reference(model, tokenizer, *judged)
    lines = record.read_text(encoding="utf8").splitlines() if record.exists() else []
    done = [json.loads(line)["task"] for line in lines]
    for text, method in chosen:
        task = {"model": name, "text": text, "method": method, **grid}
        task |= {"n_windows": n_windows, "length": length, "judged": list(judged)}
        if method == "rounding":
            task |= {"text": None, "n_windows": 0, "length": 0}
        elif mix and text == "calibration":
            task |= {"mix": dict(mix), "n_windows": sum(mix.values())}
        learns = {"rate": rate} if method.endswith("tuned") else {}
        task |= learns | ({"first": first} if first != 1 else {})
        if task in done:
            continue
        ids = None if task["text"] is None else _windows(tokenizer, task)
        where = f"{machine.hardware()['cpu']}, torch {torch.__version__}"
        entry = {"task": task, "where": where, "threads": torch.get_num_threads()}
        entry |= measure(model, reference, ids, method, first=first, **learns, **grid)
        with record.open("a", encoding="utf8") as file:
            file.write(json.dumps(entry) + "\n")
        done.append(task)
        print(json.dumps(entry), flush=True)


def _windows(tokenizer, task: dict) -> torch.Tensor:
    if "mix" not in task:
        return data.windows(tokenizer, task["text"], task["n_windows"], task["length"])
    kinds = [data.windows(tokenizer, kind, n, task["length"]) for kind, n in task["mix"].items()]
    ids = torch.cat(kinds)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def _share(argument: str) -> tuple[str, int]:
    kind, _, number = argument.partition("=")
    if kind not in texts.CALIBRATION or not number.isdigit() or int(number) < 1:
        known = ", ".join(texts.CALIBRATION)
        raise argparse.ArgumentTypeError(f"{argument!r} is not KIND=WINDOWS, KIND one of {known}")
    return kind, int(number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", choices=TEXTS, help="default: all of them")
    parser.add_argument("--method", choices=METHODS, help="default: all of them")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=128, help="for calibration")
    parser.add_argument("--length", type=int, default=128, help="of these windows, in tokens")
    mixture = "KIND=WINDOWS: so many windows of each kind, in place of --windows"
    parser.add_argument("--mix", type=_share, nargs="+", default=[], help=mixture)
    parser.add_argument("--judged", type=int, default=16, help="windows of 256 tokens of each text")
    parser.add_argument("--shrink", type=float, default=0.1, help="see ptq.quantize_block")
    parser.add_argument("--rate", type=float, default=2e-3, help="see tuning.tune")
    parser.add_argument("--first", type=float, default=1.0, help="weight of first tokens in H")
    parser.add_argument("--record", type=Path, default=RECORD)
    asked = parser.parse_args(arguments)
    if asked.mix and asked.text != "calibration":
        parser.error("argument --mix: goes with --text calibration alone")
    if not 0 <= asked.first < float("inf"):
        parser.error(f"argument --first: must be a weight of 0 or more, not {asked.first}")
    kinds = [asked.text] if asked.text else TEXTS
    methods = [asked.method] if asked.method else METHODS
    pairs = [(text, method) for text in kinds for method in methods]
    grid = {"group_size": asked.group_size, "bits": asked.bits, "shrink": asked.shrink}
    sizes = {"n_windows": asked.windows, "length": asked.length, "judged": (asked.judged, 256)}
    run(
        "smollm2",
        pairs,
        asked.record,
        rate=asked.rate,
        first=asked.first,
        mix=dict(asked.mix),
        **sizes,
        **grid,
    )


if __name__ == "__main__":
    main()
