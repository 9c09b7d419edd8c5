"""What speculation brings, against the same prompts without it in the same processes, turn by turn.

    copy   prompt lookup on work that copies its prompt, and on free text
    pair   the model with itself at fewer bits, and with itself as it is (all stands: verification alone)
    rows   a step of 1, 2, 3, 5, 9 and 16 tokens of one row against a step of one

A pair's measured speed-up stands beside (1 - a^(k+1)) / ((1 - a)(k c + v)) with a, c and v as measured.
Speed-ups are medians over rounds of (seconds a token without) / (seconds a token with); both halves of a
round run one after the other. --clock cpu counts the seconds this process ran instead of those that passed:
on one rank with one thread it is the same on an idle host, and it can be read on a busy one.

    tp-launch --nproc 2 --numa benchmarks/speculative.py copy --quant int8
    python benchmarks/speculative.py pair --threads 1 --clock cpu
    python benchmarks/speculative.py rows --model llama-1b --layers 4 --random-weights --quant int4
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COPY = {
    "rewrite": (
        "Repeat the following text exactly, but write 'winter' instead of 'summer'.\n\n"
        "The garden behind the old house was quiet in summer. Every morning the gardener opened the wooden "
        "gate, filled two tin cans at the well and walked along the gravel path to the roses. He watered the "
        "red ones first, then the white ones, and last of all the small yellow bush beside the wall. When he "
        "was done he sat on the stone bench, ate an apple and looked at the clouds above the hill."
    ),
    "json": (
        "Here is a list of sensors as JSON, with twelve more entries in the same form:\n\n[\n"
        '  {"id": 1, "type": "temperature", "unit": "celsius", "room": "kitchen", "active": true},\n'
        '  {"id": 2, "type": "humidity", "unit": "percent", "room": "kitchen", "active": true},\n'
        '  {"id": 3, "type": "temperature", "unit": "celsius", "room": "bedroom", "active": true},\n'
        '  {"id": 4, "type": "humidity", "unit": "percent", "room": "bedroom", "active": true},'
    ),
    "code": (
        "Fix the one wrong operator in this Python function and write the whole function again.\n\n"
        "def moving_average(values, window):\n"
        '    """The mean of each run of `window` neighbouring values."""\n'
        "    if window < 1:\n        raise ValueError('window must be at least 1')\n"
        "    averages = []\n    total = sum(values[:window])\n    averages.append(total / window)\n"
        "    for index in range(window, len(values)):\n"
        "        total -= values[index]\n        total -= values[index - window]\n"
        "        averages.append(total / window)\n    return averages\n"
    ),
}
CONTINUED = ("json",)  # given as text to go on with; the others are asked for in a chat
FREE = {
    "story": "Write a story about a lighthouse keeper who finds a bottle with a letter in it.",
    "essay": "Explain in your own words why the sky is blue, and why sunsets are red.",
    "letter": "Write a letter to a friend about your first week in a new town.",
}
ROWS = (1, 2, 3, 5, 9, 16)
Clock = Callable[[], float]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("copy", "pair", "rows"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a prompt, unless it ends earlier")
    parser.add_argument("--draft-tokens", type=int, default=4, help="of the pairs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--hardware", default="unnamed", help="a short name, for the results' file")
    return parser.parse_args()


def _engine(args: argparse.Namespace, clock: Clock, **changes: Any) -> Any:
    from tp_runtime.engine.llm import LLM

    settings: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("model", "quant", "layers", "random_weights", "dtype", "threads")
    }
    llm = LLM(**{**settings, "context": 1024, "max_batch": 1, **changes})
    if llm.speculator is not None:
        llm.speculator.drafter.clock = clock
    return llm


def _seconds(llm: Any, prompt: Any, tokens: int, clock: Clock) -> tuple[float, tuple[int, ...]]:
    """Seconds a decoded token, prefill left out, and the tokens."""
    from tp_runtime.config import SamplingParams

    times: list[float] = []
    params = SamplingParams(max_new_tokens=tokens)
    # Text comes with every token or few of them; the first piece ends the prefill.
    (done,) = llm.generate([prompt], params, on_text=lambda *_: times.append(clock()))
    return ((clock() - times[0]) / max(1, len(done.tokens) - 1) if times else 0.0), done.tokens


def _against_plain(llm: Any, prompt: Any, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Rounds of one answer without and with the draft."""
    speculator, ratios, plain_s, same = llm.speculator, [], [], True
    passes = []
    for _ in range(args.rounds):
        llm.speculator = None
        without, wanted = _seconds(llm, prompt, args.tokens, clock)
        llm.speculator = speculator
        with_draft, found = _seconds(llm, prompt, args.tokens, clock)
        same = same and found == wanted
        plain_s.append(without)
        passes += speculator.report.passes
        ratios.append(without / with_draft if with_draft else 0.0)
    speculator.report.passes = passes
    figures = speculator.report.to_dict()
    return {
        "speedup": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "plain_ms": 1000 * statistics.median(plain_s),
        "same_tokens": same,
        "new_tokens": len(found),
        **figures,
    }


