"""Exercise 5.4: `attend_one` is the attention of one new token to those in the cache.

The reference is the definition in numpy, in float64, head by head.
"""

import math

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, judge, misfit, show


def _cases():
    keys = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 0]]])
    values = torch.tensor([[[10.0, 0, 0, 0], [0, 10, 0, 0]]])
    yield torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 0]]), keys, values
    random = torch.Generator().manual_seed(55)
    shapes = ((4, 2, 3, 2), (1, 1, 1, 4), (3, 3, 5, 8), (6, 1, 9, 16), (6, 2, 17, 8), (9, 3, 40, 9))
    for largest in (1.0, 90.0):  # with large scores, exp overflows
        for heads, kv_heads, length, width in shapes:
            sizes = torch.linspace(largest, 1, heads)[:, None]
            query = sizes * torch.randn(heads, width, generator=random)
            keys = torch.randn(kv_heads, length, width, generator=random)
            yield query, keys, torch.randn(kv_heads, length, width, generator=random)


def _check(function) -> None:
    judge("attend_one", function, _cases(), _examine, _WRONG)


def _examine(query, keys, values, got) -> str | None:
    written = call("attend_one", query, keys, values)
    if complaint := misfit(got, torch.float32, tuple(query.shape)):
        return f"{written} returns {complaint}"
    expected = np.zeros(query.shape)
    sharing = len(query) // len(keys)
    for head, q in enumerate(query.double().numpy()):
        k, v = (cache[head // sharing].double().numpy() for cache in (keys, values))
        scores = np.array([np.dot(q, one) for one in k]) / len(q) ** 0.5
        shares = np.exp(scores - scores.max())
        expected[head] = sum(s * one for s, one in zip(shares / shares.sum(), v, strict=True))
    bad = ~np.isclose(got.detach().numpy(), expected, rtol=1e-3, atol=1e-3)
    if not bad.any():
        return None
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{written} gives {show(float(got[at]))} at {at}, expected {show(float(expected[at]))}"


def _shared(cache, query):
    return cache.repeat_interleave(len(query) // len(cache), 0)


def _scores(query, keys):
    return torch.einsum("hw,hlw->hl", query, keys)


def _mix(shares, values):
    return torch.einsum("hl,hlw->hw", shares, values)


def not_scaled(query, keys, values):
    """Forgets the square root of the width."""
    shares = _scores(query, _shared(keys, query)).softmax(1)
    return _mix(shares, _shared(values, query))


def scaled_by_width(query, keys, values):
    """Divides by the width itself."""
    shares = (_scores(query, _shared(keys, query)) / query.shape[1]).softmax(1)
    return _mix(shares, _shared(values, query))


def scaled_by_heads(query, keys, values):
    """Takes the number of heads for the width."""
    shares = (_scores(query, _shared(keys, query)) / len(query) ** 0.5).softmax(1)
    return _mix(shares, _shared(values, query))


def heads_dealt_out(query, keys, values):
    """Gives query head h the key-value head h % kv_heads."""
    sharing = len(query) // len(keys)
    keys, values = keys.repeat(sharing, 1, 1), values.repeat(sharing, 1, 1)
    return _mix((_scores(query, keys) / query.shape[1] ** 0.5).softmax(1), values)


def first_head_for_all(query, keys, values):
    """Lets all query heads share one key-value head."""
    keys, values = (cache[:1].expand(len(query), -1, -1) for cache in (keys, values))
    return _mix((_scores(query, keys) / query.shape[1] ** 0.5).softmax(1), values)


def softmax_over_heads(query, keys, values):
    """Normalizes over the heads."""
    shares = (_scores(query, _shared(keys, query)) / query.shape[1] ** 0.5).softmax(0)
    return _mix(shares, _shared(values, query))


def keys_mixed(query, keys, values):
    """Mixes keys instead of values."""
    keys = _shared(keys, query)
    return _mix((_scores(query, keys) / query.shape[1] ** 0.5).softmax(1), keys)


def exp_overflows(query, keys, values):
    """Takes exp of large scores."""
    powers = (_scores(query, _shared(keys, query)) / query.shape[1] ** 0.5).exp()
    return _mix(powers / powers.sum(1, keepdim=True), _shared(values, query))


def one_maximum_for_all(query, keys, values):
    """Subtracts the largest score of all heads, and some heads vanish."""
    scores = _scores(query, _shared(keys, query)) / query.shape[1] ** 0.5
    powers = (scores - scores.max()).exp()
    return _mix(powers / powers.sum(1, keepdim=True), _shared(values, query))


_WRONG = (
    (not_scaled, "divide the scores by √width before the softmax"),
    (scaled_by_width, "the scores are divided by √width, not by the width"),
    (scaled_by_heads, "width is the last dimension of the query, not the number of heads"),
    (heads_dealt_out, "neighbors share a key-value head: head // group, not head % kv_heads"),
    (first_head_for_all, "there is more than one key-value head to share"),
    (softmax_over_heads, "the shares of one head add up to 1 over the tokens"),
    (keys_mixed, "keys give the shares, and values are what is mixed"),
    (exp_overflows, "the exp of a large score is infinite: subtract the maximum first"),
    (one_maximum_for_all, "subtract each head's own maximum, or all its shares become 0"),
)


def attention_by_reshaping(query, keys, values):
    """Gives the groups a dimension of their own, and copies no cache."""
    grouped = query.unflatten(0, (len(keys), -1))
    shares = (grouped @ keys.mT * query.shape[1] ** -0.5).softmax(2)
    return (shares @ values).flatten(0, 1)


def attention_online(query, keys, values):
    """Reads each token once, and corrects the sums when the maximum grows."""
    result = torch.zeros_like(query)
    for head, q in enumerate(query):
        kv_head = head * len(keys) // len(query)
        top, total = -math.inf, 0.0
        for key, value in zip(keys[kv_head], values[kv_head], strict=True):
            score = float(q.double() @ key.double()) / math.sqrt(len(q))
            larger = max(top, score)
            shrink, share = math.exp(top - larger), math.exp(score - larger)
            result[head] = result[head] * shrink + share * value
            top, total = larger, total * shrink + share
        result[head] /= total
    return result


EXERCISE = Exercise(
    id="5.4",
    title="Attention from a cache",
    stars=3,
    minutes=25,
    function_names=("attend_one",),
    check=_check,
    takeaway="This is all that attention does for a new token; the rest is reading the cache.",
    wrong_answers=_WRONG,
    variants=(attention_by_reshaping, attention_online),
)
