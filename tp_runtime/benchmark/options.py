"""The command lines of tp-bench, and what can be refused before any rank exists. No torch.

A command is parsed twice from the same words: by tp-bench, which starts ranks for each number of --nproc, and
by bench.py in each rank, which measures for the number it finds and takes no --nproc.
"""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import EngineConfig
from ..engine.device import pick_device
from ..engine.source import resolve
from ..errors import ConfigError, ModelNotFoundError
from ..flags import SPELLED, Parser, add_engine_flags, configurations, quant_list
from ..models import registry

MODES = ("kernels", "collectives", "decode", "scaling", "peers", "targets")
PEER_FORMATS = ("none", "int8", "int4")
_COLLECTIVE_TIMEOUT_S = 600.0  # between runs a rank measures other things while its peers wait
_ANY_TIMEOUT_S = 3600.0
_TIMEOUT_S = {"kernels": 7200.0, "targets": 7200.0}  # one run has every shape of the models it is given
OVERVIEW = """\
usage: tp-bench {kernels,collectives,decode,scaling,peers,targets} [options]

Measure this host and print figures beside the ceiling that physics sets.

  kernels      GB/s of every linear and of attention, as a share of what memory delivers
  collectives  latency of all_reduce, all_gather and broadcast by size, against gloo
  decode       tokens a second, time to first token, share of the read ceiling, prefill, memory
  scaling      decode over ranks and formats, interleaved, laid over an analytic model; --predict
  peers        the same shape in llama.cpp and in transformers, interleaved, where installed
  targets      all of these where a target is set, judged in one table; resumes where it stopped

tp-bench COMMAND --help explains each; docs/benchmarks.md defines the figures.

examples:
  tp-bench decode --model llama-1b --quant int8 --nproc 1,2
  tp-bench kernels --models llama-1b --threads 1,2 --json
  tp-bench scaling --model llama-1b --nproc 1,2 --quant none,int8,int4 --output results
  tp-bench scaling --predict 2x6980p-snc3 --model llama-70b --quant int8,int4
  tp-launch --nproc 2 --numa bench.py decode --model llama-1b --quant int4     the same for one N
"""
_EXAMPLES = {
    "kernels": """\
  tp-bench kernels --models llama-1b,llama-8b --quant none,int8,int4-g32,int4-g128 --threads 1,2
  tp-bench kernels --rows 1,4,512 --worlds 1,2 --json
  tp-bench kernels --models llama-70b --worlds 2 --device cuda --quant int8,fp8,int4-g128
  tp-launch --nproc 2 --numa bench.py kernels --quant int8""",
    "collectives": """\
  tp-bench collectives --nproc 2 --json
  tp-bench collectives --nproc 2 --device cuda --soak 1000000
  tp-bench collectives --nproc 2,4 --bytes 4096,16384,65536""",
    "decode": """\
  tp-bench decode --model llama-1b --quant int8 --nproc 1,2
  tp-bench decode --model llama-1b --prompt-tokens 512 --new-tokens 16 --json
  tp-bench decode --model llama-8b --quant int8 --draft llama-1b --force-acceptance 0.8
  tp-bench decode --model llama-1b --quant int8 --context 8192 --new-tokens 32
  tp-bench decode --model llama-1b --quant int8 --contexts 128,8192 --new-tokens 32
  tp-bench decode --model llama2-7b --layers 8 --quant int4 --startup
  tp-bench decode --model llama-70b --quant int8 --device cuda --nproc 1,2 --profile""",
    "scaling": """\
  tp-bench scaling --model llama-1b --nproc 1,2 --quant none,int8,int4 --output results
  tp-bench scaling --model llama-70b --device cuda --nproc 1,2,4 --quant none,int8 --output results
  tp-bench scaling --predict 2x8480 --model llama-70b --quant int8,int4
  tp-bench scaling --predict my_host.toml --model llama-8b --nproc 1,2,4""",
    "peers": """\
  tp-bench peers --model llama-1b --quant none,int8,int4 --repeat 3
  tp-bench peers --model llama2-7b --layers 8 --quant int4 --json""",
    "targets": """\
  tp-bench targets --minutes 40 --output results       again, until none is left
  tp-bench targets --rows collectives,mbu --output results""",
}


@dataclass(frozen=True)
class Options:
    """One command line, checked. args: its flags. engine: settings of the model, where one is loaded."""

    mode: str
    args: Namespace
    engine: EngineConfig | None = None


