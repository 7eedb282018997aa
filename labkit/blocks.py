"""The blocks of a Llama-type model: their linear layers, what feeds these, what blocks receive."""

import copy
import functools
from collections.abc import Iterable, Sequence

import torch
from torch import nn

# The linear layers of a block by what enters them, and the layer whose output that is. The input of
# o_proj has no entry there: with shared value heads, no factor for each channel goes back into one.
LINEARS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
PRODUCERS = {
    "attention": "input_layernorm",
    "mlp": "post_attention_layernorm",
    "down": "mlp.up_proj",
}
LAYERS = tuple(layer for layers in LINEARS.values() for layer in layers)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks of a Llama-type model.

    Args:
        model: a causal LM of transformers. What stands in the place of its linear layers may be of
            any kind.

    Raises:
        TypeError: if a block lacks a layer of `LINEARS` or has another linear layer beside them;
            names the model's class and the layer.
    """
    blocks = getattr(getattr(model, "model", None), "layers", None)
    kind = f"model: {type(model).__name__} is not of Llama type"
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise TypeError(f"{kind}: it has no model.layers")
    for number, block in enumerate(blocks):
        if problem := _misfit(block):
            raise TypeError(f"{kind}: model.layers.{number} {problem}")
    return list(blocks)


def check_block(block: nn.Module) -> None:
    """Refuse a block of another type, see `blocks_of`."""
    if problem := _misfit(block):
        raise TypeError(f"block: {type(block).__name__} is not of Llama type: it {problem}")


def _misfit(block: nn.Module) -> str | None:
    for name in LAYERS:
        if _submodule(block, name) is None:
            return f"has no {name}"
    for name, module in block.named_modules():
        inside = any(f"{name}.".startswith(f"{layer}.") for layer in LAYERS)
        if isinstance(module, nn.Linear) and not inside:
            return f"has a layer {name} too"
    return None


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def linear_layers(root: nn.Module, names: Iterable[str]) -> list[nn.Linear]:
    """Return float linear layers by name.

    Args:
        root: a model or a block.
        names: of its layers.

    Raises:
        TypeError: if one is missing or no plain `nn.Linear` with its own weight; names it.
    """
    layers = []
    for name in names:
        layer = _submodule(root, name)
        if layer is None:
            raise TypeError(f"{type(root).__name__} has no layer {name}")
        check_linear(layer, f"{type(root).__name__}: {name}")
        layers.append(layer)
    return layers


def check_linear(layer: nn.Module, name: str = "linear") -> None:
    """Refuse with a TypeError what is no plain `nn.Linear`, or computes its weight (pruned)."""
    if type(layer) is not nn.Linear:
        raise TypeError(f"{name} must be a plain nn.Linear, not {type(layer).__name__}")
    if not isinstance(layer.weight, nn.Parameter):
        raise TypeError(f"{name} computes its weight; remove its pruning or parametrization first")


@torch.no_grad()
def check_wiring(model: nn.Module, ids: torch.Tensor) -> None:
    """Refuse a model in which the layers of `LINEARS` do not read what that says.

    Args:
        model: of Llama type, in eval mode.
        ids: int64 `(1, length)`, a few tokens; the model is run once.

    Raises:
        TypeError: if a block does not run each layer once, those of one entry on the same input.
    """
    places = [
        (f"model.layers.{number}", block, layers)
        for number, block in enumerate(blocks_of(model))
        for layers in LINEARS.values()
    ]
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        block.get_submodule(layer).register_forward_pre_hook(
            lambda _, x, name=f"{path}.{layer}": seen.setdefault(name, []).append(x[0])
        )
        for path, block, layers in places
        for layer in layers
    ]
    try:
        model.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for path, _, layers in places:
        entered = [seen.get(f"{path}.{layer}", []) for layer in layers]
        for layer, inputs in zip(layers, entered, strict=True):
            if len(inputs) != 1 or not _same(inputs, entered[0]):
                raise TypeError(
                    f"model: {type(model).__name__} is not of Llama type: {path}.{layer} does not "
                    f"read, once, what {layers[0]} reads"
                )


def received(
    model: nn.Module, parts: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[dict[int, tuple]]]:
    """Let a model prepare what its blocks receive; the blocks themselves do not run.

    Args:
        model: of Llama type, in eval mode.
        parts: token ids, int64 `(n, length)` each.

    Returns:
        For each part, what enters the first block, `(n, length, hidden)`. For each block, its other
        arguments, positional and by name (masks, positions), by the number n of windows.

    Raises:
        TypeError: if the model does more with its blocks than to run one after the other, or what
            they receive depends on the text.
    """
    blocks, kind = blocks_of(model), type(model).__name__
    entered, others = [], [{} for _ in blocks]
    for part in parts:
        calls = _calls(model.model, blocks, part)
        first = calls[0][1] if calls else None
        if [call[0] for call in calls] != list(range(len(blocks))) or not all(
            hidden is first for _, hidden, _ in calls
        ):
            raise TypeError(f"model: {kind} does more than to run its blocks one after the other")
        entered.append(first)
        for number, _, arguments in calls:
            if not _same(others[number].setdefault(len(part), arguments), arguments):
                raise TypeError(f"model: {kind} gives its blocks what depends on the text")
    return entered, others


def _calls(base: nn.Module, blocks: list[nn.Module], ids: torch.Tensor) -> list[tuple]:
    """Run a model with blocks that hand on what they get; return block, input, other arguments."""
    calls = []

    def hand_on(number, hidden_states, *others, **options):
        calls.append((number, hidden_states, (others, options)))
        return hidden_states

    before = [vars(block).get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            block.forward = functools.partial(hand_on, number)
        base(ids, use_cache=False)
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
    return calls


def _same(one, other) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or one == other


def rescalable(
    block: nn.Module, name: str, factor: torch.Tensor
) -> tuple[nn.Module, list[nn.Linear]]:
    """Return the layer that produces an input and the layers that read it, if a factor can move.

    Dividing the one and multiplying the others is tried on a copy of the block that shares its
    tensors, with a probe input of two tokens.

    Args:
        block: a decoder block.
        name: a key of `PRODUCERS`.
        factor: `(in,)`, positive and finite.

    Raises:
        TypeError: if the block would compute something else: its norm multiplies by 1 + weight, or
            feeds more than these layers, or other layers than these; or one is no plain layer.
        ValueError: if `name` is unknown, or `factor` of another shape or not positive and finite.
    """
    if name not in PRODUCERS:
        raise ValueError(f"name must be one of {list(PRODUCERS)}, not {name!r}")
    layers, kind = linear_layers(block, LINEARS[name]), type(block).__name__
    inputs = layers[0].in_features
    if factor.shape != (inputs,) or not ((factor > 0) & factor.isfinite()).all():
        raise ValueError(f"factor must be ({inputs},), positive and finite")
    producer = _submodule(block, PRODUCERS[name])
    if isinstance(producer, nn.Linear):
        check_linear(producer, f"{kind}: {PRODUCERS[name]}")
    elif not isinstance(getattr(producer, "weight", None), nn.Parameter):
        raise TypeError(f"{kind} has no {PRODUCERS[name]} with a weight")
    owned = [id(weight) for _, weight in block.named_parameters(remove_duplicate=False)]
    if any(owned.count(id(part.weight)) > 1 for part in (producer, *layers)):
        raise TypeError(f"{kind}: {name} cannot be rescaled, for two layers share a weight")
    if type(block).forward is not nn.Module.forward:  # else it computes nothing itself
        _check_identity(block, name, layers, factor)
    return producer, layers


@torch.no_grad()
def _check_identity(block: nn.Module, name: str, layers: list[nn.Linear], factor) -> None:
    kind, seen, given = f"{type(block).__name__}: {PRODUCERS[name]}", {}, {}
    twin = _twin(block, seen, given)
    try:
        _run(twin, seen, layers[0].weight, name)
        before = dict(seen)
        # Powers of 2, so that nothing is rounded; far apart, so that an error is large.
        strong = 16.0 ** (torch.arange(len(factor)) % 2 * 2 - 1).to(layers[0].weight)
        _divide(twin, given, PRODUCERS[name], strong)
        _run(twin, seen, layers[0].weight, name)
    except Exception as error:
        raise TypeError(f"{kind} cannot be tried on a probe input: {error}") from error
    for layer in LINEARS[name]:
        seen[layer] = [x * strong for x in seen.get(layer, [])]
    places = before.keys() | seen.keys()
    changed = [place for place in places if not _near(before.get(place), seen.get(place))]
    if changed:
        readers = ", ".join(LINEARS[name])
        raise TypeError(
            f"{kind} cannot be divided and {readers} multiplied by a factor: this would change "
            f"what enters {', '.join(sorted(changed))}"
        )


def _twin(block: nn.Module, seen: dict[str, list], given: dict[str, torch.Tensor]) -> nn.Module:
    # A copy that shares the tensors. What enters its linear layers is seen; what plain ones return,
    # is given: the same numbers at every call, so that the weights need not be read.
    configs = [module.config for module in block.modules() if hasattr(module, "config")]
    shared = {id(part): part for part in (*block.parameters(), *block.buffers(), *configs)}
    twin = copy.deepcopy(block, shared).eval()
    for module in twin.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    generator = torch.Generator().manual_seed(0)
    for name in LAYERS:
        layer = _submodule(twin, name)
        if layer is None:
            continue
        layer.register_forward_pre_hook(
            lambda _, x, name=name: seen.setdefault(name, []).append(x[0])
        )
        if isinstance(layer, nn.Linear):
            numbers = torch.randn(2, layer.out_features, generator=generator)
            given[name] = numbers.to(layer.weight)
            layer.forward = lambda x, name=name: given[name].view(*x.shape[:-1], -1)
    return twin


def _run(twin: nn.Module, seen: dict[str, list], weight: torch.Tensor, name: str) -> None:
    # Two tokens through the twin, no head turned for its position.
    seen.clear()
    attention = getattr(twin, "self_attn", None)
    width = getattr(attention, "rotary_ndims", getattr(attention, "head_dim", 1))
    turns = weight.new_ones(1, 2, width), weight.new_zeros(1, 2, width)
    size = weight.shape[0 if name == "down" else 1]
    hidden = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(1)).to(weight)
    options = {"position_embeddings": turns, "position_ids": torch.arange(2)[None]}
    output = twin(hidden, attention_mask=None, **options)
    seen["output"] = [output if isinstance(output, torch.Tensor) else output[0]]


def _divide(twin: nn.Module, given: dict[str, torch.Tensor], name: str, factor) -> None:
    if name in given:
        given[name] = given[name] / factor
        return
    norm = twin.get_submodule(name)
    norm.weight = nn.Parameter(norm.weight / factor)
    if getattr(norm, "bias", None) is not None:
        norm.bias = nn.Parameter(norm.bias / factor)


def _near(before: list[torch.Tensor] | None, after: list[torch.Tensor] | None) -> bool:
    if not before or not after or len(before) != len(after):
        return False
    pairs = zip(before, after, strict=True)
    return all((x - y).abs().max() <= 1e-3 * x.abs().max() for x, y in pairs)
