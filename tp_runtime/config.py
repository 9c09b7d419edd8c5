"""What a run is configured by: frozen dataclasses, validated once, before processes start. No torch.

EngineConfig     which model, in which format, on which device, with how much cache
SamplingParams   how one sequence is sampled; belongs to the row, never to the batch
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError, RequestError, TPError
from .layout import weight_format

DTYPES = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
KERNELS = ("auto", "reference")
DRAFT_RANKS = ("auto", "all", "one")
MOST_DRAFT_TOKENS = 15  # with the token before them 16, which the kernels for few rows take at once
CACHE_DTYPES = ("auto", "bf16", "int8", "fp8")
COLLECTIVES = ("auto", "shm", "c10d")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"--{name.replace('_', '-')} {value!r} is not known; use one of: {', '.join(known)}"
        )


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and (not math.isfinite(value) or value < least):
        raise ConfigError(f"--{name.replace('_', '-')} {value} is out of range; the least is {least:g}")


_KINDS: dict[str, tuple[type, str]] = {
    "str": (str, "a text"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "bool": (bool, "true or false"),
    "tuple[str, ...]": (tuple, "a list of texts"),
}


def _check_types(settings: Any, error: type[TPError]) -> None:
    """Raise `error` for a field whose value is not of its type, as a file or a Python caller may bring it.

    Numbers of other kinds (numpy's) become Python's own.
    """
    for field in fields(settings):
        name, value = field.name, getattr(settings, field.name)
        kind, _, optional = str(field.type).partition(" | ")
        wanted, words = _KINDS[kind]
        good = isinstance(value, wanted) and (kind == "bool" or not isinstance(value, bool))
        if kind.startswith("tuple") and good:
            good = all(isinstance(text, str) for text in value)
        if not good and not (optional and value is None):
            raise error(f"{name}={value!r} is not {words}; give one")
        if good and kind in ("int", "float") and type(value) not in (int, float):
            object.__setattr__(settings, name, int(value) if kind == "int" else float(value))


@dataclass(frozen=True)
class EngineConfig:
    """One engine. Field names are the command line's flags with - written as _.

    model: a name from configs/models, a directory in Hugging Face layout, a GGUF file or a hub id;
    None: the demo model where it is installed. weights: where the weights lie if not beside the model.
    layers: keep only the first N layers (benchmarks). quant: format of the matrix weights. head_quant:
    of head and embedding (None: int8 where quant is int4, else quant). int4_asym: give groups an
    offset. context: most tokens a row may hold (None: the model's limit, at most 8192). max_batch: rows
    that run at once. compile: run the step compiled; native_step: through the C++ kernels' own plan where
    every layer fits it, else through torch.compile. cache_dtype: the KV cache's numbers; int8 has a scale a
    token and head, CPUs only (auto: as computed). cache_bytes: bytes of this rank's KV cache (None:
    max_batch rows of `context`, less where memory is short). prefill_chunk: most tokens of one step (None:
    512 on CPUs, 2048 on GPUs).
    threads: lowers a rank's share of threads, never raises it. collective_timeout_s: how long a rank may
    keep the others waiting once tokens flow (None: what tp-launch --collective-timeout said, else 60);
    load_timeout_s: while weights are read and code is compiled. collectives: "shm" (shared memory, or an
    error), "c10d", or "auto": what TP_COLLECTIVES says, else shared memory where there is some. draft:
    what proposes tokens (None: no speculation): lookup, self:FORMAT, skip:N or a model; draft_quant:
    format of a draft that is another model (None: as quant); draft_tokens: most it proposes for a row
    (None: 15 for lookup, 7 for others); draft_adaptive: fewer where they do not pay; draft_ranks: "all"
    split it, "one" holds it whole, "auto" measures; speculate_exact: rows decode through the code that
    verifies.
    """

    model: str | None = None
    weights: str | None = None
    random_weights: bool = False
    layers: int | None = None
    dtype: str | None = None
    quant: str = "none"
    int4_asym: bool = False
    head_quant: str | None = None
    cache_dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    compile: bool = True
    native_step: bool = True
    context: int | None = None
    max_batch: int = 8
    cache_bytes: int | None = None
    prefill_chunk: int | None = None
    threads: int | None = None
    collective_timeout_s: float | None = None
    collectives: str = "auto"
    load_timeout_s: float = 600.0
    draft: str | None = None
    draft_quant: str | None = None
    draft_tokens: int | None = None
    draft_adaptive: bool = True
    draft_ranks: str = "auto"
    speculate_exact: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "weights", "draft"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        _check_types(self, ConfigError)
        if self.dtype is not None:
            _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, DEVICES)
        _one_of("kernels", self.kernels, KERNELS)
        _one_of("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        _one_of("collectives", self.collectives, COLLECTIVES)
        weight_format(self.quant)
        if self.head_quant is not None:
            weight_format(self.head_quant)
        for name in ("layers", "context", "max_batch", "cache_bytes", "prefill_chunk", "threads"):
            _at_least(name, getattr(self, name), 1)
        _at_least("collective_timeout", self.collective_timeout_s, 1)
        _at_least("load_timeout", self.load_timeout_s, 1)
        self._check_draft()

    def _check_draft(self) -> None:
        _one_of("draft_ranks", self.draft_ranks, DRAFT_RANKS)
        if self.draft_quant is not None:
            weight_format(self.draft_quant)
        if self.draft_tokens is not None and not 1 <= self.draft_tokens <= MOST_DRAFT_TOKENS:
            raise ConfigError(
                f"--draft-tokens {self.draft_tokens} is out of range; use 1 to {MOST_DRAFT_TOKENS}, or leave "
                f"--draft away to decode without"
            )
        given = {
            "--draft-quant": self.draft_quant is not None,
            "--draft-tokens": self.draft_tokens is not None,
            "--no-draft-adaptive": not self.draft_adaptive,
            "--draft-ranks": self.draft_ranks != "auto",
        }
        idle = [flag for flag, is_given in given.items() if is_given]
        if self.draft is None and idle:
            raise ConfigError(f"{idle[0]} says how to draft and no draft is given; add --draft")
        if self.draft == "lookup" and self.draft_ranks != "auto":
            raise ConfigError("--draft-ranks is for drafts that are models, not for lookup; leave it away")

    def with_changes(self, **changes: Any) -> EngineConfig:
        """A validated copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(f.name for f in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for --print-config and reports."""
        return asdict(self)


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. repetition_penalty divides the logits
    of every token seen in prompt or output (1: off); presence_penalty and frequency_penalty are
    subtracted from those of output tokens (0: off). seed: a draw depends on (seed, position, purpose)
    alone, so other rows do not change the text; under a draft that is a model they may, the distribution
    staying the same. stop: the text ends before the first of these. logprobs: report the log-probabilities
    of each chosen token and of that many likeliest ones (None: none).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _check_types(self, RequestError)
        for name, low, high, meaning in _SAMPLING_LIMITS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also refuses NaN
                raise RequestError(f"{name}={value} is out of range; it {meaning}")
        if any(not text for text in self.stop):
            raise RequestError("a stop string is empty; give at least one character")

    @property
    def plain_greedy(self) -> bool:
        """True where the next token is the argmax of the raw logits."""
        neutral = self.repetition_penalty == 1 and self.presence_penalty == self.frequency_penalty == 0
        return self.temperature == 0 and neutral

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all parameters."""
        return tuple(f.name for f in fields(cls))


_SAMPLING_LIMITS = (
    ("max_new_tokens", 1, 1 << 30, "lies in 1..2^30"),
    ("temperature", 0.0, 100.0, "lies in 0..100 and 0 is greedy"),
    ("top_k", 0, 1 << 30, "lies in 0 (off) .. 2^30"),
    ("top_p", 1e-9, 1.0, "lies above 0 and at most at 1 (off)"),
    ("min_p", 0.0, 1.0, "lies in 0 (off) .. 1"),
    ("repetition_penalty", 0.01, 100.0, "lies in 0.01..100 and 1 switches it off"),
    ("presence_penalty", -100.0, 100.0, "lies in -100..100"),
    ("frequency_penalty", -100.0, 100.0, "lies in -100..100"),
    ("seed", 0, (1 << 63) - 1, "lies in 0..2^63-1"),
    ("logprobs", 0, 1000, "lies in 0..1000"),
)