def parse(words: Sequence[str], *, in_job: bool) -> Options:
    """Read a command line. in_job: in a rank, or for tp-launch, where --nproc is not taken.

    Raises ConfigError; SystemExit(0) for --help.
    """
    mode = words[0] if words else None
    if mode not in MODES:
        raise ConfigError(
            f"{'no command was given' if mode is None else f'{mode!r} is no command'}; use one of: "
            f"{', '.join(MODES)}; see tp-bench --help"
        )
    parser = Parser(f"tp-bench {mode}", _DESCRIPTIONS[mode], _EXAMPLES[mode])
    _ADD[mode](parser)
    if not in_job:
        _add_ranks(parser, mode)
    args = parser.parse_args(list(words[1:]))
    _check_numbers(args)
    _check_contexts(args)
    if getattr(args, "soak", 0) and args.device == "cpu":
        raise ConfigError(f"--soak {args.soak} is for the sums of GPUs; add --device cuda")
    if mode in ("scaling", "peers") and args.batch > 1:
        raise ConfigError(f"--batch {args.batch} is for decode alone; {mode} compares at batch 1")
    engine = _engine(args) if mode in ("decode", "scaling", "peers") else None
    if getattr(args, "profile", False) and engine is not None and pick_device(engine) == "cpu":
        raise ConfigError(
            "--profile times the kernels of a GPU and this run is on the CPU; add --device cuda"
        )
    return Options(mode, args, engine)


def _add_ranks(parser: Parser, mode: str) -> None:
    group = parser.add_argument_group("ranks")
    limit = _TIMEOUT_S.get(mode, _ANY_TIMEOUT_S)
    group.add_argument("--timeout", type=float, default=limit, metavar="S", help=f"of one run ({limit:g})")
    if mode == "targets":
        return  # whose rows say how many
    default = "2" if mode == "collectives" else "1"
    group.add_argument(
        "--nproc",
        type=counts,
        default=None,
        metavar="N,...",
        help=f"ranks, one run each (default: {default})",
    )
    group.add_argument("--no-numa", action="store_true", help="do not bind ranks to cores and memory")
    parser.set_defaults(default_nproc=counts(default))


_STARTERS = {"--nproc": 1, "--timeout": 1, "--no-numa": 0, "--startup": 0}  # flag -> words of its value


def words_for_ranks(words: Sequence[str]) -> list[str]:
    """A command line without what only the starter of ranks takes."""
    kept: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, is_joined, _ = word.partition("=")
        if flag not in _STARTERS:
            kept.append(word)
        elif not is_joined:
            del rest[: _STARTERS[flag]]
    return kept


def _add_kernels(parser: Parser) -> None:
    add = parser.add_argument
    add("--models", type=_words, default=("llama-1b",), metavar="NAME,...", help="shapes of these (llama-1b)")
    add("--worlds", type=counts, metavar="N,...", help="ranks the shapes are divided over (this job's)")
    add("--quant", type=quant_list, default=("none", "int8", "int4-g32", "int4-g128"), metavar="Q,...")
    add("--threads", type=counts, metavar="N,...", help="threads a rank (this rank's)")
    add("--rows", type=counts, default=(1, 4), metavar="N,...", help="1 to 16, or 512 for prefill (1,4)")
    add("--attention", type=counts, default=(), metavar="TOKENS,...", help="attention over so many, too")
    add("--bytes", type=int, metavar="N", help="weights a case rotates over (8 x the last-level cache)")
    _add_device(parser)
    add("--json", action="store_true", help="the last line of stdout is one JSON document")


def _add_collectives(parser: Parser) -> None:
    add = parser.add_argument
    add("--bytes", type=counts, metavar="N,...", help="message sizes (64 B to 4 MiB; GPUs: 8 KiB to 16 MiB)")
    _add_device(parser)
    add("--soak", type=int, default=0, metavar="N", help="GPUs: N more sums with pauses, all checked (0)")
    add("--json", action="store_true", help="the last line of stdout is one JSON document")


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose (cpu)")


