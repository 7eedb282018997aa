"""Exercise 6.5, a bug hunt: `gains` should say how many times as fast as FP32 a scheme writes.

The reference is numpy's medians, pair by pair.
"""

import itertools
from numbers import Real
from statistics import fmean, median

import numpy as np
import torch

from labkit.exercises.judge import Exercise, Wrong, kind, show
from labkit.exercises.judge_on_dicts import judge_on_dicts


def _run_of(scheme, runtime, threads, prompt_seconds, seconds_a_token, tokens):
    return {
        "scheme": scheme, "runtime": runtime, "threads": threads, "prompt_seconds": prompt_seconds,
        "total_seconds": prompt_seconds + tokens * seconds_a_token, "tokens": tokens,
    }  # fmt: skip


def _cases():
    usual = [
        _run_of("FP32", "numba", 2, 0.2, 0.1, 16),
        _run_of("INT4", "numba", 2, 0.4, 0.025, 16),
    ]
    yield usual, "INT4"
    yield [*usual, _run_of("FP32", "torch", 2, 0.2, 0.3, 16)], "INT4"
    yield [*usual, _run_of("FP32", "numba", 1, 0.3, 0.2, 16)], "INT4"
    yield [usual[0], {**usual[1], "threads": 1}], "INT4"
    yield [_run_of("INT8", "numba", 2, 0.1, 0.06, 8), *usual], "INT8"
    random = np.random.default_rng(65)
    for n_runs in (3, 3, 5, 5, 7):
        runs = []
        for runtime, threads in (("torch", 1), ("torch", 2), ("numba", 2), ("onnx", 2)):
            for scheme in ("FP32", "INT8", "INT4"):
                if random.random() < 0.15:
                    continue  # not timed
                seconds = random.uniform(0.02, 0.1)
                odd = 4 if scheme == "FP32" else 0.3
                for factor in [odd, *random.uniform(0.95, 1.05, n_runs - 1).tolist()]:
                    tokens, prompt = int(random.integers(8, 40)), random.uniform(0.2, 0.9)
                    one = _run_of(scheme, runtime, threads, prompt, factor * seconds, tokens)
                    runs.append(one)
        yield [runs[i] for i in random.permutation(len(runs))], "INT8"
        yield runs, "INT4"


def _check(function) -> None:
    judge_on_dicts("gains", function, _cases(), _examine, _WRONG, _write_runs)


def _write_runs(runs, scheme) -> str:
    return f"{len(runs)} runs, {scheme!r}"


def _examine(runs, scheme, got) -> str | None:
    written = f"gains({_write_runs(runs, scheme)})"
    if not isinstance(got, dict):
        raise Wrong(f"{written} returns {kind(got)}, expected a dict")
    expected = {}
    for pair in sorted({(run["runtime"], run["threads"]) for run in runs}):
        here = [run for run in runs if (run["runtime"], run["threads"]) == pair]
        medians = [_median_token(here, wanted) for wanted in ("FP32", scheme)]
        if None not in medians:
            expected[pair] = medians[0] / medians[1]
    if set(got) != set(expected):
        keys = [", ".join(sorted(map(show, found))) or "none" for found in (got, expected)]
        return f"{written} has the pairs {keys[0]}, expected {keys[1]}"
    for pair, value in expected.items():
        if not isinstance(got[pair], Real):
            return f"{written} has {kind(got[pair])} for {show(pair)}, expected a float"
        if not abs(got[pair] - value) <= 1e-5 * value:
            return f"{written} gives {show(got[pair])} for {show(pair)}, expected {show(value)}"
    return None


def _median_token(runs, scheme) -> float | None:
    mine = [run for run in runs if run["scheme"] == scheme]
    seconds = [(run["total_seconds"] - run["prompt_seconds"]) / run["tokens"] for run in mine]
    return float(np.median(seconds)) if seconds else None


def broken_gains(runs, scheme):
    """Return how many times as fast as FP32 a scheme writes, by (runtime, threads)."""
    fp32 = [run["total_seconds"] / run["tokens"] for run in runs if run["scheme"] == "FP32"]
    best = {}
    for run in runs:
        if run["scheme"] == scheme:
            pair = run["runtime"], run["threads"]
            seconds = run["total_seconds"] / run["tokens"]
            best[pair] = min(seconds, best.get(pair, seconds))
    return {pair: sum(fp32) / len(fp32) / seconds - 1 for pair, seconds in best.items()}


def _pair(run):
    return run["runtime"], run["threads"]


def _writing(run):
    return (run["total_seconds"] - run["prompt_seconds"]) / run["tokens"]


def _times(runs, scheme, seconds_of=_writing, key=_pair):
    times = {}
    for run in runs:
        if run["scheme"] == scheme:
            times.setdefault(key(run), []).append(seconds_of(run))
    return times


def _ratios(runs, scheme, middle=median, middle_of_fp32=None, seconds_of=_writing):
    fp32, mine = (_times(runs, name, seconds_of) for name in ("FP32", scheme))
    middle_of_fp32 = middle_of_fp32 or middle
    return {
        pair: middle_of_fp32(fp32[pair]) / middle(times)
        for pair, times in mine.items()
        if pair in fp32
    }


