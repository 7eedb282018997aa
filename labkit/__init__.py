"""Labkit: the helper package of the quantization workbook. Notebooks say `import labkit as lk`."""

import importlib
import logging
from pathlib import Path

# torchao logs kernels that its wheel does not carry, and a deprecation of its own, when imported
# (transformers imports it too). Nothing a reader could act on.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_NAMES = {
    "models": ("load_model", "generate"),
    "data": ("text", "windows", "own_windows", "digits", "docstrings"),
    "measure": ("perplexity", "paired_difference", "alternate", "once", "ratio"),
    "evaluation": ("reference", "quality", "verdict"),
    "ledger": ("save_weights", "load_weights", "byte_ledger"),
    "machine": ("resident_memory", "peak_memory", "hardware", "quantized_engine"),
    "claims": ("claim", "timed_claim"),
    "exercises": ("check",),
    "plotting": ("subplots", "show", "COLORS", "MARKERS", "HATCHES"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = {path.stem for path in Path(__file__).parent.glob("[a-z]*.py")} | {"exercises"}

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
