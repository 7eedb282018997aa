"""The values of claims on different machines and settings: where their bands come from.

`python -m labkit values run` runs chapters under one of `SETTINGS` and appends what each claim
measured to `notebooks/records/00_claim_values.jsonl`; `python -m labkit values show` prints, claim
by claim, what all runs found and how far that is from the band. One line of the record is one
chapter run once: its machine, its setting, and `{id: [value, sentence]}`.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from labkit import machine
from labkit.authoring import notebooks
from labkit.authoring.claim_lines import ClaimLine, claims_of

RECORD = "00_claim_values.jsonl"
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
SETTINGS = {
    "as it is": {},
    "one thread": ONE_THREAD,
    # ONNX Runtime asks the CPU itself: no variable reaches it. And torch hands `_int_mm` to oneDNN
    # wherever it sees VNNI, so oneDNN keeps that: without, it would overflow as on no real CPU.
    "AVX2": {
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
    },
    "qnnpack": {"LABKIT_ENGINE": "qnnpack"},  # the engine of ARM
}
_DUMP = """
import json
from labkit.claims import REGISTRY
print(json.dumps({c.id: [c.value, c.sentence] for c in REGISTRY.values()}))
"""


class Spread(NamedTuple):
    """What the runs on record measured for one claim.

    Attributes:
        line: the claim as its notebook has it now.
        values: one a run, in the order of the record.
        other_sentence: runs left out since their claim of this id said something else.
    """

    line: ClaimLine
    values: list[float]
    other_sentence: int

    @property
    def room(self) -> float:
        """How far the values stay from the nearer end, as a share of it; below 0: outside.

        Infinite where nothing but one value is allowed, and all have it.
        """
        low, high = self.line.low, self.line.high
        if low == high:
            return math.inf if set(self.values) == {low} else -1.0
        ends = [(min(self.values), low, 1), (max(self.values), high, -1)]
        rooms = [side * (v - end) / (abs(end) or 1) for v, end, side in ends if math.isfinite(end)]
        return min(rooms)


def run(folder: Path, chapters: Iterable[str], setting: str) -> int:
    """Run chapters under a setting and append what their claims measured; return the exit status.

    Args:
        folder: where the notebooks are; their stored outputs are left alone.
        chapters: starts of file names; none: every notebook.
        setting: a key of `SETTINGS`.
    """
    status = 0
    for path in notebooks.chosen(folder, list(chapters)):
        entry = measure(path, setting)
        with (folder / "records" / RECORD).open("a", encoding="utf8") as record:
            record.write(json.dumps(entry, ensure_ascii=False) + "\n")
        report = (
            f"{path.name}, {setting}: {len(entry['claims'])} claims in {entry['seconds']:.0f} s"
        )
        print("\n  ".join([report, *entry["errors"]]), flush=True)
        status = max(status, int(bool(entry["errors"])))
    return status


def measure(path: Path, setting: str) -> dict:
    """Run one notebook under a setting, on past cells that fail, and return its entry."""
    notebook, start = notebooks.read(path), time.perf_counter()
    done = notebooks.execute(
        notebook, path.parent, environment=SETTINGS[setting], keep_going=True, last=_DUMP
    )
    facts = machine.hardware()
    return {
        "notebook": path.name,
        "setting": setting,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cpu": facts["cpu"],
            "cores": facts["physical cores"],
            "instruction sets": facts["instruction sets"],
            "exact at 8 bits": machine.exact_at_8_bits(),
            "python": facts["python"],
            "torch": facts["torch"],
        },
        "seconds": round(time.perf_counter() - start, 1),
        "peak_nbytes": done.peak_nbytes,
        "errors": list(_unwanted_errors(notebook)),
        "claims": {id: [_short(v), s] for id, (v, s) in json.loads(done.printed).items()},
    }


def _unwanted_errors(notebook) -> Iterator[str]:
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        if "raises-exception" not in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if output.output_type == "error":
                    yield f"code cell {number}: {output.ename}: {output.evalue[:200]}"


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def spreads(folder: Path, chapters: Iterable[str] = ()) -> dict[str, list[Spread]]:
    """Return what is on record for each claim of each notebook, by file name.

    A value recorded for another sentence is not used; it is counted.
    """
    record = folder / "records" / RECORD
    text = record.read_text(encoding="utf8") if record.exists() else ""
    entries = [json.loads(line) for line in text.splitlines()]
    found = {}
    for path in notebooks.chosen(folder, list(chapters)):
        runs = [entry["claims"] for entry in entries if entry["notebook"] == path.name]
        lines = {line.id: line for line in claims_of(notebooks.read(path))}
        found[path.name] = [_spread(line, runs) for line in lines.values()]
    return found


def _spread(line: ClaimLine, runs: list[dict]) -> Spread:
    of_this = [claims[line.id] for claims in runs if line.id in claims]
    values = [value for value, sentence in of_this if sentence == line.sentence]
    return Spread(line, values, len(of_this) - len(values))


def show(folder: Path, chapters: Iterable[str] = ()) -> int:
    """Print the spread of every claim and its distance to the band; return the exit status.

    The status is 1 if a measured claim has left its band in any run on record.
    """
    left = 0
    for name, found in spreads(folder, chapters).items():
        print(f"\n{name}\n{'claim':28} {'runs':>4} {'least':>9} {'most':>9}  {'room':>6}  band")
        for spread in found:
            print(_row(spread))
            outside = bool(spread.values) and spread.room < 0
            left += outside and spread.line.kind == "measured"
    print(f"\n{left} measured claim(s) left their band in a run on record.")
    return int(left > 0)


def _row(spread: Spread) -> str:
    line, values = spread.line, spread.values
    if values:
        room = "exact" if math.isinf(spread.room) else f"{spread.room:.0%}"
        numbers = f"{min(values):9.4g} {max(values):9.4g}  {room:>6}"
    else:
        numbers = f"{'–':>9} {'–':>9}  {'–':>6}"
    facts = [f"{line.low:g} to {line.high:g}"]
    facts += [] if line.null is None else [f"null {line.null:g}"]
    facts += [] if line.kind == "measured" else [line.kind]
    if spread.other_sentence:
        facts.append(f"{spread.other_sentence} run(s) of another sentence left out")
    return f"{line.id:28} {len(values):4} {numbers}  {'; '.join(facts)}"