def share_gained(runs, scheme):
    """Returns by what share the scheme is faster."""
    return {pair: ratio - 1 for pair, ratio in _ratios(runs, scheme).items()}


def ratios_turned_around(runs, scheme):
    """Divides the scheme by FP32."""
    return {pair: 1 / ratio for pair, ratio in _ratios(runs, scheme).items()}


def prompt_counted(runs, scheme):
    """Counts reading the prompt as writing."""
    return _ratios(runs, scheme, seconds_of=lambda run: run["total_seconds"] / run["tokens"])


def tokens_forgotten(runs, scheme):
    """Compares runs of different lengths."""
    return _ratios(
        runs, scheme, seconds_of=lambda run: run["total_seconds"] - run["prompt_seconds"]
    )


def any_fp32(runs, scheme):
    """Compares with FP32 of all runtimes together."""
    fp32 = [_writing(run) for run in runs if run["scheme"] == "FP32"]
    return {pair: median(fp32) / median(times) for pair, times in _times(runs, scheme).items()}


def any_threads(runs, scheme):
    """Compares with FP32 of the same runtime, on any number of threads."""
    fp32 = _times(runs, "FP32", key=lambda run: run["runtime"])
    mine = _times(runs, scheme).items()
    return {p: median(fp32[p[0]]) / median(times) for p, times in mine if p[0] in fp32}


def any_runtime(runs, scheme):
    """Compares with FP32 on as many threads, in any runtime."""
    fp32 = _times(runs, "FP32", key=lambda run: run["threads"])
    mine = _times(runs, scheme).items()
    return {p: median(fp32[p[1]]) / median(times) for p, times in mine if p[1] in fp32}


def best_against_mean(runs, scheme):
    """Takes the best run of the scheme and the mean of FP32."""
    return _ratios(runs, scheme, min, fmean)


def best_against_median(runs, scheme):
    """Takes the best run of the scheme and the median of FP32."""
    return _ratios(runs, scheme, min, median)


def median_against_mean(runs, scheme):
    """Takes the median of the scheme and the mean of FP32."""
    return _ratios(runs, scheme, median, fmean)


def best_of_both(runs, scheme):
    """Takes the best run of both."""
    return _ratios(runs, scheme, min)


def means_of_both(runs, scheme):
    """Takes the mean of both."""
    return _ratios(runs, scheme, fmean)


def only_one_added(runs, scheme):
    """Mends the last line, and leaves what is compared."""
    return {pair: gain + 1 for pair, gain in broken_gains(runs, scheme).items()}


_WRONG = (
    (share_gained, "four times as fast is 4.0, not 3.0"),
    (ratios_turned_around, "the seconds of FP32 go above the line"),
    (prompt_counted, "reading the prompt is not writing: subtract its seconds"),
    (tokens_forgotten, "runs write different numbers of tokens: divide by them"),
    (any_fp32, "compare with FP32 of the same runtime and threads, if it was timed there"),
    (any_threads, "FP32 on another number of threads is another measurement"),
    (any_runtime, "FP32 in another runtime is another program"),
    (best_against_mean, "the best run of one against the mean of the other: take two medians"),
    (best_against_median, "the scheme still shows its best run: take its median"),
    (median_against_mean, "FP32 still shows its mean: take its median"),
    (best_of_both, "one lucky run decides a minimum: take medians"),
    (means_of_both, "one odd run moves a mean: take medians"),
    (only_one_added, "the ratio is mended, but not yet what it compares"),
)


def gains_by_sorting(runs, scheme):
    """Sorts the runs, groups neighbors, and picks the middle one."""

    def place(run):
        return run["runtime"], run["threads"], run["scheme"]

    seconds = {}
    for (runtime, threads, name), group in itertools.groupby(sorted(runs, key=place), place):
        times = sorted(map(_writing, group))
        seconds[name, (runtime, threads)] = times[len(times) // 2]
    pairs = {pair for name, pair in seconds if name == "FP32" and (scheme, pair) in seconds}
    return {pair: seconds["FP32", pair] / seconds[scheme, pair] for pair in pairs}


def gains_with_torch(runs, scheme):
    """Compares rates in tensors: the median rate of an odd number of runs is that of the time."""
    result = {}
    for pair in dict.fromkeys(map(_pair, runs)):
        rates = []
        for name in (scheme, "FP32"):
            mine = [run for run in runs if _pair(run) == pair and run["scheme"] == name]
            rates.append(torch.tensor([1 / _writing(run) for run in mine]))
        if all(map(len, rates)):
            result[pair] = float(rates[0].median() / rates[1].median())
    return result


EXERCISE = Exercise(
    id="6.5",
    title="Bug hunt: four times as fast",
    stars=2,
    minutes=20,
    function_names=("gains",),
    check=_check,
    takeaway="A gain compares two numbers that differ in one thing alone: the scheme.",
    wrong_answers=_WRONG,
    variants=(gains_by_sorting, gains_with_torch),
    broken=broken_gains,
)
