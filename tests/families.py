"""Tiny random models of many families, as learners bring them."""

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"max_position_embeddings": 128, "initializer_range": 0.3}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
WINDOW |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

NO_SDPA = ("gemma2", "granite_swa", "vaultgemma")  # transformers itself refuses these
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
# Which of the three rescalings each family takes: (attention, mlp, down).
LLAMA_TYPE = {
    **dict.fromkeys(SUPPORTED, ("attention", "mlp", "down")),
    "bitnet": ("attention", "mlp"),
    "cohere": ("down",),
    "cohere2": ("down",),
    "cwm": ("attention", "mlp", "down"),
    "diffllama": ("attention", "mlp", "down"),
    "ernie4_5": ("attention", "mlp", "down"),
    "exaone4": ("down",),
    "gemma": ("down",),
    "gemma2": ("down",),
    "gemma3_text": ("down",),
    "granite": ("attention", "mlp", "down"),
    "helium": ("attention", "mlp", "down"),
    "hunyuan_v1_dense": ("attention", "mlp", "down"),
    "ministral": ("attention", "mlp", "down"),
    "olmo": ("down",),
    "olmo2": ("down",),
    "olmo3": ("down",),
    "seed_oss": ("attention", "mlp", "down"),
    "smollm3": ("attention", "mlp", "down"),
    "stablelm": ("attention", "mlp", "down"),
}
# What each of these has that labkit does not know, or lacks.
OTHERS = {
    "gpt2": "it has no model.layers",
    "opt": "it has no model.layers",
    "gpt_neox": "it has no model.layers",
    "gptj": "it has no model.layers",
    "bloom": "it has no model.layers",
    "phi": "self_attn.o_proj",
    "phi3": "self_attn.q_proj",
    "mixtral": "mlp.gate_proj",
    "qwen2_moe": "mlp.gate_proj",
    "qwen3_moe": "mlp.gate_proj",
    "starcoder2": "mlp.gate_proj",
    "nemotron": "mlp.gate_proj",
    "glm": "mlp.gate_proj",
    "doge": "has a layer self_attn.dt_proj too",
}
MORE = {"granite": {"embedding_multiplier": 6.0, "residual_multiplier": 0.5}}
MORE |= {"stablelm": {"qk_layernorm": True}, "cohere": {"use_qk_norm": True}}


def family(kind: str, **options) -> transformers.PreTrainedModel:
    """Return a random causal LM of 3 blocks in eval mode; its norms do not multiply by one."""
    config = CONFIG_MAPPING[kind](**SIZES | MORE.get(kind, {}) | options)
    torch.manual_seed(0)
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def token_ids(n: int = 5, length: int = 24) -> torch.Tensor:
    """Return random windows for `family`, int64 `(n, length)`."""
    return torch.randint(3, 97, (n, length), generator=torch.Generator().manual_seed(1))
