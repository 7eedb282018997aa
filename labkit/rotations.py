"""Rotations that a model does not notice and a quantizer does: Hadamard transforms, folded in."""

from collections.abc import Callable

import torch
from torch import nn

from labkit.blocks import LAYERS, LINEARS, PRODUCERS, blocks_of, rescalable

Turn = Callable[[torch.Tensor], torch.Tensor]
INSIDE = "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"


def hadamard_factors(n: int) -> list[torch.Tensor]:
    """Return the small Hadamard matrices whose Kronecker product has the size `n`.

    Of size 2, and where a 3 divides `n`, of size 12: that one is made of the squares modulo 11.

    Args:
        n: 2ᵏ · 12ᵐ, else ValueError.

    Source: Paley, "On Orthogonal Matrices", Journal of Mathematics and Physics 12, 1933.
    """
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    squares = {i * i % 11 for i in range(1, 11)}
    twelve = torch.ones(12, 12)
    for row in range(11):
        for column in range(11):
            distance = (column - row) % 11
            twelve[row + 1, column + 1] = 1.0 if distance in squares else -1.0
    twelve[1:, 0] = -1.0
    twelve.diagonal().fill_(1.0)
    found, left = [], n
    while left > 0 and left % 3 == 0 and left % 12 == 0:
        found, left = [*found, twelve], left // 12
    while left > 0 and left % 2 == 0:
        found, left = [*found, two], left // 2
    if left != 1:
        raise ValueError(f"n must be a product of twos and twelves, not {n}")
    return found


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """Return `x · H / √n` along the last dimension, where H is a Hadamard matrix: a rotation.

    It takes n · log n steps: one factor of the Kronecker product at a time, as the fast Fourier
    transform does. For a power of two, H is `scipy.linalg.hadamard(n)`.

    Args:
        x: float `(..., n)`; for `n`, and errors, see `hadamard_factors`.
    """
    n, after = x.shape[-1], x.shape[-1]
    turned = x
    for factor in hadamard_factors(n):
        size = len(factor)
        after //= size
        parts = turned.reshape(-1, size, after)
        turned = torch.einsum("ij,rik->rjk", factor.to(x.dtype), parts)
    return turned.reshape(x.shape) / n**0.5


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
    """Move the weights of the norms of a Llama-type model into what reads them, in place.

    A norm without weights does not mind a rotation. The head gets a weight of its own: it reads
    the embedding's values times the last norm, so the two are untied.
    """
    base, head = model.model, model.lm_head
    head.weight = nn.Parameter(head.weight * base.norm.weight)
    model.config.tie_word_embeddings = False
    base.norm.weight.fill_(1.0)
    for block in base.layers:
        for name in ("attention", "mlp"):
            gain = block.get_submodule(PRODUCERS[name]).weight
            for layer in map(block.get_submodule, LINEARS[name]):
                layer.weight *= gain
            gain.fill_(1.0)


@torch.no_grad()
def turn_stream(model: nn.Module, turn: Turn) -> None:
    """Rotate the residual stream of a model with folded norms: all that writes or reads it."""
    base = model.model
    base.embed_tokens.weight = nn.Parameter(turn(base.embed_tokens.weight))
    model.lm_head.weight.copy_(turn(model.lm_head.weight))
    for block in base.layers:
        for layer in map(block.get_submodule, LINEARS["attention"] + LINEARS["mlp"]):
            layer.weight.copy_(turn(layer.weight))
        for layer in map(block.get_submodule, LINEARS["output"] + LINEARS["down"]):
            layer.weight.copy_(turn(layer.weight.T).T)


@torch.no_grad()
def turn_inside(model: nn.Module, turn: Turn) -> None:
    """Rotate each value head, and the input of down_proj, which takes a hook at run time.

    That input is a product of two activations: nothing can be folded into it.
    """
    for block in model.model.layers:
        value, output, down = map(block.get_submodule, INSIDE)
        heads = -1, block.self_attn.head_dim
        value.weight.copy_(turn(value.weight.T.unflatten(1, heads)).flatten(1).T)
        output.weight.copy_(turn(output.weight.unflatten(1, heads)).flatten(1))
        down.weight.copy_(turn(down.weight))
        down.register_forward_pre_hook(lambda _, x: (turn(x[0]),))


@torch.no_grad()
def rotate(model: nn.Module, stream: Turn, inside: Turn | None = None) -> None:
    """Rotate what flows through a model without changing what it computes, in place.

    Args:
        model: a Llama-type causal LM of transformers.
        stream: rotates the last dimension of the residual stream, e.g. `hadamard_transform`: linear
            and without change of length.
        inside: the same for value heads and the input of down_proj; None leaves them alone.

    Raises:
        TypeError: if the model is of another type, its norms do not fold, or a layer that would
            have to be turned has a bias. The model is then unchanged.

    Source: Ashkboos et al., "QuaRot", arXiv 2404.00456.
    """
    _check_turnable(model)
    fold_norms(model)
    turn_stream(model, stream)
    if inside is not None:
        turn_inside(model, inside)


def _check_turnable(model: nn.Module) -> None:
    kind, norms = type(model).__name__, [model.model.norm] if blocks_of(model) else []
    known = {*LAYERS, PRODUCERS["attention"], PRODUCERS["mlp"]}
    known |= {"self_attn.q_norm", "self_attn.k_norm"}
    for block in model.model.layers:
        for name in {name.rpartition(".")[0] for name, _ in block.named_parameters()} - known:
            raise TypeError(f"model: {kind} has {name} in its blocks, which rotations do not know")
        for name in ("attention", "mlp"):
            ones = torch.ones(block.get_submodule(LINEARS[name][0]).in_features)
            norms.append(rescalable(block, name, ones)[0])
        for name in INSIDE:
            if block.get_submodule(name).bias is not None:
                raise TypeError(f"model: {name} of {kind} has a bias, which rotations do not turn")
    for norm in norms:  # of ones, a root mean square is 1; with a mean taken off nothing is left
        if not torch.allclose(norm(torch.ones_like(norm.weight)), norm.weight, rtol=1e-2):
            raise TypeError(
                f"model: {kind} has norms that notice a rotation, {type(norm).__name__}"
            )
