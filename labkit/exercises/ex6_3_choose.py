"""Exercise 6.3: `choose` returns the fastest row that keeps limits of size, loss and data.

The reference is a plain loop over the rows, one condition after another.
"""

import numpy as np

from labkit.exercises.judge import Exercise, Wrong, kind, show
from labkit.exercises.judge_on_dicts import judge_on_dicts

_NEEDS = ("none", "calibration", "training")


def _row(name, nbytes, nats, error, data, tokens_per_second):
    return {
        "name": name, "nbytes": nbytes, "nats": nats, "error": error, "data": data,
        "tokens_per_second": tokens_per_second,
    }  # fmt: skip


def _cases():
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


def _check(function) -> None:
    judge_on_dicts("choose", function, _cases(), _examine, _WRONG, _write_rows)


def _write_rows(rows, max_nbytes, max_nats, data) -> str:
    return f"{len(rows)} rows, {max_nbytes}, {show(max_nats)}, {data!r}"


def _examine(rows, max_nbytes, max_nats, data, got) -> str | None:
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


_WRONG = (
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


EXERCISE = Exercise(
    id="6.3",
    title="Someone has a limit",
    stars=2,
    minutes=20,
    function_names=("choose",),
    check=_check,
    takeaway="There is no best strategy before someone says what they have and what they can bear.",
    wrong_answers=_WRONG,
    variants=(choose_by_sorting, choose_by_columns),
)
