"""Chapter 6: checks, known wrong answers and correct variants.

Each wrong answer's docstring names the misconception; the text beside it is what a learner reads.
References are numpy or brute force by the definition, never labkit.
"""

import copy
import itertools
import json
import math
import sys
from numbers import Integral, Real
from statistics import fmean, median

import numpy as np
import torch

from labkit.exercises import Exercise, Wrong, call, judge, kind, same, show


class _Case:
    """Arguments with dicts in them, which `judge` cannot compare; `text` says what they are."""

    def __init__(self, arguments: tuple, text: str):
        self.arguments, self.text = arguments, text

    def __deepcopy__(self, memo):
        return self

    def __repr__(self):
        return self.text


class _Result(tuple):
    """A result for `same` to compare; `got` as it came, `given` what is left of the input."""


def _plain(value):
    # Lists and numbers stay, dicts become sorted pairs, and equal strings become the same object.
    if isinstance(value, dict):
        return [[_plain(key), _plain(value[key])] for key in sorted(value, key=repr)]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return sys.intern(str(value)) if isinstance(value, str) else value


def _on_plain_values(function):
    def answer(case: _Case) -> _Result:
        given = copy.deepcopy(case.arguments)
        got = function(*given)
        result = _Result([_plain(got)])
        result.got, result.given = got, given
        return result

    return answer


def _judge_on_dicts(name, function, cases, examine, wrong_answers, write) -> None:
    """As `judge`; `write` says briefly what the arguments of a case are."""

    def examine_result(case, result):
        if not same(_plain(result.given), _plain(case.arguments)):
            raise Wrong(f"{name} changes its input in place: work on copies of lists and dicts")
        return examine(*case.arguments, result.got)

    judge(
        name,
        _on_plain_values(function),
        [(_Case(case, write(*case)),) for case in cases],
        examine_result,
        tuple((_on_plain_values(mistake), message) for mistake, message in wrong_answers),
    )


# 6.1 ------------------------------------------------------------------------------------------


def _front_cases():
    yield [400.0, 100.0], [3.0, 3.2]
    yield [400.0, 100.0], [3.0, 3.0]
    yield [100.0, 100.0], [3.0, 3.0]
    yield [100.0, 100.0], [3.1, 3.0]
    yield [100.0], [3.0]
    yield [55.0, 400.0, 100.0], [3.4, 3.0, 3.1]
    yield [100.0, 55.0, 120.0, 400.0], [3.0, 3.4, 3.1, 2.9]
    yield [400.0, 55.0, 100.0, 100.0, 120.0], [3.0, 3.4, 3.1, 3.1, 3.2]
    random = np.random.default_rng(61)
    for n, steps in ((5, 4), (6, 4), (8, 6), (9, 5), (12, 9), (20, 12), (30, 500), (60, 1000)):
        nbytes, losses = random.integers(1, steps, (2, n))
        yield (10.0 * nbytes).tolist(), (3 + losses / 8).tolist()


def _check_front(function) -> None:
    judge("pareto", function, _front_cases(), _examine_front, _WRONG_FRONT)


def _examine_front(nbytes, nats, got) -> str | None:
    written = call("pareto", nbytes, nats)
    if len(nbytes) > 6:
        written = f"pareto({len(nbytes)} numbers, {len(nats)} numbers)"
    if not isinstance(got, list) or not all(isinstance(i, Integral) for i in got):
        odd = [kind(i) for i in got if not isinstance(i, Integral)] if isinstance(got, list) else []
        came = f"a list with {odd[0]} in it" if odd else kind(got)
        raise Wrong(f"{written} returns {came}, expected a list of indices")
    entries = np.array([nbytes, nats]).T
    expected = []
    for index, entry in enumerate(entries):
        never_larger, once_smaller = (entries <= entry).all(1), (entries < entry).any(1)
        if not (never_larger & once_smaller).any():
            expected.append(index)
    if got == expected:
        return None
    return f"{written} gives {_brief(got)}, expected {_brief(expected)}"


def _brief(indices: list) -> str:
    return show(indices) if len(indices) <= 8 else show(indices[:8])[:-1] + ", …]"


def _not_dominated(nbytes, nats, dominates):
    entries = list(zip(nbytes, nats, strict=True))
    return [
        i
        for i, mine in enumerate(entries)
        if not any(dominates(other, mine) for j, other in enumerate(entries) if j != i)
    ]


