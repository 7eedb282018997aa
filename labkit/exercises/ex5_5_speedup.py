"""Exercise 5.5, a bug hunt: `speedup` should compare the times of two functions fairly.

The reference is a made-up machine, whose clock and usual time of each call are known.
"""

import functools
from statistics import fmean, median

import numpy as np

from labkit.exercises.judge import Exercise, call, judge, show
from labkit.exercises.number_misfit import number_misfit


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

    def median(self, name: str, repeats: int) -> float:
        """Return the median time of the calls after the first, without the drift."""
        numbers = range(1, repeats + 1)
        return self.usual[name] * median(self.odd_calls.get((name, i), 1) for i in numbers)


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


# Medians are those of usual calls, but the median of the three ratios is not that of the medians.
_UNEVEN = {("slow", 1): 0.5, ("slow", 3): 1.5, ("fast", 1): 1.5, ("fast", 2): 0.5}


def _cases():
    first = (0.01, 0.2)
    machines = [
        (1, _Machine(0.004, 0.002, first)),
        (2, _Machine(0.003, 0.002, first)),
        (3, _Machine(0.004, 0.002, first, odd_calls={("slow", 1): 6})),
        (3, _Machine(0.005, 0.002, first, odd_calls={("fast", 2): 0.2})),
        (3, _Machine(0.006, 0.002, first, odd_calls={("fast", 1): 9})),
        (2, _Machine(0.004, 0.002, first, odd_calls={("slow", 2): 1.5})),
        (3, _Machine(0.004, 0.002, first, odd_calls=_UNEVEN)),
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


def _check(function) -> None:
    judge("speedup", function, _cases(), _examine, (*_WRONG, *_OTHER_FORMS))


def _examine(slow, fast, clock, repeats, got) -> str | None:
    # Drift and odd calls move a right answer by up to 3 percent, whichever function goes first.
    machine = clock.machine
    middles = [machine.median(name, repeats) for name in ("slow", "fast")]
    expected = middles[0] / middles[1]
    written = call("speedup", slow, fast, clock, repeats)
    if complaint := number_misfit(written, got, expected, 0.05 * expected):
        times = " and ".join(f"{show(1000 * seconds)}" for seconds in middles)
        return f"{complaint}, since the median calls take {times} ms"
    calls = machine.n_calls
    if set(calls.values()) != {repeats + 1}:
        made = f"{calls['slow']} of slow and {calls['fast']} of fast"
        return f"{written} makes {made} calls, expected {repeats + 1} of each"
    return None


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


def warm_blocks(slow, fast, clock, repeats, fast_first=False, average=median):
    """Warms each function up just before all its calls."""
    results = {}
    for function in (fast, slow) if fast_first else (slow, fast):
        function()
        results[function] = average([_timed(function, clock) for _ in range(repeats)])
    return results[slow] / results[fast]


def fast_calls_first(slow, fast, clock, repeats):
    """Warms both up, and times all calls of fast before those of slow."""
    return 1 / all_slow_calls_first(fast, slow, clock, repeats)


def means_in_turn(slow, fast, clock, repeats):
    """Takes means."""
    times = _in_turn(slow, fast, clock, repeats)
    return fmean(times[0]) / fmean(times[1])


def smallest_times(slow, fast, clock, repeats):
    """Takes the smallest times."""
    times = _in_turn(slow, fast, clock, repeats)
    return min(times[0]) / min(times[1])


def trimmed_means(slow, fast, clock, repeats):
    """Takes means without the smallest and the largest time."""
    middles = (sorted(times)[1:-1] or times for times in _in_turn(slow, fast, clock, repeats))
    slow_mean, fast_mean = map(fmean, middles)
    return slow_mean / fast_mean


def mean_of_ratios(slow, fast, clock, repeats):
    """Averages the ratios of all rounds."""
    pairs = zip(*_in_turn(slow, fast, clock, repeats), strict=True)
    return fmean(one / other for one, other in pairs)


def median_of_ratios(slow, fast, clock, repeats):
    """Takes the ratio of each round first."""
    pairs = zip(*_in_turn(slow, fast, clock, repeats), strict=True)
    return median(one / other for one, other in pairs)


def upper_median(slow, fast, clock, repeats):
    """Takes the upper of two middle times."""
    times = _in_turn(slow, fast, clock, repeats)
    return sorted(times[0])[repeats // 2] / sorted(times[1])[repeats // 2]


def lower_median(slow, fast, clock, repeats):
    """Takes the lower of two middle times."""
    times = _in_turn(slow, fast, clock, repeats)
    return sorted(times[0])[(repeats - 1) // 2] / sorted(times[1])[(repeats - 1) // 2]


def warm_up_each_round(slow, fast, clock, repeats):
    """Calls both once more before each round."""
    times = [], []
    for _ in range(repeats):
        slow()
        fast()
        times[0].append(_timed(slow, clock))
        times[1].append(_timed(fast, clock))
    return median(times[0]) / median(times[1])


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


_WRONG = (
    (share_faster, "twice as fast is a ratio of 2, not of 1"),
    (ratio_turned_around, "the time of slow goes above the line"),
    (first_call_timed, "the first call of each compiles: make it before you time"),
    (only_slow_warm, "fast needs a warm-up as well as slow"),
    (only_fast_warm, "slow needs a warm-up as well as fast"),
    (all_slow_calls_first, "the machine grows slower, and fast runs last: call them in turn"),
    (warm_blocks, "each is warm, but its calls come all in one block: take turns"),
    (means_in_turn, "one odd call moves a mean: take the median"),
    (lower_median, "the lower of two middle times is not the median: take the mean of both"),
    (smallest_times, "one lucky call decides a minimum: take the median"),
    (trimmed_means, "a mean without two extremes still counts other odd calls: take the median"),
    (mean_of_ratios, "odd calls move a mean of ratios: take the median of each, then divide"),
    (
        median_of_ratios,
        "the median of the rounds' ratios is a fair number too, but another one: here take the "
        "median of each, then divide",
    ),
    (upper_median, "of an even number of times the median is the mean of the two middle ones"),
    (warm_up_each_round, "one call of each before the first round is enough"),
    (only_warmed_up, "warm is not enough: the order and the mean still favor one side"),
    (only_in_turn, "in turn is not enough: first calls and odd ones still count"),
    (only_the_ratio, "the ratio is mended, but not yet what it measures"),
)
_MESSAGES = dict(_WRONG)
_OTHER_FORMS = (
    (functools.partial(warm_blocks, fast_first=True), _MESSAGES[warm_blocks]),
    (fast_calls_first, _MESSAGES[warm_blocks]),
    (functools.partial(warm_blocks, average=fmean), _MESSAGES[only_warmed_up]),
)


def speedup_fast_first(slow, fast, clock, repeats):
    """Begins each turn with the other one; sorts by hand."""
    fast(), slow()
    fast_times, slow_times = [], []
    while len(slow_times) < repeats:
        fast_times.append(_timed(fast, clock))
        slow_times.append(_timed(slow, clock))
    lower, upper = (repeats - 1) // 2, repeats // 2
    middles = (sorted(times)[lower] + sorted(times)[upper] for times in (slow_times, fast_times))
    return next(middles) / next(middles)


def speedup_from_stamps(slow, fast, clock, repeats):
    """Times one turn more, and drops the first."""
    stamps = []
    for _ in range(repeats + 1):
        stamps.append([clock(), slow(), clock(), fast(), clock()][::2])
    steps = np.diff(np.array(stamps[1:]), axis=1)
    return float(np.divide(*np.median(steps, axis=0)))


EXERCISE = Exercise(
    id="5.5",
    title="Bug hunt: twice as fast?",
    stars=2,
    minutes=15,
    function_names=("speedup",),
    check=_check,
    takeaway="Warm up, call in turn, take the median: then a ratio says something about the code.",
    wrong_answers=_WRONG,
    variants=(speedup_fast_first, speedup_from_stamps),
    broken=broken_speedup,
)
