"""Exercise 3.3, a bug hunt: `train_rounded` should train a weight through its rounding.

The reference is gradient descent in numpy, in float64, with the gradient worked out by hand.
"""

import numpy as np
import torch

from labkit.exercises.judge import Exercise, judge, misfit


def broken_train_rounded(weight, scale, x, target, steps, lr):
    """Train a weight through its rounding; return the float weight."""
    latent, limit = weight.clone(), 2**3 - 1
    for _ in range(steps):
        latent.requires_grad_()
        rounded = (latent / scale).round().clamp(-limit, limit) * scale
        loss = (x @ rounded.T - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, latent)
        latent = (rounded - lr * gradient).detach()
    return latent


def _cases():
    random = torch.Generator().manual_seed(35)
    yield torch.tensor([[0.9]]), 1.0, torch.ones(1, 1), torch.zeros(1, 1), 1, 0.1
    yield torch.tensor([[0.9]]), 1.0, torch.ones(1, 1), torch.zeros(1, 1), 3, 0.1
    yield torch.tensor([[9.0, 0.6]]), 1.0, torch.ones(1, 2), torch.zeros(1, 1), 2, 0.1
    for rows, inputs, tokens, steps, lr in (
        (2, 3, 4, 1, 0.1),
        (3, 8, 20, 4, 0.05),
        (5, 4, 9, 6, 0.2),
    ):
        weight = torch.randn(rows, inputs, generator=random)
        x = torch.randn(tokens, inputs, generator=random)
        target = torch.randn(tokens, rows, generator=random)
        yield weight, 0.21, x, target, steps, lr


def _check(function) -> None:
    judge("train_rounded", function, _cases(), _examine, _WRONG)


def _examine(weight, scale, x, target, steps, lr, got) -> str | None:
    shape = tuple(weight.shape)
    written = f"train_rounded with a weight of shape {shape}, {steps} step(s) and lr={lr}"
    if complaint := misfit(got, torch.float32, shape):
        return f"{written} returns {complaint}"
    latent, inputs, wanted = (t.double().numpy() for t in (weight, x, target))
    for _ in range(steps):
        level = np.round(latent / scale)
        error = inputs @ (np.clip(level, -7, 7) * scale).T - wanted
        gradient = 2 * error.T @ inputs / error.size
        latent = latent - lr * gradient * (np.abs(level) <= 7)
    bad = ~np.isclose(got.detach().double().numpy(), latent, rtol=1e-3, atol=1e-5)
    if not bad.any():
        return None
    at = tuple(np.argwhere(bad)[0])
    return (
        f"{written} moves the weight {float(weight[at]):.4g} to {float(got[at]):.4g}, expected "
        f"{latent[at]:.4g}"
    )


def _trained(weight, scale, x, target, steps, lr, cut=False, snap=False, mask=True, repeat=False):
    latent, total = weight.double(), 0
    for _ in range(steps):
        level = (latent / scale).round()
        rounded = level.clamp(-7, 7) * scale
        error = x.double() @ rounded.T - target.double()
        gradient = 2 * error.T @ x.double() / error.numel()
        gradient = gradient * (level.abs() <= 7) if mask else gradient
        total = total + gradient if repeat else gradient
        latent = (rounded if snap else latent) - (0 if cut else lr * total)
    return latent


def still_cut(weight, scale, x, target, steps, lr):
    """Keeps the float weight, but rounding still stops the gradient."""
    return _trained(weight, scale, x, target, steps, lr, cut=True).float()


def still_snaps(weight, scale, x, target, steps, lr):
    """Passes the gradient, but starts every step from the rounded weight."""
    return _trained(weight, scale, x, target, steps, lr, snap=True).float()


def clipped_weights_move(weight, scale, x, target, steps, lr):
    """Passes the gradient straight through the clipping as well."""
    return _trained(weight, scale, x, target, steps, lr, mask=False).float()


def gradients_pile_up(weight, scale, x, target, steps, lr):
    """Never sets the gradient back to zero."""
    return _trained(weight, scale, x, target, steps, lr, repeat=True).float()


def returns_the_rounded(weight, scale, x, target, steps, lr):
    """Returns the weight rounded."""
    latent = _trained(weight, scale, x, target, steps, lr)
    return ((latent / scale).round().clamp(-7, 7) * scale).float()


def trains_without_rounding(weight, scale, x, target, steps, lr):
    """Lets the loss see the float weight."""
    latent = weight.double()
    for _ in range(steps):
        error = x.double() @ latent.T - target.double()
        latent = latent - lr * 2 * error.T @ x.double() / error.numel()
    return latent.float()


_WRONG = (
    (still_cut, "no weight moves: the derivative of round is zero, pass the gradient around it"),
    (still_snaps, "every step starts from the rounded weight, so small steps are lost"),
    (clipped_weights_move, "a clipped weight must not move: keep the clipping in the gradient"),
    (gradients_pile_up, "the gradient of each step is new: do not add up those before"),
    (returns_the_rounded, "return the float weight, which holds what was learned"),
    (trains_without_rounding, "the loss must see the rounded weight"),
)


def train_with_detach(weight, scale, x, target, steps, lr):
    """Clip first, then round around the gradient, half a step of play at each end."""
    latent = weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([latent], lr)
    for _ in range(steps):
        position = latent / scale
        inside = position.round().abs() <= 7
        position = torch.where(inside, position, 7.0 * position.sign())
        rounded = (position + (position.round() - position).detach()) * scale
        optimizer.zero_grad()
        (x @ rounded.T - target).square().mean().backward()
        optimizer.step()
    return latent.detach()


EXERCISE = Exercise(
    id="3.3",
    title="Bug hunt: training that trains nothing",
    stars=2,
    minutes=15,
    function_names=("train_rounded",),
    check=_check,
    takeaway="The loss sees the rounded weight, the float weight collects the small steps.",
    wrong_answers=_WRONG,
    variants=(train_with_detach,),
    broken=broken_train_rounded,
)