def _dominates(other, mine):
    return other != mine and other[0] <= mine[0] and other[1] <= mine[1]


def smaller_in_both(nbytes, nats):
    """Lets an entry dominate only if it is smaller in both numbers."""
    return _not_dominated(nbytes, nats, lambda a, b: a[0] < b[0] and a[1] < b[1])


def equals_drop_each_other(nbytes, nats):
    """Lets equal entries dominate each other."""
    return _not_dominated(nbytes, nats, lambda a, b: a[0] <= b[0] and a[1] <= b[1])


def smaller_in_either(nbytes, nats):
    """Lets an entry dominate if it is smaller in one number, whatever the other."""
    return _not_dominated(nbytes, nats, lambda a, b: a[0] < b[0] or a[1] < b[1])


def first_of_equals(nbytes, nats):
    """Keeps one of several equal entries."""
    entries = list(zip(nbytes, nats, strict=True))
    return [i for i in pareto_by_sorting(nbytes, nats) if entries[i] not in entries[:i]]


def most_nats(nbytes, nats):
    """Takes more nats for better."""
    return pareto_by_sorting(nbytes, [-x for x in nats])


def two_ends(nbytes, nats):
    """Takes the smallest and the best, and nothing between."""
    front = pareto_by_sorting(nbytes, nats)
    smallest, best = min(nbytes), min(nats)
    return [i for i in front if nbytes[i] == smallest or nats[i] == best]


def in_order_of_bytes(nbytes, nats):
    """Returns the indices in the order of the bytes."""
    return sorted(pareto_by_sorting(nbytes, nats), key=lambda i: nbytes[i])


def earlier_entries_only(nbytes, nats):
    """Compares an entry with those before it."""
    entries = list(zip(nbytes, nats, strict=True))
    return [
        i for i, mine in enumerate(entries) if not any(_dominates(a, mine) for a in entries[:i])
    ]


_WRONG_FRONT = (
    (smaller_in_both, "an entry with as many bytes and fewer nats dominates as well"),
    (equals_drop_each_other, "equal entries do not dominate each other, so they stay"),
    (smaller_in_either, "smaller in one number is not enough if it is larger in the other"),
    (first_of_equals, "of equal entries all stay, not only the first"),
    (most_nats, "fewer nats are better"),
    (two_ends, "the front has more than its two ends"),
    (in_order_of_bytes, "sort the indices themselves, not the entries"),
    (earlier_entries_only, "compare each entry with all others, later ones too"),
)


def pareto_by_sorting(nbytes, nats):
    """Goes from few bytes to many, and keeps what lowers the nats, or repeats the last one kept."""
    front = []
    for i in sorted(range(len(nbytes)), key=lambda i: (nbytes[i], nats[i])):
        last = (nbytes[front[-1]], nats[front[-1]]) if front else (0, math.inf)
        if nats[i] < last[1] or (nbytes[i], nats[i]) == last:
            front.append(i)
    return sorted(front)


def pareto_by_broadcasting(nbytes, nats):
    """Compares all pairs at once."""
    table = torch.tensor([nbytes, nats], dtype=torch.float64)
    other, mine = table[:, :, None], table[:, None, :]
    dominated = (other <= mine).all(0) & (other < mine).any(0)
    return (~dominated.any(0)).nonzero().flatten().tolist()


# 6.2 ------------------------------------------------------------------------------------------


def _tie_cases():
    # Each model lies a known number of standard errors above the best one, never about two.
    random = np.random.default_rng(62)
    for n, above in (
        (4, {"FP32": 0, "INT8": 1.5, "INT4": 9}),
        (9, {"INT4": 3, "FP32": 0}),
        (20, {"INT8": 0.7, "FP32": 0}),
        (4, {"INT4": 9, "copy": 0, "FP32": 0}),
        (3, {"FP32": 0, "INT8": 1.8, "QAT": 1.3, "INT4": 2.4}),
        (2, {"INT8": 1.7, "FP32": 0}),
        (25, {"INT4": 8, "INT8": 1.3, "FP32": 0}),
        (12, {"INT4": 3.4, "GPTQ": 2.6, "FP32": 0, "INT8": 1.6, "QAT": 0.8}),
        (16, {"INT8": 1.5, "INT4": 3, "FP32": 0, "NF4": 4.5, "INT3": 30}),
        (100, {"INT3": 40, "INT4": 12, "INT8": 0.3, "GPTQ": 2.3, "FP32": 0}),
        (32, {"QAT": 1.7, "FP32": 0, "copy": 0, "INT8": 0.6, "NF4": 2.5}),
    ):
        base = 3 + 0.5 * random.standard_normal(n)
        yield ({name: _above(base, errors, random) for name, errors in above.items()},)


