"""Chapter 7: checks, known wrong answers and correct variants.

Each wrong answer's docstring names the misconception; the text beside it is what a learner reads.
References are numpy by the definition, in float64, in bytes or group by group, never labkit.
"""

import itertools
import math
from numbers import Integral

import numpy as np
import torch
from torch import nn

from labkit.exercises import Exercise, Wrong, call, judge, kind, misfit, same, show


class _Raised(tuple):
    """An error as a result that `same` can compare: a tuple with its class in it."""


def _errors_as_results(function, kinds, may_raise):
    def answer(*case):
        if not may_raise(*case):
            return function(*case)
        try:
            return function(*case)
        except kinds as error:
            return _Raised([type(error)])

    return answer


def _judge_with_errors(name, function, cases, examine, wrong_answers, kinds, may_raise) -> None:
    """As `judge`; an error of these kinds is a result wherever `may_raise` holds."""
    function, *mistakes = (
        _errors_as_results(answer, kinds, may_raise)
        for answer in (function, *(mistake for mistake, _ in wrong_answers))
    )
    messages = (message for _, message in wrong_answers)
    judge(name, function, cases, examine, tuple(zip(mistakes, messages, strict=True)))


def _not_a_value_error(written: str, got) -> str | None:
    if not isinstance(got, _Raised):
        return f"{written} returns {kind(got)}, expected a ValueError"
    if issubclass(got[0], ValueError):
        return None
    return f"{written} raises {got[0].__name__}, expected a ValueError"


def _no_mask(written: str, got, expected: torch.Tensor) -> str | None:
    complaint = misfit(got, torch.bool, tuple(expected.shape))
    if complaint is None:
        return None
    if same(got, expected):  # only the dtype is wrong: no misconception explains it
        raise Wrong(f"{written} returns {complaint}")
    return f"{written} returns {complaint}"


# 7.1 ------------------------------------------------------------------------------------------

_LAYOUTS = ("dense", "bitmap", "csr")


def _storage_cases():
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    for bits in (4, 8):
        yield from ((mask, bits, layout) for layout in _LAYOUTS)
    yield mask, 4, "coo"
    random = torch.Generator().manual_seed(72)
    for out, inputs, share in ((3, 7, 0.4), (7, 3, 0.7), (5, 5, 0.0), (3, 3, 1.0), (9, 21, 0.3)):
        mask = torch.rand(out, inputs, generator=random) < share
        for bits, layout in itertools.product((4, 16), _LAYOUTS[::-1]):
            yield mask, bits, layout
    yield mask, 16, "values"
    for out, inputs, share in ((31, 17, 0.5), (64, 96, 0.1), (13, 300, 0.75)):
        mask = torch.rand(out, inputs, generator=random) < share
        for bits, layout in itertools.product((4, 8, 32), _LAYOUTS):
            yield mask, bits, layout


def _unknown_layout(mask, bits, layout) -> bool:
    return layout not in _LAYOUTS


def _check_storage(function) -> None:
    _judge_with_errors(
        "stored_nbytes", function, _storage_cases(), _examine_storage, _WRONG_STORAGE,
        Exception, _unknown_layout,
    )  # fmt: skip


def _examine_storage(mask, bits, layout, got) -> str | None:
    written = call("stored_nbytes", mask, bits, layout)
    if _unknown_layout(mask, bits, layout):
        return _not_a_value_error(written, got)
    # The parts are written out for real; packbits fills up each to whole bytes.
    rows, columns = mask.numpy().nonzero()
    places = mask.numel() if layout == "dense" else len(columns)
    parts = [np.packbits(np.zeros(places * bits, bool))]
    if layout == "bitmap":
        parts.append(np.packbits(mask.numpy().flatten()))
    if layout == "csr":
        starts = np.searchsorted(rows, np.arange(len(mask) + 1))
        parts += [columns.astype(np.uint16), starts.astype(np.uint32)]
    expected = sum(part.nbytes for part in parts)
    if isinstance(got, bool) or not isinstance(got, Integral | float | np.floating):
        raise Wrong(f"{written} returns {kind(got)}, expected an int")
    of = f" for {len(columns)} kept values"
    if got != expected:
        return f"{written} gives {show(got)}{of}, expected {expected}"
    if not isinstance(got, Integral):
        raise Wrong(f"{written} returns {kind(got)} ({got}), expected an int")
    return None


def _whole_bytes(parts):
    return sum(math.ceil(bits / 8) for bits in parts)


def _stored(
    mask,
    bits,
    layout,
    n_kept=None,
    n_dense=None,
    n_in_bitmap=None,
    map_bits=1,
    column_bits=16,
    n_columns=None,
    pointer_bits=32,
    n_pointers=None,
    add_up=_whole_bytes,
):
    """Return the bytes, right unless something is given."""
    n_kept = int(mask.sum()) if n_kept is None else n_kept
    if layout == "dense":
        return add_up([bits * (mask.numel() if n_dense is None else n_dense)])
    if layout == "bitmap":
        values = n_kept if n_in_bitmap is None else n_in_bitmap
        return add_up([map_bits * mask.numel(), bits * values])
    if layout == "csr":
        columns = column_bits * (n_kept if n_columns is None else n_columns)
        n_pointers = len(mask) + 1 if n_pointers is None else n_pointers
        return add_up([bits * n_kept, columns, pointer_bits * n_pointers])
    raise ValueError(f"no layout {layout!r}")


def map_forgotten(mask, bits, layout):
    """Stores the kept values without their places."""
    return _stored(mask, bits, layout, map_bits=0)


def map_of_bytes(mask, bits, layout):
    """Stores a byte a place, as a bool tensor does."""
    return _stored(mask, bits, layout, map_bits=8)


def map_by_rows(mask, bits, layout):
    """Begins a new byte of the map for each row."""
    if layout != "bitmap":
        return _stored(mask, bits, layout)
    out, inputs = mask.shape
    return out * math.ceil(inputs / 8) + math.ceil(int(mask.sum()) * bits / 8)


def zeros_in_the_bitmap(mask, bits, layout):
    """Stores all values beside the map."""
    return _stored(mask, bits, layout, n_in_bitmap=mask.numel())


def kept_only_in_dense(mask, bits, layout):
    """Leaves the zeros out where nothing says where they were."""
    return _stored(mask, bits, layout, n_dense=int(mask.sum()))


def columns_forgotten(mask, bits, layout):
    """Stores no column numbers."""
    return _stored(mask, bits, layout, n_columns=0)


def columns_in_bits(mask, bits, layout):
    """Gives a column number as many bits as a value."""
    return _stored(mask, bits, layout, column_bits=bits)


