"""Formats and rotations at 4 and 8 bits, on texts that nothing was fitted to: records of chapter 2.

`python -m labkit.authoring.four_bits` appends to `notebooks/records/02_four_bits.jsonl` one line
for each task that is not there yet.
"""

import argparse
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from labkit import data, evaluation, machine, microscaling, models, ptq, quant, rotations

RECORD = Path(__file__).parents[2] / "notebooks" / "records" / "02_four_bits.jsonl"
JUDGED = 12, 64
CALIBRATION = 32, 128
TOP = {"INT4": 7.0, "INT4, 16 levels": 8.0, "FP4": 6.0, "NF4": 1.0}
_BELOW = (-1.0, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050, 0.0)
_ABOVE = (0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957, 1.0)
NF4 = torch.tensor((*_BELOW, *_ABOVE))
ROTATED = ("Hadamard", "random Hadamard", "random rotation")


def nearest(x: torch.Tensor, grid: str) -> torch.Tensor:
    """Round numbers to the nearest of a grid with 15 or 16 points, a key of `TOP`."""
    if grid.startswith("INT4"):
        return x.round().clamp(-TOP[grid], 7)
    if grid == "FP4":
        return microscaling.round_to_float(x, *microscaling.E2M1)
    return NF4[torch.bucketize(x, (NF4[1:] + NF4[:-1]) / 2)]


def block_scale(peak: torch.Tensor, top: float, scale_format: str) -> torch.Tensor:
    """Return the scale that brings the largest magnitude of each block to a grid's end.

    Args:
        peak: `(out, n_blocks, 1)`, largest magnitudes.
        top: the grid's largest value.
        scale_format: `"FP16"`; `"E4M3"`, under one FP32 scale of the tensor; or `"E8M0"`, a power
            of two, by the rule of MX: the exponent of the peak less that of `top`. With
            `"E8M0, higher"` it is one higher, with `"E8M0, EVEN"` only where the peak over the
            scale is 7 or more, which FP4 rounds to 8.
    """
    if scale_format == "FP16":
        return quant.to_fp16(peak / top)
    if scale_format == "E4M3":
        whole = peak.max() / top / 448
        return microscaling.round_to_float(peak / top / whole, *microscaling.E4M3) * whole
    scale = 2.0 ** microscaling.shared_exponent(peak, math.frexp(top)[1] - 1)
    raised_from = {"E8M0": torch.inf, "E8M0, higher": 0, "E8M0, EVEN": 7}[scale_format]
    return torch.where(peak / scale < raised_from, scale, 2 * scale)


