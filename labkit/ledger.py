"""Every stored tensor of a model in one file, and a byte ledger that adds up to that file."""

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

CATEGORIES = (
    "quantized codes",
    "scales",
    "zero points",
    "embeddings",
    "float weights",
    "norms and biases",
)
OVERHEAD = "file overhead"


def save_weights(model: nn.Module, path: str | Path, overwrite: bool = False) -> Path:
    """Write every stored tensor of a model to one safetensors file.

    Tied tensors are written once. Weights that `torch.ao` modules hide in packed form and torchao
    tensors are written as what they hold: codes, scales, zero points. Buffers that are not
    persistent (rotary tables) are left out, as in `state_dict`.

    Args:
        model: a float model, or one quantized with `torch.ao`, torchao or `PackedLinear`.
        path: the file; its folder must exist. A half-written file never has this name.
        overwrite: replace an existing file.

    Returns:
        The path.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        TypeError: if the model stores something this function cannot write; names it.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; pass overwrite=True to replace it")
    stored = _collect(model)
    note = {"categories": stored.categories, "ties": stored.ties}
    metadata = {"labkit": json.dumps(note, separators=(",", ":"))}
    tensors = {name: t.detach().cpu().contiguous() for name, t in stored.tensors.items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@dataclass
class _Stored:
    """What a model stores: tensors by name, their categories, `ties` (other name → name written),
    and the modules whose weights are copies, unpacked from a hidden form (module → its tensors)."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    unpacked: dict[str, set[str]] = field(default_factory=dict)


def _collect(model: nn.Module) -> _Stored:
    stored, seen = _Stored(), {}
    for prefix, module in model.named_modules():
        if any(_inside(prefix, name) for name in stored.unpacked):
            continue
        hidden = _unpack(module)
        if hidden:
            stored.unpacked[prefix] = set(hidden)
        tensors = hidden or _own_tensors(module)
        quantized = _is_ao(module) or any(_is_codes(tensor) for tensor in tensors.values())
        for leaf, tensor in tensors.items():
            name = f"{prefix}.{leaf}".lstrip(".")
            if tensor.is_meta:
                raise TypeError(f"model: {name} is on the meta device and holds no values")
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            first = seen.setdefault(place, name)
            if first != name:
                stored.ties[name] = first
            category = _category(leaf, tensor, quantized, isinstance(module, nn.Embedding))
            stored.tensors.setdefault(first, tensor)
            # A head tied to an embedding is the embedding, whichever the model lists first.
            stored.categories[first] = min(category, stored.categories.get(first, category))
    _refuse_leftovers(model, {model.get_submodule(name) for name in stored.unpacked})
    return stored


def _refuse_leftovers(model: nn.Module, unpacked: set[nn.Module]) -> None:
    modules = model.named_modules(remove_duplicate=False)
    prefixes = [name for name, module in modules if module in unpacked]
    for name, value in model.state_dict().items():
        known = isinstance(value, torch.Tensor) or any(_inside(name, p) for p in prefixes)
        if not known:
            raise TypeError(f"model: cannot store {name}, a {type(value).__name__}")


def _inside(name: str, module: str) -> bool:
    return name == module or not module or name.startswith(module + ".")


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            own[name] = buffer
    return {key: part for name, tensor in own.items() for key, part in _flatten(name, tensor)}