def columns_in_32_bits(mask, bits, layout):
    """Gives column numbers the bits of row pointers."""
    return _stored(mask, bits, layout, column_bits=32)


def columns_of_the_matrix(mask, bits, layout):
    """Stores each column once, not each kept value's."""
    return _stored(mask, bits, layout, n_columns=mask.shape[1])


def pointers_forgotten(mask, bits, layout):
    """Stores no row pointers."""
    return _stored(mask, bits, layout, n_pointers=0)


def pointer_too_few(mask, bits, layout):
    """Stores where each row begins, but not where the last one ends."""
    return _stored(mask, bits, layout, n_pointers=len(mask))


def pointers_of_columns(mask, bits, layout):
    """Stores a pointer for each column, as CSC does."""
    return _stored(mask, bits, layout, n_pointers=mask.shape[1] + 1)


def pointers_in_16_bits(mask, bits, layout):
    """Gives row pointers the bits of column numbers."""
    return _stored(mask, bits, layout, pointer_bits=16)


def dropped_counted(mask, bits, layout):
    """Takes True for dropped."""
    return _stored(~mask, bits, layout)


def cut_to_whole_bytes(mask, bits, layout):
    """Divides with //."""
    return _stored(mask, bits, layout, add_up=lambda parts: sum(part // 8 for part in parts))


def sum_filled_up(mask, bits, layout):
    """Adds the bits of all parts before it fills up."""
    return _stored(mask, bits, layout, add_up=lambda parts: math.ceil(sum(parts) / 8))


def bits_for_bytes(mask, bits, layout):
    """Adds up bits and does not divide by 8."""
    return _stored(mask, bits, layout, add_up=sum)


def otherwise_csr(mask, bits, layout):
    """Ends with an else that takes any other layout for CSR."""
    return _stored(mask, bits, "csr" if layout not in _LAYOUTS else layout)


def otherwise_dense(mask, bits, layout):
    """Stores any other layout densely."""
    return _stored(mask, bits, "dense" if layout not in _LAYOUTS else layout)


def otherwise_none(mask, bits, layout):
    """Ends without a result if the layout is none of the three."""
    return None if layout not in _LAYOUTS else _stored(mask, bits, layout)


_WRONG_STORAGE = (
    (map_forgotten, "nobody could tell where the values belong: a bitmap takes one bit a place"),
    (map_of_bytes, "the map takes one bit a place, not a whole byte"),
    (map_by_rows, "the map is filled up once, at its end, not in every row"),
    (zeros_in_the_bitmap, "beside the map, only the kept values are stored"),
    (kept_only_in_dense, "a dense layout stores the zeros as well"),
    (columns_forgotten, "CSR also stores the column of each kept value"),
    (columns_in_bits, "a column number takes 16 bits, whatever the values take"),
    (columns_in_32_bits, "columns take 16 bits each; only row pointers take 32"),
    (columns_of_the_matrix, "a column number is stored for each kept value, not once a column"),
    (pointers_forgotten, "CSR also stores row pointers: where each row begins"),
    (pointer_too_few, "there is one row pointer more than rows: the end of the last"),
    (pointers_of_columns, "CSR has pointers for rows; these are as many as columns need"),
    (pointers_in_16_bits, "a row pointer takes 32 bits: there may be many values before it"),
    (dropped_counted, "True marks a kept value; these are the dropped ones"),
    (cut_to_whole_bytes, "a byte that is begun counts in full: round up"),
    (sum_filled_up, "each part is filled up by itself, before the parts are added"),
    (bits_for_bytes, "these are bits; eight of them make a byte"),
    (otherwise_csr, "any other layout must raise ValueError; yours is taken for CSR"),
    (otherwise_dense, "any other layout must raise ValueError; yours is stored densely"),
    (otherwise_none, "any other layout must raise ValueError; yours ends without a result"),
)


def stored_by_counting(mask, bits, layout):
    """Counts values one after another, in whole numbers."""
    n_kept = sum(map(sum, mask.tolist()))
    values = (n_kept * bits + 7) // 8
    if layout == "csr":
        return values + 2 * n_kept + 4 * len(mask) + 4
    if layout == "bitmap":
        return values + (mask.numel() + 7) // 8
    if layout != "dense":
        raise ValueError("unknown layout")
    return (mask.shape[0] * mask.shape[1] * bits + 7) // 8


def stored_in_a_table(mask, bits, layout):
    """Lists the bits of all parts of all layouts; a list has no item of another name."""
    n_kept, places = mask.count_nonzero().item(), mask.numel()
    csr = n_kept * bits, n_kept * 16, 32 * (mask.shape[0] + 1)
    parts = ((places * bits,), (places, n_kept * bits), csr)
    chosen = parts[["dense", "bitmap", "csr"].index(layout)]
    return int(np.ceil(np.array(chosen) / 8).sum())


# 7.2 ------------------------------------------------------------------------------------------


def _wanda_cases():
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5], [4.0, 1.0, -1.5, 2.0]])
    norm = torch.tensor([8.0, 2.0, 1.0, 3.0])
    yield weight, norm, 0.5
    yield weight, norm, 0.25
    yield weight, norm, 0.75
    yield torch.tensor([[-3.0, 1.0, 2.0, 0.5, -0.75]]), torch.tensor([0.5, 3.0, 4.0, 2.5, 1.0]), 0.5
    yield weight, norm, 0.0
    random = torch.Generator().manual_seed(71)
    for out, inputs in ((3, 5), (4, 8), (6, 7), (8, 8), (5, 16), (12, 30)):
        for sparsity in (0.75, 0.25, 0.5, 0.0):
            weight = torch.randn(out, inputs, generator=random)
            weight *= 4.0 ** torch.randn(out, 1, generator=random)
            norm = 3.0 ** torch.randn(inputs, generator=random)
            yield weight, norm, sparsity


def _check_wanda(function) -> None:
    judge("wanda_mask", function, _wanda_cases(), _examine_wanda, _WRONG_WANDA)


def _examine_wanda(weight, norm, sparsity, got) -> str | None:
    written = call("wanda_mask", weight, norm, sparsity)
    scores = np.abs(weight.double().numpy()) * norm.double().numpy()
    order = np.argsort(scores, axis=1)[:, int(sparsity * weight.shape[1]) :]
    expected = torch.zeros(weight.shape, dtype=torch.bool).scatter(1, torch.from_numpy(order), True)
    if complaint := _no_mask(written, got, expected):
        return complaint
    for row, (kept, wanted) in enumerate(zip(got, expected, strict=True)):
        if not kept.equal(wanted):
            came, due = (_brief(places.nonzero().flatten().tolist()) for places in (kept, wanted))
            return f"{written} keeps the places {came} of row {row}, expected {due}"
    return None


