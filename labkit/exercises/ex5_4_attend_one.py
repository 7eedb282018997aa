"""Exercise 5.4: `attend_one` is the attention of one new token to those in an INT8 cache.

The reference is the definition in numpy, in float64, head by head.
"""

import functools
import math

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, insist_on_dtype, judge, misfit, show


def _cases():
    keys = torch.tensor([[[100, 0, 0, 0], [0, 0, 0, 0]]], dtype=torch.int8)
    values = torch.tensor([[[100, 0, 0, 0], [0, 50, 0, 0]]], dtype=torch.int8)
    scales = torch.tensor([[0.01, 0.02]]), torch.tensor([[0.1, 0.2]])
    query = torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 0]])
    yield query, keys, scales[0], values, scales[1]
    random = torch.Generator().manual_seed(55)
    shapes = (
        (4, 2, 6, 4),
        (1, 1, 1, 4),
        (3, 3, 5, 8),
        (6, 1, 12, 16),
        (6, 2, 17, 8),
        (9, 3, 40, 9),
    )
    for largest in (1.0, 90.0):  # with large scores, exp overflows
        for heads, kv_heads, length, width in shapes:
            sizes = torch.linspace(largest, 1, heads)[:, None]
            query = sizes * torch.randn(heads, width, generator=random)
            cache = []
            for _ in range(2):
                codes = torch.randint(-127, 128, (kv_heads, length, width), generator=random)
                scale = (torch.rand(kv_heads, length, generator=random) + 0.5) / 64
                cache += [codes.to(torch.int8), scale]
            yield query, *cache


def _check(function) -> None:
    judge("attend_one", function, _cases(), _examine, (*_WRONG, *_OTHER_FORMS))


