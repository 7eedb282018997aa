"""Mixed-precision quantization: what each layer costs at each width, and a budget spent well."""

import contextlib
import difflib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from labkit.blocks import LAYERS, blocks_of, check_linear, linear_layers
from labkit.kernels import PackedLinear
from labkit.measure import check_ids, evaluating
from labkit.quant import group_qparams, round_to_grid, to_groups


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the linear layers in the blocks of a Llama-type model, in their order.

    TypeError if the model is of another type.
    """
    return [f"model.layers.{i}.{name}" for i in range(len(blocks_of(model))) for name in LAYERS]


def fisher(model: nn.Module, ids: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Estimate the diagonal of the Fisher information: how much each weight matters.

    Each window gets random labels, drawn from the model's own prediction, and one backward pass.

    Args:
        model: a Llama-type causal LM; its float weights, which may be frozen.
        ids: int64 `(n_windows, length)`, calibration windows.
        seed: of the labels.

    Returns:
        By layer, the mean squared gradient of a token's log-likelihood, shaped like its weight.
        Rounding it by Δ costs about half the sum of Fisher · Δ², in nats of KL divergence a token.

    Raises:
        TypeError, ValueError: if `ids` is not as above; TypeError too if the model is of another
            type, or its layers are no plain `nn.Linear`.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning",
    arXiv 1801.05787; for quantization Kim et al., "SqueezeLLM", arXiv 2306.07629.
    """
    check_ids(model, ids, 1)
    names = layer_names(model)
    weights = [layer.weight for layer in linear_layers(model, names)]
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), differentiable(weights):
        squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        for window in ids:
            logits = model(window.clone()[None], use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
            loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            for square, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
                square += gradient.float().square_()
    return {name: square.div_(ids.numel()) for name, square in zip(names, squares, strict=True)}


@contextlib.contextmanager
def differentiable(weights: list[torch.Tensor]) -> Iterator[None]:
    """Let weights have gradients, also frozen ones and where gradients are off; then as before."""
    before = [weight.requires_grad for weight in weights]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            for weight, required in zip(weights, before, strict=True):
                weight.requires_grad_(required)


@torch.no_grad()
def rounding_costs(
    model: nn.Module,
    information: dict[str, torch.Tensor],
    widths: tuple[int, ...] = (3, 4, 8),
    group_size: int = 64,
) -> dict[str, dict[int, float]]:
    """Predict what rounding each layer alone costs at each width, in nats a token.

    Args:
        model: with the float weights.
        information: of `fisher`.
        widths: bits, 2 to 8 each.
        group_size: inputs that share a scale; rounding is to nearest, asymmetric.

    Returns:
        By layer and width, the predicted KL divergence from the float model.

    Raises:
        TypeError: if a layer is missing or no plain `nn.Linear`.
    """
    costs, layers = {}, linear_layers(model, information)
    for (name, weights_matter), layer in zip(information.items(), layers, strict=True):
        costs[name] = dict.fromkeys(widths, 0.0)
        weight = layer.weight.float()
        some = max(1, 2**18 // weight.shape[1])  # rows at a time that fit the processor's cache
        for rows, matter in zip(weight.split(some), weights_matter.split(some), strict=True):
            groups = to_groups(rows, group_size)
            ends = _ends(groups)  # once for all widths
            for bits in widths:
                error = round_to_grid(groups, *group_qparams(ends, 2, bits), bits)
                error = error.sub_(groups).square_().flatten(1)[:, : rows.shape[1]]
                costs[name][bits] += float((matter * error).sum() / 2)
    return costs


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Return the weight that a `PackedLinear` of these bits would hold, float32.

    Args:
        weight: `(out, in)`, finite.
        bits: 2 to 8.
        group_size: inputs that share a scale; rounding is asymmetric.
    """
    groups = to_groups(weight.float(), group_size)
    grid = group_qparams(_ends(groups), 2, bits)
    return round_to_grid(groups, *grid, bits).flatten(1)[:, : weight.shape[1]]


def _ends(groups: torch.Tensor) -> torch.Tensor:
    # The smallest and the largest value of each group: its grid depends on nothing else.
    ends = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return torch.cat(ends, dim=-1).flatten(1)


def packed_nbytes(linear: nn.Linear, bits: int, group_size: int) -> int:
    """Return the bytes that a layer takes as an asymmetric `PackedLinear`, without its bias."""
    check_linear(linear)
    out, inputs = linear.weight.shape
    return out * (math.ceil(inputs * bits / 8) + 3 * math.ceil(inputs / group_size))


def allocate(
    costs: dict[str, dict[int, float]], nbytes: dict[str, dict[int, int]], budget: int
) -> dict[str, int]:
    """Choose a width for each layer: the least sum of costs within a budget of bytes, exactly.

    An integer program: one width a layer, the bytes together at most the budget.

    Args:
        costs: by layer and width; see `rounding_costs`.
        nbytes: by layer and width; the same keys.
        budget: bytes.

    Returns:
        Bits by layer.

    Raises:
        ValueError: if the keys differ, a cost is not finite, or no choice meets the budget; names
            the smallest budget that one does.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    _check_budget(costs, nbytes, budget)
    choices = [(name, bits) for name in costs for bits in costs[name]]
    one_each = np.array([[name == layer for layer, _ in choices] for name in costs], dtype=float)
    size = np.array([[nbytes[name][bits] for name, bits in choices]]) / budget
    price = np.array([costs[name][bits] for name, bits in choices])
    result = milp(
        price / max(price.max(), np.finfo(float).tiny),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, -np.inf, 1)],
        options={"mip_rel_gap": 1e-4},
    )
    return {name: bits for (name, bits), x in zip(choices, result.x, strict=True) if x > 0.5}


def _check_budget(costs: dict, nbytes: dict, budget: int) -> None:
    if {name: set(row) for name, row in costs.items()} != {n: set(r) for n, r in nbytes.items()}:
        raise ValueError("costs and nbytes must hold the same layers and widths")
    if not all(math.isfinite(cost) for row in costs.values() for cost in row.values()):
        raise ValueError("costs must be finite, not NaN or infinity")
    smallest = sum(min(row.values()) for row in nbytes.values())
    if budget < smallest:
        raise ValueError(f"budget: no choice fits into {budget} bytes; the smallest is {smallest}")


def pack_layers(model: nn.Module, widths: dict[str, int], group_size: int = 64) -> nn.Module:
    """Replace linear layers by packed ones, in place, each of its own width, and return the model.

    Args:
        model: with float `nn.Linear` layers.
        widths: bits (2 to 8) by layer name; layers that are not named stay as they are.
        group_size: inputs that share a scale; rounding is to nearest, asymmetric.

    Raises:
        TypeError: if a name is that of a layer of another kind.
        ValueError: if no layer has a name, or a width is out of range. Nothing changes then.
    """
    modules = dict(model.named_modules())
    known = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    for name in widths:
        if name in modules:
            linear_layers(model, [name])
        else:
            if hasattr(model, "config"):  # a language model: perhaps not one with such names
                blocks_of(model)
            near = difflib.get_close_matches(name, known, 1, 0) or ["no linear layer at all"]
            raise ValueError(f"widths: the model has no linear layer {name!r}; nearest: {near[0]}")
    packed = {name: PackedLinear(known[name], bits, group_size) for name, bits in widths.items()}
    for name, layer in packed.items():
        model.set_submodule(name, layer)
    return model