def _add_decode(parser: Parser) -> None:
    _add_case(parser)
    add = parser.add_argument
    add("--contexts", type=counts, default=(), metavar="N,...", help="decode at these depths, turn by turn")
    add("--force-acceptance", type=float, metavar="P", help="drafted tokens stand with P (random weights)")
    _add_startup(parser)
    add(
        "--first-token",
        action="store_true",
        help="only load, answer with one token, and say how long it took",
    )
    add("--profile", action="store_true", help="GPUs: also time a token, and a prompt, by kernel")
    add_engine_flags(parser)


def _add_startup(parser: Parser) -> None:
    parser.add_argument(
        "--startup", action="store_true", help="also time two fresh starts, with empty and filled caches"
    )


def _add_case(parser: Parser, repeat: int = 5) -> None:
    group = parser.add_argument_group("measurement")
    add = group.add_argument
    add("--prompt-tokens", type=int, default=128, metavar="N", help="of each row (128)")
    add("--new-tokens", type=int, default=64, metavar="N", help="decoded in each run (64)")
    add("--bytes", type=int, metavar="N", help="a rank reads for the ceiling (8 x the last-level cache)")
    add("--batch", type=int, default=1, metavar="ROWS", help="rows decoded together (1)")
    add("--repeat", type=int, default=repeat, metavar="N", help=f"runs that are measured ({repeat})")
    add("--json", action="store_true", help="the last line of stdout is one JSON document")


def _add_scaling(parser: Parser) -> None:
    _add_case(parser, repeat=3)
    add = parser.add_argument
    add("--rounds", type=int, default=3, metavar="N", help="each case is run so often, turn by turn (3)")
    _add_startup(parser)
    add("--output", metavar="DIR", help="scaling.{json,md,png}; runs found there are not made again")
    add("--predict", metavar="HOST", help="measure nothing: predict HOST.toml, or a name of configs/hosts")
    add_engine_flags(parser, several_quants=True)


def _add_peers(parser: Parser) -> None:
    _add_case(parser, repeat=3)
    parser.add_argument("--gguf", metavar="FILE", help="one file for both sides (default: random weights)")
    add_engine_flags(parser, several_quants=True)


def _add_targets(parser: Parser) -> None:
    add = parser.add_argument
    add("--rows", dest="only", type=_words, metavar="NAME,...", help="only these (default: all)")
    add("--minutes", type=float, default=40.0, metavar="N", help="start no row that would end later (40)")
    add("--output", default="results", metavar="DIR", help="targets.json and targets.md (results)")
    add("--json", action="store_true", help="the last line of stdout is one JSON document")


_ADD: dict[str, Callable[[Parser], None]] = {
    "kernels": _add_kernels,
    "collectives": _add_collectives,
    "decode": _add_decode,
    "scaling": _add_scaling,
    "peers": _add_peers,
    "targets": _add_targets,
}
_DESCRIPTIONS = {
    "kernels": "GB/s of the linears and of attention beside the read ceiling of the same process.",
    "collectives": "Latency of the collectives by size, shared memory against gloo, turn by turn.",
    "decode": "Speed of decoding and prefill, and what of the hardware's limits they reach.",
    "scaling": "Decode over numbers of ranks and formats, interleaved, over an analytic model.",
    "peers": "The same shape in other runtimes, on the same threads in the same run, interleaved.",
    "targets": "Every figure that decoding is held to, judged in one table.",
}


def counts(text: str) -> tuple[int, ...]:
    """Positive whole numbers, comma-separated. Raises ArgumentTypeError."""
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ArgumentTypeError(f"{text!r} is no list of whole numbers above 0; give one such as 1,2")
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _check_numbers(args: Namespace) -> None:
    for name in ("prompt_tokens", "new_tokens", "batch", "repeat", "rounds", "bytes"):
        value = getattr(args, name, None)
        least = 2 if name == "new_tokens" else 1
        if isinstance(value, int) and value < least:
            raise ConfigError(
                f"--{name.replace('_', '-')} {value} is too small; the least is {least}"
                + (": the first token is prefill's" if name == "new_tokens" else "")
            )
    if not getattr(args, "minutes", 1.0) > 0:
        raise ConfigError(f"--minutes {args.minutes:g} is out of range; give a number above 0")
    for name in getattr(args, "models", ()):
        if registry.find(name) is None:
            raise ConfigError(f"no model is called {name!r}; the names are {', '.join(registry.names())}")
    if hasattr(args, "models"):
        _check_kernels(args)
    for rows in getattr(args, "rows", ()):
        if rows > 16 and rows != 512:
            raise ConfigError(f"--rows {rows} is not measured; give 1 to 16 for decoding or 512 for prefill")