def _above(base: np.ndarray, errors: float, random: np.random.Generator) -> torch.Tensor:
    noise = random.standard_normal(len(base))
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    raised = 0.03 * (noise + errors / len(base) ** 0.5) if errors else 0 * noise
    return torch.tensor(base + raised)


def _check_ties(function) -> None:
    name = "ties_with_best"
    _judge_on_dicts(name, function, _tie_cases(), _examine_ties, _WRONG_TIES, _write_models)


def _write_models(window_nats) -> str:
    return f"{len(window_nats)} models, {len(next(iter(window_nats.values())))} windows"


def _examine_ties(window_nats, got) -> str | None:
    written = f"ties_with_best({_write_models(window_nats)})"
    if not isinstance(got, list) or not all(isinstance(name, str) for name in got):
        raise Wrong(f"{written} returns {kind(got)}, expected a list of names")
    table = {name: nats.numpy() for name, nats in window_nats.items()}
    best = min(table, key=lambda name: table[name].mean())
    above = {name: _mean_and_error(nats - table[best]) for name, nats in table.items()}
    expected = [name for name, (mean, error) in above.items() if mean <= 2 * error]
    if got == expected:
        return None
    complaint = f"{written} gives {show(got)}, expected {show(expected)}"
    odd = [name for name in table if (name in got) != (name in expected)]
    mean, error = above[odd[0]] if odd else (0, 0)
    return f"{complaint}; {odd[0]} − {best} is {mean:.4f} ± {error:.4f}" if mean else complaint


def _mean_and_error(differences: np.ndarray) -> tuple[float, float]:
    n = len(differences)
    mean = differences.sum() / n
    return mean, math.sqrt(((differences - mean) ** 2).sum() / (n - 1) / n)


def _best_of(window_nats):
    return min(window_nats, key=lambda name: float(window_nats[name].mean()))


def _paired_error(nats, best):
    return (nats - best).std() / len(nats) ** 0.5


def _within(window_nats, allowed, best=None):
    best = window_nats[best or _best_of(window_nats)]
    return [
        name
        for name, nats in window_nats.items()
        if (nats - best).mean().abs() <= allowed(nats, best)
    ]


def errors_added(window_nats):
    """Adds the errors of the two means, as if each model had windows of its own."""
    return _within(window_nats, lambda a, b: 2 * (a.var() / len(a) + b.var() / len(b)) ** 0.5)


def spread_of_a_window(window_nats):
    """Takes the standard deviation of one window for the error of the mean."""
    return _within(window_nats, lambda a, b: 2 * (a - b).std())


def divided_by_n(window_nats):
    """Divides by n where √n is due."""
    return _within(window_nats, lambda a, b: 2 * (a - b).std() / len(a))


def one_standard_error(window_nats):
    """Allows one standard error."""
    return _within(window_nats, _paired_error)


def deviation_over_n(window_nats):
    """Divides by n in the standard deviation."""
    return _within(window_nats, lambda a, b: 2 * (a - b).std(correction=0) / len(a) ** 0.5)


def compared_with_the_first(window_nats):
    """Takes the first model for the best one."""
    return _within(window_nats, lambda a, b: 2 * _paired_error(a, b), next(iter(window_nats)))


def most_nats_for_best(window_nats):
    """Takes the model with the largest loss for the best one."""
    worst = max(window_nats, key=lambda name: float(window_nats[name].mean()))
    return _within(window_nats, lambda a, b: 2 * _paired_error(a, b), worst)


def best_left_out(window_nats):
    """Returns the others only."""
    best = _best_of(window_nats)
    return [name for name in ties_in_numpy(window_nats) if name != best]


def less_than_two_errors(window_nats):
    """Writes < for ≤, and 0 < 0 does not hold."""
    best = window_nats[_best_of(window_nats)]
    return [
        name
        for name, nats in window_nats.items()
        if (nats - best).mean() < 2 * _paired_error(nats, best)
    ]


def only_the_best(window_nats):
    """Returns the best model alone."""
    return [_best_of(window_nats)]


