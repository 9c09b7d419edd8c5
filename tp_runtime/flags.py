"""The flags that generate, bench and serve share, and the configuration they make. No torch.

A TOML file given by --config holds the same names (with _ for -); flags given on the command line win.
Unknown flags and unknown names in a file are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from .config import (
    CACHE_DTYPES,
    COLLECTIVES,
    DEVICES,
    DRAFT_RANKS,
    DTYPES,
    KERNELS,
    EngineConfig,
    SamplingParams,
)
from .errors import ConfigError
from .layout import ALIASES, FORMATS

QUANTS = ("none", *FORMATS, *ALIASES)
_CACHE_HELP = (
    "of the KV cache; int8 (CPUs only): half of bf16's bytes, a scale a token and head, at a price (it moves "
    "SmolLM2's logits by 0.11, three times as far as int8 weights do); fp8 (GPUs only): e4m3 without "
    "scales, half the bytes too; default: auto, as computed"
)
SPELLED = {"collective_timeout_s": "collective_timeout", "load_timeout_s": "load_timeout"}


class Parser(argparse.ArgumentParser):
    """Refuses bad flags with ConfigError: one sentence, no usage dump."""

    def __init__(self, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def quant_list(text: str) -> tuple[str, ...]:
    """Formats, comma-separated. Raises ArgumentTypeError."""
    found = tuple(word for word in text.split(",") if word)
    if not found or not set(found) <= set(QUANTS):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of formats; known are {', '.join(QUANTS)}")
    return found


def add_engine_flags(parser: argparse.ArgumentParser, *, several_quants: bool = False) -> None:
    """--model and everything else of EngineConfig. several_quants: --quant takes a list (benchmarks)."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="NAME|DIR|FILE.gguf|ORG/NAME", help="default: the demo model, if installed"
    )
    model.add_argument("--weights", metavar="PATH", help="where the weights of --model lie")
    model.add_argument("--random-weights", action="store_true", default=None, help="make weights in place")
    model.add_argument("--layers", type=int, metavar="N", help="keep the first N layers (benchmarks)")
    model.add_argument("--dtype", choices=DTYPES, help="default: bf16 where the hardware has it, else fp32")
    if several_quants:
        model.add_argument("--quant", type=quant_list, metavar="Q,...", help="default: none,int8,int4")
    else:
        model.add_argument(
            "--quant", choices=QUANTS, help="weight-only format; int4 means int4-g32 (default: none)"
        )
    model.add_argument(
        "--head-quant", choices=QUANTS, help="of head and embedding (default: int8 with any int4)"
    )
    model.add_argument("--int4-asym", action="store_true", default=None, help="int4 groups with an offset")
    run = parser.add_argument_group("running")
    run.add_argument("--device", choices=DEVICES, help="default: auto")
    run.add_argument("--context", type=int, metavar="TOKENS", help="most tokens a sequence may hold")
    run.add_argument("--max-batch", type=int, metavar="ROWS", help="sequences that run at once (default: 8)")
    run.add_argument("--cache-dtype", choices=CACHE_DTYPES, help=_CACHE_HELP)
    run.add_argument("--cache-bytes", type=int, metavar="BYTES", help="of one rank's KV cache")
    run.add_argument(
        "--prefill-chunk", type=int, metavar="TOKENS",
        help="most tokens of one step (default: 512, on GPUs 2048)",
    )  # fmt: skip
    run.add_argument("--threads", type=int, metavar="N", help="lowers a rank's threads, never raises them")
    run.add_argument("--kernels", choices=KERNELS, help="default: auto")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on")
    run.add_argument(
        "--native-step",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run all layers in one C++ call where the CPU kernels hold their weights; default: on",
    )
    run.add_argument(
        "--collective-timeout", type=float, metavar="S", help="a rank that hangs longer ends the job"
    )
    run.add_argument(
        "--collectives", choices=COLLECTIVES, help="how CPU ranks sum: shared memory or c10d (default: auto)"
    )
    run.add_argument("--load-timeout", type=float, metavar="S", help="the same while loading and compiling")
    _add_draft_flags(parser)
    run.add_argument("--config", metavar="FILE.toml", help="the same settings from a file; flags win")
    run.add_argument("--print-config", action="store_true", help="print the settings as JSON and stop")


def _add_draft_flags(parser: argparse.ArgumentParser) -> None:
    draft = parser.add_argument_group("speculative decoding")
    draft.add_argument(
        "--draft", metavar="KIND", help="lookup, self:FORMAT, skip:N, or a model as --model takes one"
    )
    draft.add_argument(
        "--draft-quant", choices=QUANTS, help="of a draft that is a model (default: as --quant)"
    )
    draft.add_argument(
        "--draft-tokens", type=int, metavar="K", help="most drafted at once (default: lookup 15, others 7)"
    )
    draft.add_argument(
        "--draft-adaptive",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draft fewer, or none, where they do not pay (default: on)",
    )
    draft.add_argument(
        "--draft-ranks", choices=DRAFT_RANKS, help="split a draft model or not (default: measured)"
    )
    draft.add_argument(
        "--speculate-exact",
        action="store_true",
        default=None,
        help="decode through the code that verifies, so that rounding is the same with a draft and without",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Everything of SamplingParams."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 128")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--presence-penalty", type=float, metavar="X")
    group.add_argument("--frequency-penalty", type=float, metavar="X")
    group.add_argument("--seed", type=int, metavar="N", help="default: 0")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument("--logprobs", type=int, metavar="N", help="report the N likeliest tokens of each step")


def _from_file(path: str, known: set[str]) -> dict[str, Any]:
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from None
    unknown = sorted(set(found) - known)
    if unknown:
        raise ConfigError(
            f"--config {path} has unknown settings: {', '.join(unknown)}; known: {sorted(known)}"
        )
    return found


def configurations(args: argparse.Namespace) -> tuple[EngineConfig, SamplingParams]:
    """The engine's and the sampler's settings: defaults, then --config's file, then flags."""
    engine = {SPELLED.get(f.name, f.name): f.name for f in fields(EngineConfig)}
    sampling = {name: name for name in SamplingParams.field_names()}
    values = _from_file(args.config, {*engine, *sampling}) if args.config else {}
    given = {name: value for name, value in vars(args).items() if value is not None}
    values.update((name, value) for name, value in given.items() if name in engine or name in sampling)
    return (
        EngineConfig(**{engine[name]: value for name, value in values.items() if name in engine}),
        SamplingParams(**{name: value for name, value in values.items() if name in sampling}),
    )


def print_config(engine: EngineConfig, sampling: SamplingParams) -> None:
    """Both configurations as one JSON document on stdout."""
    shown = {
        "engine": engine.to_dict(),
        "sampling": {n: getattr(sampling, n) for n in sampling.field_names()},
    }
    sys.stdout.write(json.dumps(shown, indent=2) + "\n")
