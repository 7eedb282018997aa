"""Hadamard transforms and rotations folded into a model: orthogonal, and without effect on it."""

import copy

import families
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import rotations

SIZES = [2**k for k in range(11)] + [12, 24, 96, 144, 576, 1536]


@pytest.mark.parametrize("n", SIZES)
def test_the_transform_is_a_hadamard_matrix(n):
    matrix = rotations.hadamard_transform(torch.eye(n, dtype=torch.float64)) * n**0.5
    assert (matrix.abs() - 1).abs().max() < 1e-9
    torch.testing.assert_close(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))
    if n & (n - 1) == 0:
        np.testing.assert_allclose(matrix.numpy(), scipy.linalg.hadamard(n), atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 8, 12, 48, 64]), st.lists(st.integers(1, 3), max_size=3))
def test_rows_are_turned_each_for_itself_and_keep_their_length(n, batch):
    x = torch.randn(*batch, n, generator=torch.Generator().manual_seed(n))
    turned = rotations.hadamard_transform(x)
    assert turned.shape == x.shape
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    alone = [rotations.hadamard_transform(row) for row in x.reshape(-1, n)]
    torch.testing.assert_close(turned.reshape(-1, n), torch.stack(alone))


@pytest.mark.parametrize("n", [0, 3, 5, 9, 18, 36, 100])
def test_sizes_without_a_matrix_are_refused(n):
    with pytest.raises(ValueError, match=f"n must be a product of twos and twelves, not {n}"):
        rotations.hadamard_transform(torch.zeros(2, n))


@pytest.mark.parametrize("kind", ["Hadamard", "signs", "orthogonal", "stream alone"])
def test_a_turned_model_computes_what_it_did(model, ids, kind):
    width = model.config.hidden_size
    random = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (width,), generator=random) * 2.0 - 1
    square = torch.linalg.qr(torch.randn(width, width, generator=random))[0]
    stream = {
        "signs": lambda x: rotations.hadamard_transform(x * signs),
        "orthogonal": lambda x: x @ square,
    }.get(kind, rotations.hadamard_transform)
    inside = None if kind == "stream alone" else rotations.hadamard_transform
    turned = copy.deepcopy(model)
    rotations.rotate(turned, stream, inside)
    with torch.no_grad():
        before, after = model(ids[:2]).logits, turned(ids[:2]).logits
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()
    changed = (turned.model.embed_tokens.weight - model.model.embed_tokens.weight).abs().max()
    assert changed > 1e-3, "nothing was turned"
    assert turned.lm_head.weight is not turned.model.embed_tokens.weight
    norms = [w for n, w in turned.named_parameters() if n.endswith("norm.weight")]
    assert all((weight == 1).all() for weight in norms)


@pytest.mark.parametrize("kind", sorted({*families.LLAMA_TYPE, *families.OTHERS}))
def test_other_models_turn_rightly_or_are_refused_unchanged(kind):
    model, ids = families.family(kind), families.token_ids(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(ids).logits if kind in families.LLAMA_TYPE else None
        try:
            rotations.rotate(model, rotations.hadamard_transform, rotations.hadamard_transform)
        except TypeError:
            assert kind not in ("llama", "mistral", "qwen3")
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, before[name]), name
            return
        found = model(ids).logits
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()
