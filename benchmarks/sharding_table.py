"""What `shard` makes of known models: how much of them it divides, with how many collectives, how fast.

Small random models of transformers and diffusers are built in place, fp32, and sharded by real ranks of one
thread each, one job a model. In turns, so that all times come from the same minutes: the whole model on rank
0 while the others wait, the whole model on all ranks at once (what a rank has of a busy host), the sharded
one. A layer is a child of an outermost list of blocks; of a UNet, a transformer block.

    python benchmarks/sharding_table.py --hardware xeon2c --output benchmarks/results

The last line of stdout is one JSON document. Exit code 1 where a model failed or differs by more than 1e-3.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharding_models import CASES, build, layers_of, product_weights
from torch.utils._python_dispatch import TorchDispatchMode

from tp_runtime.benchmark.card import card, card_lines, load_average
from tp_runtime.mesh import init_mesh, tp_rank, tp_size
from tp_runtime.sharding.apply import applied
from tp_runtime.sharding.shard import shard

TOLERANCE = 1e-3
TIMEOUT_S = 900
TIMES = ("whole_s", "whole_at_once_s", "sharded_s")


def count_collectives(model: Any, inputs: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
    """(collectives of a forward pass, those within layers, the pass's floating results)."""
    count = {"all": 0, "inside": 0, "depth": 0}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("tp_runtime", "tp_shm") and "all_" in func.__name__:
                count["all"] += 1
                count["inside"] += count["depth"] > 0
            return func(*args, **(kwargs or {}))

    def move(step: int) -> Any:
        return lambda *_: count.update(depth=count["depth"] + step)

    hooks = []
    for layer in layers_of(model):
        hooks += [layer.register_forward_pre_hook(move(1)), layer.register_forward_hook(move(-1))]
    with torch.no_grad(), Counter():
        out = model(**inputs)
    for hook in hooks:
        hook.remove()
    values = {k: v for k, v in out.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return count["all"], count["inside"], values


def times(whole: Any, model: Any, inputs: dict[str, Any], rounds: int, rank: int) -> list[list[float]]:
    """Seconds of a turn: the whole model on rank 0 (0 on others), on all ranks at once, the sharded one."""
    measured = []
    for turn in range(rounds + 1):
        seconds = []
        for runs, what in ((rank == 0, whole), (True, whole), (True, model)):
            dist.barrier()
            start = time.perf_counter()
            if runs:
                with torch.no_grad():
                    what(**inputs)
            seconds.append(time.perf_counter() - start if runs else 0.0)
        if turn:
            measured.append(seconds)
    return measured


def run_rank(name: str, rounds: int, file: Path) -> None:
    """What a child does; rank 0 writes the row."""
    torch.set_num_threads(1)
    mesh = init_mesh()
    rank, world = tp_rank(mesh), tp_size(mesh)
    case = CASES[name]
    whole, inputs = build(case)
    _, _, wanted = count_collectives(whole, inputs)
    matrices = sum(p.numel() for p in product_weights(whole).values())
    total = sum(p.numel() for p in whole.parameters())
    model = copy.deepcopy(whole)
    start, cpu = time.perf_counter(), time.process_time()
    shard(model, mesh, cache=False, example_inputs=inputs if case.takes == "noise" else None)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    collectives, inside, got = count_collectives(model, inputs)
    errors = {k: float((got[k] - wanted[k]).abs().max() / wanted[k].abs().max()) for k in wanted}
    held = sum(p.numel() for p in product_weights(model).values()) / matrices
    mine = (
        held,
        sum(p.numel() for p in model.parameters()) / total,
        errors,
        times(whole, model, inputs, rounds, rank),
    )
    ranks: list[Any] = [None] * world
    dist.all_gather_object(ranks, mine)
    state = applied(model)
    undivided = {w.name: w.reason for w in state.plan.weights if w.dim is None} if state else {}
    names = product_weights(model) if world > 1 else {}
    slowest = torch.tensor([r[3] for r in ranks]).amax(0).T.tolist()
    row = {
        "parameters": total,
        "product_weights": matrices,
        "layers": len(layers_of(model)),
        "share": round(max(r[0] for r in ranks), 4),
        "share_of_all": round(max(r[1] for r in ranks), 4),
        "collectives": collectives,
        "collectives_a_layer": round(inside / len(layers_of(model)), 2),
        "error": float(torch.tensor([list(r[2].values()) for r in ranks]).max()),
        **{key: [round(t, 5) for t in slowest[place]] for place, key in enumerate(TIMES)},
        "planning_s": round(seconds, 2),
        "planning_cpu_s": round(cpu, 2),
        "cut_short": bool(state and state.plan.cut_short),
        "left_whole": {re.sub(r"\.\d+(?=\.)", ".*", n): undivided[n] for n in names if n in undivided},
    }
    if rank == 0:
        file.write_text(json.dumps(row))


def job(name: str, world: int, rounds: int) -> dict[str, Any]:
    """The row of one model: `world` fresh processes; of a job that fails, its last words."""
    if find_spec(CASES[name].library) is None:
        return {"skipped": f"{CASES[name].library} is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        file, errors = Path(folder) / "row.json", Path(folder) / "errors"
        children = []
        for rank in range(world):
            variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
            environ = {**os.environ, **{key: str(value) for key, value in variables.items()}}
            environ |= {"TP_STORE_FILE": f"{folder}/store", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--rank-of", name, str(file), "--rounds", str(rounds)]
            with Path(f"{errors}{rank}").open("w") as stream:
                children.append(subprocess.Popen(command, env=environ, stderr=stream, stdout=stream))
        deadline = time.monotonic() + TIMEOUT_S
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            if any(child.poll() for child in children):
                deadline = min(deadline, time.monotonic() + 10)  # ranks that wait for one that is dead
            time.sleep(0.2)
        late = [child for child in children if child.poll() is None]
        for child in late:
            child.kill()
            child.wait()
        if file.exists() and not any(child.returncode for child in children):
            row: dict[str, Any] = json.loads(file.read_text())
            return row
        bad = next((r for r, child in enumerate(children) if child.returncode > 0), 0)
        words = Path(f"{errors}{bad}").read_text().strip().splitlines() or ["no word"]
        return {"failed": f"rank {bad}: {words[-1][:300]}" + (" (stopped)" if len(late) == world else "")}


def render(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# What becomes of known models", "", card_lines(document["card"])]
    lines += [", ".join(f"{key} {document[key]}" for key in ("transformers", "diffusers")), ""]
    lines += [f"    {document['command']}", ""]
    lines += [
        "Share: of product weights, on the fullest rank (of all weights). Times, ratios of turns: medians."
    ]
    lines += [""]
    titles = (
        "model | ranks | share (of all) | collectives | a layer | largest error | whole ms | whole on all"
    )
    titles += " ranks at once ms | sharded ms | sharded/whole | sharded/at once | planning s (CPU)"
    lines += [f"| {titles} |", "|" + "---|" * 12]
    for row in document["rows"]:
        if "error" not in row:
            words = row.get("failed") or row["skipped"]
            lines.append(f"| {row['model']} | {row['ranks']} | {words} |" + " |" * 9)
            continue
        medians = [f"{1000 * statistics.median(row[key]):.0f}" for key in TIMES]
        ratios = [
            statistics.median(s / w for w, s in zip(row[key], row["sharded_s"], strict=True))
            for key in TIMES[:2]
        ]
        cells = [row["model"], row["ranks"], f"{row['share']:.3f} ({row['share_of_all']:.3f})"]
        cells += [f"{row['collectives']} over {row['layers']} layers", row["collectives_a_layer"]]
        cells += [f"{row['error']:.1e}", *medians, *(f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{row['planning_s']} ({row['planning_cpu_s']})" + " cut short" * row["cut_short"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    left = [
        (row["model"], n, why) for row in document["rows"] for n, why in row.get("left_whole", {}).items()
    ]
    lines += ["", "Product weights that stay whole:", ""] * bool(left)
    lines += [f"- {model}, `{name}`: {why}" for model, name, why in dict.fromkeys(left)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What shard makes of known models.")
    parser.add_argument("--only", default=",".join(CASES), help="models, by commas (default: all)")
    parser.add_argument("--world", default="2", help="numbers of ranks, by commas")
    parser.add_argument("--rounds", type=int, default=9, help="turns of whole and sharded that count")
    parser.add_argument("--output", type=Path, default=None, help="folder for the .md and .json")
    parser.add_argument("--hardware", default="cpu", help="word for the hardware in the file names")
    parser.add_argument("--rank-of", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank_of is not None:
        run_rank(args.rank_of[0], args.rounds, Path(args.rank_of[1]))
        return 0
    names = args.only.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"--only {unknown[0]} is not known; known are {', '.join(CASES)}")
    shown, rows = card(load_average()), []
    for name in names:
        for world in map(int, args.world.split(",")):
            load = load_average()
            row = {"model": name, "ranks": world, "load_average": load, **job(name, world, args.rounds)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    document = {
        "benchmark": "sharding_table",
        "command": "python benchmarks/sharding_table.py " + shlex.join(sys.argv[1:]),
        "card": {**shown, "load_average": load_average()},
        **{name: version(name) if find_spec(name) else None for name in ("transformers", "diffusers")},
        "rows": rows,
    }
    text = render(document)
    print(text)
    if args.output is not None:
        stem = args.output / f"sharding_table_{args.hardware}_{time.strftime('%Y%m')}"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return int(not all("skipped" in row or row.get("error", 1.0) <= TOLERANCE for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
