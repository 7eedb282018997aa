"""Exercise 5.1: `arithmetic_intensity` is the operations of a linear layer per byte that it moves.

The reference is numpy's `nbytes` of arrays of these sizes.
"""

import numpy as np

from labkit.exercises.judge import Exercise, call, judge
from labkit.exercises.number_misfit import number_misfit


def _cases():
    yield 2, 4, 1, 4  # here and below, all weights together fill whole bytes
    yield 2, 4, 3, 16
    yield 1, 1, 1, 32
    yield 24, 10, 7, 3
    yield 16, 512, 1, 8
    for tokens in (1, 8, 300):
        for bits in (2, 4, 32):
            yield 1536, 576, tokens, bits


def _check(function) -> None:
    judge("arithmetic_intensity", function, _cases(), _examine, (*_WRONG, *_OTHER_FORMS))


def _examine(out, inputs, tokens, bits, got) -> str | None:
    weight = np.zeros(out * inputs * bits // 8, np.uint8)
    x, y = np.zeros((tokens, inputs), np.float32), np.zeros((tokens, out), np.float32)
    expected = y.size * inputs * 2 / (weight.nbytes + x.nbytes + y.nbytes)
    written = call("arithmetic_intensity", out, inputs, tokens, bits)
    return number_misfit(written, got, expected, 1e-5 * expected)


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


def two_byte_activations(out, inputs, tokens, bits):
    """Stores activations and results in float16."""
    return 2 * out * inputs * tokens / (out * inputs * bits / 8 + 2 * tokens * (inputs + out))


def numbers_for_bytes(out, inputs, tokens, bits):
    """Counts activations and results, not their bytes."""
    return 2 * out * inputs * tokens / (out * inputs * bits / 8 + tokens * (inputs + out))


def float32_weights(out, inputs, tokens, bits):
    """Moves weights in float32, whatever their bits."""
    return 2 * out * inputs * tokens / (4 * (out * inputs + tokens * (inputs + out)))


def fraction_dropped(out, inputs, tokens, bits):
    """Divides operations by bytes with //."""
    moved = out * inputs * bits / 8 + 4 * tokens * (inputs + out)
    return float(2 * out * inputs * tokens // moved)


def tokens_added(out, inputs, tokens, bits):
    """Adds tokens and inputs instead of multiplying them."""
    moved = out * inputs * bits / 8 + 4 * (tokens + inputs) + 4 * (tokens + out)
    return 2 * out * inputs * tokens / moved


def tokens_added_to_inputs(out, inputs, tokens, bits):
    """Adds tokens and inputs for the activations, and gets the results right."""
    moved = out * inputs * bits / 8 + 4 * (tokens + inputs) + 4 * tokens * out
    return 2 * out * inputs * tokens / moved


def operations_of_one_token(out, inputs, tokens, bits):
    """Forgets tokens above the line."""
    return 2 * out * inputs / (out * inputs * bits / 8 + 4 * tokens * (inputs + out))


def operations_of_one_row(out, inputs, tokens, bits):
    """Forgets out above the line."""
    return 2 * inputs * tokens / (out * inputs * bits / 8 + 4 * tokens * (inputs + out))


def operation_a_result(out, inputs, tokens, bits):
    """Forgets inputs above the line."""
    return 2 * out * tokens / (out * inputs * bits / 8 + 4 * tokens * (inputs + out))


def bytes_an_operation(out, inputs, tokens, bits):
    """Turns the ratio around."""
    return (out * inputs * bits / 8 + 4 * tokens * (inputs + out)) / (2 * out * inputs * tokens)


def weights_alone(out, inputs, tokens, bits):
    """Moves weights and nothing else."""
    return 16 * tokens / bits


_WRONG = (
    (half_the_operations, "a multiply-add is two operations"),
    (bits_for_bytes, "a byte has eight bits"),
    (whole_bytes_a_weight, "for 4 bits, bits // 8 is 0: divide with /"),
    (inputs_forgotten, "the activations are read too"),
    (results_forgotten, "the results have to be written too"),
    (weights_for_each_token, "one reading of the weights serves all tokens"),
    (one_token_of_activations, "every token has activations and results of its own"),
    (few_bit_activations, "only weights have few bits; activations and results take 4 bytes"),
    (two_byte_activations, "float32 activations and results take 4 bytes each, not 2"),
    (numbers_for_bytes, "these are numbers of activations and results: each takes 4 bytes"),
    (float32_weights, "a weight takes bits / 8 bytes, not 4"),
    (fraction_dropped, "the fraction of the result is dropped: divide with /, and keep the float"),
    (tokens_added, "activations of shape (tokens, inputs) are tokens · inputs numbers, not a sum"),
    (operations_of_one_token, "above the line are the operations of all tokens, not of one"),
    (operations_of_one_row, "above the line are the operations of all out results of a token"),
    (operation_a_result, "a result takes inputs multiply-adds, not one"),
    (bytes_an_operation, "operations go above the line, bytes below"),
    (weights_alone, "activations and results move as well as weights"),
)
_OTHER_FORMS = ((tokens_added_to_inputs, dict(_WRONG)[tokens_added]),)


def intensity_by_terms(out, inputs, tokens, bits):
    """Adds up bits, and divides once."""
    moved_bits = out * inputs * bits + 32 * (tokens * inputs + tokens * out)
    return 16.0 * tokens * out * inputs / moved_bits


def intensity_by_inverse(out, inputs, tokens, bits):
    """Adds the bytes of one multiply-add."""
    return 2 / (bits / 8 / tokens + 4 / out + 4 / inputs)


EXERCISE = Exercise(
    id="5.1",
    title="Bytes or operations",
    stars=1,
    minutes=10,
    function_names=("arithmetic_intensity",),
    check=_check,
    takeaway="With one token the bytes decide; with hundreds of tokens, the operations.",
    wrong_answers=_WRONG,
    variants=(intensity_by_terms, intensity_by_inverse),
)
