"""Post-training quantization of a Llama-type model, one block at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from labkit.blocks import (
    LINEARS,
    PRODUCERS,
    check_block,
    check_wiring,
    linear_layers,
    received,
    rescalable,
)
from labkit.measure import check_ids, evaluating
from labkit.quant import dequantize_groups, gptq, group_qparams, quantize_groups


@dataclass(frozen=True, eq=False)
class Inputs:
    """What entered a linear layer, over all calibration tokens.

    Attributes:
        mean: `(in,)`, mean magnitude of each channel.
        peak: `(in,)`, largest magnitude of each channel.
        hessian: `(in, in)`, mean of x xᵀ.
    """

    mean: torch.Tensor
    peak: torch.Tensor
    hessian: torch.Tensor

    def divided(self, factor: torch.Tensor) -> "Inputs":
        """Return the statistics of the same inputs, each channel divided by its factor."""
        hessian = self.hessian / factor / factor[:, None]
        return Inputs(self.mean / factor, self.peak / factor, hessian)

    def shrunk(self, share: float) -> "Inputs":
        """Return the statistics with what inputs have in common shrunk: trusted less.

        Args:
            share: of each entry of the Hessian off its diagonal, 0 to 1, else ValueError; it goes.
                1 leaves a diagonal, with which GPTQ is rounding to nearest.

        Source: Schäfer and Strimmer, "A Shrinkage Approach to Large-Scale Covariance Matrix
            Estimation", 2005 (the target with unequal variances).
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {share}")
        diagonal = torch.diag(self.hessian.diagonal())
        return Inputs(self.mean, self.peak, self.hessian.lerp(diagonal, share))


@torch.no_grad()
def calibrate(
    model: nn.Module, ids: torch.Tensor, batch_size: int = 4, propagate: bool = True
) -> Iterator[tuple[nn.Module, dict[str, Inputs]]]:
    """Run a model block by block, and say what enters the linear layers of each.

    That is what enters them in `model(ids)` in eval mode: the model itself prepares masks and
    positions. Needs the memory of the model, of the hidden states and of one block's statistics.

    Args:
        model: a Llama-type causal LM of transformers, on the CPU.
        ids: int64 `(n_windows, length)`, calibration windows.
        batch_size: windows at a time.
        propagate: True: a block that you change before you ask for the next one passes on its new
            outputs. False: it passes on those that it had, which saves a second run.

    Yields:
        A decoder block, and its `Inputs` by name (a key of `LINEARS`).

    Raises:
        TypeError: if `ids` is no tensor of integers, or the model of another type, see
            `blocks.blocks_of` and `blocks.received`.
        ValueError: if `ids` is not as above, or an activation is NaN or infinite.
    """
    check_ids(model, ids, batch_size)
    with evaluating(model):
        check_wiring(model, ids[:1, :2])
        hidden, others = received(model, ids.split(batch_size))

    def run(block: nn.Module, arguments: dict[int, tuple]) -> list[torch.Tensor]:
        outputs = []
        with evaluating(block):
            for part in hidden:
                rest, options = arguments[len(part)]
                outputs.append(block(part, *rest, **options))
        return outputs

    for number, (block, arguments) in enumerate(zip(model.model.layers, others, strict=True)):
        sums: dict[str, list] = {}
        hooks = [
            block.get_submodule(layers[0]).register_forward_pre_hook(_recorder(sums, name))
            for name, layers in LINEARS.items()
        ]
        try:
            output = run(block, arguments)
        finally:
            for hook in hooks:
                hook.remove()
        for name, (_, peak, _) in sums.items():
            if not torch.isfinite(peak).all():
                layers = ", ".join(LINEARS[name])
                raise ValueError(f"model: NaN or infinity enters {layers} of block {number}")
        n = ids.numel()
        yield block, {name: Inputs(s[0] / n, s[1], s[2] / n) for name, s in sums.items()}
        hidden = run(block, arguments) if propagate else output


def _recorder(sums: dict[str, list], name: str):
    def record(layer: nn.Module, arguments: tuple) -> None:
        x = arguments[0].flatten(0, -2).float()
        new = [x.abs().sum(0), x.abs().amax(0), _gram(x)]
        old = sums.get(name, [torch.zeros_like(part) for part in new])
        sums[name] = [old[0] + new[0], torch.maximum(old[1], new[1]), old[2] + new[2]]

    return record


def _gram(x: torch.Tensor) -> torch.Tensor:
    # xᵀ x; it is symmetric: what lies below the diagonal blocks is copied.
    n = x.shape[1]
    gram = x.new_empty(n, n)
    for part in torch.arange(n).tensor_split(4):
        first, last = int(part[0]), int(part[-1]) + 1
        gram[first:last, first:] = x[:, first:last].T @ x[:, first:]
        gram[last:, first:last] = gram[first:last, last:].T
    return gram


@torch.no_grad()
def rescale_input(block: nn.Module, name: str, factor: torch.Tensor) -> None:
    """Divide the input channels of linear layers by a factor, without changing what they compute.

    The layer that produces the input is divided, the weights that read it are multiplied.

    Args:
        block: a decoder block, changed in place.
        name: a key of `PRODUCERS`.
        factor: `(in,)`, positive and finite.

    Raises:
        TypeError, ValueError: see `blocks.rescalable`; nothing is changed then.
    """
    producer, layers = rescalable(block, name, factor)
    producer.weight /= factor if producer.weight.ndim == 1 else factor[:, None]
    if getattr(producer, "bias", None) is not None:
        producer.bias /= factor
    for layer in layers:
        layer.weight *= factor