def handed_on(window_nats):
    """Compares each model with the one before it in rank."""
    ranked = sorted(window_nats, key=lambda name: float(window_nats[name].mean()))
    tied = ranked[:1]
    for before, name in itertools.pairwise(ranked):
        nats = window_nats[name] - window_nats[before]
        if nats.mean() > 2 * nats.std() / len(nats) ** 0.5:
            break
        tied.append(name)
    return [name for name in window_nats if name in tied]


def best_first(window_nats):
    """Returns the names by rank."""
    return sorted(ties_in_numpy(window_nats), key=lambda name: float(window_nats[name].mean()))


_WRONG_TIES = (
    (errors_added, "the windows are the same: take the error of the differences, not of two means"),
    (spread_of_a_window, "that is the spread of one window; its mean over n has 1/√n of it"),
    (divided_by_n, "the standard error is the deviation over √n, not over n"),
    (one_standard_error, "a tie reaches to two standard errors, not to one"),
    (deviation_over_n, "few windows: divide by n − 1 in the standard deviation"),
    (compared_with_the_first, "the best model is the one with the least mean, wherever it stands"),
    (most_nats_for_best, "the best model has the fewest nats"),
    (less_than_two_errors, "a difference of 0 with an error of 0 is a tie too: use <="),
    (best_left_out, "the best model belongs to the answer"),
    (only_the_best, "models that the best one does not clearly beat belong to it as well"),
    (handed_on, "ties are not handed on: compare each with the best, not with the next"),
    (best_first, "keep the order of the dict"),
)


def ties_in_numpy(window_nats):
    """Divides the mean by its error, where there is one."""
    table = np.stack([nats.numpy() for nats in window_nats.values()])
    differences = table - table[table.mean(1).argmin()]
    mean, error = differences.mean(1), differences.std(1, ddof=1) / table.shape[1] ** 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        tied = ~(mean / error > 2)
    return list(itertools.compress(window_nats, tied.tolist()))


def ties_by_squares(window_nats):
    """Squares both sides, and adds up by hand."""
    ranked = sorted(window_nats, key=lambda name: sum(window_nats[name].tolist()))
    lost, best = set(), window_nats[ranked[0]].tolist()
    for name in ranked[1:]:
        d = [x - y for x, y in zip(window_nats[name].tolist(), best, strict=True)]
        mean = fmean(d)
        if mean**2 * len(d) * (len(d) - 1) > 4 * sum((x - mean) ** 2 for x in d):
            lost.add(name)
    return [name for name in window_nats if name not in lost]


# 6.3 ------------------------------------------------------------------------------------------

_NEEDS = ("none", "calibration", "training")


def _row(name, nbytes, nats, error, data, tokens_per_second):
    return {
        "name": name, "nbytes": nbytes, "nats": nats, "error": error, "data": data,
        "tokens_per_second": tokens_per_second,
    }  # fmt: skip


