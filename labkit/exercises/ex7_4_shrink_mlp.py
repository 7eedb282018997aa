"""Exercise 7.4: `shrink_mlp` takes the hidden channels that matter least out of all three weights.

The reference is the importance in numpy, in float64; kept channels are recognized by their values.
"""

import numpy as np
import torch

from labkit.exercises.judge import Exercise, kind, misfit, show_indices
from labkit.exercises.judge_with_errors import Raised, judge_with_errors


def _cases():
    column = torch.tensor([[1.0], [2.0], [3.0]])
    yield column, column + 3, torch.tensor([[1.0, -3.0, 2.0]]), torch.tensor([4.0, 1.0, 0.5]), 2
    yield column, column + 3, torch.tensor([[2.0, -3.0, 4.0]]), torch.tensor([4.0, 2.0, 0.5]), 1
    random = torch.Generator().manual_seed(74)
    for hidden, inputs, out, n_keep in (
        (6, 6, 6, 4), (5, 5, 5, 2), (8, 3, 3, 3), (8, 4, 6, 6), (12, 5, 4, 7), (12, 16, 5, 4),
        (16, 6, 6, 5), (20, 8, 8, 14), (24, 24, 24, 9), (4, 3, 2, 4), (30, 12, 10, 10),
    ):  # fmt: skip
        gate, up = torch.randn(2, hidden, inputs, generator=random)
        loud, strong = 2.0 ** torch.randn(2, hidden, generator=random)
        down = torch.randn(out, hidden, generator=random) * strong
        yield gate, up, down, loud**2, n_keep


def _check(function) -> None:
    judge_with_errors(
        "shrink_mlp", function, _cases(), _examine, _WRONG, IndexError, lambda *case: True
    )


def _examine(gate, up, down, power, n_keep, got) -> str | None:
    hidden, inputs = gate.shape
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("gate", gate), ("down", down)))
    written = f"shrink_mlp with {shapes} and n_keep {n_keep}"
    if isinstance(got, Raised):
        return f"{written} raises {got[0].__name__}, expected {n_keep} of {hidden} channels"
    if not isinstance(got, tuple | list) or len(got) != 3:
        return f"{written} returns {kind(got)}, expected the triple (gate, up, down)"
    wanted = ("gate", (n_keep, inputs)), ("up", (n_keep, inputs)), ("down", (len(down), n_keep))
    for (name, shape), value in zip(wanted, got, strict=True):
        if complaint := misfit(value, torch.float32, shape):
            return f"in {written}, {name} is {complaint}"
    importance = power.double().numpy() * (down.double().numpy() ** 2).sum(0)
    expected = sorted(np.argsort(importance)[hidden - n_keep :].tolist())
    old, new = (gate, up, down.T), (got[0], got[1], got[2].T)
    for (name, _), before, after in zip(wanted, old, new, strict=True):
        kept = [_channel_of(before, channel) for channel in after]
        if kept != expected:
            complaint = f"in {written}, {name} holds the old channels {show_indices(kept)}"
            return f"{complaint}, expected {show_indices(expected)}"
    return None


def _channel_of(old: torch.Tensor, channel: torch.Tensor) -> int | None:
    equal = np.isclose(old.numpy(), channel.detach().numpy(), rtol=1e-5, atol=1e-7).all(1)
    return int(equal.argmax()) if equal.any() else None


def _largest(importance, n_keep):
    return importance.argsort(descending=True)[:n_keep].sort().values


def _importance(power, down):
    return power * down.square().sum(0)


def _cut(gate, up, down, keep):
    return gate[keep], up[keep], down[:, keep]


def power_forgotten(gate, up, down, power, n_keep):
    """Looks at the weights alone."""
    return _cut(gate, up, down, _largest(down.norm(dim=0), n_keep))


def down_forgotten(gate, up, down, power, n_keep):
    """Looks at the activations alone."""
    return _cut(gate, up, down, _largest(power, n_keep))


def norm_of_the_gate(gate, up, down, power, n_keep):
    """Weighs a channel by its row of the gate."""
    return _cut(gate, up, down, _largest(power * gate.square().sum(1), n_keep))


def norm_not_squared(gate, up, down, power, n_keep):
    """Multiplies a mean square by a norm."""
    return _cut(gate, up, down, _largest(power * down.norm(dim=0), n_keep))


def square_of_the_sum(gate, up, down, power, n_keep):
    """Adds the weights of a column before it squares them."""
    return _cut(gate, up, down, _largest(power * down.sum(0).square(), n_keep))