def _brief(places: list) -> str:
    return show(places) if len(places) <= 8 else show(places[:8])[:-1] + ", …]"


def _all_but_smallest(score, n_dropped, dim=1):
    smallest = score.argsort(dim).narrow(dim, 0, n_dropped)
    return torch.ones(score.shape, dtype=torch.bool).scatter(dim, smallest, False)


def _n_dropped(weight, sparsity):
    return int(sparsity * weight.shape[1])


def norm_forgotten(weight, norm, sparsity):
    """Prunes by magnitude."""
    return _all_but_smallest(weight.abs(), _n_dropped(weight, sparsity))


def one_threshold(weight, norm, sparsity):
    """Compares all weights of the matrix with each other."""
    score = (weight.abs() * norm).flatten()[None]
    return _all_but_smallest(score, int(sparsity * score.numel())).view(weight.shape)


def within_columns(weight, norm, sparsity):
    """Drops a share of each column."""
    return _all_but_smallest(weight.abs() * norm, int(sparsity * len(weight)), dim=0)


def smallest_kept(weight, norm, sparsity):
    """Drops the largest scores."""
    return _all_but_smallest(-weight.abs() * norm, _n_dropped(weight, sparsity))


def mask_of_the_dropped(weight, norm, sparsity):
    """Marks what is dropped."""
    return ~_all_but_smallest(weight.abs() * norm, _n_dropped(weight, sparsity))


def share_kept(weight, norm, sparsity):
    """Takes the sparsity for the share that stays."""
    n_dropped = weight.shape[1] - _n_dropped(weight, sparsity)
    return _all_but_smallest(weight.abs() * norm, n_dropped)


def norm_squared(weight, norm, sparsity):
    """Squares the norm, but not the weight."""
    return _all_but_smallest(weight.abs() * norm**2, _n_dropped(weight, sparsity))


def weight_squared(weight, norm, sparsity):
    """Squares the weight, but not the norm."""
    return _all_but_smallest(weight**2 * norm, _n_dropped(weight, sparsity))


def dropped_rounded_up(weight, norm, sparsity):
    """Rounds the number of dropped weights up, or that of kept ones down."""
    return _all_but_smallest(weight.abs() * norm, math.ceil(sparsity * weight.shape[1]))


def signed_score(weight, norm, sparsity):
    """Takes a large negative weight for a small one."""
    return _all_but_smallest(weight * norm, _n_dropped(weight, sparsity))


def pruned_weight(weight, norm, sparsity):
    """Returns the weight with zeros in it."""
    return weight * mask_by_ranks(weight, norm, sparsity)


def above_the_quantile(weight, norm, sparsity):
    """Drops the score that equals the quantile."""
    score = weight.abs() * norm
    return score > score.quantile(sparsity, dim=1, keepdim=True)


def all_after_minus_zero(weight, norm, sparsity):
    """Drops the last n of a sorted row with [-n:], which is the whole row for n = 0."""
    score, n_dropped = weight.abs() * norm, _n_dropped(weight, sparsity)
    dropped = score.argsort(1, descending=True)[:, -n_dropped:]
    return torch.ones(score.shape, dtype=torch.bool).scatter(1, dropped, False)


_WRONG_WANDA = (
    (norm_forgotten, "this is the magnitude alone: multiply it by the norm of the input channel"),
    (one_threshold, "every row drops as many; do not compare across rows"),
    (within_columns, "the weights of a row compete with each other, not those of a column"),
    (smallest_kept, "the smallest scores are dropped, not the largest"),
    (all_after_minus_zero, "sparsity 0 drops nothing, but [-0:] is the whole row"),
    (mask_of_the_dropped, "the mask is turned: True means kept"),
    (share_kept, "the sparsity is the share that is dropped, not the share that stays"),
    (norm_squared, "square both factors or neither; here it is the norm alone"),
    (weight_squared, "the score is |weight| · norm, without a square on the weight"),
    (dropped_rounded_up, "the number to drop is cut off, not rounded up: int(0.5 * 5) is 2"),
    (signed_score, "a large negative weight is large: take its magnitude"),
    (pruned_weight, "the mask itself is asked for, not the pruned weight"),
    (above_the_quantile, "the score at the quantile itself stays: >= in place of >"),
)


def mask_by_ranks(weight, norm, sparsity):
    """Sorts twice: the second sort gives each score its rank."""
    ranks = (weight * norm).square().argsort(1).argsort(1)
    return ranks >= int(sparsity * weight.shape[1])


def mask_by_rows(weight, norm, sparsity):
    """Compares each row with the smallest score that stays."""
    rows = []
    for row in (weight.abs().double() * norm.double()).tolist():
        smallest = sorted(row)[int(sparsity * len(row))]
        rows.append([score >= smallest for score in row])
    return torch.tensor(rows)


def mask_by_largest(weight, norm, sparsity):
    """Asks for the largest scores."""
    score = torch.einsum("oi,i->oi", weight.abs(), norm)
    largest = score.topk(weight.shape[1] - int(sparsity * weight.shape[1])).indices
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[torch.arange(len(mask))[:, None], largest] = True
    return mask


# 7.3 ------------------------------------------------------------------------------------------


def _group_cases():
    yield torch.tensor([[2.0, 5.0, 2.0, 2.0, -1.0, -4.0, -2.0, -3.0]]), 2, 4
    yield torch.tensor([[3.0, 4.0, -1.0, 1.0]]), 1, 2
    yield torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -7.0, 0.0, 4.0]]), 3, 4
    yield torch.tensor([[0.5, -2.0, 0.25, 1.0, 3.0, -0.5]]), 2, 4
    yield torch.tensor([[0.5, -2.0, 0.25, 1.0]]), 0, 4
    yield torch.tensor([[0.5, -2.0, 0.25, 1.0]]), 5, 4
    random = torch.Generator().manual_seed(73)
    for out, inputs, n, m in (
        (4, 8, 1, 4), (4, 16, 3, 4), (8, 16, 2, 8), (6, 12, 1, 3), (8, 24, 2, 4), (10, 10, 5, 5),
        (16, 8, 1, 2), (8, 32, 5, 8), (4, 12, 4, 4),
    ):  # fmt: skip
        yield torch.randn(out, inputs, generator=random), n, m
        yield torch.randint(-3, 4, (out, inputs), generator=random).float(), n, m
    yield torch.randn(4, 10, generator=random), 1, 4
    yield torch.randn(6, 9, generator=random), 4, 3


def _impossible(score, n, m) -> bool:
    return score.shape[1] % m > 0 or n not in range(1, m + 1)


