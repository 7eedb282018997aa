"""Quality with error bars, and time with its spread."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

BUSY_SHARE = 1 / 6
MIN_CPU_SECONDS = 0.2
_QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Perplexity:
    """How well a model predicts a text; `exp(nats_per_token)` and what it is the mean of.

    Attributes:
        nats_per_token: mean negative log-likelihood.
        standard_error: of `nats_per_token`, over windows; NaN for one window.
        window_nats: float64 `(n_windows,)`, the mean of each window.
        token_nats: float64 `(n_windows, length - 1)`; the first token is given, not predicted.
    """

    perplexity: float
    nats_per_token: float
    standard_error: float
    window_nats: torch.Tensor = field(repr=False)
    token_nats: torch.Tensor = field(repr=False)

    def __str__(self) -> str:
        nats = f"{self.nats_per_token:.4f} ± {self.standard_error:.4f} nats a token"
        return f"perplexity {self.perplexity:.2f} ({nats}, {len(self.window_nats)} windows)"


@dataclass(frozen=True)
class Difference:
    """`other − reference` in nats a token, paired by window.

    Attributes:
        standard_error: of `nats`, over windows.
        margin: half the width of the 95 % interval of `nats`, by Student's t for the windows.
        ratio: of the perplexities.
    """

    nats: float
    standard_error: float
    margin: float
    ratio: float

    @property
    def verdict(self) -> str:
        """`"tie"` if 0 is in the interval, else `"worse"` or `"better"` (fewer nats)."""
        if abs(self.nats) <= self.margin:
            return "tie"
        return "better" if self.nats < 0 else "worse"  # NaN, a broken model, is worse

    def __str__(self) -> str:
        nats = f"{self.nats:+.4f} ± {self.standard_error:.4f} nats a token"
        return f"{self.verdict}: {nats}, perplexity × {self.ratio:.3f}"


def perplexity(model: nn.Module, ids: torch.Tensor, batch_size: int = 1) -> Perplexity:
    """Score a language model on windows of tokens, each window alone.

    Args:
        model: called as `model(ids)`; returns logits `(batch, length, vocabulary)`, bare or as
            `.logits`. Scored in eval mode on its own device, then put back as it was.
        ids: int64 `(n_windows, length)`, length 2 or more.
        batch_size: windows a call.

    Returns:
        A `Perplexity`; its tensors are on the CPU.

    Raises:
        TypeError: if `ids` is not an int64 tensor.
        ValueError: if its shape, a token id or `batch_size` is out of range.
    """
    check_ids(model, ids, batch_size)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with evaluating(model), torch.inference_mode():
        rows = [_token_nats(model, part.to(device)) for part in ids.split(batch_size)]
    return summarize(torch.cat(rows))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; then each of its modules is back in the mode that it had."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def summarize(token_nats: torch.Tensor) -> Perplexity:
    """Return the `Perplexity` of known nats, float64 `(n_windows, length - 1)`."""
    window_nats = token_nats.mean(1)
    nats, error = _mean_and_error(window_nats)
    return Perplexity(_exp(nats), nats, error, window_nats, token_nats)


def check_ids(model: nn.Module, ids: torch.Tensor, batch_size: int) -> None:
    """Refuse token ids that a model cannot take; see `perplexity`."""
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
        kind = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an int64 tensor of token ids, not {kind}")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        shape = tuple(ids.shape)
        raise ValueError(f"ids must be (n_windows ≥ 1, length ≥ 2), not {shape}; see lk.windows")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    # Checked before the call: on a GPU an id out of range would end the process.
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", math.inf)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"ids must be from 0 to {vocabulary - 1}, not {low} to {high}; wrong tokenizer?"
        )


def _token_nats(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    output = model(ids)
    logits = getattr(output, "logits", output)[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    # In chunks: the log-softmax of a whole window is as large as its logits.
    chunks = zip(logits.split(128), targets.split(128), strict=True)
    nats = [nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in chunks]
    return torch.cat(nats).double().cpu().view(len(ids), -1)


def t_margin(values: torch.Tensor) -> float:
    """Return half the width of the 95 % interval of a mean, by Student's t; NaN for one value."""
    from scipy.special import stdtrit

    n = len(values)
    return float(stdtrit(n - 1, 0.975)) * values.std().item() / n**0.5 if n > 1 else math.nan


def _mean_and_error(windows: torch.Tensor) -> tuple[float, float]:
    n = len(windows)
    return windows.mean().item(), windows.std().item() / n**0.5 if n > 1 else math.nan


def _exp(nats: float) -> float:
    return torch.tensor(nats, dtype=torch.float64).exp().item()  # inf where math.exp would raise


def paired_difference(other: Perplexity, reference: Perplexity) -> Difference:
    """Compare two models on the same windows.

    The standard error is over windows, not tokens: tokens of one window are not independent.

    Args:
        other, reference: from `perplexity` with the same `ids`.

    Raises:
        ValueError: if the windows differ in shape or are fewer than 2, or the reference is not
            finite.
    """
    shapes = tuple(other.token_nats.shape), tuple(reference.token_nats.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"other {shapes[0]} and reference {shapes[1]} must share their windows")
    if shapes[0][0] < 2:
        raise ValueError("other and reference need at least 2 windows for an error bar, not 1")
    if not torch.isfinite(reference.window_nats).all():
        raise ValueError("reference holds NaN or infinity; compare with a model that works")
    differences = other.window_nats - reference.window_nats
    nats, error = _mean_and_error(differences)
    return Difference(nats, error, t_margin(differences), _exp(nats))


