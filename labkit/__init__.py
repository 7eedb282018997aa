"""Labkit: the helper package of the quantization workbook. Notebooks say `import labkit as lk`."""

import importlib
import logging

# torchao logs kernels that its wheel does not carry, and a deprecation of its own, when imported
# (transformers imports it too). Nothing a reader could act on.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_HOME = {
    "load_model": "models",
    "generate": "models",
    "text": "data",
    "windows": "data",
    "digits": "data",
    "docstrings": "data",
    "perplexity": "measure",
    "paired_difference": "measure",
    "save_weights": "measure",
    "byte_ledger": "measure",
    "latency": "measure",
    "resident_memory": "measure",
    "peak_memory": "measure",
    "hardware": "measure",
    "claim": "claims",
    "check": "checks",
    "subplots": "plotting",
    "show": "plotting",
    "COLORS": "plotting",
    "MARKERS": "plotting",
    "HATCHES": "plotting",
}
_MODULES = {*_HOME.values(), "kernels", "quant", "widgets"}

__all__ = sorted({*_HOME, *_MODULES})


def __getattr__(name: str):
    # Each name is fetched when it is first used, so `import labkit` stays quick.
    if name in _HOME:
        return getattr(importlib.import_module(f"labkit.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"labkit.{name}")
    raise AttributeError(f"labkit has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