def least_important_kept(gate, up, down, power, n_keep):
    """Keeps the channels that matter least."""
    return _cut(gate, up, down, _largest(-_importance(power, down), n_keep))


def by_importance(gate, up, down, power, n_keep):
    """Returns the channels in the order of their importance."""
    keep = _importance(power, down).argsort(descending=True)[:n_keep]
    return _cut(gate, up, down, keep)


def n_keep_removed(gate, up, down, power, n_keep):
    """Removes as many channels as should stay."""
    return _cut(gate, up, down, _largest(_importance(power, down), len(power) - n_keep))


def zeroes_left_in_place(gate, up, down, power, n_keep):
    """Sets the other channels to zero."""
    mask = torch.zeros(len(power)).scatter(0, _largest(_importance(power, down), n_keep), 1.0)
    return gate * mask[:, None], up * mask[:, None], down * mask


def columns_of_gate_and_up(gate, up, down, power, n_keep):
    """Cuts the inputs of gate and up."""
    keep = _largest(_importance(power, down), n_keep)
    return gate[:, keep], up[:, keep], down[:, keep]


def rows_of_down(gate, up, down, power, n_keep):
    """Cuts the outputs of down."""
    keep = _largest(_importance(power, down), n_keep)
    return gate[keep], up[keep], down[keep]


def up_left_alone(gate, up, down, power, n_keep):
    """Forgets that up has the channel too."""
    keep = _largest(_importance(power, down), n_keep)
    return gate[keep], up.clone(), down[:, keep]


def down_left_alone(gate, up, down, power, n_keep):
    """Forgets that down reads the channel."""
    keep = _largest(_importance(power, down), n_keep)
    return gate[keep], up[keep], down.clone()


def a_choice_for_each(gate, up, down, power, n_keep):
    """Chooses the channels of each matrix by its own norm."""
    norms = gate.norm(dim=1), up.norm(dim=1)
    keep = [_largest(norm, n_keep) for norm in norms]
    return gate[keep[0]], up[keep[1]], down[:, _largest(_importance(power, down), n_keep)]


_WRONG = (
    (power_forgotten, "a large weight on a silent channel does nothing: weigh it by the power"),
    (down_forgotten, "a loud channel that down hardly reads does little: weigh it by its column"),
    (norm_of_the_gate, "what a channel adds to the output lies in its column of down, not in gate"),
    (norm_not_squared, "the power is a mean square, so the norm is squared too"),
    (square_of_the_sum, "square each weight of a column, then add: signs must not cancel"),
    (least_important_kept, "the most important channels stay, not the least"),
    (by_importance, "the channels keep their old order: sort the indices you keep"),
    (n_keep_removed, "as many as n_keep channels stay; in yours, as many leave"),
    (zeroes_left_in_place, "channels set to zero still cost as much: take them out"),
    (columns_of_gate_and_up, "hidden channels are the rows of gate and up"),
    (rows_of_down, "hidden channels are the columns of down"),
    (up_left_alone, "a channel leaves up as well as gate"),
    (down_left_alone, "a channel that is gone cannot be read: it leaves down too"),
    (a_choice_for_each, "choose the channels once: all three weights lose the same ones"),
)


def mlp_by_ranks(gate, up, down, power, n_keep):
    """Masks what has few enough rivals, by the root of the importance."""
    importance = power.sqrt() * down.norm(dim=0)
    stays = (importance[:, None] < importance[None, :]).sum(1) < n_keep
    return gate[stays], up[stays], down[:, stays]


def mlp_in_a_loop(gate, up, down, power, n_keep):
    """Takes one channel out after another, by the mean square of what it adds."""
    parts = [gate.clone(), up.clone(), down.T.clone()]
    left = (power.double() * down.double().square().mean(0)).tolist()
    while len(left) > n_keep:
        least = left.index(min(left))
        left.pop(least)
        parts = [torch.cat([part[:least], part[least + 1 :]]) for part in parts]
    return [parts[0], parts[1], parts[2].T.contiguous()]


EXERCISE = Exercise(
    id="7.4",
    title="Channels that really leave",
    stars=2,
    minutes=20,
    function_names=("shrink_mlp",),
    check=_check,
    takeaway="A channel that leaves all three weights leaves a smaller dense model and no mask.",
    wrong_answers=_WRONG,
    variants=(mlp_by_ranks, mlp_in_a_loop),
)