def round_weight(
    weight: torch.Tensor,
    grid: str,
    block: int,
    scale_format: str,
    hessian: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round a weight `(out, in)` to a grid in blocks: to nearest, or by GPTQ with a Hessian."""
    if grid == "INT4 with zero point":
        scale, zero_point = quant.group_qparams(weight, block)
        return _on_integers(weight, scale, zero_point, block, hessian)
    blocks = quant.to_groups(weight, block)
    scale = block_scale(blocks.abs().amax(-1, keepdim=True), TOP[grid], scale_format)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    if grid == "INT4, 16 levels":  # the largest magnitude takes the end with one level more
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        return _on_integers(weight, scale, torch.where(largest > 0, 7.0, 8.0), block, hessian)
    if hessian is None:
        return (nearest(blocks / scale, grid) * scale).flatten(1)[:, : weight.shape[1]]
    # Twice the values of FP4 are integers.
    half, twice = scale / 2, lambda x: 2 * nearest(x / 2, grid)
    zero = torch.zeros_like(scale)
    codes = quant.gptq(weight, hessian, half, zero, block, 5, True, nearest=twice)
    return quant.dequantize_groups(codes, half, zero, block)


def _on_integers(weight, scale, zero_point, block, hessian) -> torch.Tensor:
    if hessian is None:
        codes = quant.quantize_groups(weight, scale, zero_point, block)
    else:
        codes = quant.gptq(weight, hessian, scale, zero_point, block)
    return quant.dequantize_groups(codes, scale, zero_point, block)


def turn_of(kind: str, seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a rotation of the residual stream: one of `ROTATED`."""
    random = torch.Generator().manual_seed(seed)
    if kind == "random Hadamard":
        signs = torch.randint(0, 2, (576,), generator=random) * 2.0 - 1
        return lambda x: rotations.hadamard_transform(x * signs)
    if kind == "random rotation":
        square = torch.linalg.qr(torch.randn(576, 576, generator=random))[0]
        return lambda x: x @ square
    return rotations.hadamard_transform


def build(model, seen: list, ids: torch.Tensor, task: dict) -> nn.Module:
    """Quantize a copy of a model as a task says.

    Args:
        model: the float model.
        seen: what enters each of its blocks, from `ptq.calibrate`.
        ids: calibration windows.
        task: `weights`, `activations`; perhaps `turn`, `seed`, `alpha`, `gptq`, and `outside`: the
            residual stream alone is turned; for `but` see `fold`. The turn `"where rounded"`
            folds nothing: each layer turns its input, rounds it, and turns it back.
    """
    made = copy.deepcopy(model)
    turn = task.get("turn")
    if turn == "SmoothQuant":
        smooth(made, seen, task["alpha"])
    elif turn == "norms folded":
        fold(made, task.get("but", 0))
    elif turn in ROTATED:
        inside = None if task.get("outside") else rotations.hadamard_transform
        rotations.rotate(made, turn_of(turn, task.get("seed", 0)), inside)
    if task.get("gptq") and turn in ("norms folded", "SmoothQuant", *ROTATED):
        seen = [inputs for _, inputs in ptq.calibrate(made, ids, propagate=False)]
    for block, inputs in zip(made.model.layers, seen, strict=True):
        for name, layers in ptq.LINEARS.items():
            for layer in map(block.get_submodule, layers):
                _round(layer, task, inputs[name])
    return made


def smooth(model, seen: list, alpha: float) -> None:
    """Fold SmoothQuant's factors into a model, in place."""
    for block, inputs in zip(model.model.layers, seen, strict=True):
        for name in ptq.PRODUCERS:
            weights = [block.get_submodule(layer).weight for layer in ptq.LINEARS[name]]
            factor = ptq.smooth_factor(inputs[name].peak, weights, alpha)
            ptq.rescale_input(block, name, factor)


def fold(model, but: float) -> None:
    """Fold the gains of the blocks' norms, in place, save those below `but` times their median.

    A gain that stays is divided by the median, which is folded, so that its channel is no larger
    than its neighbors.
    """
    small = {}
    for number, block in enumerate(model.model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            gain = getattr(block, name).weight.detach()
            left = torch.where(gain.abs() < but * gain.abs().median(), gain / gain.median(), 1.0)
            gain /= left
            small[number, name] = left
    rotations.fold_norms(model)
    for (number, name), left in small.items():
        getattr(model.model.layers[number], name).weight.data *= left


def _round(layer: nn.Linear, task: dict, seen: ptq.Inputs) -> None:
    weights, inputs, hessian = task["weights"], task["activations"], None
    turn = back = lambda x: x
    if task.get("turn") == "where rounded":
        square = rotations.hadamard_transform(torch.eye(layer.in_features))
        turn, back = (lambda x: x @ square), (lambda x: x @ square.T)
    if task.get("gptq"):
        turned = dataclasses.replace(seen, hessian=turn(turn(seen.hessian).T))
        hessian = turned.shrunk(0.1).hessian
    with torch.no_grad():
        if weights == "8 bits":
            rounded = quant.fake_quantize(turn(layer.weight), 8, symmetric=True, dim=1)
            layer.weight.copy_(back(rounded))
        elif weights:
            layer.weight.copy_(back(round_weight(turn(layer.weight), *weights, hessian)))
    if inputs:
        layer.register_forward_pre_hook(lambda _, x: (back(round_inputs(turn(x[0]), inputs)),))


def round_inputs(x: torch.Tensor, how: str) -> torch.Tensor:
    """Round activations: to a block format, or `"8 bits a token"`, `"4 bits, blocks of 64"`, ….

    Tokens and blocks get a symmetric grid, a tensor an asymmetric one, as the INT8 engines do.
    """
    if how in microscaling.BITS_PER_WEIGHT:
        return microscaling.round_to_blocks(x, how)
    if "blocks of" in how:
        blocks = x.unflatten(-1, (-1, int(how.split()[-1])))
        return quant.fake_quantize(blocks, int(how[0]), symmetric=True, dim=-1).flatten(-2)
    bits, by_token = int(how[0]), how.endswith("token")
    return quant.fake_quantize(x, bits, symmetric=by_token, dim=-1 if by_token else None)


def tasks() -> list[dict]:
    """Return everything that the record holds, the most wanted first."""
    w4 = ("INT4 with zero point", 64, "FP16")
    mx, nv = ("FP4", 32, "E8M0"), ("FP4", 16, "E4M3")
    turns = [{}, {"turn": "Hadamard"}, {"turn": "SmoothQuant", "alpha": 0.5}]
    four = {"weights": w4, "activations": "4 bits a token"}
    plain = [mx, nv, ("INT4", 32, "FP16"), ("INT4", 16, "E4M3")]
    found = [{**four, **turn} for turn in turns]
    found += [{"weights": weights, "activations": None} for weights in (*plain, w4)]
    widths = [("8 bits", "8 bits a token"), (w4, "8 bits a token"), ("8 bits", "8 bits a tensor")]
    found += [{"weights": w, "activations": a, **turn} for w, a in widths[:2] for turn in turns]
    both = (mx, "MXFP4"), (nv, "NVFP4")
    fitted = {**turns[1], "gptq": True}
    found += [{"weights": w4, "activations": None, **turn} for turn in (turns[1], fitted)]
    found += [{**four, **fitted}, {"weights": w4, "activations": None, "turn": "norms folded"}]
    found += [{"weights": w, "activations": a, **turn} for w, a in both for turn in turns[:2]]
    found += [{"weights": w4, "activations": "8 bits a token", **fitted}]
    found += [{"weights": weights, "activations": None, "gptq": True} for weights in (*plain, w4)]
    found += [{**four, "turn": turn, "seed": 1} for turn in ROTATED[1:]]
    found += [{**four, **turns[1], "outside": True}]
    found += [{"weights": w, "activations": a, **turn} for w, a in widths[2:] for turn in turns]
    found += [{**four, "turn": turn, "seed": seed} for seed in (2, 3) for turn in ROTATED[1:]]
    found += [{"weights": w4, "activations": None, **turns[2]}]
    others = [("INT4", 32, "E8M0"), ("FP4", 32, "FP16"), ("FP4", 16, "E8M0"), ("NF4", 64, "FP16")]
    others += [("FP4", 64, "FP16"), ("INT4", 64, "FP16"), ("NF4", 32, "FP16"), ("FP4", 16, "FP16")]
    others += [("INT4, 16 levels", block, "FP16") for block in (16, 32, 64)]
    others += [("INT4, 16 levels", 16, "E4M3")]
    others += [("FP4", 32, f"E8M0, {rule}") for rule in ("EVEN", "higher")]
    found += [{"weights": weights, "activations": None} for weights in others]
    found += [{"weights": ("INT4, 16 levels", 16, "E4M3"), "activations": None, "gptq": True}]
    blocks = [(w, f"4 bits, blocks of {size}") for w in (w4, None) for size in (64, 16)]
    alone = [(None, "4 bits a token"), (None, "NVFP4"), *blocks]
    found += [{"weights": w, "activations": a, **turn} for w, a in alone for turn in turns[:2]]
    return [*found, {"weights": nv, "activations": None, **turns[1]}, *_arms_beside(w4)]


def _arms_beside(w4: tuple) -> list[dict]:
    # The arm beside each method: SmoothQuant at the exponent that suits one scale a tensor, and
    # GPTQ without a turn, in finer blocks as well.
    four, gptq = {"weights": w4, "activations": "4 bits a token"}, {"gptq": True}
    smooth, turned = {"turn": "SmoothQuant", "alpha": 0.8}, {"turn": "Hadamard"}
    finer = [{"weights": w4, "activations": f"4 bits, blocks of {size}"} for size in (16, 64)]
    return [
        {**four, **smooth},
        {**four, **gptq},
        {"weights": "8 bits", "activations": "8 bits a tensor", **smooth},
        *({**task, **how, **gptq} for task in finer for how in ({}, turned)),
        *_arms_without_folding(w4),
    ]


def _arms_without_folding(w4: tuple) -> list[dict]:
    # A rotation folds the gains of the norms, and turns. Each of the two alone:
    inputs = ("4 bits, blocks of 16", "NVFP4", "4 bits, blocks of 64", "4 bits a token")
    cases = [(None, each) for each in inputs]
    cases += [(w4, None), (w4, "4 bits, blocks of 16"), (w4, "4 bits a token")]
    where = {"turn": "where rounded"}
    found = [{"weights": w, "activations": x, **where} for w, x in cases]
    found += [{"weights": None, "activations": x, "turn": "norms folded"} for x in inputs[:3]]
    found += [{"weights": w, "activations": x, **where, "gptq": True} for w, x in cases[4:]]
    some = [{"turn": "norms folded", "but": share} for share in (0.02, 0.3, 0.7)]
    return found + [
        {"weights": w, "activations": x, **but} for w, x in (cases[0], cases[4]) for but in some
    ]


def run(record: Path = RECORD, chosen: Sequence[dict] | None = None) -> None:
    """Measure the tasks that a record does not hold yet, and append a line for each."""
    model, tokenizer = models.load_model("smollm2", device="cpu")
    reference = evaluation.reference(model, tokenizer, *JUDGED)
    ids = data.windows(tokenizer, "calibration", *CALIBRATION)
    seen = [inputs for _, inputs in ptq.calibrate(model, ids, propagate=False)]
    lines = record.read_text(encoding="utf8").splitlines() if record.exists() else []
    done = [json.loads(line)["task"] for line in lines]
    for task in tasks() if chosen is None else chosen:
        task = json.loads(json.dumps(task))  # as it is stored
        if task in done:
            continue
        found = evaluation.quality(build(model, seen, ids, task), reference)
        where = f"{machine.hardware()['cpu']}, torch {torch.__version__}"
        on = {name: {"loss": _short(q.loss), "kl": _short(q.kl)} for name, q in found.items()}
        entry = {"task": task, "where": where, "judged": JUDGED, "on": on}
        with record.open("a", encoding="utf8") as file:
            file.write(json.dumps(entry) + "\n")
        done.append(task)
        means = {name: f"{q.loss} {q.kl}" for name, q in found.items()}
        print(task, means, flush=True)


def _short(estimate: evaluation.Estimate) -> list[float]:
    return [float(f"{value:.4g}") for value in estimate.by_window]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the record lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, default=RECORD)
    run(parser.parse_args(arguments).record)


if __name__ == "__main__":
    main()
