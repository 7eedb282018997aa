"""Score what the other libraries wrote, beside the float model and labkit, and write `ptq.json`.

    python tests/peers/compare.py OUT [--windows 16] [--add]

Runs in the environment of the workbook. OUT is the folder of `quantize_with.py`. With `--add`, what
is new in OUT joins the record, beside labkit's best method scored again.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

import labkit as lk
from labkit import tuning
from labkit.ptq import calibrate, quantize_block

LENGTH = 512
CALIBRATION = 30  # windows, as `export.py` writes for the other libraries
METHODS = {"scaling": True, "clipping": True, "compensation": True, "shrink": 0.1}
OURS = {
    "labkit-rtn": {},
    "labkit-awq": {"scaling": True, "clipping": True},
    "labkit-gptq": {"compensation": True, "shrink": 0.1},
    "labkit-gptq-unshrunk": {"compensation": True},
    "labkit-all-three": METHODS,
    "labkit-tuned": METHODS,  # and then `tuning.tune`, 1,024 tokens a step
}
BEST, BATCH = "labkit-tuned", 2


def put_weights(model, path: Path) -> None:
    """Load the parameters of every decoder block; the rest of the model is left alone.

    Raises:
        ValueError: if the file does not hold exactly the matrices and norms of the blocks.
    """
    found = load_file(path)
    own = dict(model.named_parameters())
    expected = {name for name in own if name.startswith("model.layers.")}
    if set(found) != expected:
        some = sorted(set(found) ^ expected)[:3]
        raise ValueError(f"{path.name} must hold {len(expected)} parameters; differs in {some}")
    for name, weight in found.items():
        own[name].data.copy_(weight)


def quantize_ours(model, ids, group_size: int, options: dict, tuned: bool) -> tuple:
    """Return a quantized copy of the model, and the record of what was done."""
    quantized, start = copy.deepcopy(model), time.perf_counter()
    grids = [
        quantize_block(block, inputs, group_size, **options)
        for block, inputs in calibrate(quantized, ids)
    ]
    if tuned:
        tuning.tune(quantized, grids, group_size, model, ids, batch_size=BATCH)
    facts = {"library": "labkit", "bits": 4, "group_size": group_size, "symmetric": False}
    facts |= {"calibration windows": len(ids) if options else 0, "settings": options}
    facts |= {"tuned": tuned, "threads": torch.get_num_threads()}
    facts |= {"bits a weight": 4 + 24 / group_size}
    return quantized, facts | {"seconds": round(time.perf_counter() - start, 1)}


def rounded(estimate) -> list[float]:
    """Return a mean and half its 95 % interval, as they are written down."""
    return [round(estimate.value, 4), round(estimate.margin, 4)]


def mean_loss(quality) -> float:
    """Return the mean loss over all texts."""
    return sum(on.loss.value for on in quality.values()) / len(quality)


def score_everything(out: Path, n_windows: int, group_size: int, methods) -> tuple:
    """Score methods of labkit and every result in a folder of that group size."""
    model, tokenizer = lk.load_model("smollm2", "cpu")
    reference = lk.reference(model, tokenizer, n_windows, LENGTH)
    scores, facts = {}, {}
    calibration = lk.windows(tokenizer, "calibration", CALIBRATION, LENGTH)
    for name in methods:
        tuned = name == "labkit-tuned"
        quantized, facts[name] = quantize_ours(model, calibration, group_size, OURS[name], tuned)
        scores[name] = lk.quality(quantized, reference)
        print(name, scores[name], sep="\n", flush=True)
    for path in sorted(out.glob("*.safetensors")):
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf8"))
        if found["group_size"] == group_size and not found["symmetric"]:
            put_weights(model, path)
            scores[path.stem], facts[path.stem] = lk.quality(model, reference), found
            print(path.stem, scores[path.stem], sep="\n", flush=True)
    return reference, scores, facts


def compare(out: Path, n_windows: int, group_size: int, methods=tuple(OURS)) -> dict:
    """Return the whole record."""
    reference, scores, facts = score_everything(out, n_windows, group_size, methods)
    rows = [
        {
            "name": name,
            "on": {
                text: {
                    "loss": rounded(on.loss),
                    "kl": rounded(on.kl),
                    "same token": rounded(on.same),
                    f"{BEST} minus this": rounded(scores[BEST][text].loss - on.loss),
                }
                for text, on in scores[name].items()
            },
        }
        | facts[name]
        for name in sorted(facts, key=lambda name: mean_loss(scores[name]))
    ]
    return {
        "label": "measured once on the machine named in each record; not run by the tests",
        "model": "SmolLM2-135M-Instruct, 210 matrices inside the decoder blocks quantized",
        "texts": f"{list(reference.ids)}, {n_windows} windows of {LENGTH} tokens of each",
        "numbers": "nats a token above float32, and half the 95 % interval (Student's t)",
        "date": time.strftime("%Y-%m-%d"),
        "scored with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "float32": {name: round(p.perplexity, 3) for name, p in reference.perplexity.items()},
        "records": rows,
    }


def joined(old: dict, new: dict) -> dict:
    """Return an old record with what a new one has beside labkit's best, which both have.

    Raises:
        ValueError: if they were judged on different texts.
    """
    for fact in ("texts", "float32"):
        if old[fact] != new[fact]:
            raise ValueError(f"{fact}: the record has {old[fact]}, the new one {new[fact]}")
    names = {row["name"] for row in new["records"]} - {BEST}
    rows = [row for row in old["records"] if row["name"] not in names]
    rows += [row for row in new["records"] if row["name"] in names]
    order = sorted(rows, key=lambda row: sum(on["loss"][0] for on in row["on"].values()))
    return old | {"date": new["date"], "records": order}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="what quantize_with.py wrote")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("ptq.json"))
    parser.add_argument("--add", action="store_true", help="to the record that there is")
    arguments = parser.parse_args()
    asked = arguments.out, arguments.windows, arguments.group_size
    if arguments.add:
        before = json.loads(arguments.write.read_text(encoding="utf8"))
        results = joined(before, compare(*asked, (BEST,)))
    else:
        results = compare(*asked)
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    arguments.write.write_text(text, encoding="utf8")
