"""Quantization-aware training: layers that feel their own rounding, and a loop that survives."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from labkit.arguments import check_group_grid
from labkit.blocks import LAYERS, blocks_of, check_linear, linear_layers
from labkit.kernels import PackedLinear, linear_in_float32
from labkit.quant import check_input, group_qparams, integer_range, to_fp16, to_groups


class StepSizeError(ValueError):
    """A learned step size is no longer positive."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what was kept."""


def straight_through(ctx, gradient):
    """Return the straight-through gradient of the weight, and LSQ's of the scale."""
    weight, scale, zero_point = ctx.saved_tensors
    position = weight / scale
    code = position.round().add_(zero_point)
    clipped = code.clamp(*ctx.ends)
    inside = code.eq_(clipped)  # 1 where nothing was clipped, else 0
    of_scale = clipped.sub_(zero_point).sub_(position.mul_(inside)).mul_(gradient)
    return inside.mul_(gradient), of_scale.sum_to_size(scale.shape), None, None, None


class FakeQuantize(torch.autograd.Function):
    """Round in the forward pass; in the backward pass, act as if only clipping had happened.

    Sources: Bengio et al., arXiv 1308.3432 (straight-through estimator); Esser et al., "Learned
    Step Size Quantization", arXiv 1902.08153 (the gradient of the scale).
    """

    @staticmethod
    def forward(ctx, weight, scale, zero_point, qmin, qmax):
        """Return `(clip(round(weight / scale) + zero_point) - zero_point) · scale`."""
        ctx.save_for_backward(weight, scale, zero_point)
        ctx.ends = qmin, qmax
        codes = (weight / scale).round_().add_(zero_point).clamp_(qmin, qmax)
        return codes.sub_(zero_point).mul_(scale)

    backward = staticmethod(straight_through)


