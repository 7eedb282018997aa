"""Time llama.cpp and our decoder in turn on SmolLM2, and print the record as JSON.

    python tests/peers/llama_cpp_speed.py peers/xllamacpp SmolLM2-135M-Instruct.Q4_1.gguf

Runs in the environment of the workbook, with llama.cpp in a folder beside it; see README.md.
"""

import argparse
import copy
import importlib.metadata
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import gguf
import k_quants
import numba
import torch

import labkit as lk
from labkit import mixed, ptq
from labkit.decoder import Decoder
from labkit.kernels import PackedLinear

PROMPT, STEPS, REPEATS = 64, 24, 7
LONG_PROMPT, LONG_REPEATS = 256, 3
REST = 0.3  # seconds: the threads of a program spin for a while when they have nothing to do
FIRST_ID, STEP_ID = 1000, 11  # any tokens: the time does not depend on which
METHODS = {"scaling": True, "clipping": True, "compensation": True, "shrink": 0.1}
TYPES = ("Q8_0", "Q4_0", "Q4_K_M")


def packed(name: str, weight, kind: str, n_layers: int) -> tuple:
    """Return the bytes of a matrix of a block in a type, or in that of a recipe; and the type."""
    if kind == "Q4_K_M":
        return k_quants.q4_k_m(name, weight, n_layers)
    found = gguf.GGMLQuantizationType[kind]
    return gguf.quantize(weight, found), found


def convert(source: Path, path: Path, kind: str) -> None:
    """Write a GGUF file again with the matrices of its blocks in another type.

    The embedding, which is also the head, stays in Q8_0, as in the source.
    """
    reader = gguf.GGUFReader(source)
    n_layers = reader.fields["llama.block_count"].contents()
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    for tensor in reader.tensors:
        data, found = tensor.data, tensor.tensor_type
        if len(tensor.shape) == 2 and tensor.name != "token_embd.weight":
            data, found = packed(tensor.name, gguf.dequantize(data, found), kind, n_layers)
        writer.add_tensor(tensor.name, data, raw_dtype=found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp with one file, in a process of its own.

    Two programs, or two files, in one process share libgomp, which sends threads to sleep between
    two products as soon as it counts more of them than cores: each step then took up to three times
    as long, in llama.cpp as in our decoder.
    """

    server = None  # in the other process

    def __init__(self, wheel: Path, path: Path, threads: int):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.facts = self.pool.submit(self._start, wheel, path, threads).result()

    @classmethod
    def _start(cls, wheel: Path, path: Path, threads: int) -> str:
        sys.path.append(str(wheel))
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(path), 1024, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.verbosity = 0
        cls.server = xllamacpp.Server(parameters)
        return xllamacpp.get_system_info()

    @classmethod
    def _answer(cls, length: int, n_tokens: int) -> dict:
        options = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}
        prompt = {"prompt": list(range(FIRST_ID, FIRST_ID + length)), "n_predict": n_tokens}
        return cls.server.handle_completions(prompt | options)["timings"]

    def step(self) -> float:
        """Return the seconds of one token after a prompt, by its own account."""
        time.sleep(REST)
        found = self.pool.submit(self._answer, PROMPT, STEPS).result()
        return found["predicted_per_token_ms"] / 1e3

    def prompt(self) -> float:
        """Return the seconds of a long prompt, by its own account."""
        time.sleep(REST)
        return self.pool.submit(self._answer, LONG_PROMPT, 1).result()["prompt_ms"] / 1e3


def our_step(decoder: Decoder) -> float:
    time.sleep(REST)
    decoder.length = PROMPT
    decoder.step(STEP_ID)  # wakes the threads, as a prompt does in llama.cpp
    start = time.perf_counter()
    for _ in range(STEPS):
        decoder.step(STEP_ID)
    return (time.perf_counter() - start) / STEPS


def our_prompt(decoder: Decoder) -> float:
    time.sleep(REST)
    start = time.perf_counter()
    decoder.prefill(range(FIRST_ID, FIRST_ID + LONG_PROMPT))
    return time.perf_counter() - start


def our_decoder(model, bits: int, group_size: int | None, calibration_ids=None) -> Decoder:
    """Return the decoder of chapter 5: the head in 8 bits, a scale a channel.

    With calibration windows, scaling, clipping and GPTQ choose the codes, as in chapter 2.
    """
    net, grids = copy.deepcopy(model), {}
    if calibration_ids is not None:
        for i, (block, inputs) in enumerate(ptq.calibrate(net, calibration_ids)):
            found = ptq.quantize_block(block, inputs, group_size, bits, **METHODS)
            grids |= {f"model.layers.{i}.{name}": grid for name, grid in found.items()}
    for name in [*mixed.layer_names(net), "lm_head"]:
        layer, width = net.get_submodule(name), 8 if name == "lm_head" else bits
        size = layer.in_features if name == "lm_head" or not group_size else group_size
        net.set_submodule(name, PackedLinear(layer, width, size, grid=grids.get(name)))
    return Decoder(net)


def from_file(path: Path):
    """Return what a GGUF file holds, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def loss(net, reference) -> dict:
    """Score a model or a decoder: loss above the reference and its margin, by text."""
    found = lk.quality(net, reference)
    return {name: [text.loss.value, text.loss.margin] for name, text in found.items()}


def read_nbytes(path: Path) -> int:
    """Return the bytes that a token reads: all matrices, the embedding once, as the head."""
    return sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2)