def _check_groups(function) -> None:
    _judge_with_errors(
        "n_of_m_mask", function, _group_cases(), _examine_groups, _WRONG_GROUPS,
        Exception, _impossible,
    )  # fmt: skip


def _examine_groups(score, n, m, got) -> str | None:
    written = call("n_of_m_mask", score, n, m)
    if _impossible(score, n, m):
        return _not_a_value_error(written, got)
    expected = torch.zeros(score.shape, dtype=torch.bool)
    groups = list(itertools.product(range(len(score)), range(0, score.shape[1], m)))
    for row, start in groups:
        values = score[row, start : start + m].tolist()
        ranked = sorted(range(m), key=lambda i, values=values: (-values[i], i))
        expected[row, [start + i for i in ranked[:n]]] = True
    if complaint := _no_mask(written, got, expected):
        return complaint
    for row, start in groups:
        group = score[row, start : start + m]
        came, due = (mask[row, start : start + m] for mask in (got, expected))
        if not came.equal(due):
            places = [show(mask.nonzero().flatten()) for mask in (came, due)]
            alike = group[came].sort().values.equal(group[due].sort().values)
            return (
                f"{written}: of the scores {show(group)} it keeps the places {places[0]}, expected "
                f"{places[1]}{', the first of equals' * alike}"
            )
    return None


def _raise_if_impossible(score, n, m):
    if _impossible(score, n, m):
        raise ValueError(f"no {n} of {m} in {score.shape[1]} inputs")


def _first_n(groups, n):
    """Return the mask of the n largest in the last dimension; of equals the earlier one stays."""
    order = groups.sort(stable=True, dim=-1, descending=True).indices[..., :n]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter(-1, order, True)


def _by_groups(score, n, m, choose=_first_n):
    _raise_if_impossible(score, n, m)
    return choose(score.unflatten(1, (-1, m)), n).flatten(1)


def _in_pieces(score, n, m):
    return torch.cat([_first_n(piece, n) for piece in score.split(m, 1)], 1)


def n_dropped_of_m(score, n, m):
    """Takes n for the number that is dropped."""
    return _by_groups(score, n, m, lambda groups, n: _first_n(groups, m - n))


def smallest_of_the_group(score, n, m):
    """Keeps the n smallest."""
    return _by_groups(-score, n, m)


def largest_magnitude(score, n, m):
    """Takes magnitudes of what is a score already."""
    return _by_groups(score.abs(), n, m)


def groups_down_the_column(score, n, m):
    """Groups the outputs."""
    _raise_if_impossible(score, n, m)
    return _in_pieces(score.T, n, m).T


def groups_of_every_mth(score, n, m):
    """Puts inputs into a group that lie apart."""
    _raise_if_impossible(score, n, m)
    return _first_n(score.unflatten(1, (m, -1)).mT, n).mT.flatten(1)


def share_of_the_row(score, n, m):
    """Keeps n / m of a row, wherever they lie."""
    _raise_if_impossible(score, n, m)
    return _first_n(score, score.shape[1] * n // m)


def n_of_the_row(score, n, m):
    """Keeps n in the whole row."""
    _raise_if_impossible(score, n, m)
    return _first_n(score, n)


def all_equals_stay(score, n, m):
    """Compares with the n-th largest, which several may equal."""
    return _by_groups(
        score, n, m, lambda groups, n: groups >= groups.sort(-1, True).values[..., n - 1 : n]
    )


def all_equals_go(score, n, m):
    """Keeps what is larger than the next largest, and so drops those equal to it."""

    def choose(groups, n):
        ranked = nn.functional.pad(groups.sort(-1, True).values, (0, 1), value=-math.inf)
        return groups > ranked[..., n : n + 1]

    return _by_groups(score, n, m, choose)


def later_of_equals(score, n, m):
    """Keeps the last of equal scores."""
    return _by_groups(score, n, m, lambda groups, n: _first_n(groups.flip(-1), n).flip(-1))


def scores_in_place_of_a_mask(score, n, m):
    """Returns the scores with zeros in them."""
    return score * _by_groups(score, n, m)


def nothing_checked(score, n, m):
    """Leaves the errors to torch, which knows nothing of n."""
    return _first_n(score.unflatten(1, (-1, m)), n).flatten(1)


def n_unchecked(score, n, m):
    """Tests whether m divides the inputs, and takes any n."""
    _raise_if_impossible(score, 1, m)
    return nothing_checked(score, n, m)


def m_unchecked(score, n, m):
    """Tests n, and leaves the error about m to torch."""
    if not 1 <= n <= m:
        raise ValueError("n")
    return nothing_checked(score, n, m)


def shorter_last_group(score, n, m):
    """Takes what is left at the end for a group."""
    if not 1 <= n <= m:
        raise ValueError("n")
    return _in_pieces(score, n, m)


def zero_of_m(score, n, m):
    """Allows n = 0."""
    _raise_if_impossible(score, max(n, 1), m)
    return nothing_checked(score, n, m)


def more_than_m_of_m(score, n, m):
    """Allows n > m."""
    _raise_if_impossible(score, min(n, m), m)
    return nothing_checked(score, n, m)


_WRONG_GROUPS = (
    (n_dropped_of_m, "in each group n scores stay; yours drops n"),
    (smallest_of_the_group, "the largest scores stay, not the smallest"),
    (largest_magnitude, "the scores are given: a negative one is small, so take no magnitudes"),
    (groups_down_the_column, "a group lies along a row, in the inputs, not down a column"),
    (groups_of_every_mth, "a group is m neighbors: with m = 4, the places 0, 1, 2 and 3"),
    (share_of_the_row, "every group keeps n: the share of the row alone is not enough"),
    (n_of_the_row, "this keeps n in a row; each group of the row keeps n"),
    (all_equals_stay, "with equal scores more than n stay: of those only the earlier ones may"),
    (all_equals_go, "with equal scores fewer than n stay: the earlier ones must"),
    (later_of_equals, "of equal scores the earlier one stays"),
    (scores_in_place_of_a_mask, "return the mask, not the scores under it"),
    (zero_of_m, "an n of 0 would keep nothing at all: that is a ValueError too"),
    (more_than_m_of_m, "more than m of m cannot stay: that is a ValueError too"),
    (n_unchecked, "an n that is not from 1 to m must raise ValueError"),
    (m_unchecked, "torch raises RuntimeError for such an m: test it before, and raise ValueError"),
    (shorter_last_group, "if m does not divide the inputs, raise ValueError, whatever is left"),
    (nothing_checked, "test n and m yourself, and raise ValueError before anything else"),
)


def groups_by_sorting(score, n, m):
    """Sorts the places of each group in Python."""
    rows = score.tolist()
    if len(rows[0]) % m or not 0 < n <= m:
        raise ValueError("groups do not fit")
    mask = np.zeros(score.shape, bool)
    for row, scores in enumerate(rows):
        for start in range(0, len(scores), m):
            places = range(start, start + m)
            mask[row, sorted(places, key=scores.__getitem__, reverse=True)[:n]] = True
    return torch.from_numpy(mask)


def groups_by_rivals(score, n, m):
    """Counts for each score how many of its group go before it."""
    groups = score.reshape(len(score), score.shape[1] // m, m) if score.shape[1] % m == 0 else None
    if groups is None or n < 1 or n > m:
        raise ValueError("groups do not fit")
    other, mine = groups[..., None, :], groups[..., :, None]
    earlier = torch.ones(m, m).tril(-1).bool()
    n_before = ((other > mine) | ((other == mine) & earlier)).sum(-1)
    return (n_before < n).reshape(score.shape)


# 7.4 ------------------------------------------------------------------------------------------


def _mlp_cases():
    column = torch.tensor([[1.0], [2.0], [3.0]])
    yield column, column + 3, torch.tensor([[1.0, -3.0, 2.0]]), torch.tensor([4.0, 1.0, 0.5]), 2
    yield column, column + 3, torch.tensor([[2.0, -3.0, 4.0]]), torch.tensor([4.0, 2.0, 0.5]), 1
    random = torch.Generator().manual_seed(74)
    for hidden, inputs, out, n_keep in (
        (6, 6, 6, 4), (5, 5, 5, 2), (8, 3, 3, 3), (8, 4, 6, 6), (12, 5, 4, 7), (12, 16, 5, 4),
        (16, 6, 6, 5), (20, 8, 8, 14), (24, 24, 24, 9), (4, 3, 2, 4), (30, 12, 10, 10),
    ):  # fmt: skip
        gate, up = torch.randn(2, hidden, inputs, generator=random)
        loud, strong = 2.0 ** torch.randn(2, hidden, generator=random)
        down = torch.randn(out, hidden, generator=random) * strong
        yield gate, up, down, loud**2, n_keep


def _check_mlp(function) -> None:
    _judge_with_errors(
        "shrink_mlp", function, _mlp_cases(), _examine_mlp, _WRONG_MLP,
        IndexError, lambda *case: True,
    )  # fmt: skip


def _examine_mlp(gate, up, down, power, n_keep, got) -> str | None:
    hidden, inputs = gate.shape
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("gate", gate), ("down", down)))
    written = f"shrink_mlp with {shapes} and n_keep {n_keep}"
    if isinstance(got, _Raised):
        return f"{written} raises {got[0].__name__}, expected {n_keep} of {hidden} channels"
    if not isinstance(got, tuple | list) or len(got) != 3:
        return f"{written} returns {kind(got)}, expected the triple (gate, up, down)"
    wanted = ("gate", (n_keep, inputs)), ("up", (n_keep, inputs)), ("down", (len(down), n_keep))
    for (name, shape), value in zip(wanted, got, strict=True):
        if complaint := misfit(value, torch.float32, shape):
            return f"in {written}, {name} is {complaint}"
    importance = power.double().numpy() * (down.double().numpy() ** 2).sum(0)
    expected = sorted(np.argsort(importance)[hidden - n_keep :].tolist())
    old, new = (gate, up, down.T), (got[0], got[1], got[2].T)
    for (name, _), before, after in zip(wanted, old, new, strict=True):
        kept = [_channel_of(before, channel) for channel in after]
        if kept != expected:
            complaint = f"in {written}, {name} holds the old channels {_brief(kept)}"
            return f"{complaint}, expected {_brief(expected)}"
    return None


