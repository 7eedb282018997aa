"""Exercise 6.4: `left_to_do` reads a record that may be cut off, and says which tasks are left.

The reference is Python's `json`; a line is broken if its brackets do not match.
"""

import itertools
import json

import numpy as np

from labkit.exercises.judge import Exercise, Wrong, kind, show
from labkit.exercises.judge_on_dicts import judge_on_dicts


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


def _cases():
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


def _check(function) -> None:
    answer = _with_errors_as_results(function)
    wrong_answers = tuple((_with_errors_as_results(w), message) for w, message in _WRONG)
    name = "left_to_do"
    judge_on_dicts(name, answer, _cases(), _examine, wrong_answers, _write_lines)


def _broken(lines) -> list[int]:
    # A whole line has two brackets of each kind: those of the record and those of its task.
    return [i for i, x in enumerate(lines) if x and (x.count("{"), x.count("}")) != (2, 2)]


def _write_lines(tasks, lines) -> str:
    n_lines = f"{len(lines)} line" + "s" * (len(lines) != 1)
    notes = {"a cut-off end": len(lines) - 1 in _broken(lines), "a blank line": "" in lines}
    notes["a broken line before the end"] = any(i < len(lines) - 1 for i in _broken(lines))
    noted = " and ".join(note for note, holds in notes.items() if holds)
    return f"{len(tasks)} tasks, {n_lines}" + (f" with {noted}" if noted else "")


def _examine(tasks, lines, got) -> str | None:
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


_WRONG = (
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


EXERCISE = Exercise(
    id="6.4",
    title="Go on where it stopped",
    stars=2,
    minutes=20,
    function_names=("left_to_do",),
    check=_check,
    takeaway="A file that only grows by lines survives a killed process, short of its last line.",
    wrong_answers=_WRONG,
    variants=(left_by_keys, left_from_the_end),
)