def _examine(query, keys, key_scale, values, value_scale, got) -> str | None:
    written = call("attend_one", query, keys, key_scale, values, value_scale)
    insist_on_dtype(f"{written} returns", got, torch.float32, tuple(query.shape))
    if complaint := misfit(got, torch.float32, tuple(query.shape)):
        return f"{written} returns {complaint}"
    expected = np.zeros(query.shape)
    sharing = len(query) // len(keys)
    for head, q in enumerate(query.double().numpy()):
        k, v = (
            codes[head // sharing].double().numpy()
            * scale[head // sharing, :, None].double().numpy()
            for codes, scale in ((keys, key_scale), (values, value_scale))
        )
        scores = np.array([np.dot(q, one) for one in k]) / len(q) ** 0.5
        shares = np.exp(scores - scores.max())
        expected[head] = sum(s * one for s, one in zip(shares / shares.sum(), v, strict=True))
    bad = ~np.isclose(got.detach().numpy(), expected, rtol=1e-3, atol=1e-3)
    if not bad.any():
        return None
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{written} gives {show(float(got[at]))} at {at}, expected {show(float(expected[at]))}"


def _in_float(attention):
    """Let an attention over float caches read quantized ones."""

    @functools.wraps(attention)
    def read(query, keys, key_scale, values, value_scale):
        return attention(query, keys * key_scale[..., None], values * value_scale[..., None])

    return read


def _attention(query, keys, values, divisor=None):
    keys, values = _shared(keys, query), _shared(values, query)
    divisor = divisor or query.shape[1] ** 0.5
    return _mix((_scores(query, keys) / divisor).softmax(1), values)


def _shared(cache, query):
    return cache.repeat_interleave(len(query) // len(cache), 0)


def _scores(query, keys):
    return torch.einsum("hw,hlw->hl", query, keys)


def _mix(shares, values):
    return torch.einsum("hl,hlw->hw", shares, values)


@_in_float
def not_scaled(query, keys, values):
    """Forgets the square root of the width."""
    return _attention(query, keys, values, 1.0)


@_in_float
def scaled_by_width(query, keys, values):
    """Divides by the width itself."""
    return _attention(query, keys, values, query.shape[1])


@_in_float
def scaled_by_heads(query, keys, values):
    """Takes the number of heads for the width."""
    return _attention(query, keys, values, len(query) ** 0.5)


@_in_float
def scaled_by_length(query, keys, values):
    """Divides by the root of the number of tokens."""
    return _attention(query, keys, values, keys.shape[1] ** 0.5)


@_in_float
def scaled_by_all_heads(query, keys, values):
    """Divides by the root of the width of all heads together."""
    return _attention(query, keys, values, query.numel() ** 0.5)


@_in_float
def times_the_root(query, keys, values):
    """Multiplies by the root of the width."""
    return _attention(query, keys, values, query.shape[1] ** -0.5)


@_in_float
def shares_divided(query, keys, values):
    """Divides by the root after the softmax."""
    shares = _scores(query, _shared(keys, query)).softmax(1) / query.shape[1] ** 0.5
    return _mix(shares, _shared(values, query))


@_in_float
def no_softmax(query, keys, values):
    """Mixes the values with the scores themselves."""
    return _mix(
        _scores(query, _shared(keys, query)) / query.shape[1] ** 0.5, _shared(values, query)
    )


@_in_float
def not_normalized(query, keys, values):
    """Takes exp of the scores less their maximum, and does not divide by its sum."""
    scores = _scores(query, _shared(keys, query)) / query.shape[1] ** 0.5
    return _mix((scores - scores.amax(1, keepdim=True)).exp(), _shared(values, query))


@_in_float
def exp_not_normalized(query, keys, values):
    """Takes exp of the scores as they are, and does not divide by its sum."""
    powers = (_scores(query, _shared(keys, query)) / query.shape[1] ** 0.5).exp()
    return _mix(powers, _shared(values, query))


@_in_float
def heads_dealt_out(query, keys, values):
    """Gives query head h the key-value head h % kv_heads."""
    sharing = len(query) // len(keys)
    keys, values = keys.repeat(sharing, 1, 1), values.repeat(sharing, 1, 1)
    return _mix((_scores(query, keys) / query.shape[1] ** 0.5).softmax(1), values)


@_in_float
def first_head_for_all(query, keys, values):
    """Lets all query heads share one key-value head."""
    keys, values = (cache[:1].expand(len(query), -1, -1) for cache in (keys, values))
    return _mix((_scores(query, keys) / query.shape[1] ** 0.5).softmax(1), values)


@_in_float
def softmax_over_heads(query, keys, values):
    """Normalizes over the heads."""
    shares = (_scores(query, _shared(keys, query)) / query.shape[1] ** 0.5).softmax(0)
    return _mix(shares, _shared(values, query))


@_in_float
def keys_mixed(query, keys, values):
    """Mixes keys instead of values."""
    keys = _shared(keys, query)
    return _mix((_scores(query, keys) / query.shape[1] ** 0.5).softmax(1), keys)


@_in_float
def exp_overflows(query, keys, values):
    """Takes exp of large scores."""
    powers = (_scores(query, _shared(keys, query)) / query.shape[1] ** 0.5).exp()
    return _mix(powers / powers.sum(1, keepdim=True), _shared(values, query))


@_in_float
def one_maximum_for_all(query, keys, values):
    """Subtracts the largest score of all heads, and some heads vanish."""
    scores = _scores(query, _shared(keys, query)) / query.shape[1] ** 0.5
    powers = (scores - scores.max()).exp()
    return _mix(powers / powers.sum(1, keepdim=True), _shared(values, query))


def keys_unscaled(query, keys, key_scale, values, value_scale):
    """Takes the codes of the keys for keys."""
    return _attention(query, keys.float(), values * value_scale[..., None])


def values_unscaled(query, keys, key_scale, values, value_scale):
    """Mixes the codes of the values."""
    return _attention(query, keys * key_scale[..., None], values.float())


def both_unscaled(query, keys, key_scale, values, value_scale):
    """Takes the codes for keys and values."""
    return _attention(query, keys.float(), values.float())


def scales_swapped(query, keys, key_scale, values, value_scale):
    """Gives keys the scales of values."""
    return _attention(query, keys * value_scale[..., None], values * key_scale[..., None])


def first_scale_for_all(query, keys, key_scale, values, value_scale):
    """Uses the scale of the first token for all."""
    first = key_scale[:, :1, None], value_scale[:, :1, None]
    return _attention(query, keys * first[0], values * first[1])


def key_scale_after_softmax(query, keys, key_scale, values, value_scale):
    """Scales the shares instead of the scores."""
    shares = (_scores(query, _shared(keys.float(), query)) / query.shape[1] ** 0.5).softmax(1)
    shares = shares * _shared(key_scale, query)
    return _mix(shares, _shared(values * value_scale[..., None], query))


_WRONG = (
    (keys_unscaled, "a key is its codes times the scale of its token"),
    (values_unscaled, "a value is its codes times the scale of its token"),
    (both_unscaled, "codes alone are no keys and values: each token has two scales"),
    (scales_swapped, "keys and values have scales of their own"),
    (first_scale_for_all, "each token has a scale of its own"),
    (key_scale_after_softmax, "the scale belongs to the score, before the softmax"),
    (not_scaled, "divide the scores by √width before the softmax"),
    (scaled_by_width, "the scores are divided by √width, not by the width"),
    (scaled_by_heads, "width is the last dimension of the query, not the number of heads"),
    (scaled_by_length, "it is the root of the width, not of the number of tokens"),
    (scaled_by_all_heads, "the width is that of one head, not of all together"),
    (times_the_root, "the scores are divided by √width, not multiplied"),
    (shares_divided, "√width belongs to the scores, before the softmax, not to the shares"),
    (no_softmax, "these are scores: the softmax makes shares of them"),
    (not_normalized, "divide by the sum of the exp: the shares of a head add up to 1"),
    (heads_dealt_out, "neighbors share a key-value head: head // group, not head % kv_heads"),
    (first_head_for_all, "there is more than one key-value head to share"),
    (softmax_over_heads, "the shares of one head add up to 1 over the tokens"),
    (keys_mixed, "keys give the shares, and values are what is mixed"),
    (exp_overflows, "the exp of a large score is infinite: subtract the maximum first"),
    (one_maximum_for_all, "subtract each head's own maximum, or all its shares become 0"),
)
_OTHER_FORMS = ((exp_not_normalized, dict(_WRONG)[not_normalized]),)


@_in_float
def attention_by_reshaping(query, keys, values):
    """Gives the groups a dimension of their own, and copies no cache."""
    grouped = query.unflatten(0, (len(keys), -1))
    shares = (grouped @ keys.mT * query.shape[1] ** -0.5).softmax(2)
    return (shares @ values).flatten(0, 1)


@_in_float
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


def attention_on_codes(query, keys, key_scale, values, value_scale):
    """Scales scores and shares, so that no cache in float exists."""
    shared = functools.partial(_shared, query=query)
    scores = _scores(query, shared(keys.float())) * shared(key_scale) / query.shape[1] ** 0.5
    return _mix(scores.softmax(1) * shared(value_scale), shared(values.float()))


EXERCISE = Exercise(
    id="5.4",
    title="Attention from an INT8 cache",
    stars=3,
    minutes=25,
    function_names=("attend_one",),
    check=_check,
    takeaway="A scale a token leaves the inner loop: the cache is read as codes.",
    wrong_answers=_WRONG,
    variants=(attention_by_reshaping, attention_online, attention_on_codes),
)