def _channel_of(old: torch.Tensor, channel: torch.Tensor) -> int | None:
    equal = np.isclose(old.numpy(), channel.detach().numpy(), rtol=1e-5, atol=1e-7).all(1)
    return int(equal.argmax()) if equal.any() else None


def _largest(importance, n_keep):
    return importance.argsort(descending=True)[:n_keep].sort().values


def _importance(power, down):
    return power * down.square().sum(0)


def _cut(gate, up, down, keep):
    return gate[keep], up[keep], down[:, keep]


def power_forgotten(gate, up, down, power, n_keep):
    """Looks at the weights alone."""
    return _cut(gate, up, down, _largest(down.norm(dim=0), n_keep))


def down_forgotten(gate, up, down, power, n_keep):
    """Looks at the activations alone."""
    return _cut(gate, up, down, _largest(power, n_keep))


def norm_of_the_gate(gate, up, down, power, n_keep):
    """Weighs a channel by its row of the gate."""
    return _cut(gate, up, down, _largest(power * gate.square().sum(1), n_keep))


def norm_not_squared(gate, up, down, power, n_keep):
    """Multiplies a mean square by a norm."""
    return _cut(gate, up, down, _largest(power * down.norm(dim=0), n_keep))


def square_of_the_sum(gate, up, down, power, n_keep):
    """Adds the weights of a column before it squares them."""
    return _cut(gate, up, down, _largest(power * down.sum(0).square(), n_keep))


def least_important_kept(gate, up, down, power, n_keep):
    """Keeps the channels that matter least."""
    return _cut(gate, up, down, _largest(-_importance(power, down), n_keep))


def by_importance(gate, up, down, power, n_keep):
    """Returns the channels in the order of their importance."""
    keep = _importance(power, down).argsort(descending=True)[:n_keep]
    return _cut(gate, up, down, keep)


def n_keep_removed(gate, up, down, power, n_keep):
    """Removes as many channels as should stay."""
    return _cut(gate, up, down, _largest(_importance(power, down), len(power) - n_keep))


def zeroes_left_in_place(gate, up, down, power, n_keep):
    """Sets the other channels to zero."""
    mask = torch.zeros(len(power)).scatter(0, _largest(_importance(power, down), n_keep), 1.0)
    return gate * mask[:, None], up * mask[:, None], down * mask


def columns_of_gate_and_up(gate, up, down, power, n_keep):
    """Cuts the inputs of gate and up."""
    keep = _largest(_importance(power, down), n_keep)
    return gate[:, keep], up[:, keep], down[:, keep]


def rows_of_down(gate, up, down, power, n_keep):
    """Cuts the outputs of down."""
    keep = _largest(_importance(power, down), n_keep)
    return gate[keep], up[keep], down[keep]


def up_left_alone(gate, up, down, power, n_keep):
    """Forgets that up has the channel too."""
    keep = _largest(_importance(power, down), n_keep)
    return gate[keep], up.clone(), down[:, keep]


