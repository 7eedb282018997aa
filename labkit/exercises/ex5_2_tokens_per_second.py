"""Exercise 5.2: `tokens_per_second` is the most a decoder can do with the bandwidth it has.

The reference is numpy: the times of all reads of one step, added up.
"""

import numpy as np

from labkit.exercises.judge import Exercise, call, judge
from labkit.exercises.number_misfit import number_misfit


def _cases():
    yield 60_000_000, 40_000, 500, 10e9
    yield 60_000_000, 40_000, 1, 10e9
    yield 1000, 30, 100, 8000.0
    random = np.random.default_rng(52)
    for length in (7, 64, 300, 2048, 100_000):
        weights, cache = int(random.integers(10**7, 10**9)), int(random.integers(10**3, 10**5))
        yield weights, cache, length, float(random.integers(10**9, 10**12))


def _check(function) -> None:
    for cases in (_cases(), [(60_000_000, 40_000, 0, 10e9)]):  # then with nothing in the cache
        judge("tokens_per_second", function, cases, _examine, (*_WRONG, *_OTHER_FORMS))


def _examine(weight_nbytes, cache_nbytes_per_token, length, bandwidth, got) -> str | None:
    reads = np.array([weight_nbytes] + [cache_nbytes_per_token] * length, np.float64)
    expected = float(1 / np.sum(reads / bandwidth))
    written = call("tokens_per_second", weight_nbytes, cache_nbytes_per_token, length, bandwidth)
    return number_misfit(written, got, expected, 1e-5 * expected)


def cache_forgotten(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Reads the weights only."""
    return bandwidth / weight_nbytes


def cache_of_one_token(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Reads one token of the cache."""
    return bandwidth / (weight_nbytes + cache_nbytes_per_token)


def weights_for_each_cached_token(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Reads the weights again for each token before."""
    return bandwidth / ((weight_nbytes + cache_nbytes_per_token) * length)


def seconds_a_token(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Returns the time, not the rate."""
    return (weight_nbytes + cache_nbytes_per_token * length) / bandwidth


def rates_added(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Adds rates instead of times."""
    return bandwidth / weight_nbytes + bandwidth / (cache_nbytes_per_token * length)


def the_slower_rate(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Reads weights and cache at the same time."""
    return bandwidth / max(weight_nbytes, cache_nbytes_per_token * length)


def whole_text(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Adds up the caches of all steps so far."""
    read = cache_nbytes_per_token * length * (length + 1) / 2
    return bandwidth / (weight_nbytes + read)


def keys_and_values_again(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Counts the cache twice, for keys and for values."""
    return bandwidth / (weight_nbytes + 2 * cache_nbytes_per_token * length)


def new_token_read_too(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Reads the cache of length + 1 tokens."""
    return bandwidth / (weight_nbytes + cache_nbytes_per_token * (length + 1))


def new_token_counted(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Reads the cache of length − 1 tokens."""
    return bandwidth / (weight_nbytes + cache_nbytes_per_token * (length - 1))


def half_of_the_cache(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Reads half of the cache, its mean over the steps so far."""
    return bandwidth / (weight_nbytes + cache_nbytes_per_token * length / 2)


def fraction_dropped(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Divides with //."""
    return bandwidth // (weight_nbytes + cache_nbytes_per_token * length)


def bits_read(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Turns the bytes that are read into bits."""
    return bandwidth / (8 * (weight_nbytes + cache_nbytes_per_token * length))


def bandwidth_in_bits(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Turns the bandwidth into bits a second."""
    return 8 * bandwidth / (weight_nbytes + cache_nbytes_per_token * length)


_WRONG = (
    (cache_forgotten, "each step reads the cache too"),
    (cache_of_one_token, "a new token attends to all tokens of the cache, not to one"),
    (weights_for_each_cached_token, "a step reads the weights once, whatever the length"),
    (seconds_a_token, "this is seconds a token; turn it around"),
    (rates_added, "times add up, rates do not"),
    (the_slower_rate, "weights and cache share one bandwidth, so both take time"),
    (whole_text, "this is about one step, not about all steps before it"),
    (
        keys_and_values_again,
        "the cache bytes of a token are those of its key and value: do not double",
    ),
    (new_token_read_too, "the cache holds the length tokens before, not the new one as well"),
    (new_token_counted, "length counts the tokens before the new one: all of them are read"),
    (
        half_of_the_cache,
        "length is that of this step, not of the last one: the whole cache is read",
    ),
    (fraction_dropped, "the fraction of a token is dropped: divide with /, and keep the float"),
    (bits_read, "sizes and bandwidth are both in bytes: no factor of 8"),
)
_OTHER_FORMS = ((bandwidth_in_bits, dict(_WRONG)[bits_read]),)


def decoder_by_times(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Adds the times of weights and cache."""
    seconds = weight_nbytes / bandwidth + length * cache_nbytes_per_token / bandwidth
    return 1 / seconds


def decoder_in_a_loop(weight_nbytes, cache_nbytes_per_token, length, bandwidth):
    """Reads the cache token by token."""
    read = weight_nbytes
    for _ in range(length):
        read += cache_nbytes_per_token
    return bandwidth / read


EXERCISE = Exercise(
    id="5.2",
    title="The most a decoder can do",
    stars=1,
    minutes=10,
    function_names=("tokens_per_second",),
    check=_check,
    takeaway="For one text, only fewer bytes, a faster memory or several tokens a reading help.",
    wrong_answers=_WRONG,
    variants=(decoder_by_times, decoder_in_a_loop),
)
