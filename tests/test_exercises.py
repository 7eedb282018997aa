"""The exercises: each known wrong answer gets its own message; solutions and variants pass."""

import ast
import contextlib
import functools
import inspect
import math
import re
import struct
import textwrap
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

import labkit
from labkit import exercises
from labkit.authoring.exercise_cells import (
    HINTS,
    SOLUTION,
    Cells,
    exercises_of,
    folds_of,
    solution_of,
)
from labkit.authoring.notebooks import NAMES
from labkit.exercises import Exercise, registry, verdict

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
EXERCISES = list(registry().values())
WRONG = [(e, answer, fragment) for e in EXERCISES for answer, fragment in e.wrong_answers]
CHAPTERS = sorted({e.id.split(".")[0] for e in EXERCISES})

each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)


def name_of(value) -> str:
    return getattr(value, "id", None) or getattr(value, "__name__", "")


# What the checks say ---------------------------------------------------------------------------


@pytest.mark.parametrize(("exercise", "answer", "fragment"), WRONG, ids=name_of)
def test_wrong_answer_gets_its_own_message(exercise, answer, fragment):
    found = verdict(exercise.id, answer)
    assert found.status == "wrong"
    heard = [f for _, f in exercise.wrong_answers if f.lower() in found.message.lower()]
    assert heard == [fragment]
    assert "expected" in found.message or "comes back as" in found.message, "no example"
    assert "\n" not in found.message
    assert len(found.message) < 300
    assert answer.__doc__, "the docstring names the misconception"


@each_exercise
def test_exercise_is_complete(exercise):
    fragments = [fragment for _, fragment in exercise.wrong_answers]
    assert len(fragments) >= 3
    assert len(set(fragments)) == len(fragments)
    assert 1 <= exercise.stars <= 3
    assert exercise.minutes > 0
    assert exercise.variants
    for variant in exercise.variants:
        assert verdict(exercise.id, variant) == exercises.Verdict("correct", exercise.takeaway)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def bfloat16_elsewhere_without_gradients():
    with default_dtype(torch.bfloat16), torch.device("meta"), torch.inference_mode():
        yield


def settings_of_torch():
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()


@each_exercise
def test_right_and_wrong_answers_are_told_where_float64_is_the_default(exercise):
    with default_dtype(torch.float64):
        for variant in exercise.variants:
            found = verdict(exercise.id, variant)
            assert found == exercises.Verdict("correct", exercise.takeaway), variant.__name__
        for answer, fragment in exercise.wrong_answers:
            assert fragment.lower() in verdict(exercise.id, answer).message.lower()
        assert torch.get_default_dtype() == torch.float64


@each_exercise
def test_a_right_answer_is_right_whatever_torch_is_set_to(exercise):
    with bfloat16_elsewhere_without_gradients():
        before = settings_of_torch()
        assert verdict(exercise.id, exercise.variants[-1]).status == "correct"
        assert settings_of_torch() == before


