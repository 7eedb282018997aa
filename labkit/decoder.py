"""A small decoder for Llama-type models: a KV cache around the kernels of `labkit.matvec`."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from labkit import matvec
from labkit.blocks import blocks_of
from labkit.kernels import PackedLinear
from labkit.measure import evaluating

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class Product:
    """Linear layers that read the same input, as one product with one token.

    `bits` is 32, 8 or 4; `out`, the outputs; `nbytes`, what a product reads, biases included.
    """

    def __init__(self, name: str, *layers: nn.Module, kernel: Callable = matvec.matvec_packed):
        """Lay the weights of layers out for their kernel.

        Args:
            name: for messages.
            layers: `(out, in)` each, of one `in`.
            kernel: multiplies packed ones; called as `matvec.matvec_packed`.

        Raises:
            TypeError: if not all are `nn.Linear`, or all `PackedLinear`.
            ValueError: if packed ones differ in bits or groups, or no kernel knows these.
        """
        kinds = {type(layer) for layer in layers}
        if len(kinds) > 1 or not kinds <= {nn.Linear, PackedLinear}:
            came = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"{name}: layers must be all Linear or all PackedLinear, not {came}")
        self.bits, self.group_size, self.kernel = 32, 0, kernel
        if kinds == {nn.Linear}:  # the model's own memory, so nothing is joined
            self.arrays = [layer.weight.detach().float().numpy() for layer in layers]
            self.out = sum(map(len, self.arrays))
        else:
            self._lay_out(name, layers)
        self.bias = _joined_bias(layers)
        self.nbytes = sum(array.nbytes for array in (*self.arrays, self.bias))

    def _lay_out(self, name: str, layers: tuple[PackedLinear, ...]) -> None:
        grids = {(layer.bits, layer.group_size, layer.inputs) for layer in layers}
        if len(grids) > 1:
            raise ValueError(f"{name}: layers must share bits and groups, not {sorted(grids)}")
        ((self.bits, self.group_size, inputs),) = grids
        n_groups, per_word = -(-inputs // self.group_size), 32 // self.bits
        if n_groups == 1:  # a row: filled up to whole words
            self.group_size = -(-inputs // per_word) * per_word
        if self.bits not in (4, 8) or self.group_size % per_word:
            raise ValueError(
                f"{name}: kernels know 4 bits in groups of a multiple of 8, 8 bits in groups of a "
                f"multiple of 4, or a row; not {self.bits} bits in groups of {self.group_size}"
            )
        parts = [(layer.codes.numpy(), *layer.grid()) for layer in layers]
        joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        self.out, self.inputs = len(joined[0]), n_groups * self.group_size
        gap = self.inputs * self.bits // 8 - joined[0].shape[1]
        joined[0] = np.pad(joined[0], ((0, 0), (0, gap))).view("<u4")
        self.arrays = list(map(matvec.to_tiles, joined))

    def operands(self) -> tuple:
        """Return the packed layers as `matvec.compiled_block` reads them."""
        words, *grid = self.arrays
        return words, self.bits, *grid, self.group_size, self.inputs, self.out, self.bias

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the product with one token, float32 `(in,)`, as `(out,)`."""
        if self.bits == 32:
            parts = [matvec.matvec_fp32(weight, x) for weight in self.arrays]
            y = np.concatenate(parts) if len(parts) > 1 else parts[0]
        else:
            if x.size < self.inputs:
                x = np.pad(x, (0, self.inputs - x.size))
            words, *grid = self.arrays
            y = self.kernel(words, self.bits, *grid, x, self.group_size)[: self.out]
        return y + self.bias if self.bias.size else y


def _joined_bias(layers: tuple[nn.Module, ...]) -> np.ndarray:
    # Empty if no layer has one.
    if all(layer.bias is None for layer in layers):
        return np.zeros(0, np.float32)
    rows = [layer.weight if isinstance(layer, nn.Linear) else layer.codes for layer in layers]
    parts = [
        torch.zeros(len(some)) if layer.bias is None else layer.bias.detach().float()
        for layer, some in zip(layers, rows, strict=True)
    ]
    return torch.cat(parts).numpy()