@torch.no_grad()
def smooth_factor(peak: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """Return SmoothQuant's factor `(in,)`, peakᵅ / max |w|¹⁻ᵅ: from activations into weights.

    Args:
        peak: `(in,)`, largest magnitude of each input channel in calibration.
        weights: the matrices `(out, in)` that read this input.
        alpha: how much moves, from 0 (weights get flat) to 1 (activations get flat).

    Source: Xiao et al., "SmoothQuant", arXiv 2211.10438.
    """
    reach = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return peak.clamp(min=1e-5) ** alpha / reach.clamp(min=1e-5) ** (1 - alpha)


@torch.no_grad()
def output_error(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return the mean squared error a token that a weight error `(out, in)` makes in the output."""
    return float(((error @ hessian) * error).sum())


@torch.no_grad()
def awq_factor(
    weights: list[torch.Tensor],
    inputs: Inputs,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    steps: int = 6,
) -> torch.Tensor:
    """Search AWQ's factor: channels with large activations get a finer grid.

    Args:
        weights: the matrices `(out, in)` that read this input, to be rounded as the others say.
        inputs: its statistics.
        steps: how many exponents between 0 and 1 are tried.

    Returns:
        `(in,)`: mean magnitude to the exponent with the least output error, centered on 1.

    Source: Lin et al., "AWQ", arXiv 2306.00978.
    """
    best_error, best = math.inf, None
    parts = [part for weight in weights for part in weight.split(512)]
    for alpha in torch.linspace(0, 1, steps):
        factor = inputs.mean.clamp(min=1e-5) ** alpha
        factor = factor / (factor.max() * factor.min()).sqrt()
        total = 0.0
        for weight in parts:
            scaled = weight * factor
            grid = group_qparams(scaled, group_size, bits, symmetric)
            codes = quantize_groups(scaled, *grid, group_size, bits, symmetric)
            error = dequantize_groups(codes, *grid, group_size).div_(factor).sub_(weight)
            total += output_error(error, inputs.hessian)
            if total >= best_error:
                break  # this exponent cannot win any more
        if total < best_error:
            best_error, best = total, factor
    return best


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    inputs: dict[str, Inputs],
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    *,
    scaling: bool = False,
    clipping: bool = False,
    compensation: bool = False,
    shrink: float = 0.0,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Quantize the linear layers of a block. With no method switched on: round to nearest.

    Args:
        block: changed in place: its weights become values of the grid, in float32.
        inputs: from `calibrate`.
        group_size: inputs a group; 0 for one group a row (per channel).
        bits, symmetric: the grid.
        scaling: AWQ's factors first, where a producer can take them.
        clipping: search the range of each group, weighted by activation power.
        compensation: GPTQ instead of rounding.
        shrink: how much of the correlations between inputs GPTQ is not to trust, 0 to 1; see
            `Inputs.shrunk`.

    Returns:
        Scale and zero point by the layer's name in the block, for `PackedLinear`.

    Raises:
        TypeError: if the block is not of Llama type, its layers are no plain `nn.Linear`, or
            factors do not go into a producer, see `rescale_input`.
        TypeError, ValueError: see `quant.group_qparams` and `quant.gptq`. A block is left as it was
            then, save for AWQ's factors.
    """
    check_block(block)
    layers_of = {name: linear_layers(block, layers) for name, layers in LINEARS.items()}
    inputs = dict(inputs)
    factors = {}
    for name in PRODUCERS if scaling else ():
        weights = [layer.weight for layer in layers_of[name]]
        rescalable(block, name, torch.ones(weights[0].shape[1]))
        size = group_size or weights[0].shape[1]
        factors[name] = awq_factor(weights, inputs[name], size, bits, symmetric)
    for name, factor in factors.items():
        rescale_input(block, name, factor)
        inputs[name] = inputs[name].divided(factor)
    grids, values = {}, []
    for name, layers in layers_of.items():
        weights = [layer.weight for layer in layers]
        rows = [len(weight) for weight in weights]
        hessian = inputs[name].shrunk(shrink).hessian if shrink else inputs[name].hessian
        # Rows are independent: those of all layers that read this input go through together.
        stacked, size = torch.cat(weights), group_size or len(hessian)
        power = hessian.diagonal() if clipping else None
        found = _rounded(stacked, size, bits, symmetric, power, hessian if compensation else None)
        parts = zip(LINEARS[name], weights, *(x.split(rows) for x in found), strict=True)
        for layer, weight, rounded, scale, zero_point in parts:
            values.append((weight, rounded))
            grids[layer] = scale.clone(), zero_point.clone()
    for weight, rounded in values:
        weight.copy_(rounded)
    return grids


def _rounded(
    weight: torch.Tensor,
    group_size: int,
    bits: int,
    symmetric: bool,
    power: torch.Tensor | None,
    hessian: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The rounded weight, its scale and its zero point; a hessian asks for GPTQ.
    parts = weight.split(2**18 // weight.shape[1] + 1)  # what fits the processor's cache
    grids = [group_qparams(part, group_size, bits, symmetric, power) for part in parts]
    grid = [torch.cat(part) for part in zip(*grids, strict=True)]
    if hessian is not None:
        codes = gptq(weight, hessian, *grid, group_size, bits, symmetric)
    else:
        pairs = zip(parts, grids, strict=True)
        nearest = [quantize_groups(x, *own, group_size, bits, symmetric) for x, own in pairs]
        codes = torch.cat(nearest)
    return dequantize_groups(codes, *grid, group_size), *grid