def cast(value, dtype):
    """Turn every floating-point tensor in a result into another dtype."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return type(value)(cast(x, dtype) for x in value) if type(value) in (tuple, list) else value


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "exercise",
    [e for e in EXERCISES if e.id not in ("1.1", "5.3")],  # 1.1 takes no help of torch, 5.3 arrays
    ids=lambda e: e.id,
)
def test_a_wrong_dtype_is_called_that_and_nothing_else(exercise, dtype):
    # Values of float64 are as good; where they are refused, then for their dtype.
    for right in exercise.variants:
        found = verdict(exercise.id, lambda *args, right=right: cast(right(*args), dtype))
        if found.status == "correct":
            continue
        assert f"a {str(dtype).removeprefix('torch.')} tensor" in found.message
        assert "expected a float32 tensor" in found.message
        assert [f for _, f in exercise.wrong_answers if f.lower() in found.message.lower()] == []


def test_codes_of_another_integer_type_are_called_that():
    right = registry()["1.3"].variants[0]

    def answer(w, bits):
        codes, scale, zero_point = right(w, bits)
        return codes.int(), scale, zero_point

    found = verdict("1.3", answer)
    assert found.message == (
        "For weights of shape (1, 3), codes is an int32 tensor of shape (1, 3), expected a uint8 "
        "tensor of shape (1, 3): mind the dtype."
    )


def test_a_known_mistake_in_another_dtype_is_first_told_of_its_dtype():
    mistake, fragment = registry()["3.1"].wrong_answers[0]
    assert fragment in verdict("3.1", mistake).message.lower()
    found = verdict("3.1", lambda *args: mistake(*args).double())
    assert fragment not in found.message.lower()
    assert "a float64 tensor" in found.message


# Written as a learner might, unlike the functions in the registry.
def fp16_normal_only(pattern):
    sign = (pattern & 0x8000) >> 15
    return (-1) ** sign * 2 ** (((pattern >> 10) & 0x1F) - 15) * (1 + (pattern & 0x3FF) / 2**10)


def fp16_with_whole_sign(pattern):
    sign, field, fraction = (-1) ** (pattern >> 15), pattern >> 10 & 31, pattern & 1023
    if field == 31:
        return math.nan if fraction else sign * math.inf
    return sign * (fraction + 1024 * (field > 0)) / 2**24 * 2 ** max(field - 1, 0)


def bf16_normal_only(pattern):
    return (
        (-1) ** (pattern >> 15) * (1 + (pattern & 127) / 128) * 2.0 ** ((pattern >> 7 & 255) - 127)
    )


def fake_quantize_with_max(x, bits):
    q = 2 ** (bits - 1) - 1
    s = torch.max(x).item() / q or 1.0
    return torch.clamp(torch.round(x * (1 / s)), -q, q) * s


def bytes_as_float(rows, columns, bits, group_size):
    return rows * columns * bits / 8 + rows * columns / group_size * 3


def mxfp4_by_searchsorted(blocks):
    exponent = torch.floor(torch.log2(blocks.abs().max(1).values)) - 2
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32)
    scaled = blocks / 2 ** exponent.clamp(min=-127)[:, None]
    codes = torch.searchsorted(values, scaled.abs(), right=True) - 1 + 8 * (scaled < 0).int()
    return (exponent.clamp(min=-127) + 127).byte(), (codes[:, ::2] + 16 * codes[:, 1::2]).byte()


def mxfp4(exponent_of, largest_of):
    def answer(blocks):
        values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32)
        exponent = exponent_of(largest_of(blocks)).clamp(min=-127)
        scaled = blocks / 2.0 ** exponent[:, None]
        codes = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
        return (exponent + 127).byte(), (codes[:, 0::2] + 16 * codes[:, 1::2]).byte()

    return answer


def rows_with_fraction(w, bits):
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    return (w / scale - low / scale).round().clamp(0, 2**bits - 1).byte(), scale, -low / scale


def rows_with_zero_only(w, bits):
    low, high = torch.clamp(w.min(1)[0], max=0), torch.clamp(w.max(1)[0], min=0)
    scale = ((high - low) / 2**bits)[:, None].clamp(min=1e-8)
    zero = torch.round(-low[:, None] / scale).clamp(0, 2**bits - 1)
    return (torch.round(w / scale) + zero).int().to(torch.uint8), scale, zero


def calibrate_overwriting(batches):
    for batch in batches:
        low, high = min(0, float(batch.min())), max(0, float(batch.max()))
    return (high - low) / 255, round(-low / ((high - low) / 255))


@pytest.mark.parametrize(
    ("id", "answer", "fragment"),
    [
        ("1.1", fp16_normal_only, "subnormals"),
        ("1.1", fp16_with_whole_sign, "0x8000 is −0.0"),
        ("1.1", bf16_normal_only, "the fields of BF16"),
        ("1.1", lambda pattern: "1.0", "returns a str, expected a float"),
        ("1.1", lambda pattern: 2.0 ** (1024 * (pattern > 0x7BFF)), "OverflowError"),
        ("1.2", fake_quantize_with_max, "largest |x|"),
        ("1.2", lambda x, bits: x.double(), "expected a float32 tensor of shape (3,)"),
        ("1.4", bytes_as_float, "divide with //"),
        ("1.5", mxfp4_by_searchsorted, "take the nearest value"),
        (
            "1.5",
            mxfp4(lambda x: torch.frexp(x).exponent - 2, lambda blocks: blocks.abs().amax(1)),
            "the exponent of torch.frexp is one more",
        ),
        (
            "1.5",
            mxfp4(lambda x: torch.log2(x).ceil() - 2, lambda blocks: blocks.abs().amax(1)),
            "rounds the exponent down",
        ),
        (
            "1.5",
            mxfp4(lambda x: torch.frexp(x).exponent - 3, lambda blocks: blocks.amax(1)),
            "from the largest |x|, not from the largest x",
        ),
        ("1.3", rows_with_fraction, "a zero point is an integer"),
        ("1.3", rows_with_zero_only, "zero is in the range now"),
        ("1.6", calibrate_overwriting, "overwrites"),
        ("1.6", lambda batches: (torch.tensor(1.0), 0), ".item()"),
    ],
)
def test_learner_written_mistakes_are_recognized(id, answer, fragment):
    found = verdict(id, answer)
    assert found.status == "wrong"
    assert fragment.lower() in found.message.lower()


def compensate_with(factor_of):
    def answer(weight, hessian, scale):
        left, rounded, factor = weight.clone(), torch.zeros_like(weight), factor_of(hessian)
        for j in range(weight.shape[1]):
            rounded[:, j] = (left[:, j] / scale[:, 0]).round().clamp(-7, 7) * scale[:, 0]
            error = (left[:, j] - rounded[:, j]) / factor[j, j]
            left[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
        return rounded

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        compensate_with(lambda hessian: torch.linalg.cholesky(torch.linalg.inv(hessian))),
        compensate_with(lambda hessian: torch.linalg.inv(torch.linalg.cholesky(hessian))),
        lambda weight, hessian, scale: (weight / scale).round().clamp(-7, 7) * scale,
    ],
    ids=["lower", "inverse of lower", "rounding"],
)
def test_plain_rounding_hears_of_both_its_causes(answer):
    message = verdict("2.3", answer).message
    assert "columns are rounded as they were, or the factor is a lower one" in message


@pytest.mark.parametrize("share", [0.005, 0.01, 0.03, 0.1, 0.3])
def test_a_hessian_damped_again_by_any_share_hears_of_it(share):
    def factor_of(hessian):
        more = share * hessian.diagonal().mean() * torch.eye(len(hessian))
        return torch.linalg.cholesky(torch.linalg.inv(hessian + more), upper=True)

    assert "damped already" in verdict("2.3", compensate_with(factor_of)).message


@pytest.mark.parametrize("zero", [0, np.int64(0), np.float32(0), -0.0])
def test_any_real_number_ends_a_range_and_a_bool_does_not(zero):
    def ends(x, percent):
        low, high = registry()["2.1"].variants[1](x, percent)
        return zero if low == 0 else low, zero if high == 0 else high

    assert verdict("2.1", ends).status == "correct"
    found = verdict("2.1", lambda x, percent: (False, ends(x, percent)[1]))
    assert "returns (a bool, a float64), expected a pair of floats" in found.message


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_swapped_pair_is_called_that_in_any_integer_type(dtype):
    def answer(weight, levels, block_size):
        packed, scale = registry()["2.5"].variants[0](weight, levels, block_size)
        return scale, packed.to(dtype)

    message = verdict("2.5", answer).message
    assert "pair is swapped" in message
    assert "mind the dtype" not in message


def with_part(id, place, change):
    right = registry()[id].variants[0]

    def answer(*arguments):
        parts = right(*arguments)
        if place is None:
            return change(parts)
        return tuple(change(part) if i == place else part for i, part in enumerate(parts))

    return answer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("id", "place"), [("1.2", None), ("1.3", 0), ("1.3", 1), ("1.5", 0), ("1.5", 1)]
)
def test_a_right_value_in_another_dtype_hears_about_the_dtype(id, place, dtype):
    found = verdict(id, with_part(id, place, lambda part: part.to(dtype)))
    assert found.status == "wrong"
    assert f"{str(dtype).removeprefix('torch.')} tensor" in found.message
    assert [f for _, f in registry()[id].wrong_answers if f.lower() in found.message.lower()] == []


@pytest.mark.parametrize(("place", "change"), [(0, torch.tensor), (1, float), (1, torch.tensor)])
def test_a_right_number_of_another_type_hears_about_the_type(place, change):
    found = verdict("1.6", with_part("1.6", place, change))
    assert f"the {('scale', 'zero point')[place]} is" in found.message
    assert "expected a" in found.message
    assert not any(words in found.message for _, words in registry()["1.6"].wrong_answers)


def fp16_by_struct(pattern):
    return struct.unpack("<e", struct.pack("<H", pattern))[0]


def fp16_imported(pattern):
    import struct as reader

    return reader.unpack("<e", pattern.to_bytes(2, "little"))[0]


def fp16_by_view(pattern):
    return torch.tensor(pattern - 65536 * (pattern >> 15)).short().view(torch.float16).item()


def fp16_by_helper(pattern):
    return fp16_by_view(pattern)


def fp16_by_labkit(pattern):
    return labkit.formats.decode(f"{pattern:016b}", "FP16")


def fp16_inside(pattern):
    return [(lambda p: float(np.uint16(p).view(np.float16)))(pattern)][0]


def fp16_by_name(pattern):
    return __import__("struct").unpack("<e", pattern.to_bytes(2, "little"))[0]


def fp16_by_memory(pattern):
    return memoryview(pattern.to_bytes(2, "little")).cast("e")[0]


class Fp16Caller:
    def __call__(self, pattern):
        return fp16_by_struct(pattern)


@pytest.mark.parametrize(
    "answer",
    [
        fp16_by_struct,
        fp16_imported,
        fp16_by_view,
        fp16_by_helper,
        fp16_by_labkit,
        fp16_inside,
        fp16_by_name,
        fp16_by_memory,
        Fp16Caller(),
        functools.partial(fp16_by_struct),
    ],
    ids=name_of,
)
def test_a_library_that_reads_the_bits_is_refused(answer):
    found = verdict("1.1", answer)
    assert found.status == "wrong"
    assert "read the bits, expected arithmetic on the three fields" in found.message


def test_the_library_of_the_exercise_itself_is_refused_and_its_helpers_are_not():
    def by_library(blocks):
        packed, scale = labkit.microscaling.quantize_mxfp4(blocks)
        return scale[:, 0], packed

    assert "lets microscaling do the work" in verdict("1.5", by_library).message
    chapter = {"torch": torch, "check_input": labkit.quant.check_input}
    for name in ("round_to_float", "fp4_codes", "to_blocks", "shared_exponent"):
        exec(textwrap.dedent(inspect.getsource(getattr(labkit.microscaling, name))), chapter)
    chapter |= {"E2M1": labkit.microscaling.E2M1, "FP4_VALUES": labkit.microscaling.FP4_VALUES}
    source = """
        def pack_mxfp4(blocks):
            blocks = to_blocks(blocks, 32)
            exponent = shared_exponent(blocks, 2)
            codes = fp4_codes(blocks / 2.0**exponent).flatten(-2)
            return (exponent[:, 0, 0] + 127).byte(), codes[:, 0::2] | codes[:, 1::2] << 4
    """
    exec(textwrap.dedent(source), chapter)
    assert verdict("1.5", chapter["pack_mxfp4"]).status == "correct"


ODD = [None, True, math.nan, 2**80, 1j, "text", [], (1, 2), (None, None, None), object()]
ODD += [np.zeros(3), np.float32(1), torch.zeros(3, dtype=torch.complex64), torch.zeros(0)]
ODD += [(torch.zeros(1), torch.zeros(1), torch.zeros(1)), torch.ones(2, 3, dtype=torch.bool)]


@pytest.mark.parametrize("result", ODD, ids=lambda r: type(r).__name__)
@each_exercise
def test_odd_results_are_called_wrong(exercise, result):
    found = verdict(exercise.id, lambda *args: result)
    assert found.status == "wrong"
    assert len(found.message) < 400


@each_exercise
def test_answer_that_raises(exercise, capsys):
    def answer(*args):
        print("noise")
        raise RuntimeError("no\nluck")

    exercises.check(exercise.id, answer)
    line = capsys.readouterr().out
    assert line.startswith(f"Exercise {exercise.id}: not yet. ")
    assert line.count("\n") == 1
    assert f"{exercise.function_names[0]}(" in line
    assert "RuntimeError (no luck)" in line
    assert "noise" not in line


@pytest.mark.parametrize(
    ("id", "spoil"),
    [
        ("1.2", lambda x: x.add_(1)),
        ("1.3", lambda w: w.transpose_(0, 1)),
        ("1.5", lambda blocks: blocks.zero_()),
        ("1.6", lambda batches: batches[0].abs_().add_(1)),
        ("1.6", lambda batches: batches.pop()),
    ],
)
def test_answer_that_changes_its_input(id, spoil):
    right = registry()[id].variants[0]

    def answer(*args):
        result = right(*args)
        spoil(args[0])
        return result

    found = verdict(id, answer)
    assert found.status == "wrong"
    assert "changes its input in place" in found.message


# Untouched stubs -------------------------------------------------------------------------------


def stub(x):
    """Do it."""
    ...


def stub_with_comment(x: int, *rest, deep=True) -> float: ...  # later


@torch.no_grad()
def decorated_stub(x): ...


def returns_none(x):
    return None


def only_passes(x):
    pass


def returns_ellipsis(x):
    return ...


def returns_input(x):
    return x


def run(source: str, namespace: dict | None = None) -> dict:
    """Execute source that Python cannot look up again, as a notebook under test."""
    namespace = {"torch": torch, "np": np, "math": math, "lk": labkit} | (namespace or {})
    exec(compile(source, "<notebook cell under test>", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("answer", [stub, stub_with_comment, decorated_stub], ids=name_of)
@each_exercise
def test_untouched_stub(exercise, answer, capsys):
    exercises.check(exercise.id, answer)
    assert capsys.readouterr().out == f"Exercise {exercise.id}: not attempted yet\n"


def test_untouched_stub_without_source():
    source = 'def f(x: int) -> float:\n    """Do it."""\n    ...\n'
    assert verdict("1.1", run(source)["f"]).status == "not attempted"


@pytest.mark.parametrize(
    "answer", [returns_none, only_passes, returns_ellipsis, returns_input, abs], ids=name_of
)
def test_attempt_is_no_stub(answer):
    assert verdict("1.2", answer).status == "wrong"


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if e.broken], ids=lambda e: e.id)
def test_bug_hunt_starts_from_the_broken_function(exercise):
    assert verdict(exercise.id, exercise.broken).status == "not attempted"
    source = inspect.getsource(exercise.broken) + "    # a comment is no attempt\n"
    renamed = run(source.replace('"""', '"""Said otherwise. ', 1))[exercise.broken.__name__]
    assert verdict(exercise.id, renamed).status == "not attempted"
    source = re.sub(r"\b1\b", "2", source, count=1)
    touched = run(source, exercise.broken.__globals__)[exercise.broken.__name__]
    assert verdict(exercise.id, touched).status == "wrong"


@pytest.mark.parametrize(
    ("arguments", "error", "fragment"),
    [
        ((1.2, stub), TypeError, 'id must be a string such as "1.2"'),
        (("1.99", stub), ValueError, "there are 1.1, 1.2, 1.3"),
        (("1.2", 3.0), TypeError, 'lk.check("1.2", symmetric_fake_quantize); got float'),
        (("1.2",), TypeError, "got nothing"),
        (("1.2", stub, stub), TypeError, "takes functions"),
    ],
)
def test_bad_calls_of_check(arguments, error, fragment):
    with pytest.raises(error, match=re.escape(fragment)):
        exercises.check(*arguments)


# The notebooks ---------------------------------------------------------------------------------


def cells_of(exercise: Exercise) -> Cells:
    return places()[exercise.id][1]


@functools.cache
def places() -> dict[str, tuple[nbformat.NotebookNode, Cells]]:
    """Return, by exercise in reading order, the notebook that holds it, and its cells there."""
    read = (nbformat.read(NOTEBOOKS / name, as_version=4) for name in NAMES)
    return {
        id: (notebook, cells) for notebook in read for id, cells in exercises_of(notebook).items()
    }


def imported_before(exercise: Exercise) -> dict:
    """Return what the notebook has imported when a learner comes to the exercise."""
    notebook, cells = places()[exercise.id]
    before = notebook.cells[: notebook.cells.index(cells.stub)]
    trees = [ast.parse(cell.source) for cell in before if cell.cell_type == "code"]
    imports = [n for tree in trees for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    namespace = {}
    exec(compile(ast.Module(imports, []), "<imports of a notebook>", "exec"), namespace)
    return namespace


def definitions(source: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(textwrap.dedent(source))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def body_of(function: ast.FunctionDef) -> list[str]:
    return [ast.dump(s) for s in function.body[ast.get_docstring(function) is not None :]]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_and_registry_have_the_same_exercises(chapter):
    registered = [e for e in EXERCISES if e.id.split(".")[0] == chapter]
    assert [id for id in places() if id.split(".")[0] == chapter] == [e.id for e in registered]
    assert 4 <= len(registered) <= 6
    assert any(e.broken for e in registered), "no bug hunt"


def test_each_exercise_has_a_file_named_for_it():
    files = {path.stem for path in Path(exercises.__file__).parent.glob("ex*.py")}
    named = {f"ex{e.id.replace('.', '_')}_{e.function_names[0]}" for e in EXERCISES}
    assert files == named
    assert all(e.check.__module__.split(".")[-1] in named for e in EXERCISES)
    places = [tuple(map(int, e.id.split("."))) for e in EXERCISES]
    assert places == sorted(places)


def test_every_notebook_has_checks():
    assert {f"{int(name[:2])}" for name in NAMES} == set(CHAPTERS)


@each_exercise
def test_notebook_cells(exercise: Exercise):
    task, stub_cell, check, folded = (cell.source for cell in cells_of(exercise))
    assert list(folds_of(folded)) == [*HINTS, SOLUTION]
    heading = f"### Exercise {exercise.id} {'★' * exercise.stars} · {exercise.minutes} min — "
    assert task.startswith(heading + exercise.title + "\n")
    assert check.strip() == f'lk.check("{exercise.id}", {", ".join(exercise.function_names)})'
    stubs, solutions = definitions(stub_cell), definitions(solution_of(folded))
    for name in exercise.function_names:
        stub_ast = stubs[name]
        assert ast.dump(stub_ast.args) == ast.dump(solutions[name].args)
        assert ast.get_docstring(stub_ast)
        if exercise.broken:
            (broken,) = definitions(inspect.getsource(exercise.broken)).values()
            assert body_of(stub_ast) == body_of(broken)
            assert [a.arg for a in stub_ast.args.args] == [a.arg for a in broken.args.args]
        else:
            assert body_of(stub_ast) == [ast.dump(ast.parse("...").body[0])]


@each_exercise
def test_folded_solution_passes(exercise: Exercise):
    _, stub_cell, _, folded = (cell.source for cell in cells_of(exercise))
    namespace = imported_before(exercise)
    exec(stub_cell, namespace)
    before = verdict(exercise.id, *(namespace[name] for name in exercise.function_names))
    assert before.status == "not attempted"
    exec(solution_of(folded), namespace)
    after = verdict(exercise.id, *(namespace[name] for name in exercise.function_names))
    assert after == exercises.Verdict("correct", exercise.takeaway)


@pytest.mark.parametrize("least", [1e-8, 1e-12])
def test_a_scale_kept_above_zero_is_told_what_a_block_of_zeros_asks_for(least):
    def nf4(weight, levels, block_size):
        blocks = weight.unflatten(1, (-1, block_size))
        scale = blocks.abs().amax(-1).clamp(min=least)
        codes = (blocks / scale[..., None])[..., None].sub(levels).abs().argmin(-1)
        return labkit.quant.pack_bits(codes.to(torch.uint8).flatten(1), 4), scale

    assert f"scale of block 0 is {least:g}, expected 0" in verdict("2.5", nf4).message
