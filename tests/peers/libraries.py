"""One short function for each library: quantize, and return what a file would hold as floats.

Runs in the environment of that library, without labkit. A library is imported where it is used.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

BLOCKS = "model.layers."


@dataclass(frozen=True)
class Scheme:
    """What grid: `group_size` 0 is one scale an output channel."""

    bits: int
    group_size: int
    symmetric: bool


@dataclass
class Result:
    """The parameters after quantization, and what a file would hold for each group.

    Attributes:
        state: float tensors by parameter name.
        scale_bits, zero_bits: stored bits of one scale and of one zero point.
        settings: what was passed to the library beyond the scheme.
        extra_bits: other stored bits, all matrices together.
        flat: groups run on across the rows of a matrix.
    """

    state: dict[str, torch.Tensor]
    scale_bits: float
    zero_bits: float
    settings: dict
    extra_bits: int = 0
    flat: bool = False


def load_model(folder: Path):
    """Return the exported model in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def calibration(folder: Path) -> torch.Tensor:
    """Return the calibration tokens, int64 `(windows, length)`."""
    return load_file(folder / "calibration.safetensors")["input_ids"]


def block_linears(model) -> dict[str, torch.nn.Module]:
    """Return the linear layers inside the decoder blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(BLOCKS) and name.endswith("_proj")
    }


def on_fp16_grid(weight, scale, zero, low: int, high: int) -> torch.Tensor:
    """Round a weight to codes and read it back with the scale that a file holds, in float16."""
    w = weight.detach().float().unflatten(1, (scale.shape[1], -1))
    scale, zero = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    codes = (torch.round(w / scale) + zero).clamp(low, high)
    return ((codes - zero) * scale.half().float()).flatten(1)


def column_index_bits(state: dict[str, torch.Tensor]) -> int:
    """Return the bits of the group index that these formats store for each input column."""
    return sum(32 * w.shape[1] for name, w in state.items() if name.endswith("_proj.weight"))


def llmcompressor(folder: Path, scheme: Scheme, options, method: str) -> Result:
    """Quantize with llm-compressor: round to nearest, GPTQ, or AWQ and then round to nearest."""
    from llmcompressor import oneshot

    ids = calibration(folder)[: options.windows]
    batches = [{"input_ids": x[None], "attention_mask": torch.ones_like(x[None])} for x in ids]
    model = load_model(folder)
    modifiers, settings = llmcompressor_recipe(scheme, method)
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(batches, batch_size=None),
        recipe=modifiers,
        num_calibration_samples=len(ids),
        pipeline="sequential",
    )
    state = dict(model.named_parameters())
    half = 2 ** (scheme.bits - 1)
    for name, layer in block_linears(model).items():
        grid = layer.weight_scale, layer.weight_zero_point
        state[f"{name}.weight"] = on_fp16_grid(layer.weight, *grid, -half, half - 1)
    return Result(state, 16, 0 if scheme.symmetric else scheme.bits, settings)


def llmcompressor_recipe(scheme: Scheme, method: str) -> tuple[list, dict]:
    """Return the modifiers and a record of their settings."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    # Version 0.14 pins memory for a GPU even where there is none, and stops.
    IntermediatesCache.pin_memory = lambda self, *_: None
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
    if scheme.group_size:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    else:
        weights |= {"strategy": "channel"}
    common = {
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    if method == "gptq":
        gptq = GPTQModifier(**common)
        return [gptq], {
            "dampening": gptq.dampening_frac,
            "block size": gptq.block_size,
            "act order": "static",  # the default; groups keep their columns
        }
    rounding = QuantizationModifier(**common)
    if method == "awq":
        settings = {"duo scaling": "both", "grid points": 20, "then": "round to nearest"}
        return [AWQModifier(duo_scaling="both", n_grid=20), rounding], settings
    return [rounding], {}


def auto_round(folder: Path, scheme: Scheme, options, method: str) -> Result:
    """Quantize with AutoRound: signed gradient descent on rounding and ranges, or none of it."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    ids = calibration(folder)[: options.windows]
    steps = {"iters": 0} if method == "rtn" else {"iters": options.iters}
    if 0 < steps["iters"] <= 50:
        steps["lr"] = 5e-3  # of AutoRound's own light recipe, 50 iterations
    settings = steps | {"batch size": 4, "amp": "bfloat16"}
    rounder = AutoRound(
        load_model(folder),
        AutoTokenizer.from_pretrained(folder),
        scheme="W4A16",
        bits=scheme.bits,
        group_size=scheme.group_size or -1,
        sym=scheme.symmetric,
        dataset=torch.utils.data.DataLoader([{"input_ids": x} for x in ids], batch_size=4),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=4,
        device_map="cpu",
        scale_dtype="fp16",
        enable_torch_compile=False,
        **steps,
    )
    model, _ = rounder.quantize()
    return Result(
        dict(model.named_parameters()), 16, 0 if scheme.symmetric else scheme.bits, settings
    )


def gptqmodel(folder: Path, scheme: Scheme, options, method: str) -> Result:
    """Quantize with GPTQModel: GPTQ, by default with its group-aware order."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it stops with fewer
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    config = GPTQConfig(
        bits=scheme.bits,
        group_size=scheme.group_size or -1,
        sym=scheme.symmetric,
        desc_act=method == "desc-act",
        format="gptq_v2",  # in memory, `gptq` holds zero points that are one too small
        device="cpu",
        offload_to_disk=False,
    )
    peer = GPTQModel.load(str(folder), config, dtype=torch.float32)
    windows = [x.tolist() for x in calibration(folder)[: options.windows]]
    peer.quantize([{"input_ids": x, "attention_mask": [1] * len(x)} for x in windows], batch_size=1)
    state = dict(peer.model.named_parameters())
    for name, layer in block_linears(peer.model).items():
        state[f"{name}.weight"] = layer.dequantize_weight().T
    settings = {
        "dampening": config.damp_percent,
        "act order": "group-aware" if config.act_group_aware else "desc_act",
        "true sequential": config.true_sequential,
    }
    return Result(state, 16, scheme.bits, settings, column_index_bits(state))


def neural_compressor(folder: Path, scheme: Scheme, options, method: str) -> Result:
    """Quantize with Neural Compressor: GPTQ."""
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

    # In version 3.10 `true_sequential` feeds a block its own outputs after each group of layers, so
    # that all but the first see wrong inputs. It is off by default.
    settings = {"act_order": True, "true_sequential": False, "percdamp": 0.01}
    config = GPTQConfig(
        bits=scheme.bits, use_sym=scheme.symmetric, group_size=scheme.group_size or -1, **settings
    )
    config.set_local("lm_head", GPTQConfig(dtype="fp32"))
    model = prepare(load_model(folder), config)
    with torch.no_grad():
        for window in calibration(folder)[: options.windows]:
            model(window[None])
    model = convert(model)
    state = dict(model.named_parameters())
    for name, layer in block_linears(model).items():
        state[f"{name}.weight"] = layer.recover()
    return Result(state, 16, scheme.bits, settings, column_index_bits(state))


def hqq(folder: Path, scheme: Scheme, options, method: str) -> Result:
    """Quantize with HQQ: no calibration; half-quadratic fit of the zero points."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    if scheme.symmetric:
        raise ValueError("HQQ has no symmetric grid")
    config = BaseQuantizeConfig(nbits=scheme.bits, group_size=scheme.group_size or None, axis=1)
    model = load_model(folder)
    state = dict(model.named_parameters())
    for name, layer in block_linears(model).items():
        packed = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        state[f"{name}.weight"] = packed.dequantize()
    settings = {key: config["weight_quant_params"][key] for key in ("axis", "optimize")}
    return Result(state, 16, 16, settings, flat=True)


def quanto(folder: Path, scheme: Scheme, options, method: str) -> Result:
    """Quantize with optimum-quanto: no calibration; min-max ranges, or its HQQ optimizer."""
    from optimum.quanto import HqqOptimizer, MaxOptimizer, qint4, quantize_weight

    if scheme.symmetric or scheme.bits != 4 or not scheme.group_size:
        raise ValueError("this call of quanto has 4-bit groups with a shift only")
    optimizer = HqqOptimizer() if method == "hqq" else MaxOptimizer()
    model = load_model(folder)
    state = dict(model.named_parameters())
    for name, layer in block_linears(model).items():
        w, size = layer.weight.detach(), scheme.group_size
        scale, shift = (x.half().float() for x in optimizer(w, qint4, 0, size))
        grid = {"axis": 0, "scale": scale, "shift": shift, "group_size": size}
        packed = quantize_weight(w, qtype=qint4, optimized=False, **grid)
        state[f"{name}.weight"] = packed.dequantize()
    return Result(state, 16, 16, {"optimizer": type(optimizer).__name__})


def bitsandbytes(folder: Path, scheme: Scheme, options, method: str) -> Result:
    """Quantize with bitsandbytes: NF4 blocks of the flattened matrix, no calibration."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if scheme.bits != 4 or not scheme.group_size:
        raise ValueError("NF4 has 4 bits and needs a block size")
    double = method == "double"
    model = load_model(folder)
    state, extra = dict(model.named_parameters()), 0
    for name, layer in block_linears(model).items():
        packed, how = quantize_4bit(
            layer.weight.detach(),
            blocksize=scheme.group_size,
            quant_type="nf4",
            compress_statistics=double,
        )
        state[f"{name}.weight"] = dequantize_4bit(packed, how)
        if double:  # a float32 scale for 256 scales, and their float32 mean
            extra += 32 * (how.state2.absmax.numel() + 1)
    settings = {"codes": "NF4", "scales": "8 bits in blocks of 256" if double else "float32"}
    return Result(state, 8 if double else 32, 0, settings, extra, flat=True)
