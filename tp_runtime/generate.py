"""tp-launch generate.py: answer prompts with a model spread over ranks.

Text goes to stdout as it becomes certain, figures and messages to stderr; with --json stdout holds one
JSON document. `check` refuses bad input without torch, before any rank exists.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tp_runtime import env
from tp_runtime.config import EngineConfig, SamplingParams
from tp_runtime.errors import CollectiveError, ConfigError, TPError
from tp_runtime.flags import Parser, add_engine_flags, add_sampling_flags, configurations, print_config

if TYPE_CHECKING:
    from tp_runtime.engine.llm import LLM
    from tp_runtime.engine.sequence import Completion

EXAMPLES = """\
  tp-launch --nproc 2 --numa generate.py --model smollm2-135m --quant int8 --chat --prompt "Hello"
  tp-launch --nproc 2 --numa generate.py --model ./Llama-3.1-8B --prompt-file question.txt --temperature 0.7
  tp-launch --nproc 8 generate.py --model llama-70b --quant int8 --context 8192 --plan
  python -m tp_runtime.generate --prompt "One rank needs no launcher" --json"""


def _parser() -> Parser:
    parser = Parser("generate.py", "Generate text with a model split over the ranks of this job.", EXAMPLES)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated: answered in one batch"
    )
    prompts.add_argument(
        "--prompt-file", metavar="FILE", help="a file that holds one prompt (UTF-8); - is stdin"
    )
    prompts.add_argument("--chat", action="store_true", help="put prompts through the model's chat template")
    prompts.add_argument("--system", metavar="TEXT", help="a system message for --chat")
    add_sampling_flags(parser)
    add_engine_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="the last line of stdout is one JSON document")
    output.add_argument(
        "--plan", action="store_true", help="print how weights divide and what fits, then stop"
    )
    return parser


def _prompts(args: Namespace) -> list[str]:
    texts = list(args.prompt or [])
    if args.prompt_file:
        try:
            file = sys.stdin.buffer if args.prompt_file == "-" else open(args.prompt_file, "rb")  # noqa: SIM115
            with file:
                texts.append(file.read().decode())
        except OSError as error:
            raise ConfigError(f"--prompt-file {args.prompt_file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(
                f"--prompt-file {args.prompt_file} is not UTF-8 text; convert it first"
            ) from None
    if not texts:
        raise ConfigError("no prompt was given; use --prompt TEXT or --prompt-file FILE")
    if not all(texts):
        raise ConfigError("the prompt is empty; give at least one character")
    if args.system and not args.chat:
        raise ConfigError("--system needs --chat: without it there is no template to put it in")
    return texts


def _requests(args: Namespace) -> list[Any]:
    """What LLM.generate takes: texts, or chat messages."""
    if not args.chat:
        return _prompts(args)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [[*system, {"role": "user", "content": text}] for text in _prompts(args)]


def check(argv: Sequence[str], nproc: int) -> int | None:
    """Refuse bad input without torch; an exit code where there is nothing left to run (--plan, --help).

    argv: this script's arguments. nproc: ranks of the job. Raises TPError.
    """
    try:
        args = _parser().parse_args(list(argv))
    except SystemExit as done:
        return int(done.code or 0)
    engine, sampling = configurations(args)
    if args.print_config:
        print_config(engine, sampling)
        return 0
    from tp_runtime.engine.preflight import preflight, show_plan

    if args.plan:
        show_plan(engine, nproc, as_json=args.json)
        return 0
    preflight(engine, sampling, nproc, _requests(args))
    return None


def _report(llm: LLM, completions: list[Completion], sampling: SamplingParams) -> dict[str, Any]:
    """The document of --json. Every rank calls it: peak memory is gathered."""
    from dataclasses import asdict

    from tp_runtime.engine.report import run_figures

    first = asdict(completions[0])
    document = {
        "text": first["text"],
        "tokens": first["tokens"],
        "prompt_tokens": first["prompt_tokens"],
        "new_tokens": completions[0].new_tokens,
        "finish_reason": first["finish_reason"],
        **run_figures(llm),
    }
    if sampling.logprobs is not None:
        document["logprobs"] = first["logprobs"]
    if len(completions) > 1:
        document["completions"] = [{**asdict(c), "new_tokens": c.new_tokens} for c in completions]
    return document


def _run(args: Namespace, engine: EngineConfig, sampling: SamplingParams) -> None:
    from tp_runtime.engine.llm import LLM
    from tp_runtime.engine.report import figures_line

    requests = _requests(args)
    with LLM(measure_ceiling=True, **engine.to_dict()) as llm:
        speaks = llm.rank == 0
        stream = speaks and not args.json and len(requests) == 1

        def show(_: int, piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        completions = llm.generate(requests, sampling, on_text=show if stream else None)
        document = _report(llm, completions, sampling)
        if not speaks:
            return
        if args.json:
            sys.stdout.write(json.dumps(document) + "\n")
        elif stream:
            sys.stdout.write("\n")
        else:
            for index, completion in enumerate(completions):
                sys.stdout.write(f"--- {index + 1}\n{completion.text}\n")
        sys.stdout.flush()
        sys.stderr.write(figures_line(document) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run in one rank; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    rank = env.get_int("RANK") or 0
    try:
        if not env.get_flag("TP_CHECKED"):
            done = check(argv, env.get_int("WORLD_SIZE") or 1)
            if done is not None:
                return done
        args = _parser().parse_args(list(argv))
        _run(args, *configurations(args))
    except TPError as error:
        if env.get_int("TP_LAUNCHER_PID") is not None:
            raise  # the launcher says it, once
        if rank == 0 or isinstance(error, CollectiveError):
            sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
