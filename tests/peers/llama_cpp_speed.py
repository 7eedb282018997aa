"""Time llama.cpp on the file that SmolLM2 is converted from, and print the record as JSON.

    python tests/peers/llama_cpp_speed.py SmolLM2-135M-Instruct.Q4_1.gguf [--threads 2]

Runs in an environment of its own that has llama-cpp-python, without labkit; see README.md.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

PROMPT, STEPS, REPEATS = 64, 64, 5
LONG_PROMPT, LONG_REPEATS = 512, 3
FIRST_ID, STEP_ID = 1000, 5  # any tokens: the time does not depend on which


def seconds(model: llama_cpp.Llama, ids: list[int]) -> float:
    """Return the time that reading some tokens takes."""
    start = time.perf_counter()
    model.eval(ids)
    return time.perf_counter() - start


def prompt(length: int) -> list[int]:
    """Return token ids to read."""
    return list(range(FIRST_ID, FIRST_ID + length))


def steps(model: llama_cpp.Llama) -> list[float]:
    """Return the time of each of some single tokens that follow a prompt."""
    model.reset()
    model.eval(prompt(PROMPT))
    return [seconds(model, [STEP_ID]) for _ in range(STEPS)]


def prefill(model: llama_cpp.Llama) -> float:
    """Return the time of a long prompt that is read at once."""
    model.reset()
    return seconds(model, prompt(LONG_PROMPT))


def summary(times: list[float]) -> dict:
    """Return median and quartiles in seconds."""
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "quartiles": [low, high]}


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def system_info() -> str:
    """Return what llama.cpp says of itself: the instruction sets that it was compiled for."""
    return llama_cpp.llama_print_system_info().decode().strip()


def measure(path: Path, threads: int) -> dict:
    """Return the whole record."""
    options = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(str(path), verbose=False, logits_all=False, **options)
    runs = [steps(model) for _ in range(REPEATS)]
    return {
        "label": "measured once on the machine named here; not run by the tests",
        "file": path.name,
        "llama-cpp-python": llama_cpp.__version__,
        "numpy": np.__version__,
        "settings": options,
        "system": system_info(),
        "cpu": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds a token": {
            "prompt tokens": PROMPT,
            "single tokens": STEPS,
            "all runs": summary([one for run in runs for one in run]),
            "each run": [summary(run) for run in runs],
        },
        "seconds of a prompt": {
            "prompt tokens": LONG_PROMPT,
            "each run": [prefill(model) for _ in range(LONG_REPEATS)],
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    record = measure(arguments.path, arguments.threads)
    sys.stdout.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
