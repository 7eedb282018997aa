"""What a quantized model learns from its float original once its codes stand: scales and norms."""

import torch
from torch import nn

from labkit.blocks import LAYERS, blocks_of
from labkit.measure import check_ids
from labkit.qat import train
from labkit.quant import to_fp16, to_groups

Grids = list[dict[str, tuple[torch.Tensor, torch.Tensor]]]


def tune(
    model: nn.Module,
    grids: Grids,
    group_size: int,
    teacher: nn.Module,
    ids: torch.Tensor,
    *,
    batch_size: int = 8,
    rate: float = 2e-3,
    progress: bool = False,
) -> tuple[Grids, list[float]]:
    """Let the scales and norms of a quantized model learn to answer as its original, in place.

    Codes and zero points stay as they are, so nothing is rounded again. The loss is the KL
    divergence from the teacher; each window is used once, by Adam, in steps that fall to 0.

    Args:
        model: a Llama-type model whose blocks `ptq.quantize_block` has quantized.
        grids: for each block, what that returned.
        group_size: inputs a group, as there; 0 for one group a row.
        teacher: the model in float, with the same vocabulary.
        ids: int64 `(n_windows, length)`; windows that are left over from a batch are not used.
        batch_size: windows a step.
        rate: about how much a step changes a scale or a norm, as a share of it.
        progress: show a bar.

    Returns:
        The new grids, whose scales FP16 holds exactly, and the loss before each step, in nats a
        token.

    Raises:
        TypeError: if the model is not of Llama type.
        TypeError, ValueError: if `ids` is not as above or holds less than one batch, or a block has
            no grid.
        TrainingStopped: if a loss is NaN or infinite; the model is then as it was.

    Source: the second phase of EfficientQAT (Chen et al., arXiv 2407.11062), with the divergence
    from the teacher as the loss, and norms as well (Li et al., "Norm Tweaking", arXiv 2309.02784).
    """
    check_ids(model, ids, batch_size)
    if len(blocks_of(model)) != len(grids):
        came = f"{len(grids)} grids for {len(blocks_of(model))} blocks"
        raise ValueError(f"grids must be one for each block of the model, not {came}")
    if len(ids) < batch_size:
        raise ValueError(f"ids must hold at least batch_size={batch_size} windows, not {len(ids)}")
    weights, gains = _beginning(model, grids)

    def loss_of(step: int) -> torch.Tensor:
        # A few windows at a time, whose gradients add up: all at once would take their memory.
        loss = torch.zeros(())
        for part in ids[step * batch_size : (step + 1) * batch_size].split(2):
            tuned = {n: _times(weights[n], 1 + gain, group_size) for n, gain in gains.items()}
            some = _divergence(model, tuned, teacher, part) * (len(part) / batch_size)
            some.backward()
            loss += some.detach()
        return loss.requires_grad_()  # `train` goes back from here, and finds nothing more

    optimizer = torch.optim.Adam(gains.values(), lr=rate)
    losses = train(loss_of, optimizer, len(ids) // batch_size, progress=progress)
    with torch.no_grad():
        for name, gain in gains.items():
            if gain.shape == weights[name].shape:
                weights[name] *= 1 + gain
        return [
            _rescaled(model, n, grid, gains, group_size) for n, grid in enumerate(grids)
        ], losses


def _beginning(model: nn.Module, grids: Grids) -> tuple[dict, dict]:
    # By name: what is to change, and by what share it has changed, a norm's or a group's: 0.
    norms = [name for name, _ in model.named_parameters() if name.endswith("norm.weight")]
    weights = {name: model.get_parameter(name).detach() for name in norms}
    gains = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for number, grid in enumerate(grids):
        for layer, (scale, _) in grid.items():
            name = f"model.layers.{number}.{layer}.weight"
            weights[name] = model.get_parameter(name).detach()
            gains[name] = torch.zeros_like(scale)
    for gain in gains.values():
        gain.requires_grad_()
    return weights, gains


def _times(weight: torch.Tensor, factor: torch.Tensor, group_size: int) -> torch.Tensor:
    # A norm's weight times a factor a channel, or a matrix times a factor a group.
    if weight.ndim == 1:
        return weight * factor
    groups = to_groups(weight, group_size or weight.shape[1]) * factor
    return groups.flatten(1)[:, : weight.shape[1]]


def _divergence(model, tuned, teacher, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        wanted = teacher(batch).logits.log_softmax(-1)
    answers = torch.func.functional_call(model, tuned, (batch,)).logits.log_softmax(-1)
    return nn.functional.kl_div(answers, wanted, log_target=True, reduction="none").sum(-1).mean()


def _rescaled(model, number: int, grid: dict, gains: dict, group_size: int) -> dict:
    # The grid of a block after training; its weights follow, codes times the new scales.
    new = {}
    for name in LAYERS:
        full, (scale, zero_point) = f"model.layers.{number}.{name}.weight", grid[name]
        new[name] = to_fp16(scale * (1 + gains[full])), zero_point
        weight = model.get_parameter(full)
        codes = _times(weight, 1 / scale, group_size).round()
        weight.copy_(_times(codes, new[name][0], group_size))
    return new