def down_left_alone(gate, up, down, power, n_keep):
    """Forgets that down reads the channel."""
    keep = _largest(_importance(power, down), n_keep)
    return gate[keep], up[keep], down.clone()


def a_choice_for_each(gate, up, down, power, n_keep):
    """Chooses the channels of each matrix by its own norm."""
    norms = gate.norm(dim=1), up.norm(dim=1)
    keep = [_largest(norm, n_keep) for norm in norms]
    return gate[keep[0]], up[keep[1]], down[:, _largest(_importance(power, down), n_keep)]


_WRONG_MLP = (
    (power_forgotten, "a large weight on a silent channel does nothing: weigh it by the power"),
    (down_forgotten, "a loud channel that down hardly reads does little: weigh it by its column"),
    (norm_of_the_gate, "what a channel adds to the output lies in its column of down, not in gate"),
    (norm_not_squared, "the power is a mean square, so the norm is squared too"),
    (square_of_the_sum, "square each weight of a column, then add: signs must not cancel"),
    (least_important_kept, "the most important channels stay, not the least"),
    (by_importance, "the channels keep their old order: sort the indices you keep"),
    (n_keep_removed, "as many as n_keep channels stay; in yours, as many leave"),
    (zeroes_left_in_place, "channels set to zero still cost as much: take them out"),
    (columns_of_gate_and_up, "hidden channels are the rows of gate and up"),
    (rows_of_down, "hidden channels are the columns of down"),
    (up_left_alone, "a channel leaves up as well as gate"),
    (down_left_alone, "a channel that is gone cannot be read: it leaves down too"),
    (a_choice_for_each, "choose the channels once: all three weights lose the same ones"),
)


def mlp_by_ranks(gate, up, down, power, n_keep):
    """Masks what has few enough rivals, by the root of the importance."""
    importance = power.sqrt() * down.norm(dim=0)
    stays = (importance[:, None] < importance[None, :]).sum(1) < n_keep
    return gate[stays], up[stays], down[:, stays]


def mlp_in_a_loop(gate, up, down, power, n_keep):
    """Takes one channel out after another, by the mean square of what it adds."""
    parts = [gate.clone(), up.clone(), down.T.clone()]
    left = (power.double() * down.double().square().mean(0)).tolist()
    while len(left) > n_keep:
        least = left.index(min(left))
        left.pop(least)
        parts = [torch.cat([part[:least], part[least + 1 :]]) for part in parts]
    return [parts[0], parts[1], parts[2].T.contiguous()]


# 7.5 ------------------------------------------------------------------------------------------


class _Outcome(tuple):
    """What `same` compares of a loss; `loss`, `student` and `teacher` (gradients) as they came."""


def _with_gradients(function, summary):
    def answer(student, teacher, labels, temperature, hard):
        with torch.enable_grad():
            logits = student.requires_grad_(), teacher.requires_grad_()
            loss = function(*logits, labels, temperature, hard)
            scalar = isinstance(loss, torch.Tensor) and not loss.ndim and loss.is_floating_point()
            if not scalar:
                return loss
            if loss.requires_grad:
                loss.backward()
        gradients = [np.zeros(x.shape) if x.grad is None else x.grad.numpy() for x in logits]
        outcome = _Outcome(summary(loss.item(), *gradients))
        outcome.loss, (outcome.student, outcome.teacher) = loss.item(), gradients
        return outcome

    return answer


def _loss_and_its_slope(loss, student, teacher):
    return loss, float(np.linalg.norm(student))


def _reaches_the_teacher(loss, student, teacher):
    return (bool(teacher.any()),)


def _loss_cases():
    even, sure = torch.zeros(1, 1, 2), torch.tensor([[[2 * math.log(3.0), 0.0]]])
    first = torch.zeros(1, 1, dtype=torch.int64)
    yield even, sure, first, 2.0, 0.5
    yield even, sure, first, 2.0, 0.0
    random = torch.Generator().manual_seed(75)
    for batch, time, words, temperature, hard, size in (
        (2, 3, 5, 2.0, 0.25, 1), (3, 2, 4, 4.0, 0.0, 3), (1, 6, 7, 1.0, 0.75, 2),
        (4, 5, 3, 3.0, 0.5, 1), (2, 1, 6, 0.5, 0.25, 1), (2, 4, 9, 2.0, 1.0, 2),
        (3, 7, 11, 2.0, 0.9, 4), (5, 3, 8, 1.5, 0.125, 2), (2, 8, 16, 1.0, 0.25, 70),
        (3, 4, 6, 2.5, 0.0, 2), (2, 3, 4, 4.0, 0.25, 70),
    ):  # fmt: skip
        student, teacher = size * torch.randn(2, batch, time, words, generator=random)
        labels = torch.randint(words, (batch, time), generator=random)
        yield student, teacher, labels, temperature, hard
    yield student, student.clone(), labels, 3.0, 0.0


def _check_loss(function) -> None:
    name = "distillation_loss"
    for summary, examine in (
        (_loss_and_its_slope, _examine_loss),
        (_reaches_the_teacher, _examine_teacher),
    ):
        wrong_answers = tuple((_with_gradients(w, summary), text) for w, text in _WRONG_LOSS)
        answer = _with_gradients(function, summary)
        judge(name, answer, _loss_cases(), examine, wrong_answers)


def _log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    x = logits.double().numpy() / temperature
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _examine_loss(student, teacher, labels, temperature, hard, got) -> str | None:
    written = call("distillation_loss", student, teacher, labels, temperature, hard)
    if not isinstance(got, _Outcome):
        return f"{written} returns {kind(got)}, expected a float32 tensor of shape ()"
    right = np.eye(student.shape[-1])[labels.numpy()]
    plain = _log_softmax(student)
    s, t = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    from_labels = -(right * plain).sum(-1).mean()
    from_teacher = temperature**2 * (np.exp(t) * (t - s)).sum(-1).mean()
    expected = float(hard * from_labels + (1 - hard) * from_teacher)
    if not abs(got.loss - expected) <= 1e-5 * max(1.0, expected):
        return f"{written} gives {show(got.loss)}, expected {show(expected)}"
    slope = hard * (np.exp(plain) - right) + (1 - hard) * temperature * (np.exp(s) - np.exp(t))
    slope /= labels.numel()
    off = ~(np.abs(got.student - slope) <= 1e-6 + 1e-4 * np.abs(slope).max())
    if not off.any():
        return None
    at = tuple(int(i) for i in np.argwhere(off)[0])
    came, wanted = show(float(got.student[at])), show(float(slope[at]))
    return f"{written}: the student's gradient at {at} is {came}, expected {wanted}"