class QATLinear(nn.Linear):
    """A linear layer that computes with rounded weights and learns the unrounded ones.

    Its parameters: `weight` `(out, in)`, kept in float32 and never rounded itself, and `scale`
    `(out, n_groups, 1)`, the step sizes. The buffer `zero_point` stays as it was chosen.
    """

    def __init__(
        self,
        linear: nn.Linear,
        bits: int,
        group_size: int,
        symmetric: bool = False,
        grid: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        """Wrap a float layer; its parameters are taken over, or copied if they are no float32.

        Args:
            linear: the layer; its weight is `(out, in)`.
            bits: width of a code, 2 to 8.
            group_size: inputs that share a scale, see `quant.to_groups`.
            symmetric: signed grid around 0.
            grid: scale and zero point to begin with. None: min-max, see `quant.group_qparams`.

        Raises:
            TypeError: if `linear` is no plain `nn.Linear`.
            TypeError, ValueError: see `quant.group_qparams`; a `grid` also `check_group_grid`.
        """
        nn.Module.__init__(self)
        check_linear(linear)
        weight = linear.weight.detach()
        check_input(weight, bits)
        scale, zero_point = grid or group_qparams(weight, group_size, bits, symmetric)
        check_group_grid(weight, scale, zero_point, group_size, bits, symmetric)
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.training = linear.training
        self.weight, self.bias = _to_learn(linear.weight), _to_learn(linear.bias)
        self.scale = nn.Parameter(scale.detach().to(torch.float32, copy=True))
        self.register_buffer("zero_point", zero_point.detach().to(torch.float32, copy=True))

    def rounded(self) -> torch.Tensor:
        """Return the weight that the layer computes with, `(out, in)`, on the grid."""
        smallest = float(self.scale.detach().min())
        if not smallest > 0:
            raise StepSizeError(f"a step size became {smallest:.3g}; it must stay above 0")
        # As it will be stored, in FP16; its gradient passes to the float32 scale unchanged.
        scale = self.scale + (to_fp16(self.scale.detach()) - self.scale.detach())
        ends = integer_range(self.bits, self.symmetric)
        groups = to_groups(self.weight, self.group_size)
        groups = FakeQuantize.apply(groups, scale, self.zero_point, *ends)
        return groups.flatten(1)[:, : self.in_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for x `(..., in)`, in its dtype."""
        return linear_in_float32(x, self.rounded(), self.bias)


def _to_learn(parameter: nn.Parameter | None) -> nn.Parameter | None:
    # BF16 and FP16 would lose small steps; what inference mode made takes no part in training.
    if parameter is None or (parameter.dtype == torch.float32 and not parameter.is_inference()):
        return parameter
    copied = parameter.detach().to(torch.float32, copy=True)
    return nn.Parameter(copied, parameter.requires_grad)


def prepare(
    model: nn.Module,
    bits: int,
    group_size: int = 0,
    symmetric: bool = False,
    grids: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] | None = None,
) -> list[QATLinear]:
    """Make every linear layer of a Llama-type model's blocks a `QATLinear`, in place.

    Args:
        model: a causal LM of transformers, in any float format; the layers compute in float32.
        bits, symmetric: the grid.
        group_size: inputs a group; 0 for one group a row (per channel).
        grids: for each block, what `ptq.quantize_block` returned. None: min-max grids.

    Returns:
        The new layers, in the order of the model.

    Raises:
        TypeError: if the model is of another type, or its layers are no plain `nn.Linear`; so too
            if it was prepared before, since the step sizes that it has learned would be lost.
        TypeError, ValueError: see `QATLinear`; ValueError too if `grids` are not of these blocks.
            The model is then unchanged.
    """
    blocks, prepared = blocks_of(model), []
    if any(isinstance(module, QATLinear) for module in model.modules()):
        raise TypeError(
            f"model: this {type(model).__name__} is prepared already, and its step sizes would be "
            "lost; train it, or load it anew"
        )
    if grids is not None and [set(grid) for grid in grids] != len(blocks) * [set(LAYERS)]:
        raise ValueError(f"grids must hold {len(blocks)} blocks, each with {', '.join(LAYERS)}")
    for number, block in enumerate(blocks):
        for name, linear in zip(LAYERS, linear_layers(block, LAYERS), strict=True):
            grid = grids[number][name] if grids else None
            size = group_size or linear.in_features
            prepared.append((block, name, QATLinear(linear, bits, size, symmetric, grid)))
    for block, name, layer in prepared:
        block.set_submodule(name, layer)
    return [layer for _, _, layer in prepared]


def parameter_groups(model: nn.Module, lr: float, scale_rate: float = 1e-3) -> list[dict]:
    """Return what an optimizer is to train, in two groups: the step sizes, and all else.

    A step size learns slowly: Adam moves each number by about the learning rate, and 1e-4 is little
    for a weight but more than some 8-bit steps.

    Args:
        model: what requires no gradient is left out.
        lr: the learning rate of all but the step sizes.
        scale_rate: that of the step sizes, as a share of their mean.
    """
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = [f"{n}.scale" for n, m in model.named_modules() if isinstance(m, QATLinear)]
    scales = [learned.pop(name) for name in names if name in learned]
    groups = [{"params": list(learned.values()), "lr": lr}]
    if scales:
        mean = float(torch.cat([scale.detach().flatten() for scale in scales]).mean())
        groups.append({"params": scales, "lr": scale_rate * mean})
    return groups


@torch.no_grad()
def convert(model: nn.Module) -> None:
    """Make every `QATLinear` of a model a `PackedLinear` with the same rounded weights, in place.

    Raises:
        StepSizeError: if a step size is not positive; the model is then unchanged.
    """
    packed = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QATLinear):
            layer.rounded()  # refuses a bad step size
            grid = to_fp16(layer.scale), layer.zero_point
            size = layer.group_size
            packed[name] = PackedLinear(layer, layer.bits, size, layer.symmetric, grid)
    for name, layer in packed.items():
        model.set_submodule(name, layer)


def train(
    loss_of: Callable[[int], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    n_steps: int,
    checkpoint: str | Path | None = None,
    every: int = 50,
    progress: bool = False,
) -> list[float]:
    """Minimize a loss with learning rates that fall to 0 in a straight line.

    A run that was interrupted goes on from its checkpoint, with the result it would have had.

    Args:
        loss_of: called with the step, 0 to `n_steps` - 1; returns the loss. Its data may depend on
            the step alone.
        optimizer: its learning rates are those of step 0. Its parameters and its own state are what
            a checkpoint holds.
        n_steps: steps of the whole run.
        checkpoint: a safetensors file, continued if it is there. None: keep nothing.
        every: steps between two checkpoints.
        progress: show a bar.

    Returns:
        The loss of each step, before that step was made.

    Raises:
        TrainingStopped: if a loss is NaN or infinite, or a step size no longer positive. The
            parameters are then those of the last checkpoint, if there is one.
        ValueError: if `n_steps` or `every` is below 1, or the checkpoint belongs to another run.
    """
    from tqdm.auto import tqdm

    if n_steps < 1 or every < 1:
        raise ValueError(f"n_steps and every must be at least 1, not {n_steps} and {every}")
    checkpoint = checkpoint and Path(checkpoint)
    losses = _load(optimizer, checkpoint, n_steps) if checkpoint and checkpoint.exists() else []
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    optimizer.zero_grad()
    steps = range(len(losses), n_steps)
    for step in tqdm(steps, desc="training", disable=not progress):
        try:
            loss = loss_of(step)
            problem = "" if torch.isfinite(loss) else f"the loss is {loss.item()}"
        except StepSizeError as error:
            problem = str(error)
        if problem:
            _stop(optimizer, checkpoint, n_steps, step, problem)
        if checkpoint and step % every == 0:  # the state before this step has proved good
            _save(optimizer, checkpoint, n_steps, losses)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / n_steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # now, so that gradients do not lie beside the next forward pass
        losses.append(loss.item())
    if not all(p.isfinite().all() for _, p in _parts(optimizer)):
        _stop(optimizer, checkpoint, n_steps, n_steps, "a parameter is NaN or infinite")
    if checkpoint:
        _save(optimizer, checkpoint, n_steps, losses)
    return losses


def _stop(optimizer, checkpoint: Path | None, n_steps: int, step: int, problem: str) -> NoReturn:
    """Go back to the last checkpoint, if there is one, and raise `TrainingStopped`."""
    kept = "No checkpoint was asked for, so the last parameters stand"
    if checkpoint:
        good = len(_load(optimizer, checkpoint, n_steps)) if checkpoint.exists() else 0
        kept = f"The parameters of step {good} are back, from {checkpoint.name}"
    raise TrainingStopped(f"step {step}: {problem}. {kept}. Try a lower learning rate.")


def _parts(optimizer: torch.optim.Optimizer):
    return enumerate(p for group in optimizer.param_groups for p in group["params"])


def _save(optimizer, checkpoint: Path, n_steps: int, losses: list[float]) -> None:
    from safetensors.torch import save_file

    tensors = {f"{i}.parameter": p.detach().contiguous() for i, p in _parts(optimizer)}
    for i, parameter in _parts(optimizer):
        state = optimizer.state[parameter].items()
        tensors |= {f"{i}.{key}": value.contiguous() for key, value in state}
    partial = checkpoint.with_name(f"{checkpoint.name}.{os.getpid()}.partial")
    save_file(tensors, partial, {"n_steps": str(n_steps), "losses": json.dumps(losses)})
    partial.replace(checkpoint)


@torch.no_grad()
def _load(optimizer, checkpoint: Path, n_steps: int) -> list[float]:
    """Put parameters and optimizer state back; return the losses up to then."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(checkpoint, "pt") as file:
        note = file.metadata() or {}
    tensors = load_file(checkpoint)
    shapes = {name: t.shape for name, t in tensors.items() if name.endswith(".parameter")}
    if note.get("n_steps") != str(n_steps) or shapes != {
        f"{i}.parameter": p.shape for i, p in _parts(optimizer)
    }:
        raise ValueError(
            f"checkpoint: {checkpoint} belongs to another run (other steps or shapes); give "
            "another name, or move that file away to begin anew"
        )
    for i, parameter in _parts(optimizer):
        parameter.copy_(tensors.pop(f"{i}.parameter"))
        keys = [key for key in tensors if key.startswith(f"{i}.")]
        optimizer.state[parameter] = {key.split(".", 1)[1]: tensors[key] for key in keys}
    return json.loads(note["losses"])
