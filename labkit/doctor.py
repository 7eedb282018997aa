"""Examine this machine: what works, what does not, and how to mend it."""

import importlib.metadata
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MEMORY_OF_A_CHAPTER = 3_500_000_000  # bytes: the budget every chapter keeps
MEMORY_NEEDED = 2_000_000_000  # below this not even SmolLM2 can be converted
SHOWN_PACKAGES = ("torch", "torchao", "transformers")
REINSTALL = "in the folder of the workbook, run: python -m pip install -e ."
FETCH = "python -m labkit fetch"
MARKS = {"ok": "✓", "warning": "!", "failed": "✗"}


@dataclass(frozen=True)
class Finding:
    """One line of the report: status "ok", "warning" or "failed", what was found, the remedy."""

    status: str
    text: str
    remedy: str = ""


def examine() -> int:
    """Print one line a finding, with a remedy below each that is not "ok".

    Returns:
        The exit status: 1 if anything failed, else 0. Warnings do not count.
    """
    failures = 0
    for check in CHECKS:
        for finding in _run(check):
            failures += finding.status == "failed"
            print(f"{MARKS[finding.status]} {finding.text}", flush=True)
            if finding.remedy:
                print(f"    → {finding.remedy}", flush=True)
    print(f"{failures} problem(s) to mend." if failures else "This machine is ready.")
    return int(failures > 0)


def _run(check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    # A broken installation can fail anywhere; the report must go on and still say what to do.
    try:
        return list(check())
    except Exception as error:
        subject = check.__name__.removeprefix("check_").replace("_", " ")
        return [Finding("failed", f"{subject}: {type(error).__name__}: {error}", REINSTALL)]


def check_packages() -> Iterable[Finding]:
    """Compare Python and every required package with what labkit's metadata asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("labkit")["Requires-Python"]
    python = platform.python_version()
    if not SpecifierSet(wanted or "").contains(python, prereleases=True):
        remedy = f"make a new virtual environment with a Python {wanted}"
        yield Finding("failed", f"Python {python}, but labkit needs {wanted}", remedy)
    requirements = map(Requirement, importlib.metadata.requires("labkit") or [])
    needed = [r for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
    found = {r.name: _installed_version(r.name) for r in needed}
    wrong = [r for r in needed if not r.specifier.contains(found[r.name] or "0", prereleases=True)]
    for requirement in wrong:
        version = found[requirement.name] or "not installed"
        text = f"{requirement.name}: {version}, but labkit needs {requirement.specifier}"
        yield Finding("failed", text, REINSTALL)
    shown = ", ".join(f"{name} {found.get(name)}" for name in SHOWN_PACKAGES)
    if not wrong:
        yield Finding("ok", f"Python {python}; {len(needed)} packages as pinned ({shown})")


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_memory() -> Iterable[Finding]:
    """See whether a chapter fits into the free memory."""
    import psutil

    memory = psutil.virtual_memory()
    text = f"memory: {memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    if memory.available >= MEMORY_OF_A_CHAPTER:
        yield Finding("ok", text)
    else:
        status = "warning" if memory.available >= MEMORY_NEEDED else "failed"
        remedy = f"close other programs; a chapter takes up to {MEMORY_OF_A_CHAPTER / 1e9:.1f} GB"
        yield Finding(status, text, remedy)


def check_disk() -> Iterable[Finding]:
    """See whether the cache can take SmolLM2, if it does not hold it yet."""
    from labkit import models

    cache = models.cache_folder()
    existing = next(p for p in (cache.absolute(), *cache.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    text = f"disk: {free / 1e9:.1f} GB free at the cache, {cache}"
    remedy = "set LABKIT_CACHE to a folder of yours on a disk with "
    remedy += f"{models.DISK_NEEDED / 1e9:.1f} GB free"
    if models.smollm2_folder().exists():
        yield Finding("ok", text)
    elif not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Finding("failed", f"{text}: not writable", remedy)
    elif free < models.DISK_NEEDED:
        yield Finding("failed", text, remedy)
    else:
        yield Finding("ok", text)


def check_hardware() -> Iterable[Finding]:
    """Name the processor, what it offers for low precision, and torch's INT8 kernels for it."""
    from labkit import machine

    facts = machine.hardware()
    cores = f"{facts['physical cores']} cores, {facts['logical cores']} threads"
    yield Finding("ok", f"processor: {facts['cpu']} ({facts['architecture']}), {cores}")
    sets = ", ".join(facts["instruction sets"]) or "none that speed up low precision"
    yield Finding("ok", f"instruction sets: {sets}")
    yield Finding("ok", f"GPU: {facts['gpu'] or 'none; every chapter runs without one'}")
    try:
        yield Finding("ok", f"INT8 engine: {machine.quantized_engine()}")
    except RuntimeError as error:
        yield Finding("failed", f"INT8 engine: {error}", f"install torch for this CPU; {REINSTALL}")


def check_smollm2() -> Iterable[Finding]:
    """See whether SmolLM2 lies in the cache, whole."""
    from labkit import models

    status = models.smollm2_status()
    if status == "ready":
        yield Finding("ok", f"SmolLM2: ready in {models.smollm2_folder()}")
    elif status == "missing":
        yield Finding("warning", "SmolLM2: not in the cache", f"{FETCH} (93 MB, once)")
    else:
        remedy = f"{FETCH} (sets the damaged files aside and fetches them again)"
        yield Finding("failed", f"SmolLM2: {status}", remedy)


def check_quantize_and_run() -> Iterable[Finding]:
    """Quantize the tiny LM with torch's INT8 kernels and with our 4-bit layers, and run both."""
    import torch

    from labkit import data, kernels, machine, measure, models

    model, tokenizer = models.load_model("tiny", "cpu")
    ids = data.windows(tokenizer, "eval", 4, 256)
    reference = measure.perplexity(model, ids)
    torch.backends.quantized.engine = machine.quantized_engine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated; chapter 1 says why and what replaces it
        int8 = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
        int8 = measure.perplexity(int8, ids)
    for layer in model.model.layers:
        layer.mlp.down_proj = kernels.PackedLinear(layer.mlp.down_proj, 4, 64)
    int4 = measure.perplexity(model, ids)
    text = (
        f"quantize and run: perplexity {reference.perplexity:.2f} in FP32, {int8.perplexity:.2f} "
        f"in INT8, {int4.perplexity:.2f} with packed INT4 layers"
    )
    # NaN fails both. A sound machine shows 0.04 and 0.005; a broken kernel, whole nats.
    lost = [result.nats_per_token - reference.nats_per_token for result in (int8, int4)]
    if abs(lost[0]) < 0.2 and abs(lost[1]) < 0.05:
        yield Finding("ok", text)
    else:
        yield Finding("failed", text, f"the results are off; {REINSTALL}")


CHECKS = (
    check_packages,
    check_memory,
    check_disk,
    check_hardware,
    check_smollm2,
    check_quantize_and_run,
)