class Decoder(nn.Module):
    """A Llama-type model on the CPU that reads a prompt at once, and goes on token by token.

    `length` is what the cache holds, in tokens; `nbytes`, what a step reads of weights."""

    def __init__(
        self,
        model: nn.Module,
        max_length: int = 1024,
        kernel: Callable = matvec.matvec_packed,
    ):
        """Take over a model, which goes on reading the prompts.

        Args:
            model: a causal LM of the Llama, Mistral, Qwen2 or Qwen3 family on the CPU; its linear
                layers may be `PackedLinear`.
            max_length: tokens that the cache holds.
            kernel: of the packed layers, see `Product`. If Numba compiled it, a block whose layers
                are all packed is one compiled function; else Python calls kernel after kernel.

        Raises:
            TypeError, ValueError: if the model is of another architecture, or see `Product`;
                ValueError too if `max_length` is below 1.
        """
        super().__init__()
        _check_model(model)
        self.model, self.config = model, model.config
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        base = model.model
        self.blocks = [_block(f"model.layers.{i}", x, kernel) for i, x in enumerate(base.layers)]
        self.windows = [_window(self.config, block.self_attn) for block in base.layers]
        self.norm, self.epsilon = base.norm.weight.detach().numpy(), self.config.rms_norm_eps
        self.head = Product("lm_head", model.lm_head, kernel=kernel)
        cos, sin = base.rotary_emb(base.norm.weight, torch.arange(max_length)[None])
        self.cos, self.sin = cos[0].numpy(), sin[0].numpy()
        heads = self.config.num_key_value_heads, max_length, base.layers[0].self_attn.head_dim
        self.keys = np.zeros((len(self.blocks), *heads), np.float32)
        self.values, self.length = np.zeros_like(self.keys), 0
        products = [x for block in self.blocks for x in block if isinstance(x, Product)]
        _put_in_a_row([*products, self.head])
        self.ways = [_way(block) for block in self.blocks]
        self.nbytes = self.head.nbytes + sum(product.nbytes for product in products)

    def _check(self, ids: Sequence[int] | torch.Tensor, more: int) -> torch.Tensor:
        ids, room = torch.as_tensor(ids), self.keys.shape[2]
        if ids.ndim != 1 or not len(ids) or ids.dtype not in (torch.int32, torch.int64):
            came = f"{ids.dtype} {tuple(ids.shape)}"
            raise ValueError(f"ids must be a row of 1 token id or more, not {came}")
        if len(ids) + more > room:
            raise ValueError(
                f"ids: {len(ids) + more} tokens do not fit into a cache of {room}; give Decoder a "
                "larger max_length"
            )
        if ids.min() < 0 or ids.max() >= self.head.out:
            raise ValueError(f"ids must be from 0 to {self.head.out - 1}, not {ids.tolist()}")
        return ids

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int] | torch.Tensor) -> np.ndarray:
        """Read a prompt into an empty cache; return the logits after it, `(vocabulary,)`.

        ValueError if the prompt is empty, too long for the cache, or holds an unknown id.
        """
        from transformers import DynamicCache

        ids = self._check(ids, 0)
        cache = DynamicCache()  # without a window, which would make it forget
        with evaluating(self.model):
            output = self.model.model(ids[None], past_key_values=cache, use_cache=True)
        for i, layer in enumerate(cache.layers):
            self.keys[i, :, : len(ids)] = layer.keys[0]
            self.values[i, :, : len(ids)] = layer.values[0]
        self.length = len(ids)
        return self.head(output.last_hidden_state[0, -1].numpy())

    @torch.inference_mode()
    def step(self, token: int) -> np.ndarray:
        """Read one more token through the kernels; return the logits after it, `(vocabulary,)`.

        ValueError if the cache is full, or the id unknown.
        """
        at = self.length
        x = self.model.model.embed_tokens(self._check([token], at))[0].numpy()
        shared = self.epsilon, self.cos, self.sin
        for (run, block), window, *cache in zip(
            self.ways, self.windows, self.keys, self.values, strict=True
        ):
            x = run(x, block, *shared, *cache, max(0, at + 1 - window), at)
        self.length += 1
        return self.head(matvec.rms_norm(x, self.norm, self.epsilon))

    def generate(self, ids: Sequence[int] | torch.Tensor, n_tokens: int) -> list[int]:
        """Continue a prompt greedily by `n_tokens`, 1 or more; return the new ids."""
        if n_tokens < 1:
            raise ValueError(f"n_tokens must be at least 1, not {n_tokens}")
        written = [int(self.prefill(self._check(ids, n_tokens - 1)).argmax())]
        while len(written) < n_tokens:
            written.append(int(self.step(written[-1]).argmax()))
        return written

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits `(n, length, vocabulary)` of windows `(n, length)`, all by `step`."""
        logits = []
        for window in ids.tolist():
            self.length = 0
            logits.append(torch.stack([torch.from_numpy(self.step(token)) for token in window]))
        return torch.stack(logits)


def _check_model(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    kind, act = getattr(config, "model_type", None), getattr(config, "hidden_act", "")
    if kind not in FAMILIES or act != "silu" or not hasattr(model, "lm_head"):
        came, known = f"{type(model).__name__} {act}".strip(), ", ".join(FAMILIES)
        raise TypeError(f"model: the decoder knows causal LMs of {known} with SiLU, not {came}")
    blocks_of(model)
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise TypeError(f"model: the decoder knows no rotation that depends on length ({rope})")
    if (dtype := model.model.norm.weight.dtype) != torch.float32:
        raise TypeError(f"model must be float32, not {dtype}; call model.float()")


def _window(config, attention: nn.Module) -> float:
    # How many tokens a block looks back on, its own included.
    mistral = config.sliding_window if config.model_type == "mistral" else None
    return getattr(attention, "sliding_window", mistral) or math.inf


def _put_in_a_row(products: list[Product], line: int = 64) -> None:
    # Packed arrays move to one piece of memory, in the order in which a step reads them: NumPy asks
    # for large pages for a large piece, and what is asked for ahead is the next matrix.
    packed = [product for product in products if product.bits < 32]
    memory = np.empty(sum(x.nbytes + line for each in packed for x in each.arrays), np.uint8)
    for product in packed:
        for i, array in enumerate(product.arrays):
            memory = memory[-memory.ctypes.data % line :]
            place, memory = memory[: array.nbytes], memory[array.nbytes :]
            product.arrays[i] = place.view(array.dtype).reshape(array.shape)
            product.arrays[i][:] = array


def _way(block: tuple) -> tuple[Callable, tuple]:
    # What takes a token through a block, and the block as that reads it.
    products = [part for part in block if isinstance(part, Product)]
    kernel, packed = products[0].kernel, all(product.bits < 32 for product in products)
    if not (packed and hasattr(kernel, "py_func")):
        return matvec.one_block, block
    parts = (part.operands() if isinstance(part, Product) else part for part in block)
    return matvec.compiled_block(kernel), tuple(parts)


def _head_norm(attention: nn.Module) -> np.ndarray:
    # The weights of the norms on queries and keys, (heads + kv_heads, width); no row: no norm.
    config, width = attention.config, attention.head_dim
    if not hasattr(attention, "q_norm"):
        return np.zeros((0, width), np.float32)
    norms = attention.q_norm.weight, attention.k_norm.weight
    heads = config.num_attention_heads, config.num_key_value_heads
    parts = [norm.detach().expand(n, width) for norm, n in zip(norms, heads, strict=True)]
    return torch.cat(parts).numpy()


def _block(name: str, block: nn.Module, kernel: Callable) -> tuple:
    attention, mlp = block.self_attn, block.mlp
    product, projections = partial(Product, kernel=kernel), ("q_proj", "k_proj", "v_proj")
    return (
        block.input_layernorm.weight.detach().numpy(),
        product(f"{name}.self_attn", *(getattr(attention, each) for each in projections)),
        _head_norm(attention),
        product(f"{name}.self_attn.o_proj", attention.o_proj),
        block.post_attention_layernorm.weight.detach().numpy(),
        product(f"{name}.mlp", mlp.gate_proj, mlp.up_proj),
        product(f"{name}.mlp.down_proj", mlp.down_proj),
    )
