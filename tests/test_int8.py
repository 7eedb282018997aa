"""The W8A8 engine against 64-bit integers, as it is and with what overflows elsewhere apart."""

import copy
import pickle

import pytest
import torch
from torch import nn

from labkit import int8
from labkit.int8 import Int8Linear, with_int8_linears
from labkit.quant import choose_qparams


@pytest.fixture(params=[False, True], ids=["as it is", "apart"])
def apart(request, monkeypatch):
    """Whether the layer has to spare the engine what overflows on x86 without VNNI."""
    if request.param:
        monkeypatch.setattr(int8, "_exact", lambda engine: False)
    return request.param


def _codes_of(rows, layer):
    """Codes less their zero point, int64, and their scale: torch's own where it finds it."""
    if layer.bits == 8 and (len(rows) == 1 or not layer.per_token):
        found = torch.quantize_per_tensor_dynamic(rows, torch.quint8, False)
        return found.int_repr().long() - found.q_zero_point(), torch.tensor(found.q_scale())
    scale, zero = choose_qparams(rows, layer.bits, dim=-1 if layer.per_token else None)
    codes = ((rows / scale).round() + zero).clamp(0, 2**layer.bits - 1)
    return codes.long() - zero.long(), scale


def exactly(layer, linear, x):
    """What the layer should return, by 64-bit integers and float64 scales."""
    rows, scale = _codes_of(x.flatten(0, -2), layer)
    sums = (rows.numpy() @ layer.codes.long().numpy().T) * scale.double().numpy()
    out = torch.from_numpy(sums) * layer.scale.double()
    out = out if linear.bias is None else out + linear.bias.double()
    return out.unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(1, 576), (3, 40, 576), (2, 1536)])
def test_it_computes_what_integers_say(shape, per_token, bits, apart):
    torch.manual_seed(0)
    linear = nn.Linear(shape[-1], 96, bias=shape[0] > 1)
    x = torch.randn(shape) * torch.rand(*shape[:-1], 1) * 5 + 0.5
    layer = Int8Linear(linear, per_token, bits)
    found, wanted = layer(x), exactly(layer, linear, x)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("n_inputs", [512, 511])
@pytest.mark.parametrize("per_token", [False, True])
def test_it_is_exact_where_16_bit_sums_overflow(per_token, n_inputs, apart):
    linear = nn.Linear(n_inputs, 8, bias=False)
    linear.weight.data.fill_(1.0)
    found = Int8Linear(linear, per_token)(torch.ones(4, n_inputs))
    assert torch.allclose(found, torch.full((4, 8), float(n_inputs)), rtol=1e-6)


def test_what_is_taken_off_leaves_sums_of_neighbors_that_fit_and_is_little():
    torch.manual_seed(0)
    for codes in (
        torch.randint(-128, 128, (40, 101), dtype=torch.int8),
        torch.full((2, 64), -128, dtype=torch.int8),
        Int8Linear(nn.Linear(576, 64)).codes,
        Int8Linear(_normal(576, 64)).codes,
    ):
        rest = int8._too_much(codes)
        left = nn.functional.pad((codes - rest).int(), (0, codes.shape[1] % 2)).unflatten(
            1, (-1, 2)
        )
        assert torch.equal(codes - rest + rest, codes)
        assert (codes.int() - rest).abs().max() <= 128
        for sign in (-1, 1):
            assert (sign * left).clamp(min=0).sum(-1).max() * 255 <= 32767 + (sign < 0)
    assert (rest != 0).float().mean() < 0.02


def _normal(n_inputs, n_outputs):
    linear = nn.Linear(n_inputs, n_outputs)
    nn.init.normal_(linear.weight)
    return linear


def test_tokens_with_their_own_scale_do_not_feel_one_another():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64), torch.randn(5, 64)
    loud = torch.cat([x, 1000 * torch.randn(1, 64)])
    per_token, per_tensor = Int8Linear(linear, per_token=True), Int8Linear(linear)
    assert torch.equal(per_token(loud)[:5], per_token(x))
    assert (per_tensor(loud)[:5] - linear(x)).abs().max() > 1


def test_one_input_works_and_no_gradient_is_asked_for():
    linear = nn.Linear(1, 4)
    x = torch.tensor([[0.5], [-2.0], [0.0]], requires_grad=True)
    found = Int8Linear(linear)(x)
    assert not found.requires_grad
    assert (found - linear(x)).abs().max() < 0.02


def test_the_dtype_of_the_input_comes_back():
    x = torch.randn(3, 32)
    layer = Int8Linear(nn.Linear(32, 4))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert (layer(x.bfloat16()).float() - layer(x)).abs().max() < 0.05


def test_zeros_constants_and_negatives_pass():
    linear = nn.Linear(32, 4, bias=False)
    layer = Int8Linear(linear, per_token=True)
    assert torch.equal(layer(torch.zeros(2, 32)), torch.zeros(2, 4))
    x = torch.stack([torch.full((32,), 3.0), torch.full((32,), -3.0)])
    assert (layer(x) - linear(x)).abs().max() < 0.02 * linear(x).abs().max() + 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_no_scale_can_hold_is_refused(bad):
    x = torch.ones(2, 32)
    x[1, 3] = bad
    for per_token in (False, True):
        with pytest.raises(ValueError, match="NaN or infinite"):
            Int8Linear(nn.Linear(32, 4), per_token)(x)


def test_bits_are_seven_or_eight():
    with pytest.raises(ValueError, match="bits must be 7 or 8, not 4"):
        Int8Linear(nn.Linear(32, 4), bits=4)


def test_copies_and_pickles_work():
    layer = Int8Linear(nn.Linear(32, 4))
    x = torch.randn(3, 32)
    wanted = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), wanted)


def test_a_loaded_state_is_used():
    one, other = Int8Linear(nn.Linear(32, 4)), Int8Linear(nn.Linear(32, 4))
    x = torch.randn(3, 32)
    one(x), other(x)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))


def test_all_linear_layers_but_the_head_are_replaced():
    import labkit as lk

    model, _ = lk.load_model("tiny", device="cpu")
    head = model.lm_head
    with_int8_linears(model, per_token=True)
    assert model.lm_head is head
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.Linear)]
    assert kinds == [nn.Linear]
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 7 * len(model.model.layers)