def copy(args: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Prompt lookup, k adaptive."""
    rows = []
    with _engine(args, clock, draft="lookup") as llm:
        for kind, prompts in (("copy", COPY), ("free", FREE)):
            for name, text in prompts.items():
                asked = text if name in CONTINUED else [{"role": "user", "content": text}]
                rows.append({"case": f"{kind}: {name}", **_against_plain(llm, asked, args, clock)})
                _say(llm, rows[-1])
    return rows


def pair(args: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """A model and its drafts, k fixed."""
    rows = []
    for draft in (args.model, "self:int4-g32", "self:int4-g64", "self:int8"):
        changes = {"draft": draft, "draft_tokens": args.draft_tokens, "draft_adaptive": False}
        if draft == args.model:
            changes["draft_quant"] = args.quant
        with _engine(args, clock, **changes) as llm:
            for name, text in FREE.items():
                row = _against_plain(llm, [{"role": "user", "content": text}], args, clock)
                row["speedup_predicted"] = _model(row, args.draft_tokens)
                row["measured_over_model"] = row["speedup"] / row["speedup_predicted"]
                rows.append({"case": f"{draft}: {name}", **row})
                _say(llm, rows[-1])
    return rows


def _model(row: dict[str, Any], k: int) -> float:
    """(1 - a^(k+1)) / ((1 - a)(k c + v)), in plain passes."""
    a, plain = row["acceptance"] or 0.0, row["plain_ms"]
    expected = k + 1 if a == 1 else (1 - a ** (k + 1)) / (1 - a)
    return expected / ((row["draft_ms"] + row["verify_ms"]) / plain)


def rows_of_a_step(args: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Median cost of a step by its tokens, over one row of 256 cached ones."""
    from tp_runtime.engine.step import Row, Step

    times: dict[int, list[float]] = {count: [] for count in ROWS}
    with _engine(args, clock) as llm:
        if llm.world_size > 1:
            raise SystemExit("rows is measured on one rank; start it without tp-launch")
        blocks = tuple(llm.pool.allocate(llm.pool.blocks_for(300)))
        llm.runner.execute(Step((Row((1,) * 256, 0, blocks, 1),)))
        for _ in range(args.rounds * 5):
            for count in ROWS:
                began = clock()
                llm.runner.execute(Step((Row((1,) * count, 256, blocks, count),)))
                times[count].append(clock() - began)
    one = statistics.median(times[1])
    return [
        {
            "case": f"{count} tokens",
            "step_ms": 1000 * statistics.median(taken),
            "over_one": statistics.median(a / b for a, b in zip(taken, times[1], strict=True)),
            "least_ms": 1000 * min(taken),
            "least_over_least": min(taken) / min(times[1]),
            "plain_ms": 1000 * one,
        }
        for count, taken in times.items()
    ]


def _say(llm: Any, row: dict[str, Any]) -> None:
    if llm.rank == 0:
        print(f"{row['case']}: {row['speedup']:.2f} ({row['least']:.2f}..{row['most']:.2f})", flush=True)


def _card(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "benchmark": f"speculative {args.part}",
        "command": "python " + " ".join(sys.argv),
        "cpu": f"{cpu}, {os.cpu_count()} CPUs",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "model": args.model,
        "quant": args.quant,
        "dtype": args.dtype,
        "clock": args.clock,
        "rounds": args.rounds,
        "load_average": os.getloadavg()[0],
    }


def _table(rows: list[dict[str, Any]]) -> str:
    left_out = ("draft", "draft_tokens", "acceptance_by_position")
    names = [name for name in rows[0] if name not in left_out]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = _arguments()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    rows = {"copy": copy, "pair": pair, "rows": rows_of_a_step}[args.part](args, clock)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    document = {**_card(args), "rows": rows}
    print(_table(rows))
    if args.output is not None:
        stem = f"speculative_{args.part}_{args.hardware}_{time.strftime('%Y%m')}"
        (args.output / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
        card = "\n".join(f"- {key}: {value}" for key, value in document.items() if key != "rows")
        (args.output / f"{stem}.md").write_text(f"# Speculation: {args.part}\n\n{card}\n\n{_table(rows)}\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