def _row_cases():
    fp32 = _row("FP32", 400, 0.0, 0.0, "none", 10.0)
    int8 = _row("INT8", 100, 0.125, 0.0625, "none", 20.0)
    gptq = _row("GPTQ", 60, 0.3125, 0.0625, "calibration", 30.0)
    qat = _row("QAT", 60, 0.25, 0.0625, "training", 25.0)
    for data in _NEEDS:
        yield [fp32, int8, gptq, qat], 99, 0.5, data
    yield [fp32, int8], 100, 0.5, "none"  # fits exactly
    yield [fp32, int8], 110, 0.25, "none"  # 0.125 + 2 · 0.0625
    yield [fp32, _row("INT4", 60, 0.375, 0.125, "none", 30.0), int8], 100, 0.5625, "none"
    yield [_row("INT4", 60, 0.4375, 0.125, "none", 30.0), int8], 100, 0.5, "none"
    yield [_row("INT4", 60, 0.625, 0.125, "none", 30.0), int8], 100, 0.5, "none"
    for rows in ([fp32, {**int8, "tokens_per_second": 10.0}], [{**gptq, "nbytes": 70}, qat]):
        rows = [{**row, "tokens_per_second": 30.0} for row in rows]
        yield rows, 500, 0.5, "training"
        yield rows[::-1], 500, 0.5, "training"
    random = np.random.default_rng(63)
    for i in range(24):
        n = 4 + i % 6
        sizes = random.choice(np.arange(40, 400), n, replace=False).tolist()
        rows = []
        for j, nbytes in enumerate(sizes):
            nats, error = random.uniform(0.1, 0.6), random.uniform(0.02, 0.2)
            needs = _NEEDS[random.integers(3)]
            rows.append(_row(f"row {j}", nbytes, nats, error, needs, float(random.integers(2, 7))))
        limit = sorted(sizes)[-(-2 * n // 3)] if i % 2 else 400
        yield rows, limit, random.uniform(0.4, 0.8), _NEEDS[i % 3]


def _check_choose(function) -> None:
    _judge_on_dicts("choose", function, _row_cases(), _examine_choose, _WRONG_CHOICE, _write_rows)


def _write_rows(rows, max_nbytes, max_nats, data) -> str:
    return f"{len(rows)} rows, {max_nbytes}, {show(max_nats)}, {data!r}"


def _examine_choose(rows, max_nbytes, max_nats, data, got) -> str | None:
    written = f"choose({_write_rows(rows, max_nbytes, max_nats, data)})"
    if got is not None and not isinstance(got, str):
        raise Wrong(f"{written} returns {kind(got)}, expected a name or None")
    usable = _NEEDS[: _NEEDS.index(data) + 1]
    best = None
    for row in rows:
        loss = row["nats"] + row["error"] + row["error"]
        if row["nbytes"] > max_nbytes or loss > max_nats or row["data"] not in usable:
            continue
        rank = row["tokens_per_second"], -row["nbytes"]
        if best is None or rank > (best["tokens_per_second"], -best["nbytes"]):
            best = row
    if got == (best and best["name"]):
        return None
    chosen = next((row for row in rows if row["name"] == got), got)
    return f"{written} gives {_write_row(chosen)}, expected {_write_row(best)}"


def _write_row(row) -> str:
    if not isinstance(row, dict):
        return show(row)
    nats, speed = f"{row['nats']:.3g} ± {row['error']:.3g} nats", show(row["tokens_per_second"])
    return f"{row['name']} ({row['nbytes']} bytes, {nats}, {row['data']}, {speed} tokens/s)"


def _speed_then_bytes(row):
    return row["tokens_per_second"], -row["nbytes"]


def _pick(rows, key=_speed_then_bytes):
    return max(rows, key=key)["name"] if rows else None


def _fitting(rows, max_nbytes, max_nats, data):
    return [
        row
        for row in rows
        if row["nbytes"] <= max_nbytes
        and row["nats"] + 2 * row["error"] <= max_nats
        and _NEEDS.index(row["data"]) <= _NEEDS.index(data)
    ]


def error_ignored(rows, max_nbytes, max_nats, data):
    """Trusts the measured loss."""
    return _pick(_fitting([{**row, "error": 0} for row in rows], max_nbytes, max_nats, data))


def one_error_added(rows, max_nbytes, max_nats, data):
    """Adds one standard error."""
    halved = [{**row, "error": row["error"] / 2} for row in rows]
    return _pick(_fitting(halved, max_nbytes, max_nats, data))


def error_subtracted(rows, max_nbytes, max_nats, data):
    """Counts the doubt in favor of the row."""
    lowered = [{**row, "error": -row["error"]} for row in rows]
    return _pick(_fitting(lowered, max_nbytes, max_nats, data))


def same_data_only(rows, max_nbytes, max_nats, data):
    """Wants a row that uses all the data there is."""
    fitting = _fitting(rows, max_nbytes, max_nats, data)
    return _pick([row for row in fitting if row["data"] == data])


def data_ignored(rows, max_nbytes, max_nats, data):
    """Forgets what a strategy needs."""
    return _pick(_fitting(rows, max_nbytes, max_nats, "training"))


def words_by_the_alphabet(rows, max_nbytes, max_nats, data):
    """Compares the words as text."""
    fitting = _fitting(rows, max_nbytes, max_nats, "training")
    return _pick([row for row in fitting if row["data"] <= data])


def fastest_or_nothing(rows, max_nbytes, max_nats, data):
    """Looks at the fastest row of all, and gives up if it does not fit."""
    fastest = max(rows, key=_speed_then_bytes)
    return _pick(_fitting([fastest], max_nbytes, max_nats, data))


def smallest_row(rows, max_nbytes, max_nats, data):
    """Takes the row with the fewest bytes."""
    return _pick(_fitting(rows, max_nbytes, max_nats, data), lambda row: -row["nbytes"])


def first_of_the_fastest(rows, max_nbytes, max_nats, data):
    """Takes the first of equally fast rows."""
    fitting = _fitting(rows, max_nbytes, max_nats, data)
    return _pick(fitting, lambda row: row["tokens_per_second"])


def less_than_the_bytes(rows, max_nbytes, max_nats, data):
    """Writes < for ≤ in the bytes."""
    return _pick(_fitting(rows, max_nbytes - 1, max_nats, data))


def less_than_the_nats(rows, max_nbytes, max_nats, data):
    """Writes < for ≤ in the nats."""
    return _pick(_fitting(rows, max_nbytes, max_nats - 1e-9, data))


_WRONG_CHOICE = (
    (error_ignored, "the true loss may lie above the measured one: add two standard errors"),
    (one_error_added, "a limit that must hold takes two standard errors, not one"),
    (error_subtracted, "the doubt counts against a row: add the errors"),
    (same_data_only, "who has more data than a strategy needs can use it too"),
    (data_ignored, "a strategy that needs data you lack is out"),
    (words_by_the_alphabet, "as text, 'calibration' comes before 'none': give the words an order"),
    (fastest_or_nothing, "take the fastest of the rows that fit, not the fastest of all"),
    (smallest_row, "of the rows that fit take the fastest, not the smallest"),
    (first_of_the_fastest, "two rows are equally fast: the one with fewer bytes wins"),
    (less_than_the_bytes, "a row of exactly max_nbytes fits: use <="),
    (less_than_the_nats, "a loss that just reaches max_nats is allowed: use <="),
)


def choose_by_sorting(rows, max_nbytes, max_nats, data):
    """Ranks all rows, and takes the first that fits."""
    order = {"none": 0, "calibration": 1, "training": 2}
    for row in sorted(rows, key=lambda row: (-row["tokens_per_second"], row["nbytes"])):
        small, known = row["nbytes"] <= max_nbytes, order[row["data"]] <= order[data]
        if small and known and row["nats"] <= max_nats - 2 * row["error"]:
            return row["name"]
    return None


def choose_by_columns(rows, max_nbytes, max_nats, data):
    """Masks numpy columns."""
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    fits = (column["nbytes"] <= max_nbytes) & (max_nats - column["nats"] >= 2 * column["error"])
    fits &= np.isin(column["data"], _NEEDS[: _NEEDS.index(data) + 1])
    if not fits.any():
        return None
    fits &= column["tokens_per_second"] == column["tokens_per_second"][fits].max()
    return str(column["name"][np.where(fits, column["nbytes"], np.inf).argmin()])


# 6.4 ------------------------------------------------------------------------------------------


class _Raised(str):
    """Stands for a `ValueError` among results. All are equal; each has its `reason`."""


def _with_errors_as_results(function):
    def answer(tasks, lines):
        try:
            return function(tasks, lines)
        except ValueError as error:
            raised = _Raised("a ValueError was raised")
            raised.reason = f"{type(error).__name__} ({' '.join(str(error).split())[:80]})"
            return raised

    return answer


def _task(strategy, model, seed):
    return {"strategy": strategy, "model": model, "seed": seed}


def _line(task, nats=3.25, turned=False) -> str:
    if turned:
        return json.dumps({"nats": nats, "task": dict(reversed(task.items()))})
    return json.dumps({"task": task, "nats": nats})


def _record_cases():
    a, b, c = _task("INT8", "tiny", 0), _task("INT4", "tiny", 0), _task("INT4", "tiny", 1)
    yield [a, b], [_line(a)]
    yield [a, b], []
    yield [b, a], [_line(a)]
    yield [a, b], [_line(a, turned=True)]
    yield [a, b], [_line(a), _line(b)[:25]]
    yield [a, b], [_line(a), _line(b)[:-1]]
    yield [a, b, c], [_line(a), "", _line(c)]
    yield [a, b, c], [_line(b), _line(b)]
    yield [a, b, c], [_line(b), _line(_task("INT2", "tiny", 0))]
    yield [a, b, c], [_line(c), ""]
    yield [b, c], [_line(b)[:25], _line(c)]
    yield [c, b, a], [_line(a), _line(b)[:-1] + _line(c), _line(b)]
    random = np.random.default_rng(64)
    plan = itertools.product(("INT8", "GPTQ", "INT4"), ("tiny", "big"), (0, 1))
    plan = [_task(*names) for names in plan]
    for number in range(16):
        tasks = [plan[i] for i in random.permutation(len(plan))[:5]]
        done = [tasks[i] for i in random.permutation(5)[:3]]
        lines = [_line(t, float(random.random()), turned=random.random() < 0.4) for t in done]
        if number % 2:  # recorded twice, with a blank line between
            lines = [lines[1], "", *lines]
        if number % 4 < 3:
            rest = _line(tasks[number % 5])
            lines.append(rest[: int(random.integers(9, len(rest)))])
        if number % 8 == 5:
            lines.append(_line(done[-1]))
        yield tasks, lines


def _check_left(function) -> None:
    answer = _with_errors_as_results(function)
    wrong_answers = tuple((_with_errors_as_results(w), message) for w, message in _WRONG_LEFT)
    name = "left_to_do"
    _judge_on_dicts(name, answer, _record_cases(), _examine_left, wrong_answers, _write_lines)


def _broken(lines) -> list[int]:
    # A whole line has two brackets of each kind: those of the record and those of its task.
    return [i for i, x in enumerate(lines) if x and (x.count("{"), x.count("}")) != (2, 2)]


def _write_lines(tasks, lines) -> str:
    n_lines = f"{len(lines)} line" + "s" * (len(lines) != 1)
    notes = {"a cut-off end": len(lines) - 1 in _broken(lines), "a blank line": "" in lines}
    notes["a broken line before the end"] = any(i < len(lines) - 1 for i in _broken(lines))
    noted = " and ".join(note for note, holds in notes.items() if holds)
    return f"{len(tasks)} tasks, {n_lines}" + (f" with {noted}" if noted else "")


def _examine_left(tasks, lines, got) -> str | None:
    written = f"left_to_do({_write_lines(tasks, lines)})"
    broken = _broken(lines)
    if any(i < len(lines) - 1 for i in broken):
        if isinstance(got, _Raised):
            return None
        what = _write_tasks(got) if _are_tasks(got) else kind(got)
        return f"{written} returns {what}, expected a ValueError"
    done = [json.loads(x)["task"] for i, x in enumerate(lines) if x and i not in broken]
    expected = [task for task in tasks if task not in done]
    if isinstance(got, _Raised):
        return f"{written} raises {got.reason}, expected {_write_tasks(expected)}"
    if not _are_tasks(got):
        raise Wrong(f"{written} returns {kind(got)}, expected a list of tasks")
    if got == expected:
        return None
    return f"{written} gives {_write_tasks(got)}, expected {_write_tasks(expected)}"


def _are_tasks(got) -> bool:
    return isinstance(got, list) and all(isinstance(task, dict) for task in got)


def _write_tasks(tasks) -> str:
    names = [show(" ".join(str(value) for value in task.values())).strip("'") for task in tasks]
    return f"[{', '.join(names[:5])}{', …' * (len(names) > 5)}]"


def _records(lines, at_a_broken_line=None):
    """Return the records; by default a broken last line counts for nothing, and others raise."""
    records = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if at_a_broken_line == "stop":
                break
            if at_a_broken_line == "raise" or (at_a_broken_line is None and i < len(lines) - 1):
                raise
    return records


def _not_in(tasks, records):
    done = [record["task"] for record in records]
    return [task for task in tasks if task not in done]


def end_must_be_whole(tasks, lines):
    """Lets the cut-off end raise."""
    return _not_in(tasks, _records(lines, "raise"))


def broken_lines_skipped(tasks, lines):
    """Skips broken lines wherever they are."""
    return _not_in(tasks, _records(lines, "skip"))


def stops_at_a_broken_line(tasks, lines):
    """Stops reading at a broken line, wherever it is."""
    return _not_in(tasks, _records(lines, "stop"))


def last_line_dropped(tasks, lines):
    """Drops the last line, whole or not."""
    return _not_in(tasks, _records(lines[:-1], "raise"))


def blank_lines_broken(tasks, lines):
    """Takes a blank line for a broken one."""
    records = _records(lines)
    if "" in lines[:-1]:
        raise ValueError("a blank line")
    return _not_in(tasks, records)


def tasks_as_text(tasks, lines):
    """Compares tasks as text, with their keys in order."""
    done = [json.dumps(record["task"]) for record in _records(lines)]
    return [task for task in tasks if json.dumps(task) not in done]


def text_of_a_broken_line(tasks, lines):
    """Counts a task that stands in a cut-off line."""
    left = _not_in(tasks, _records(lines))
    return [t for t in left if not any(json.dumps(t) in line for line in lines[-1:])]


def counted_on(tasks, lines):
    """Goes on after as many tasks as there are records."""
    return tasks[len(_records(lines)) :]


def only_the_strategy(tasks, lines):
    """Takes a strategy for done with its first record."""
    done = {record["task"]["strategy"] for record in _records(lines)}
    return [task for task in tasks if task["strategy"] not in done]


def taken_off_the_list(tasks, lines):
    """Removes each record's task from a list, which raises the second time."""
    left = list(tasks)
    for record in _records(lines):
        left.remove(record["task"])
    return left


def in_a_new_order(tasks, lines):
    """Sorts what is left."""
    return sorted(_not_in(tasks, _records(lines)), key=json.dumps)


_WRONG_LEFT = (
    (end_must_be_whole, "a cut-off last line counts for nothing, and raises nothing"),
    (broken_lines_skipped, "only the last line can be cut off; a broken one before it must raise"),
    (stops_at_a_broken_line, "a broken line with others after it must raise, not end the reading"),
    (last_line_dropped, "a last line that is whole counts"),
    (blank_lines_broken, "a blank line is no broken line: skip it"),
    (tasks_as_text, "compare dicts, not text: a line may have its keys in another order"),
    (text_of_a_broken_line, "a cut-off line has no result, even if its task can be read"),
    (counted_on, "which tasks have a record matters, not how many records there are"),
    (only_the_strategy, "a task is all of its keys: another model or seed is another task"),
    (taken_off_the_list, "a task may be recorded twice, and list.remove raises the second time"),
    (in_a_new_order, "keep the order of the tasks"),
)


def left_by_keys(tasks, lines):
    """Makes sorted text of each task, and reads the last line apart."""
    *whole, last = [line for line in lines if line.strip()] or [""]
    records = [json.loads(line) for line in whole]
    if last.endswith("}") and last.count("{") == last.count("}"):
        records.append(json.loads(last))
    done = {json.dumps(record["task"], sort_keys=True) for record in records}
    return [task for task in tasks if json.dumps(task, sort_keys=True) not in done]


def left_from_the_end(tasks, lines):
    """Reads backwards, and takes tasks off a copy of the list."""
    left, is_last = list(tasks), True
    for line in reversed(lines):
        try:
            done = json.loads(line)["task"] if line else None
        except json.JSONDecodeError:
            if not is_last:
                raise ValueError(f"a broken line: {line}") from None
            done = None
        left = [task for task in left if task != done]
        is_last = False
    return left


# 6.5 ------------------------------------------------------------------------------------------


def _run_of(scheme, runtime, threads, prompt_seconds, seconds_a_token, tokens):
    return {
        "scheme": scheme, "runtime": runtime, "threads": threads, "prompt_seconds": prompt_seconds,
        "total_seconds": prompt_seconds + tokens * seconds_a_token, "tokens": tokens,
    }  # fmt: skip


def _timing_cases():
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


def _check_gains(function) -> None:
    _judge_on_dicts("gains", function, _timing_cases(), _examine_gains, _WRONG_GAINS, _write_runs)


def _write_runs(runs, scheme) -> str:
    return f"{len(runs)} runs, {scheme!r}"


def _examine_gains(runs, scheme, got) -> str | None:
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


_WRONG_GAINS = (
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


EXERCISES = (
    Exercise(
        "6.1", "The front", 1, 10, ("pareto",), _check_front,
        "What is not on the front has a better choice beside it, whatever you weigh more.",
        _WRONG_FRONT, (pareto_by_sorting, pareto_by_broadcasting),
    ),
    Exercise(
        "6.2", "Who ties with the best?", 2, 15, ("ties_with_best",), _check_ties,
        "The winner of a table is a group, and within it something else may decide.",
        _WRONG_TIES, (ties_in_numpy, ties_by_squares),
    ),
    Exercise(
        "6.3", "Someone has a limit", 2, 20, ("choose",), _check_choose,
        "There is no best strategy before someone says what they have and what they can bear.",
        _WRONG_CHOICE, (choose_by_sorting, choose_by_columns),
    ),
    Exercise(
        "6.4", "Go on where it stopped", 2, 20, ("left_to_do",), _check_left,
        "A file that only grows by lines survives a killed process, short of its last line.",
        _WRONG_LEFT, (left_by_keys, left_from_the_end),
    ),
    Exercise(
        "6.5", "Bug hunt: four times as fast", 2, 20, ("gains",), _check_gains,
        "A gain compares two numbers that differ in one thing alone: the scheme.",
        _WRONG_GAINS, (gains_by_sorting, gains_with_torch),
        broken=broken_gains,
    ),
)  # fmt: skip
