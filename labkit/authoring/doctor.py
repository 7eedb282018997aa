"""Examine this machine: what works, what does not, and how to mend it."""

import contextlib
import errno
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from labkit import python_version

MEMORY_OF_A_CHAPTER = 3_500_000_000  # bytes: the budget every chapter keeps
MEMORY_NEEDED = 2_000_000_000  # below this not even SmolLM2 can be converted
REINSTALL = "in the folder of the workbook, run: python -m pip install -e ."
if importlib.util.find_spec("pip") is None:  # as in environments that uv makes
    REINSTALL = "in the folder of the workbook, run: uv pip install -e ."
KEEP_KERNELS = "set NUMBA_CACHE_DIR to a folder that you can write and that stays"
FETCH = "python -m labkit fetch"
ROOM = f"close other programs; a chapter takes up to {MEMORY_OF_A_CHAPTER / 1e9:.1f} GB of memory"
MARKS = {"ok": "✓", "warning": "!", "failed": "✗"}


class Finding(NamedTuple):
    """One line of the report: status "ok", "warning" or "failed", what was found, the remedy."""

    status: str
    text: str
    remedy: str = ""


def examine() -> int:
    """Print every finding, with its remedy; return the exit status, 1 if anything failed."""
    failures = 0
    for check in CHECKS:
        try:
            findings = list(check())
        except Exception as error:  # a broken installation can fail anywhere; the report goes on
            subject = check.__name__.removeprefix("check_").replace("_", " ")
            text = f"{subject}: {type(error).__name__}: {error}"
            findings = [Finding("failed", text, remedy_of(error))]
        for status, text, remedy in findings:
            failures += status == "failed"
            print(f"{MARKS[status]} {text}" + (f"\n    → {remedy}" if remedy else ""), flush=True)
    print(f"{failures} problem(s) to mend." if failures else "This machine is ready.")
    return int(failures > 0)


def remedy_of(error: Exception) -> str:
    """Return what helps against an error that no check foresaw."""
    number, place = getattr(error, "errno", None), getattr(error, "filename", None) or "the folder"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"you may not read or write {place}: ask its owner, or work in a copy of your own"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"no room is left at {place}: free some, or set LABKIT_CACHE to another disk"
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return ROOM
    return REINSTALL


def check_python() -> Iterable[Finding]:
    """See whether the workbook was tried on this version of Python."""
    text = f"Python {platform.python_version()}"
    if python_version.OLDEST <= sys.version_info[:2] <= python_version.NEWEST:
        return [Finding("ok", text)]
    status = "failed" if sys.version_info < python_version.OLDEST else "warning"
    return [Finding(status, text, python_version.advice())]


def check_packages() -> Iterable[Finding]:
    """Compare every required package with what labkit's metadata asks for."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, importlib.metadata.requires("labkit"))
    needed = [r for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
    found = {}
    for r in needed:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[r.name] = importlib.metadata.version(r.name)
        if not r.specifier.contains(found.get(r.name, "0"), prereleases=True):
            version = found.pop(r.name, "not installed")
            text = f"{r.name}: {version}, but labkit needs {r.specifier}"
            yield Finding("failed", text, REINSTALL)
    if len(found) == len(needed):
        shown = ", ".join(f"{name} {found[name]}" for name in ("torch", "torchao", "transformers"))
        text = f"{len(needed)} packages as pinned ({shown})"
        yield Finding("ok", text)


def check_memory() -> Iterable[Finding]:
    """See whether a chapter fits into the free memory, of this machine or of its container."""
    from labkit import limits

    memory, remedy = limits.memory(), ROOM
    text = f"memory: {memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    if memory.total < memory.machine:
        text += f", a limit set for this container; the machine has {memory.machine / 1e9:.1f} GB"
        if memory.total < MEMORY_OF_A_CHAPTER:
            remedy = f"give the container {MEMORY_OF_A_CHAPTER / 1e9:.1f} GB, as a chapter may take"
    if memory.available >= MEMORY_OF_A_CHAPTER:
        return [Finding("ok", text)]
    status = "warning" if memory.available >= MEMORY_NEEDED else "failed"
    return [Finding(status, text, remedy)]


def check_disk() -> Iterable[Finding]:
    """See whether the cache can take SmolLM2, if it does not hold it yet."""
    from labkit import downloads, models

    cache, needed = downloads.cache_folder(), models.SMOLLM2.disk_needed
    existing = next(p for p in (cache.absolute(), *cache.absolute().parents) if p.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    free = shutil.disk_usage(existing).free
    text = f"disk: {free / 1e9:.1f} GB free at the cache, {cache}"
    if models.SMOLLM2.folder.exists() or (writable and free >= needed):
        return [Finding("ok", text)]
    remedy = f"set LABKIT_CACHE to a folder of yours on a disk with {needed / 1e9:.1f} GB free"
    return [Finding("failed", text + ("" if writable else ": not writable"), remedy)]


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


def check_fetched() -> Iterable[Finding]:
    """See whether SmolLM2 and the texts lie in the cache, whole."""
    from labkit import downloads, models, texts

    pip = "" if importlib.util.find_spec("pip") else f"{downloads.GET_PIP}; then "
    for thing in (models.SMOLLM2, texts.GENSIM):
        status, size = thing.status(thorough=True), f"{thing.nbytes / 1e6:.0f} MB"
        if status == "ready":
            yield Finding("ok", f"{thing.title}: ready in {thing.folder}")
        elif status == "missing":
            yield Finding(
                "warning", f"{thing.title}: not in the cache", f"{pip}{FETCH} ({size}, once)"
            )
        else:
            remedy = f"{pip}{FETCH} (sets the damaged files aside and fetches them again)"
            yield Finding("failed", f"{thing.title}: {status}", remedy)


def check_kernels() -> Iterable[Finding]:
    """See whether Numba can keep the kernels that it compiles, which takes it half a minute."""
    from labkit import compiling, matvec

    if not compiling.KEPT:
        text = "kernels: nowhere to keep them, so that each notebook compiles them again"
        return [Finding("warning", text, KEEP_KERNELS)]
    place = matvec.matvec_fp32.stats.cache_path
    text = f"kernels: compiled once, then kept in {place}"
    if Path(place).is_relative_to(compiling.TEMPORARY):
        return [Finding("warning", f"{text}, which may be emptied", KEEP_KERNELS)]
    return [Finding("ok", text)]


def check_quantize_and_run() -> Iterable[Finding]:
    """Quantize the tiny LM with torch's INT8 kernels and with our 4-bit layers, and run both."""
    import torch

    from labkit import data, kernels, machine, measure, models

    model, tokenizer = models.load_model("tiny", "cpu")
    ids = data.windows(tokenizer, "reference-judge", 4, 256)
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
    sound = abs(lost[0]) < 0.2 and abs(lost[1]) < 0.05
    remedy = f"the results are off; {REINSTALL}"
    yield Finding("ok", text) if sound else Finding("failed", text, remedy)


CHECKS = (
    check_python,
    check_packages,
    check_memory,
    check_disk,
    check_hardware,
    check_fetched,
    check_kernels,
    check_quantize_and_run,
)