def wheel_version(wheel: Path) -> str:
    """Return the version of the wheel of llama.cpp in a folder."""
    (found,) = importlib.metadata.distributions(name="xllamacpp", path=[str(wheel)])
    return found.version


def summary(clocks: dict[str, Callable], repeats: int) -> dict:
    """Time in turn; return the rounds of each, in seconds."""
    found = lk.alternate(clocks, repeats, own_clock=True)
    return {name: [float(f"{second:.4g}") for second in x.rounds] for name, x in found.items()}


def measure(wheel: Path, source: Path, threads: int, folder: Path) -> dict:
    """Return the whole record."""
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    files = {"Q4_1": source} | {name: folder / f"{name}.gguf" for name in TYPES}
    for name in TYPES:
        convert(source, files[name], name)
    model, tokenizer = lk.load_model("smollm2", device="cpu")
    reference = lk.reference(model, tokenizer, n_windows=8, length=256)
    losses = {f"llama.cpp {name}": loss(from_file(files[name]), reference) for name in files}
    losses["transformers BF16"] = loss(copy.deepcopy(model).bfloat16(), reference)
    theirs = {f"llama.cpp {name}": LlamaCpp(wheel, path, threads) for name, path in files.items()}
    ours = {
        "labkit INT8": our_decoder(model, 8, None),
        "labkit INT4": our_decoder(model, 4, 64),
        "labkit INT4, fitted": our_decoder(
            model, 4, 64, lk.windows(tokenizer, "calibration", 30, 512)
        ),
    }
    losses |= {name: loss(decoder, reference) for name, decoder in ours.items()}
    for decoder in ours.values():
        decoder.prefill(range(FIRST_ID, FIRST_ID + PROMPT))
    steps = {name: each.step for name, each in theirs.items()}
    steps |= {name: partial(our_step, each) for name, each in ours.items()}
    prompts = {name: each.prompt for name, each in theirs.items()}
    prompts |= {name: partial(our_prompt, each) for name, each in ours.items()}
    with torch.inference_mode():
        timed = {"seconds a token": summary(steps, REPEATS)}
        timed["seconds of a prompt of 256"] = summary(prompts, LONG_REPEATS)
    return {
        "label": "measured once on the machine named here, in turn; not run by the tests",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": lk.hardware()["cpu"],
        "threads": threads,
        "xllamacpp": wheel_version(wheel),
        "llama.cpp": theirs["llama.cpp Q4_1"].facts,
        "labkit": {
            "numba": numba.__version__,
            "compiled for": numba.core.config.CPU_NAME or "host",
        },
        "source": source.name,
        "bytes a token": {f"llama.cpp {name}": read_nbytes(path) for name, path in files.items()}
        | {name: decoder.nbytes for name, decoder in ours.items()},
        "loss in nats and margin, 8 windows of 256": losses,
        **timed,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="the folder of the wheel of llama.cpp")
    parser.add_argument("path", type=Path, help="the GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments.wheel, arguments.path, arguments.threads, Path(folder))
    sys.stdout.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
