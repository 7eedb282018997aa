"""Every stored tensor of a model in one file, and a byte ledger that adds up to that file."""

import json
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

_IN_FLOAT = ("embeddings", "float weights", "norms and biases")
CATEGORIES = ("quantized codes", "scales", "zero points", *_IN_FLOAT)
OVERHEAD = "file overhead"


def save_weights(model: nn.Module, path: str | Path, overwrite: bool = False) -> Path:
    """Write every stored tensor of a model to one safetensors file, and return its path.

    Tied tensors are written once. Weights that `torch.ao` hides in packed form and torchao tensors
    are written as what they hold: codes, scales, zero points.

    Args:
        model: a float model, or one quantized with `torch.ao`, torchao or `PackedLinear`.
        path: the file; its folder must exist. A half-written file never has this name.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        TypeError: if the model stores something this function cannot write; names it.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; pass overwrite=True to replace it")
    stored, note, _ = _collect(model)
    metadata = {"labkit": json.dumps(note, separators=(",", ":"))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _collect(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, dict], list[str]]:
    """Return tensors by name, a note about them, and the modules whose weights were unpacked."""
    stored, categories, ties, unpacked, seen = {}, {}, {}, [], {}
    for path, module in model.named_modules():
        if path.startswith(tuple(unpacked)):
            continue
        prefix = f"{path}." if path else ""
        tensors = _unpack(module)
        if tensors:
            unpacked.append(prefix)
        else:
            tensors = _own_tensors(module, prefix)
        quantized = _is_ao(module) or any(map(_is_codes, tensors.values()))
        for leaf, tensor in tensors.items():
            name = prefix + leaf
            if tensor.is_meta:
                raise TypeError(f"model: {name} is on the meta device and holds no values")
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            first = seen.setdefault(place, name)
            if first != name:
                ties[name] = first  # other name → name written
            stored.setdefault(first, tensor)
            category = _category(leaf, tensor, quantized, isinstance(module, nn.Embedding))
            # A head tied to an embedding is the embedding, whichever the model lists first.
            categories[first] = min(category, categories.get(first, category))
    return stored, {"categories": categories, "ties": ties}, unpacked


def _own_tensors(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    own = {}
    module._save_to_state_dict(own, "", keep_vars=True)  # `state_dict` without the children
    for name, value in own.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"model: cannot store {prefix}{name}, a {type(value).__name__}")
    return dict(pair for name, tensor in own.items() for pair in flatten(name, tensor))


def flatten(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return the plain tensors that a tensor is made of, by name; itself if it is plain."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    inner = tensor.__tensor_flatten__()[0]
    return [pair for key in inner for pair in flatten(f"{name}.{key}", getattr(tensor, key))]


def _is_ao(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn")


def _unpack(module: nn.Module) -> dict[str, torch.Tensor]:
    if not _is_ao(module):
        return {}
    hidden, dtype = {}, getattr(module, "dtype", None)
    if hasattr(module, "_all_weight_values"):  # LSTM and GRU
        hidden = module.get_weight() | module.get_bias()
    elif callable(getattr(module, "weight", None)):  # Linear, Conv, Embedding
        bias = getattr(module, "bias", None)
        hidden = {"weight": module.weight(), "bias": bias() if callable(bias) else None}
        dtype = getattr(module._packed_params, "dtype", None)
    parts = {}
    for name, tensor in hidden.items():
        if tensor is not None and tensor.is_quantized:
            parts |= _split(name, tensor)
        elif tensor is not None:  # dtype=torch.float16 packs halves but hands out float32
            is_half = dtype == torch.float16 and name.startswith("weight")
            parts[name] = tensor.half() if is_half else tensor
    # A dynamic layer has these two attributes as well, unused.
    is_static = ".dynamic" not in type(module).__module__
    if is_static and isinstance(getattr(module, "scale", None), float):
        parts |= {name: torch.tensor(getattr(module, name)) for name in ("scale", "zero_point")}
    return parts


def _split(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
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
    return {f"{name}.codes": codes, f"{name}.scale": scale, f"{name}.zero_point": zero_point}


def _is_codes(tensor: torch.Tensor) -> bool:
    one_byte = tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool
    return tensor.ndim >= 2 and (one_byte or tensor.dtype in (torch.int16, torch.int32))


def _category(leaf: str, tensor: torch.Tensor, quantized: bool, embedding: bool) -> int:
    belongs = {
        "scales": quantized and "scale" in leaf,
        "zero points": quantized and "zero" in leaf,
        "quantized codes": _is_codes(tensor),
        "embeddings": embedding,
        "float weights": tensor.is_floating_point() and tensor.ndim >= 2,
        "norms and biases": True,
    }
    return CATEGORIES.index(next(name for name, found in belongs.items() if found))


def byte_ledger(source: str | Path | nn.Module) -> dict[str, int]:
    """Say where the bytes of a saved model go.

    Args:
        source: a file written by `save_weights`, or a model: the file it would be saved to.

    Returns:
        Bytes by category, in the order of `CATEGORIES` (a tied head counts as embedding, once),
        then the file overhead. The sum is the size of the file.

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
        model: built and quantized as the one that was saved. What was tied is tied again.
        path: a file written by `save_weights`.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if the model holds layers that `torch.ao` quantized; names the first.
        ValueError: if names, shapes or dtypes differ, or `save_weights` did not write the file.
    """
    from safetensors.torch import load_file

    note, _ = _read_header(Path(path))
    expected, _, unpacked = _collect(model)
    if unpacked:
        raise TypeError(
            f"model: load_weights cannot fill {unpacked[0].rstrip('.')!r}, a layer "
            "of torch.ao; load the float model, then quantize it again"
        )
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    # Ties of the file between parameters that are separate in the model.
    ties = {a: b for a, b in note["ties"].items() if a in shapes and shapes[a] == shapes.get(b)}
    expected = {name: tensor for name, tensor in expected.items() if name not in ties}
    loaded = load_file(path)
    _check_same(expected, loaded)
    for alias, name in ties.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameters[name])
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(loaded[name])


def _check_same(expected: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    forms = [{name: (t.dtype, t.shape) for name, t in side.items()} for side in (expected, loaded)]
    changed = {name for name, _ in forms[0].items() ^ forms[1].items()}
    problems = {
        "missing in the file": expected.keys() - loaded.keys(),
        "unknown to the model": loaded.keys() - expected.keys(),
        "of another shape or dtype": changed & expected.keys() & loaded.keys(),
    }
    found = [f"{len(v)} {k} ({', '.join(sorted(v)[:3])} …)" for k, v in problems.items() if v]
    if found:
        raise ValueError(f"path: the file and the model differ; {'; '.join(found)}")
