"""Quantize the exported model with one other library, and write its weights back as floats.

    python tests/peers/quantize_with.py METHOD FOLDER OUT [--group-size 64] [--symmetric]

Runs in the environment of that library, without labkit. FOLDER is what `export.py` wrote. OUT gets
`NAME.safetensors` (the matrices inside the decoder blocks, dequantized to float32, and the norms)
and `NAME.json` (versions, settings, seconds, bits). The tied embedding and head stay as they are.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import libraries
import torch
from libraries import BLOCKS, Result, Scheme
from safetensors.torch import save_file

# Name: function, its variant, the package whose version counts, does it use calibration text.
METHODS = {
    "llmcompressor-rtn": (libraries.llmcompressor, "rtn", "llmcompressor", False),
    "llmcompressor-gptq": (libraries.llmcompressor, "gptq", "llmcompressor", True),
    "llmcompressor-awq": (libraries.llmcompressor, "awq", "llmcompressor", True),
    "auto-round-rtn": (libraries.auto_round, "rtn", "auto-round", False),
    "auto-round": (libraries.auto_round, "signed", "auto-round", True),
    "gptqmodel-gptq": (libraries.gptqmodel, "group-aware", "gptqmodel", True),
    "gptqmodel-gptq-desc-act": (libraries.gptqmodel, "desc-act", "gptqmodel", True),
    "neural-compressor-gptq": (libraries.neural_compressor, "", "neural-compressor-pt", True),
    "hqq": (libraries.hqq, "", "hqq", False),
    "quanto": (libraries.quanto, "max", "optimum-quanto", False),
    "quanto-hqq": (libraries.quanto, "hqq", "optimum-quanto", False),
    "bitsandbytes-nf4": (libraries.bitsandbytes, "", "bitsandbytes", False),
    "bitsandbytes-nf4-double": (libraries.bitsandbytes, "double", "bitsandbytes", False),
}


def bits_per_weight(result: Result, scheme: Scheme) -> float:
    """Return stored bits a weight: codes, scales and zero points of the quantized matrices."""
    bits, n_weights = result.extra_bits, 0
    for name, w in result.state.items():
        if name.startswith(BLOCKS) and name.endswith("_proj.weight"):
            rows, columns = w.shape
            size = scheme.group_size or columns
            groups = w.numel() / size if result.flat else rows * math.ceil(columns / size)
            bits += w.numel() * scheme.bits + groups * (result.scale_bits + result.zero_bits)
            n_weights += w.numel()
    return bits / n_weights


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(result: Result, out: Path, name: str, facts: dict) -> None:
    """Write the block parameters and the facts under one name."""
    endings = ("_proj.weight", "norm.weight")  # AWQ folds its scales into the norms
    state = {
        key: x.detach().float().contiguous().clone()
        for key, x in result.state.items()
        if key.startswith(BLOCKS) and key.endswith(endings)
    }
    save_file(state, out / f"{name}.safetensors")
    (out / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf8")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("folder", type=Path, help="what export.py wrote")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64, help="0: one scale a channel")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--iters", type=int, default=200, help="steps a block (AutoRound)")
    parser.add_argument("--windows", type=int, default=30, help="calibration windows")
    return parser.parse_args()


def main() -> None:
    """Quantize, time, and write."""
    options = parse()
    folder, out = options.folder.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    scheme = Scheme(options.bits, options.group_size, options.symmetric)
    function, method, package, calibrated = METHODS[options.method]
    torch.manual_seed(0)
    start, threads = time.perf_counter(), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # some libraries leave files where they run
        result = function(folder, scheme, options, method)
        os.chdir(out)
    group = f"g{scheme.group_size}" if scheme.group_size else "channel"
    name = f"{options.method}-w{scheme.bits}-{group}-{'sym' if scheme.symmetric else 'asym'}"
    if options.method == "auto-round":
        name += f"-{options.iters}"
    version = importlib.metadata.version
    facts = {"method": options.method, "library": package, "version": version(package)}
    facts |= {"torch": torch.__version__, "transformers": version("transformers")}
    facts |= asdict(scheme) | {"calibration windows": options.windows if calibrated else 0}
    facts |= {"settings": result.settings, "bits a weight": bits_per_weight(result, scheme)}
    facts |= {"seconds with loading": round(time.perf_counter() - start, 1), "threads": threads}
    facts |= {"cpu": cpu_name(), "date": time.strftime("%Y-%m-%d")}
    write(result, out, name, facts)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
