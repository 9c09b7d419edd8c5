"""tp-launch generate.py: answer prompts with a model spread over ranks.

Text goes to stdout as it becomes certain, figures and messages to stderr; with --json stdout holds one
JSON document. `check` refuses bad input without torch, before any rank exists.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_runtime import env
from tp_runtime.config import EngineConfig, SamplingParams
from tp_runtime.errors import ConfigError, TPError
from tp_runtime.flags import Parser, add_engine_flags, add_sampling_flags, configurations, print_config
from tp_runtime.log import complain

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


def _stdin_bytes() -> bytes:
    """All of stdin, left to be read again: by this process once it runs, and by the ranks it starts."""
    try:
        begin = os.lseek(0, 0, os.SEEK_CUR)
    except OSError:  # a pipe or a terminal: what came through it is kept in a file that takes its place
        with tempfile.TemporaryFile() as kept:
            kept.write(os.fdopen(0, "rb", closefd=False).read())
            kept.flush()
            os.dup2(kept.fileno(), 0)
        begin = os.lseek(0, 0, os.SEEK_SET)
    with open(0, "rb", closefd=False) as file:
        content = file.read()
    os.lseek(0, begin, os.SEEK_SET)
    return content


def _file_bytes(path: str) -> bytes:
    if path == "-":
        return _stdin_bytes()
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise ConfigError(
            f"--prompt-file {path} is a pipe, which can be read only once; pipe it in and use -"
        )
    return Path(path).read_bytes()


def _prompts(args: Namespace) -> list[str] | None:
    """The prompts. None where rank 0 of the job reads stdin for this rank."""
    if args.prompt_file == "-" and env.get_int("RANK"):
        return None
    texts = list(args.prompt or [])
    if args.prompt_file:
        try:
            texts.append(_file_bytes(args.prompt_file).decode())
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


def _requests(args: Namespace, texts: list[str]) -> list[Any]:
    """What LLM.generate takes: texts, or chat messages."""
    if not args.chat:
        return texts
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [[*system, {"role": "user", "content": text}] for text in texts]


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
    preflight(engine, sampling, nproc, _requests(args, _prompts(args) or []))
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


def _say(text: str) -> bool:
    """Write to stdout at once; False where nobody reads it any more (`... | head -1`)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _run(args: Namespace, engine: EngineConfig, sampling: SamplingParams) -> None:
    from tp_runtime.engine.llm import LLM
    from tp_runtime.engine.report import figures_line

    texts = _prompts(args)
    with LLM(measure_ceiling=True, **engine.to_dict()) as llm:
        if args.prompt_file == "-":
            texts = llm.from_rank_0(texts)
        assert texts is not None, "rank 0 has the prompts"
        requests = _requests(args, texts)
        speaks = llm.rank == 0
        stream = speaks and not args.json and len(requests) == 1

        def show(_: int, piece: str) -> bool:
            return _say(piece)

        completions = llm.generate(requests, sampling, on_text=show if stream else None)
        document = _report(llm, completions, sampling)
        if not speaks:
            return
        if args.json:
            _say(json.dumps(document) + "\n")
        elif stream:
            _say("\n")
        else:
            _say("".join(f"--- {index + 1}\n{c.text}\n" for index, c in enumerate(completions)))
        sys.stderr.write(figures_line(document) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run in one rank; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    running = False
    try:
        if not env.get_flag("TP_CHECKED"):
            done = check(argv, env.get_int("WORLD_SIZE") or 1)
            if done is not None:
                return done
        args = _parser().parse_args(list(argv))
        settings = configurations(args)
        running = True
        _run(args, *settings)
        from tp_runtime.mesh import leave_job

        leave_job()
    except TPError as error:
        if env.get_int("TP_LAUNCHER_PID") is not None:
            raise  # the launcher says it, once
        complain(error, of_input=not running)
        return 2
    except KeyboardInterrupt:  # Ctrl-C: end by that signal, as the shell expects, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
