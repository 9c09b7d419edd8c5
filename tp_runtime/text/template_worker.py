"""Renders chat templates in a process of its own, one JSON line in, one JSON line out.

A chat template is a program that came with a model: it may loop for ever or ask for a terabyte
(`{% set x = x + x %}`). jinja2's sandbox keeps it from Python's internals and refuses huge ranges, but
cannot stop it, and a thread cannot be killed. So it runs here, under a timer whose signal the kernel
delivers even inside C code, and under a limit of address space. Run as a file by `chat_template.py`,
never imported by the package; it ends when its input does. Standard library and jinja2 only.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _GenerationTag(Extension):
    """Accepts `{% generation %} ... {% endgeneration %}`, a mark for training, as if it were not there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as models were trained on it; jinja2's own filter would escape <, > and & for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _render(request: dict) -> dict:
    """The reply to one request: {"text": ...}, or {"error": one sentence's end}."""
    limit = request["max_chars"]
    parts, length = [], 0
    for part in _compile(request["template"]).generate(**request["variables"]):
        length += len(part)
        if length > limit:
            return {"error": f"wrote more than {limit} characters"}
        parts.append(part)
    return {"text": "".join(parts)}


def _answer(request: dict) -> dict:
    try:
        return _render(request)
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"has a syntax error in line {error.lineno}: {error.message}"}
    except jinja2.TemplateError as error:
        return {"error": f"says: {error.message}"}
    except MemoryError:
        return {"error": "needs too much memory"}
    except Exception as error:  # noqa: BLE001 - a template can raise whatever Python's operators raise
        return {"error": f"failed with {type(error).__name__}: {error}"}


def main(argv: list[str]) -> None:
    """argv: address space in bytes. Serves requests until the input ends."""
    limit = int(argv[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["time_limit_s"])
        reply = _answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
