"""targets: every figure that decoding on CPUs is held to, measured by the other commands. No torch.

A row (target_rows.py) is one or more command lines of tp-bench, run in turns. Rows are written as they end,
and those of this commit are not run again, so a run that was cut short goes on where it stopped (with
changes that are not committed, all are run). A row that would not end within --minutes is left for the next
run.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .card import commit
from .kept import read_document, write_files
from .launching import RunFailed, run_program
from .options import Options
from .target_rows import Documents, Row, rows


def run(options: Options) -> dict[str, Any]:
    """Measure what is asked for and not yet there; the document of all rows. Raises TPError, RunFailed."""
    args, at = options.args, commit()
    known = {row.name: row for row in rows()}
    for name in args.only or ():
        if name not in known:
            raise ConfigError(f"--rows has no {name!r}; the rows are {', '.join(known)}")
    folder = Path(args.output).expanduser()
    document, started, left = read_document(folder / "targets.json", {"rows": {}}), time.monotonic(), []
    for name in args.only or known:
        row, spent = known[name], (time.monotonic() - started) / 60
        if _is_kept(document["rows"].get(name), at):
            sys.stdout.write(f"{name}: measured at {at} already\n")
        elif spent + row.minutes > args.minutes:
            left.append(name)
        else:
            document["rows"][name] = _measured(row, at, args.timeout)
            _write(folder, document)
    sys.stdout.write(markdown(document))
    if left:
        sys.stdout.write(f"left for want of time (--minutes {args.minutes:g}): {', '.join(left)}\n")
    return document | {"left": left}


def _is_kept(row: dict[str, Any] | None, at: str | None) -> bool:
    return row is not None and at is not None and not at.endswith("-dirty") and row["commit"] == at


def _measured(row: Row, at: str | None, timeout_s: float) -> dict[str, Any]:
    """One row run and judged; where a command fails, what is left of it."""
    sys.stdout.write(f"{row.name}: about {row.minutes:g} min\n")
    sys.stdout.flush()
    began = time.monotonic()
    found: Documents = [[] for _ in row.commands]
    result: dict[str, Any] = {"commit": at, "commands": [f"tp-bench {words}" for words in row.commands]}
    try:
        for _ in range(row.turns):
            for words, runs in zip(row.commands, found, strict=True):
                command = [sys.executable, "-m", "tp_runtime.bench", *shlex.split(words), "--json"]
                runs.append(run_program(command, timeout_s=timeout_s))
    except RunFailed as failed:
        return result | {"commit": None, "figures": [], "failed": failed.code}  # and is run again
    figures = [asdict(figure) | {"met": figure.met} for figure in row.judge(found)]
    minutes = round((time.monotonic() - began) / 60, 1)
    return result | {"figures": figures, "minutes": minutes, "documents": found}


def _write(folder: Path, document: dict[str, Any]) -> None:
    files = {"targets.json": json.dumps(document, indent=1) + "\n", "targets.md": markdown(document)}
    write_files(folder, files)


def markdown(document: dict[str, Any]) -> str:
    """The judged figures, then the host and the commands."""
    lines = ["# Targets of decoding on CPUs", "", "| row | figure | target | found | met | ceiling GB/s |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, row in document["rows"].items():
        for figure in row["figures"]:
            sign = "<=" if figure["at_most"] else ">="
            value = "-" if figure["value"] is None else f"{figure['value']:.3f}"
            met = {True: "yes", False: "**no**", None: "not measured"}[figure["met"]]
            ceiling = "-" if figure["ceiling_gb_s"] is None else f"{figure['ceiling_gb_s']:.1f}"
            target = f"{sign} {figure['target']:.3g}"
            lines.append(f"| {name} | {figure['what']} | {target} | {value} | {met} | {ceiling} |")
        if "failed" in row:
            lines.append(f"| {name} | ended with code {row['failed']} | - | - | not measured | - |")
    for name, row in document["rows"].items():
        lines += ["", f"{name}, at {row['commit']}, {row.get('minutes', '-')} minutes:", ""]
        lines += [f"    {command}" for command in row["commands"]]
        cards = [run["card"] for runs in row.get("documents", ()) for run in runs if "card" in run]
        if cards:
            loads = f"{cards[0]['load_average_at_start']} to {cards[-1]['load_average']}"
            lines += ["", f"{cards[0]['cpu']}, {cards[0]['cpus']} CPUs, {cards[0]['date']}, load {loads}"]
    return "\n".join(lines) + "\n"
