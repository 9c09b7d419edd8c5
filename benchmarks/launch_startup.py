"""From the command to the script's first line: tp-launch against torchrun, alternating in one run.

Both start ranks on the same elastic agent, and both must load torch for it; what tp-launch adds is the
topology, the plan, and in each rank the placement before the script. The script imports nothing: it
writes the monotonic clock, which processes of one machine share. A rank's start counts when the last
rank has started. CPU seconds are those of the launcher and all ranks together, to the end: they hardly
depend on what else the machine does, as the times do.

    python benchmarks/launch_startup.py --ranks 2 --repeats 9 --hardware xeon2c --output benchmarks/results

The last line of stdout is one JSON document. Exit code 1 where the median of `tp-launch --numa` is above
1.15 times torchrun's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGET_RATIO = 1.15
TIMEOUT_S = 120
SCRIPT = """
import os, sys, time
now = time.monotonic()
with open(os.path.join(sys.argv[1], os.environ["RANK"]), "w") as file:
    file.write(repr(now))
"""


def commands(ranks: int) -> dict[str, list[str]]:
    """What is compared, as the user types it."""
    binaries = Path(sys.executable).parent
    return {
        "torchrun": [str(binaries / "torchrun"), "--standalone", "--nproc-per-node", str(ranks)],
        "tp-launch": [str(binaries / "tp-launch"), "--nproc", str(ranks)],
        "tp-launch --numa": [str(binaries / "tp-launch"), "--nproc", str(ranks), "--numa"],
    }


def first_line(command: list[str], ranks: int) -> tuple[float, float]:
    """Seconds until the last rank's first line, and CPU seconds. Raises CalledProcessError on failure."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(SCRIPT)
        # An installed program has its bytecode; some build environments forbid writing it.
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        words = [*command, str(script), folder]
        used = cpu_of_children_s()
        start = time.monotonic()
        subprocess.run(words, env=environ, check=True, capture_output=True, timeout=TIMEOUT_S)
        last = max(float((Path(folder) / str(rank)).read_text()) for rank in range(ranks))
        return last - start, cpu_of_children_s() - used


def cpu_of_children_s() -> float:
    """CPU seconds of all ended descendants so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(ranks: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds by launcher; one round that is thrown away warms the file cache."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands(ranks)}
    for repeat in range(repeats + 1):
        for name, command in commands(ranks).items():
            measured = first_line(command, ranks)
            if repeat:
                times[name].append(measured)
    return times


def document(args: argparse.Namespace, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """The card and the results."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
    )
    return {
        "benchmark": "launch_startup",
        "command": "python benchmarks/launch_startup.py " + " ".join(sys.argv[1:]),
        "cpu": f"{cpu}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit.stdout.strip() or "unknown",
        "ranks": args.ranks,
        "repeats": args.repeats,
        "load_average": round(os.getloadavg()[0], 2),
        "target_ratio": TARGET_RATIO,
        "launchers": {name: row(values, times["torchrun"]) for name, values in times.items()},
    }


def row(values: list[tuple[float, float]], base: list[tuple[float, float]]) -> dict[str, float]:
    """One launcher's figures. Ratios are taken within rounds: the machine's load changes over minutes."""
    seconds = [value[0] for value in values]
    ratios = [value[0] / other[0] for value, other in zip(values, base, strict=True)]
    return {
        "median_s": round(statistics.median(seconds), 3),
        "min_s": round(min(seconds), 3),
        "max_s": round(max(seconds), 3),
        "median_ratio": round(statistics.median(ratios), 3),
        "median_cpu_s": round(statistics.median(value[1] for value in values), 3),
    }


def render(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# From the command to the script's first line", ""]
    lines += [f"- {key}: {value}" for key, value in result.items() if key != "launchers"]
    titles = "| launcher | median s | min s | max s | over torchrun, median of rounds | CPU s |"
    lines += ["", titles, "|" + "---|" * 6]
    for name, figures in result["launchers"].items():
        lines.append(f"| {name} | " + " | ".join(str(value) for value in figures.values()) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Start-up of tp-launch against torchrun's.")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start")
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count")
    parser.add_argument("--output", type=Path, default=None, help="folder for the .md and .json")
    parser.add_argument("--hardware", default="cpu", help="word for the hardware in the file names")
    args = parser.parse_args(argv)
    result = document(args, measure(args.ranks, args.repeats))
    text = render(result)
    print(text)
    if args.output is not None:
        stem = args.output / f"launch_{args.hardware}_{time.strftime('%Y%m')}"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["launchers"]["tp-launch --numa"]["median_ratio"] <= TARGET_RATIO else 1


if __name__ == "__main__":
    raise SystemExit(main())