def _examine_teacher(student, teacher, labels, temperature, hard, got) -> str | None:
    if not got.teacher.any():
        return None
    written = call("distillation_loss", student, teacher, labels, temperature, hard)
    largest = float(np.abs(got.teacher).max())
    return f"{written} gives the teacher a gradient of up to {show(largest)}, expected none"


def broken_distillation_loss(student, teacher, labels, temperature, hard):
    """Return the loss of a student on labels and on its teacher's answers."""
    p = (teacher / temperature).softmax(dim=1)
    log_q = (student / temperature).log_softmax(dim=1)
    soft = nn.functional.kl_div(log_q, p, reduction="batchmean")
    hard_loss = nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten())
    return hard * hard_loss + (1 - hard) * soft


def _from_labels(student, labels):
    return nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten())


def _divergence(teacher, student, dim=-1, dim_of_student=None):
    log_p = teacher.detach().log_softmax(dim)
    log_q = student.log_softmax(dim if dim_of_student is None else dim_of_student)
    return log_p.exp() * (log_p - log_q)


def _soft(student, teacher, temperature, dim=-1, dim_of_student=None):
    """Return the divergence of each token."""
    t = temperature
    return _divergence(teacher / t, student / t, dim, dim_of_student).sum(-1)


def _mixed(student, labels, hard, soft):
    return hard * _from_labels(student, labels) + (1 - hard) * soft


def only_the_axis_left(student, teacher, labels, temperature, hard):
    """Mends scale and mean; the softmax still runs along the tokens."""
    soft = temperature**2 * _soft(student, teacher, temperature, dim=1).mean()
    return _mixed(student, labels, hard, soft)


def only_the_square_left(student, teacher, labels, temperature, hard):
    """Mends axis and mean; temperature² is missing."""
    return _mixed(student, labels, hard, _soft(student, teacher, temperature).mean())


def only_the_mean_left(student, teacher, labels, temperature, hard):
    """Mends axis and scale; still divides by the batch alone."""
    soft = temperature**2 * _soft(student, teacher, temperature).sum() / len(student)
    return _mixed(student, labels, hard, soft)


def only_the_mean_mended(student, teacher, labels, temperature, hard):
    """Mends the mean; axis and scale are left."""
    soft = _soft(student, teacher, temperature, dim=1).mean()
    return _mixed(student, labels, hard, soft)


def only_the_square_mended(student, teacher, labels, temperature, hard):
    """Mends the scale; axis and mean are left."""
    soft = temperature**2 * _soft(student, teacher, temperature, dim=1).sum() / len(student)
    return _mixed(student, labels, hard, soft)


def only_the_axis_mended(student, teacher, labels, temperature, hard):
    """Mends the axis; scale and mean are left."""
    soft = _soft(student, teacher, temperature).sum() / len(student)
    return _mixed(student, labels, hard, soft)


def only_detached(student, teacher, labels, temperature, hard):
    """Detaches the teacher; axis, scale and mean are left."""
    return broken_distillation_loss(student, teacher.detach(), labels, temperature, hard)


