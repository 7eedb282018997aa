"""Chapter 5: checks, known wrong answers and correct variants.

Each wrong answer's docstring names the misconception; the text beside it is what a learner reads.
References are numpy by the definition, in float64 or value by value, never labkit.
"""

import math
from numbers import Real
from statistics import fmean, median

import numpy as np
import torch

from labkit.exercises import Exercise, call, judge, kind, misfit, show


def _number(written: str, got, expected: float, tolerance: float) -> str | None:
    if not isinstance(got, Real):
        return f"{written} returns {kind(got)}, expected a float"
    if abs(float(got) - expected) <= tolerance:  # NaN is not
        return None
    return f"{written} gives {show(float(got))}, expected {show(expected)}"


# 5.1 ------------------------------------------------------------------------------------------


def _intensity_cases():
    yield 2, 4, 1, 4  # here and below, all weights together fill whole bytes
    yield 2, 4, 3, 16
    yield 1, 1, 1, 32
    yield 24, 10, 7, 3
    yield 16, 512, 1, 8
    for tokens in (1, 8, 300):
        for bits in (2, 4, 32):
            yield 1536, 576, tokens, bits


def _check_intensity(function) -> None:
    judge("arithmetic_intensity", function, _intensity_cases(), _examine_intensity, _WRONG_RATIO)