@dataclass(frozen=True)
class Latency:
    """Time of one call: median and quartiles in seconds, over `runs` calls on `threads` threads.

    Attributes:
        busy: whether other programs took a sixth of the processor or more meanwhile.
        rounds: the seconds of each call, in order.
        turn: stands for the call of `alternate` that timed it; None for a single run.
    """

    seconds: float
    low: float
    high: float
    runs: int
    threads: int
    busy: bool = False
    rounds: tuple[float, ...] = field(default=(), repr=False)
    turn: object | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        unit, factor = ("ms", 1e3) if self.seconds < 1 else ("s", 1)
        low, middle, high = (f"{x * factor:.3g}" for x in (self.low, self.seconds, self.high))
        busy = ", on a busy machine" if self.busy else ""
        return f"{middle} {unit} ({low} to {high}, {self.runs} runs, threads: {self.threads}{busy})"


@dataclass(frozen=True)
class Ratio:
    """One time over another, from `ratio`.

    Attributes:
        value: the median over rounds.
        low, high: its quartiles.
        origin: how it was timed, in words.
    """

    value: float
    low: float
    high: float
    origin: str


def alternate(
    functions: dict[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    *,
    own_clock: bool = False,
) -> dict[str, Latency]:
    """Time several calls in turn (A B A B …), so that a drift of the machine hits all alike.

    Args:
        functions: by name; each is called without arguments.
        repeats: rounds that count, 1 or more.
        warmup: rounds before them that do not.
        own_clock: whether each function returns the seconds that count, e.g. without its set-up.

    Returns:
        A `Latency` for each name.

    Raises:
        TypeError: if a function cannot be called.
        ValueError: if there is none, or a count is out of range.
    """
    if not functions:
        raise ValueError("functions is empty; give at least one")
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, not {type(function).__name__}")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be ≥ 1 and warmup ≥ 0, not {repeats} and {warmup}")
    seconds = {name: [] for name in functions}
    others = _OtherPrograms()
    for _ in range(warmup + repeats):
        for name, function in functions.items():
            seconds[name].append(function() if own_clock else _seconds(function))
    turn, busy = object(), others.share() > BUSY_SHARE
    return {name: _summary(times[warmup:], busy, turn) for name, times in seconds.items()}


def once(function: Callable[[], Any]) -> tuple[Latency, Any]:
    """Time one call that is too long, or changes too much, to be made again.

    Returns:
        A `Latency` of one run, and what the function returned.
    """
    others, kept = _OtherPrograms(), []
    seconds = _seconds(lambda: kept.append(function()))
    return _summary([seconds], others.share() > BUSY_SHARE, None), kept[0]


def ratio(one: Latency, other: Latency, factor: float = 1.0) -> Ratio:
    """Divide one time by another, round by round.

    Args:
        one, other: from the same call of `alternate`, or both from `once`.
        factor: multiplies every ratio, e.g. tokens a call of `other` over those of `one`.

    Raises:
        ValueError: if they were timed apart, where a drift of the machine hits one alone.
    """
    single = one.turn is None and other.turn is None and one.runs == other.runs == 1
    if not single and (one.turn is None or one.turn is not other.turn):
        raise ValueError("one and other were timed apart; time both in one call of lk.alternate")
    pairs = zip(one.rounds, other.rounds, strict=True)
    ratios = torch.tensor([factor * a / b for a, b in pairs], dtype=torch.float64)
    low, value, high = ratios.quantile(_QUARTILES).tolist()
    origin = f"quartiles {low:.3g} to {high:.3g} over {len(ratios)} rounds in turn"
    if single:
        origin = "one run each"
    if one.busy or other.busy:
        origin += ", on a busy machine"
    return Ratio(value, low, high, origin)


class _OtherPrograms:
    """What share of the processor other programs take, from here on."""

    def __init__(self):
        self.start = self._read()

    def _read(self) -> tuple[float, float]:
        import psutil

        everyone, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = everyone.idle + getattr(everyone, "iowait", 0.0)
        guest = getattr(everyone, "guest", 0.0) + getattr(everyone, "guest_nice", 0.0)
        busy = sum(everyone) - idle - guest  # a guest's time is in the user's already
        return busy + idle, busy - own.user - own.system

    def share(self) -> float:
        """Return it, from 0 to 1; 0 for less than a fifth of a second, where nothing is known."""
        (total, others), (total_then, others_then) = self._read(), self.start
        passed = total - total_then
        return max(0.0, (others - others_then) / passed) if passed > MIN_CPU_SECONDS else 0.0


def _seconds(function: Callable[[], Any]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    function()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _summary(times: list[float], busy: bool, turn: object | None) -> Latency:
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(_QUARTILES).tolist()
    return Latency(median, low, high, len(times), torch.get_num_threads(), busy, tuple(times), turn)