def teacher_along_time(student, teacher, labels, temperature, hard):
    """Mends the axis of the student alone."""
    soft = _soft(student, teacher, temperature, dim=1, dim_of_student=-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def student_along_time(student, teacher, labels, temperature, hard):
    """Mends the axis of the teacher alone."""
    soft = _soft(student, teacher, temperature, dim_of_student=1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def mean_over_the_vocabulary(student, teacher, labels, temperature, hard):
    """Averages over the vocabulary as well (reduction="mean")."""
    soft = _soft(student, teacher, temperature).mean() / student.shape[-1]
    return _mixed(student, labels, hard, temperature**2 * soft)


def vocabulary_mean_without_square(student, teacher, labels, temperature, hard):
    """Mends the axis, and averages over the vocabulary as well."""
    soft = _soft(student, teacher, temperature).mean() / student.shape[-1]
    return _mixed(student, labels, hard, soft)


def sum_over_all(student, teacher, labels, temperature, hard):
    """Adds up the tokens (reduction="sum")."""
    soft = temperature**2 * _soft(student, teacher, temperature).sum()
    return _mixed(student, labels, hard, soft)


def reversed_divergence(student, teacher, labels, temperature, hard):
    """Weighs by the student's probabilities."""
    log_p = (teacher / temperature).log_softmax(-1).detach()
    log_q = (student / temperature).log_softmax(-1)
    soft = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def target_in_logs(student, teacher, labels, temperature, hard):
    """Hands kl_div the logarithms of a target, without log_target."""
    log_p = (teacher / temperature).log_softmax(-1).detach().flatten(0, 1)
    log_q = (student / temperature).log_softmax(-1).flatten(0, 1)
    soft = nn.functional.kl_div(log_q, log_p, reduction="batchmean")
    return _mixed(student, labels, hard, temperature**2 * soft)


def input_in_probabilities(student, teacher, labels, temperature, hard):
    """Hands kl_div the student's probabilities, not their logarithms."""
    p = (teacher / temperature).softmax(-1).detach().flatten(0, 1)
    q = (student / temperature).softmax(-1).flatten(0, 1)
    soft = nn.functional.kl_div(q, p, reduction="batchmean")
    return _mixed(student, labels, hard, temperature**2 * soft)


def log_of_the_softmax(student, teacher, labels, temperature, hard):
    """Takes the logarithm of a softmax that has underflowed."""
    p = (teacher / temperature).softmax(-1).detach()
    q = (student / temperature).softmax(-1)
    soft = (p * (p.log() - q.log())).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def entropy_missing(student, teacher, labels, temperature, hard):
    """Takes the cross entropy with the teacher for the divergence."""
    p = (teacher / temperature).softmax(-1).detach()
    soft = -(p * (student / temperature).log_softmax(-1)).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def only_the_teacher_softened(student, teacher, labels, temperature, hard):
    """Divides the teacher's logits alone by the temperature."""
    soft = _divergence(teacher / temperature, student).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def only_the_student_softened(student, teacher, labels, temperature, hard):
    """Divides the student's logits alone by the temperature."""
    soft = _divergence(teacher, student / temperature).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def weights_swapped(student, teacher, labels, temperature, hard):
    """Gives the teacher the share of the labels."""
    soft = temperature**2 * _soft(student, teacher, temperature).mean()
    return (1 - hard) * _from_labels(student, labels) + hard * soft


def square_on_both(student, teacher, labels, temperature, hard):
    """Multiplies the whole loss by temperature²."""
    soft = _soft(student, teacher, temperature).mean()
    return temperature**2 * _mixed(student, labels, hard, soft)


def not_squared(student, teacher, labels, temperature, hard):
    """Multiplies by the temperature once."""
    soft = temperature * _soft(student, teacher, temperature).mean()
    return _mixed(student, labels, hard, soft)


def divided_by_the_square(student, teacher, labels, temperature, hard):
    """Divides by temperature²."""
    soft = _soft(student, teacher, temperature).mean() / temperature**2
    return _mixed(student, labels, hard, soft)


def labels_softened(student, teacher, labels, temperature, hard):
    """Uses the temperature for the labels as well."""
    soft = temperature**2 * _soft(student, teacher, temperature).mean()
    return _mixed(student / temperature, labels, hard, soft)


def labels_shifted(student, teacher, labels, temperature, hard):
    """Shifts labels that are shifted already."""
    soft = temperature**2 * _soft(student, teacher, temperature).mean()
    return _mixed(student[:, :-1], labels[:, 1:], hard, soft)


def student_cut_off(student, teacher, labels, temperature, hard):
    """Computes the soft part without gradients."""
    with torch.no_grad():
        soft = temperature**2 * _soft(student, teacher, temperature).mean()
    return _mixed(student, labels, hard, soft)


def teacher_learns(student, teacher, labels, temperature, hard):
    """Mends the value, and leaves the teacher in the graph."""
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    soft = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


_WRONG_LOSS = (
    (only_the_axis_left, "each softmax must run over the vocabulary, the last dimension"),
    (
        only_the_square_left,
        "without temperature² the teacher's share fades as the temperature grows",
    ),
    (
        only_the_mean_left,
        "divided by the batch alone, the soft part grows with time: average over all tokens",
    ),
    (only_the_mean_mended, "the mean is mended; the axis and the scale of the soft part are not"),
    (only_the_square_mended, "temperature² is there; the axis and the mean are still wrong"),
    (only_the_axis_mended, "the axis is mended; the scale of the soft part and its mean are not"),
    (only_detached, "the soft part is as broken as it was: look at axis, scale and mean"),
    (teacher_along_time, "the student's softmax is mended, the teacher's still runs along time"),
    (student_along_time, "the teacher's softmax is mended, the student's still runs along time"),
    (mean_over_the_vocabulary, "the divergence of a token is a sum over the vocabulary, no mean"),
    (
        vocabulary_mean_without_square,
        "the vocabulary is summed, only tokens are averaged; and where is temperature²",
    ),
    (sum_over_all, "the soft part grows with the number of tokens: take their mean"),
    (reversed_divergence, "the divergence is turned: the teacher's probabilities are the weights"),
    (target_in_logs, "to give kl_div a target in logarithms, set log_target=True"),
    (input_in_probabilities, "the first argument of kl_div is logarithms: use log_softmax there"),
    (log_of_the_softmax, "a softmax may underflow to 0, whose logarithm is -inf: use log_softmax"),
    (entropy_missing, "a student equal to its teacher has a soft part of 0: subtract the entropy"),
    (only_the_teacher_softened, "the student's logits are divided by the temperature too"),
    (only_the_student_softened, "the teacher's logits are divided by the temperature too"),
    (weights_swapped, "the part of the labels has the weight hard, that of the teacher 1 − hard"),
    (square_on_both, "temperature² belongs to the soft part alone"),
    (not_squared, "the factor is the temperature squared, not the temperature"),
    (divided_by_the_square, "multiply by temperature²: the divergence is too small, not too large"),
    (labels_softened, "the labels meet the plain logits, without a temperature"),
    (labels_shifted, "the labels are already the next tokens: do not shift them again"),
    (student_cut_off, "the student must learn from the soft part: keep it in the graph"),
    (teacher_learns, "no gradient may flow into the teacher: detach it"),
)


def loss_with_kl_div(student, teacher, labels, temperature, hard):
    """Puts all tokens into one row, so that batchmean divides by their number."""
    student, teacher = student.flatten(0, 1), teacher.detach().flatten(0, 1)
    soft = nn.functional.kl_div(
        (student / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    from_labels = nn.functional.cross_entropy(student, labels.flatten())
    return torch.lerp(soft * temperature * temperature, from_labels, hard)


def loss_by_entropies(student, teacher, labels, temperature, hard):
    """Cross entropy minus entropy, in float64."""
    student, teacher = student.double(), teacher.detach().double()
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    entropy, cross = (-(log_p.exp() * x).sum(-1).mean() for x in (log_p, log_q))
    right = student.log_softmax(-1).gather(-1, labels[..., None])
    return (-hard * right.mean() + (1 - hard) * temperature**2 * (cross - entropy)).float()


def loss_token_by_token(student, teacher, labels, temperature, hard):
    """Goes through the tokens, with soft targets for the cross entropy."""
    losses, tokens = [], (x.flatten(0, 1) for x in (student, teacher, labels[..., None]))
    for s, t, label in zip(*tokens, strict=True):
        with torch.no_grad():
            p = torch.softmax(t / temperature, 0)
            entropy = torch.special.entr(p).sum()
        soft = nn.functional.cross_entropy(s / temperature, p) - entropy
        losses.append(hard * (s.logsumexp(0) - s[label[0]]) + (1 - hard) * temperature**2 * soft)
    return torch.stack(losses).mean()


EXERCISES = (
    Exercise(
        "7.1", "What zeros cost", 2, 15, ("stored_nbytes",), _check_storage,
        "To leave a zero out you must store where it was, and that can cost more than the zero.",
        _WRONG_STORAGE, (stored_by_counting, stored_in_a_table),
    ),
    Exercise(
        "7.2", "Wanda's mask", 1, 10, ("wanda_mask",), _check_wanda,
        "A small weight on a loud channel can matter more than a large one on a quiet channel.",
        _WRONG_WANDA, (mask_by_ranks, mask_by_rows, mask_by_largest),
    ),
    Exercise(
        "7.3", "Two of four", 2, 15, ("n_of_m_mask",), _check_groups,
        "Every group keeps as many, which hardware can use, and which free choice would not do.",
        _WRONG_GROUPS, (groups_by_sorting, groups_by_rivals),
    ),
    Exercise(
        "7.4", "Channels that really leave", 2, 20, ("shrink_mlp",), _check_mlp,
        "A channel that leaves all three weights leaves a smaller dense model and no mask.",
        _WRONG_MLP, (mlp_by_ranks, mlp_in_a_loop),
    ),
    Exercise(
        "7.5", "Bug hunt: the popular distillation loss", 3, 25, ("distillation_loss",),
        _check_loss,
        "None of the four mistakes raises an error: test a loss on a value worked out by hand.",
        _WRONG_LOSS, (loss_with_kl_div, loss_by_entropies, loss_token_by_token),
        broken=broken_distillation_loss,
    ),
)  # fmt: skip