def _examine_intensity(out, inputs, tokens, bits, got) -> str | None:
    weight = np.zeros(out * inputs * bits // 8, np.uint8)
    x, y = np.zeros((tokens, inputs), np.float32), np.zeros((tokens, out), np.float32)
    expected = y.size * inputs * 2 / (weight.nbytes + x.nbytes + y.nbytes)
    written = call("arithmetic_intensity", out, inputs, tokens, bits)
    return _number(written, got, expected, 1e-5 * expected)


def half_the_operations(out, inputs, tokens, bits):
    """Counts a multiply-add once."""
    return out * inputs * tokens / (out * inputs * bits / 8 + 4 * tokens * (inputs + out))


def bits_for_bytes(out, inputs, tokens, bits):
    """Takes the bits of a weight for its bytes."""
    return 2 * out * inputs * tokens / (out * inputs * bits + 4 * tokens * (inputs + out))


def whole_bytes_a_weight(out, inputs, tokens, bits):
    """Rounds the bytes of a weight down."""
    return 2 * out * inputs * tokens / (out * inputs * (bits // 8) + 4 * tokens * (inputs + out))


def inputs_forgotten(out, inputs, tokens, bits):
    """Reads the weights, but no activations."""
    return 2 * out * inputs * tokens / (out * inputs * bits / 8 + 4 * tokens * out)


def results_forgotten(out, inputs, tokens, bits):
    """Never writes the results."""
    return 2 * out * inputs * tokens / (out * inputs * bits / 8 + 4 * tokens * inputs)


def weights_for_each_token(out, inputs, tokens, bits):
    """Reads the weights once for each token."""
    return 2 * out * inputs / (out * inputs * bits / 8 + 4 * (inputs + out))


def one_token_of_activations(out, inputs, tokens, bits):
    """Moves the activations of a single token."""
    return 2 * out * inputs * tokens / (out * inputs * bits / 8 + 4 * (inputs + out))


def few_bit_activations(out, inputs, tokens, bits):
    """Stores activations in as few bits as weights."""
    return 16 * out * inputs * tokens / bits / (out * inputs + tokens * (inputs + out))


def bytes_an_operation(out, inputs, tokens, bits):
    """Turns the ratio around."""
    return (out * inputs * bits / 8 + 4 * tokens * (inputs + out)) / (2 * out * inputs * tokens)


def weights_alone(out, inputs, tokens, bits):
    """Moves weights and nothing else."""
    return 16 * tokens / bits


_WRONG_RATIO = (
    (half_the_operations, "a multiply-add is two operations"),
    (bits_for_bytes, "a byte has eight bits"),
    (whole_bytes_a_weight, "for 4 bits, bits // 8 is 0: divide with /"),
    (inputs_forgotten, "the activations are read too"),
    (results_forgotten, "the results have to be written too"),
    (weights_for_each_token, "one reading of the weights serves all tokens"),
    (one_token_of_activations, "every token has activations and results of its own"),
    (few_bit_activations, "only weights have few bits; activations and results take 4 bytes"),
    (bytes_an_operation, "operations go above the line, bytes below"),
    (weights_alone, "activations and results move as well as weights"),
)


def intensity_by_terms(out, inputs, tokens, bits):
    """Adds up bits, and divides once."""
    moved_bits = out * inputs * bits + 32 * (tokens * inputs + tokens * out)
    return 16.0 * tokens * out * inputs / moved_bits


def intensity_by_inverse(out, inputs, tokens, bits):
    """Adds the bytes of one multiply-add."""
    return 2 / (bits / 8 / tokens + 4 / out + 4 / inputs)


# 5.2 ------------------------------------------------------------------------------------------


def _decoder_cases():
    yield 60_000_000, 40_000, 500, 10e9
    yield 60_000_000, 40_000, 1, 10e9
    yield 1000, 30, 100, 8000.0
    random = np.random.default_rng(52)
    for length in (7, 64, 300, 2048, 100_000):
        weights, cache = int(random.integers(10**7, 10**9)), int(random.integers(10**3, 10**5))
        yield weights, cache, length, float(random.integers(10**9, 10**12))


def _check_decoder(function) -> None:
    judge("tokens_per_second", function, _decoder_cases(), _examine_decoder, _WRONG_DECODER)


def _examine_decoder(weight_nbytes, cache_nbytes_per_token, length, bandwidth, got) -> str | None:
    reads = np.array([weight_nbytes] + [cache_nbytes_per_token] * length, np.float64)
    expected = float(1 / np.sum(reads / bandwidth))
    written = call("tokens_per_second", weight_nbytes, cache_nbytes_per_token, length, bandwidth)
    return _number(written, got, expected, 1e-5 * expected)


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


_WRONG_DECODER = (
    (cache_forgotten, "each step reads the cache too"),
    (cache_of_one_token, "a new token attends to all tokens of the cache, not to one"),
    (weights_for_each_cached_token, "a step reads the weights once, whatever the length"),
    (seconds_a_token, "this is seconds a token; turn it around"),
    (rates_added, "times add up, rates do not"),
    (the_slower_rate, "weights and cache share one bandwidth, so both take time"),
    (whole_text, "this is about one step, not about all steps before it"),
)


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


# 5.3 ------------------------------------------------------------------------------------------


def _dot_cases():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    packed = torch.tensor([0x93, 0x0F], dtype=torch.uint8)
    zeros = torch.tensor([8, 1], dtype=torch.uint8)
    yield packed, torch.tensor([0.5, 2.0]), zeros, x, 2
    yield packed, torch.tensor([0.5, 2.0]), zeros, x, 3
    yield packed[:1], torch.tensor([0.25]), torch.tensor([15], dtype=torch.uint8), x[:2], 2
    random = torch.Generator().manual_seed(53)
    for inputs, group_size in ((10, 4), (12, 5), (16, 16), (64, 32), (70, 32), (96, 32), (128, 24)):
        n_groups = math.ceil(inputs / group_size)
        packed = torch.randint(256, (inputs // 2,), generator=random, dtype=torch.uint8)
        zero_point = torch.randint(16, (n_groups,), generator=random, dtype=torch.uint8)
        scale = torch.rand(n_groups, generator=random) + 0.1
        yield packed, scale, zero_point, torch.randn(inputs, generator=random), group_size


def _check_dot(function) -> None:
    judge("int4_dot", function, _dot_cases(), _examine_dot, _WRONG_DOT)


def _examine_dot(packed, scale, zero_point, x, group_size, got) -> str | None:
    terms = []
    for i, value in enumerate(x.tolist()):
        code = packed.tolist()[i // 2] // 16 ** (i % 2) % 16
        group = i // group_size
        terms.append((code - zero_point.tolist()[group]) * scale.tolist()[group] * value)
    written = call("int4_dot", packed, scale, zero_point, x, group_size)
    return _number(written, got, sum(terms), 1e-4 * sum(map(abs, terms)))


def _codes(packed):
    return torch.stack((packed & 15, packed >> 4), 1).flatten().float()


def _spread(values, group_size, inputs):
    return values.float().repeat_interleave(group_size)[:inputs]


def _dot(codes, scale, zero_point, x, group_size):
    zeros = _spread(zero_point, group_size, x.numel())
    return ((codes - zeros) * _spread(scale, group_size, x.numel()) * x).sum().item()


def high_nibble_first(packed, scale, zero_point, x, group_size):
    """Takes the high four bits for the first code."""
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten().float()
    return _dot(codes, scale, zero_point, x, group_size)


def low_nibbles_first(packed, scale, zero_point, x, group_size):
    """Puts all low codes before all high ones."""
    codes = torch.cat((packed & 15, packed >> 4)).float()
    return _dot(codes, scale, zero_point, x, group_size)


def low_nibble_unmasked(packed, scale, zero_point, x, group_size):
    """Leaves the second code above the first."""
    codes = torch.stack((packed, packed >> 4), 1).flatten().float()
    return _dot(codes, scale, zero_point, x, group_size)


def zero_point_forgotten(packed, scale, zero_point, x, group_size):
    """Scales the codes as they are."""
    return _dot(_codes(packed), scale, torch.zeros_like(zero_point), x, group_size)


def zero_point_unscaled(packed, scale, zero_point, x, group_size):
    """Subtracts the zero point after scaling."""
    weight = _codes(packed) * _spread(scale, group_size, x.numel())
    return ((weight - _spread(zero_point, group_size, x.numel())) * x).sum().item()


def wrapped_below_zero(packed, scale, zero_point, x, group_size):
    """Subtracts in uint8."""
    zeros = zero_point.repeat_interleave(group_size)[: x.numel()]
    weight = (_codes(packed).to(torch.uint8) - zeros) * _spread(scale, group_size, x.numel())
    return (weight * x).sum().item()


def first_grid_only(packed, scale, zero_point, x, group_size):
    """Uses the first group's grid for all."""
    return _dot(_codes(packed), scale[:1], zero_point[:1], x, x.numel())


def last_group_dropped(packed, scale, zero_point, x, group_size):
    """Counts whole groups only."""
    whole = x.numel() // group_size * group_size
    return _dot(_codes(packed)[:whole], scale, zero_point, x[:whole], group_size)


def groups_of_bytes(packed, scale, zero_point, x, group_size):
    """Counts groups in bytes, so that each covers twice as many codes."""
    return _dot(_codes(packed), scale, zero_point, x, 2 * group_size)


_WRONG_DOT = (
    (high_nibble_first, "the first code of a pair lies in the low four bits"),
    (low_nibbles_first, "the two codes of a byte are neighbors in the row"),
    (low_nibble_unmasked, "mask the low code with & 15: the other one still sits above it"),
    (zero_point_forgotten, "subtract the zero point from the codes"),
    (zero_point_unscaled, "the zero point is a code: subtract it before you scale"),
    (wrapped_below_zero, "in uint8, 3 - 8 wraps to 251: convert before you subtract"),
    (first_grid_only, "each group has its own scale and zero point"),
    (last_group_dropped, "the last group counts too, even a shorter one"),
    (groups_of_bytes, "a group is counted in weights, and a byte holds two of them"),
)


def dot_by_groups(packed, scale, zero_point, x, group_size):
    """Applies the grid once a group."""
    total = 0.0
    parts = zip(_codes(packed).split(group_size), x.split(group_size), strict=True)
    for group, (codes, values) in enumerate(parts):
        dot = codes @ values - zero_point[group].float() * values.sum()
        total += float(scale[group] * dot)
    return total


def dot_by_bytes(packed, scale, zero_point, x, group_size):
    """Loops over bytes, in Python numbers."""
    total = 0.0
    for i, byte in enumerate(packed.tolist()):
        for j, code in ((2 * i, byte % 16), (2 * i + 1, byte // 16)):
            group = j // group_size
            total += (code - int(zero_point[group])) * float(scale[group]) * float(x[j])
    return total


# 5.5 ------------------------------------------------------------------------------------------


class _Machine:
    """A slow and a fast function and a clock, whose every tick is known.

    Args:
        slow, fast: seconds of a call.
        compiling: seconds that the first call of each takes on top.
        drift: share by which all calls become slower with each call.
        odd_calls: what single calls take, as a multiple, by name and number.
    """

    def __init__(self, slow, fast, compiling=(0.0, 0.0), drift=0.0, odd_calls=()):
        self.usual = {"slow": slow, "fast": fast}
        self.compiling = dict(zip(("slow", "fast"), compiling, strict=True))
        self.drift, self.odd_calls = drift, dict(odd_calls)
        self.restart()

    def restart(self) -> None:
        self.time = 1000.0
        self.n_calls = {"slow": 0, "fast": 0}

    def call(self, name):
        if name == "clock":
            return self.time
        number, before = self.n_calls[name], sum(self.n_calls.values())
        factor = self.odd_calls.get((name, number), 1) * (1 + self.drift * before)
        self.time += self.usual[name] * factor + self.compiling[name] * (number == 0)
        self.n_calls[name] += 1


class _Part:
    """One function of a machine. `judge` copies its inputs for a trial: the machine restarts."""

    def __init__(self, machine: _Machine, name: str):
        self.machine, self.name = machine, name

    def __call__(self):
        return self.machine.call(self.name)

    def __repr__(self):
        return self.name

    def __deepcopy__(self, memo):
        self.machine.restart()
        return self


def _clock_cases():
    first = (0.01, 0.2)
    machines = [
        (1, _Machine(0.004, 0.002, first)),
        (2, _Machine(0.003, 0.002, first)),
        (3, _Machine(0.004, 0.002, first, odd_calls={("slow", 1): 6})),
        (3, _Machine(0.005, 0.002, first, odd_calls={("fast", 2): 0.2})),
        (3, _Machine(0.006, 0.002, first, odd_calls={("fast", 1): 9})),
        (31, _Machine(0.004, 0.002, first, drift=0.01)),
        (11, _Machine(0.004, 0.005, first, 0.02, {("slow", 3): 7, ("fast", 5): 8})),
    ]
    random = np.random.default_rng(54)
    for repeats in (60, 81, 100):
        calls = {("slow", int(i)): 12 for i in random.choice(np.arange(1, repeats), 2, False)}
        calls |= {("fast", int(i)): 0.1 for i in random.choice(np.arange(1, repeats), 2, False)}
        usual = random.uniform(0.006, 0.012), random.uniform(0.002, 0.004)
        machines.append((repeats, _Machine(*usual, first, 0.2 / repeats, calls)))
    for repeats, machine in machines:
        yield *(_Part(machine, name) for name in ("slow", "fast", "clock")), repeats


def _check_speedup(function) -> None:
    judge("speedup", function, _clock_cases(), _examine_speedup, _WRONG_SPEEDUP)


def _examine_speedup(slow, fast, clock, repeats, got) -> str | None:
    # Drift and odd calls move a right answer by up to 3 percent, whichever function goes first.
    usual = clock.machine.usual
    expected = usual["slow"] / usual["fast"]
    complaint = _number(call("speedup", slow, fast, clock, repeats), got, expected, 0.05 * expected)
    if complaint is None:
        return None
    times = " and ".join(f"{show(1000 * seconds)}" for seconds in usual.values())
    return f"{complaint}, since usual calls take {times} ms"


def broken_speedup(slow, fast, clock, repeats):
    """Return the median time of slow over the median time of fast."""
    seconds = []
    for function in (slow, fast):
        start = clock()
        for _ in range(repeats):
            function()
        seconds.append((clock() - start) / repeats)
    return seconds[0] / seconds[1] - 1


def _timed(function, clock) -> float:
    start = clock()
    function()
    return clock() - start


def _in_turn(slow, fast, clock, repeats, warm=("slow", "fast")):
    for function, name in ((slow, "slow"), (fast, "fast")):
        if name in warm:
            function()
    pairs = [(_timed(slow, clock), _timed(fast, clock)) for _ in range(repeats)]
    return [[pair[i] for pair in pairs] for i in (0, 1)]


def _one_after_the_other(slow, fast, clock, repeats):
    slow()
    fast()
    return [[_timed(function, clock) for _ in range(repeats)] for function in (slow, fast)]


def share_faster(slow, fast, clock, repeats):
    """Returns by what share it is faster."""
    times = _in_turn(slow, fast, clock, repeats)
    return median(times[0]) / median(times[1]) - 1


def ratio_turned_around(slow, fast, clock, repeats):
    """Divides fast by slow."""
    times = _in_turn(slow, fast, clock, repeats)
    return median(times[1]) / median(times[0])


def first_call_timed(slow, fast, clock, repeats):
    """Times the first call, which compiles."""
    times = _in_turn(slow, fast, clock, repeats, warm=())
    return median(times[0]) / median(times[1])


def only_slow_warm(slow, fast, clock, repeats):
    """Warms up the slow function only."""
    times = _in_turn(slow, fast, clock, repeats, warm=("slow",))
    return median(times[0]) / median(times[1])


def only_fast_warm(slow, fast, clock, repeats):
    """Warms up the fast function only."""
    times = _in_turn(slow, fast, clock, repeats, warm=("fast",))
    return median(times[0]) / median(times[1])


def all_slow_calls_first(slow, fast, clock, repeats):
    """Lets the drift fall on the fast function."""
    times = _one_after_the_other(slow, fast, clock, repeats)
    return median(times[0]) / median(times[1])


def means_in_turn(slow, fast, clock, repeats):
    """Takes means."""
    times = _in_turn(slow, fast, clock, repeats)
    return fmean(times[0]) / fmean(times[1])


def smallest_times(slow, fast, clock, repeats):
    """Takes the smallest times."""
    times = _in_turn(slow, fast, clock, repeats)
    return min(times[0]) / min(times[1])


def only_warmed_up(slow, fast, clock, repeats):
    """Adds the warm-up, and leaves order and means."""
    times = _one_after_the_other(slow, fast, clock, repeats)
    return fmean(times[0]) / fmean(times[1])


def only_in_turn(slow, fast, clock, repeats):
    """Calls them in turn, and leaves first calls and means."""
    times = _in_turn(slow, fast, clock, repeats, warm=())
    return fmean(times[0]) / fmean(times[1])


def only_the_ratio(slow, fast, clock, repeats):
    """Mends the last line, and leaves how it is measured."""
    return broken_speedup(slow, fast, clock, repeats) + 1


_WRONG_SPEEDUP = (
    (share_faster, "twice as fast is a ratio of 2, not of 1"),
    (ratio_turned_around, "the time of slow goes above the line"),
    (first_call_timed, "the first call of each compiles: make it before you time"),
    (only_slow_warm, "fast needs a warm-up as well as slow"),
    (only_fast_warm, "slow needs a warm-up as well as fast"),
    (all_slow_calls_first, "the machine grows slower, and fast runs last: call them in turn"),
    (means_in_turn, "one odd call moves a mean: take the median"),
    (smallest_times, "one lucky call decides a minimum: take the median"),
    (only_warmed_up, "warm is not enough: the order and the mean still favor one side"),
    (only_in_turn, "in turn is not enough: first calls and odd ones still count"),
    (only_the_ratio, "the ratio is mended, but not yet what it measures"),
)


def speedup_fast_first(slow, fast, clock, repeats):
    """Begins each turn with the other one; sorts by hand."""
    fast(), slow()
    fast_times, slow_times = [], []
    while len(slow_times) < repeats:
        fast_times.append(_timed(fast, clock))
        slow_times.append(_timed(slow, clock))
    middle = repeats // 2
    return sorted(slow_times)[middle] / sorted(fast_times)[middle]


def speedup_from_stamps(slow, fast, clock, repeats):
    """Times one turn more, and drops the first."""
    stamps = []
    for _ in range(repeats + 1):
        stamps.append([clock(), slow(), clock(), fast(), clock()][::2])
    steps = np.diff(np.array(stamps[1:]), axis=1)
    return float(np.divide(*np.median(steps, axis=0)))


# 5.4 ------------------------------------------------------------------------------------------


def _attention_cases():
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


def _check_attention(function) -> None:
    judge("attend_one", function, _attention_cases(), _examine_attention, _WRONG_ATTENTION)


def _examine_attention(query, keys, values, got) -> str | None:
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


_WRONG_ATTENTION = (
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


EXERCISES = (
    Exercise(
        "5.1", "Bytes or operations", 1, 10, ("arithmetic_intensity",), _check_intensity,
        "With one token the bytes decide; with hundreds of tokens, the operations.",
        _WRONG_RATIO, (intensity_by_terms, intensity_by_inverse),
    ),
    Exercise(
        "5.2", "The most a decoder can do", 1, 10, ("tokens_per_second",), _check_decoder,
        "No kernel beats this bound; only fewer bytes or a faster memory raise it.",
        _WRONG_DECODER, (decoder_by_times, decoder_in_a_loop),
    ),
    Exercise(
        "5.3", "Four bits in a row", 2, 20, ("int4_dot",), _check_dot,
        "A kernel does the same in registers, and never writes the weights out.",
        _WRONG_DOT, (dot_by_groups, dot_by_bytes),
    ),
    Exercise(
        "5.4", "Attention from a cache", 3, 25, ("attend_one",), _check_attention,
        "This is all that attention does for a new token; the rest is reading the cache.",
        _WRONG_ATTENTION, (attention_by_reshaping, attention_online),
    ),
    Exercise(
        "5.5", "Bug hunt: twice as fast?", 2, 15, ("speedup",), _check_speedup,
        "Warm up, call in turn, take the median: then a ratio says something about the code.",
        _WRONG_SPEEDUP, (speedup_fast_first, speedup_from_stamps),
        broken=broken_speedup,
    ),
)  # fmt: skip