def _flatten(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    inner = tensor.__tensor_flatten__()[0]
    return [pair for key in inner for pair in _flatten(f"{name}.{key}", getattr(tensor, key))]


def _is_ao(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn")


def _unpack(module: nn.Module) -> dict[str, torch.Tensor]:
    if not _is_ao(module):
        return {}
    if hasattr(module, "_all_weight_values"):  # LSTM and GRU
        weights, biases, dtype = module.get_weight(), module.get_bias(), module.dtype
    elif callable(getattr(module, "weight", None)):  # Linear, Conv, Embedding
        weights, biases = {"weight": module.weight()}, {}
        if callable(getattr(module, "bias", None)):
            biases["bias"] = module.bias()
        dtype = getattr(module._packed_params, "dtype", None)
    else:
        weights, biases, dtype = {}, {}, None
    parts = {}
    for name, weight in weights.items():
        if weight.is_quantized:
            parts |= {f"{name}.{key}": part for key, part in _split(weight).items()}
        else:  # dtype=torch.float16 packs halves but hands out float32
            parts[name] = weight.half() if dtype == torch.float16 else weight
    parts |= {name: bias for name, bias in biases.items() if bias is not None}
    # A dynamic layer has these two attributes as well, unused.
    is_static = ".dynamic" not in type(module).__module__
    if is_static and isinstance(getattr(module, "scale", None), float):
        parts["scale"] = torch.tensor(module.scale)
        parts["zero_point"] = torch.tensor(module.zero_point)
    return parts


def _split(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor(weight.q_scale(), dtype=torch.float64)
        zero_point = torch.tensor(weight.q_zero_point())
    else:
        scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    codes = weight.int_repr()
    # torch keeps 8-byte scales and zero points; what fits in fewer bytes exactly is stored so.
    if torch.equal(scale.float().double(), scale.double()):
        scale = scale.float()
    if not zero_point.is_floating_point():
        zero_point = zero_point.to(codes.dtype)
    return {"codes": codes, "scale": scale, "zero_point": zero_point}


def _is_codes(tensor: torch.Tensor) -> bool:
    return tensor.ndim >= 2 and (
        tensor.dtype in (torch.int16, torch.int32)
        or (tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool)
    )


def _category(leaf: str, tensor: torch.Tensor, quantized: bool, embedding: bool) -> int:
    if quantized and "scale" in leaf:
        name = "scales"
    elif quantized and "zero" in leaf:
        name = "zero points"
    elif _is_codes(tensor):
        name = "quantized codes"
    elif embedding:
        name = "embeddings"
    elif tensor.is_floating_point() and tensor.ndim >= 2:
        name = "float weights"
    else:
        name = "norms and biases"
    return CATEGORIES.index(name)


def byte_ledger(source: str | Path | nn.Module) -> dict[str, int]:
    """Say where the bytes of a saved model go.

    Args:
        source: a file written by `save_weights`, or a model: the file it would be saved to.

    Returns:
        Bytes by category, in the order of `CATEGORIES` (embeddings, weights, norms and biases are
        those left in float; a tied head counts as embedding, once), then the file overhead. The
        sum is the size of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if the model cannot be saved, see `save_weights`.
        ValueError: if the file was not written by `save_weights`.
    """
    if isinstance(source, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            return byte_ledger(save_weights(source, Path(folder) / "model.safetensors"))
    path = Path(source)
    note, entries = _read_header(path)
    ledger = dict.fromkeys(CATEGORIES, 0)
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        ledger[CATEGORIES[note["categories"][name]]] += stop - start
    return ledger | {OVERHEAD: path.stat().st_size - sum(ledger.values())}


def _read_header(path: Path) -> tuple[dict, dict]:
    # The format: 8 bytes of header length, the header in JSON, the tensors.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            entries = json.loads(file.read(length) if length < path.stat().st_size else b"")
            return json.loads(entries.pop("__metadata__")["labkit"]), entries
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"path: {path} was not written by labkit's save_weights") from None


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a model with the weights of a file, exactly: the inverse of `save_weights`.

    Args:
        model: built, and quantized, the same way as the model that was saved. Tensors that were
            tied then are tied again.
        path: a file written by `save_weights`.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if the model holds layers that `torch.ao` quantized; names the first.
        ValueError: if names, shapes or dtypes differ, or `save_weights` did not write the file.
    """
    from safetensors.torch import load_file

    path = Path(path)
    note, _ = _read_header(path)
    stored, parameters = _collect(model), dict(model.named_parameters())
    ties = _ties_to_make(note["ties"], parameters)
    expected = {name: tensor for name, tensor in stored.tensors.items() if name not in ties}
    if stored.unpacked:
        raise TypeError(
            f"model: load_weights cannot fill {next(iter(stored.unpacked))!r}, a layer "
            "of torch.ao; load the float model, then quantize it again"
        )
    loaded = load_file(path)
    _check_same(expected, loaded)
    for alias, name in ties.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameters[name])
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(loaded[name])


def _ties_to_make(ties: dict[str, str], parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """Return the ties of the file between parameters that are separate in the model."""
    return {
        alias: name
        for alias, name in ties.items()
        if {alias, name} <= parameters.keys() and parameters[alias].shape == parameters[name].shape
    }


def _check_same(expected: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    both = expected.keys() & loaded.keys()
    forms = [{name: (t.dtype, t.shape) for name, t in side.items()} for side in (expected, loaded)]
    problems = {
        "missing in the file": expected.keys() - loaded.keys(),
        "unknown to the model": loaded.keys() - expected.keys(),
        "of another shape or dtype": {name for name in both if forms[0][name] != forms[1][name]},
    }
    found = [f"{len(v)} {k} ({', '.join(sorted(v)[:3])} …)" for k, v in problems.items() if v]
    if found:
        raise ValueError(f"path: the file and the model differ; {'; '.join(found)}")