def _check_kernels(args: Namespace) -> None:
    """Refuse formats that the device has no kernel for."""
    other = ("int8-g32",) if args.device == "cuda" else ("fp8",)
    for quant in other:
        if quant in args.quant:
            raise ConfigError(f"--quant {quant} has no kernel for --device {args.device}; leave it out")
    if args.device == "cuda" and args.threads is not None:
        raise ConfigError("--threads is for CPUs; leave it out with --device cuda")


def _check_contexts(args: Namespace) -> None:
    found = getattr(args, "contexts", ())
    if not found:
        return
    if list(found) != sorted(set(found)) or found[0] <= args.new_tokens:
        raise ConfigError(
            f"--contexts {','.join(map(str, found))} has to rise, from above --new-tokens {args.new_tokens}"
        )
    if found[-1] < args.prompt_tokens + args.new_tokens:
        raise ConfigError(
            f"--contexts ends at {found[-1]}, below --prompt-tokens {args.prompt_tokens} and --new-tokens "
            f"{args.new_tokens} together; give a deeper one"
        )
    if args.context not in (None, found[-1]):
        raise ConfigError(f"--context {args.context} is not the last of --contexts; leave it out")


def _engine(args: Namespace) -> EngineConfig:
    """The settings of the case, checked."""
    engine = _settings(args)
    _check_forced(getattr(args, "force_acceptance", None), engine)
    return engine


def _settings(args: Namespace) -> EngineConfig:
    """The settings of the case: room for it, and random weights where the model has none."""
    values: dict[str, Any] = {**vars(args), "print_config": None}
    if isinstance(args.quant, tuple):
        values["quant"] = args.quant[0]
    engine, _ = configurations(Namespace(**values))
    tokens = args.prompt_tokens + args.new_tokens
    context = max(tokens, engine.context or 0, *getattr(args, "contexts", ()))
    timeout_s = engine.collective_timeout_s or _COLLECTIVE_TIMEOUT_S
    engine = replace(engine, context=context, max_batch=args.batch, collective_timeout_s=timeout_s)
    if engine.random_weights or engine.weights is not None:
        return engine
    try:
        resolve(engine.model, layers=engine.layers)
    except ModelNotFoundError:
        if engine.model is None or registry.find(engine.model) is None:
            raise
        return replace(engine, random_weights=True)
    return engine


def _check_forced(wanted: float | None, engine: EngineConfig) -> None:
    """Raise ConfigError where drafted tokens cannot be made to stand with this probability."""
    if wanted is None:
        return
    if not 0 < wanted <= 1:  # also refuses NaN
        raise ConfigError(f"--force-acceptance {wanted:g} is out of range; it lies above 0 and at most at 1")
    if engine.draft is None:
        raise ConfigError(f"--force-acceptance {wanted:g} needs a draft; name one with --draft")
    if engine.draft == "lookup":
        raise ConfigError(
            f"--force-acceptance {wanted:g} is for a draft whose steps cost time, and --draft is lookup; use "
            f"another model, self:FORMAT or skip:N"
        )
    if not engine.random_weights:
        name = engine.model or "the model"
        raise ConfigError(
            f"--force-acceptance {wanted:g} is for random weights, and {name} has real ones here; leave it "
            f"away, or add --random-weights"
        )


def check_engine(options: Options, nproc: int) -> None:
    """Refuse what the engine would refuse, without torch. Raises TPError."""
    from ..engine.preflight import preflight_engine

    if options.engine is not None:
        preflight_engine(options.engine, nproc)


def quants(options: Options) -> tuple[str, ...]:
    """The formats of a command that takes several."""
    return options.args.quant or PEER_FORMATS


def engine_words(engine: EngineConfig, args: Namespace) -> list[str]:
    """The command line of a decode with these settings: what differs from the defaults."""
    words = []
    for name in ("prompt_tokens", "new_tokens", "batch", "repeat"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.bytes is not None:
        words += ["--bytes", str(args.bytes)]
    plain = EngineConfig()
    for name, value in engine.to_dict().items():
        flag = f"--{SPELLED.get(name, name).replace('_', '-')}"
        if value == getattr(plain, name) or name == "max_batch":
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, str(value)]
    return words
