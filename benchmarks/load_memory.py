"""Peak memory of a rank while it loads: its own share + the largest tensor + 700 MB is the bound.

Writes a sharded safetensors checkpoint of random weights into a temporary folder on disk, loads it in
fresh processes at each world size and quantisation through `load_weights`, as the engine does, and
reads each rank's peak resident memory (VmHWM, which begins anew with a process's program).

    python benchmarks/load_memory.py --gib 4 --worlds 1,2 --quants none,int8,int4 --output benchmarks/results

The last line of stdout is one JSON document. Exit code 1 where a rank exceeds the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tp_runtime.layout import weight_format
from tp_runtime.sharding.plan import Plan
from tp_runtime.sharding.rules import DecoderShape, plan_decoder

ALLOWANCE_BYTES = 700_000_000
LAYER_GIB = 0.21
TIMEOUT_S = 900


def plan_of(gib: float, world_size: int) -> Plan:
    """A Llama-like shape of about `gib` GiB in bf16; embedding and head are its largest tensors."""
    vocab_size = int(gib * 32_000)
    num_layers = max(1, round((gib - 2 * vocab_size * 4096 * 2 / 2**30) / LAYER_GIB))
    shape = DecoderShape(
        hidden_size=4096,
        intermediate_size=5632,
        num_layers=num_layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=vocab_size,
        tied=False,
    )
    return plan_decoder(shape, world_size)


def write_checkpoint(folder: Path, plan: Plan) -> int:
    """One shard a layer, and one each for embedding and head. Returns the bytes of the largest tensor."""
    import torch
    from safetensors.torch import save_file

    from tp_runtime.checkpoint import RandomCheckpoint

    made = RandomCheckpoint({weight.name: weight.shape for weight in plan.weights})
    shards: dict[str, list[str]] = {}
    for name in made.names():
        layer = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    for file, names in shards.items():
        save_file({name: made.read(name, dtype=torch.bfloat16) for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return max(made.info(name).nbytes for name in made.names())


def run_rank(args: argparse.Namespace) -> None:
    """What a child does: load its part and print its share and its peak."""
    import torch

    from tp_runtime import mesh
    from tp_runtime.checkpoint import WeightRequest, load_weights, open_checkpoint
    from tp_runtime.quant.tensor import QuantizedTensor

    torch.set_num_threads(1)
    devices = mesh.init_mesh()
    rank, world = mesh.tp_rank(devices), mesh.tp_size(devices)
    form = weight_format(args.quants)
    requests = [
        WeightRequest(weight.name, weight, form if len(weight.shape) == 2 else None, torch.bfloat16)
        for weight in plan_of(args.gib, world).weights
    ]
    held: dict[str, torch.Tensor | QuantizedTensor] = {}
    start = time.perf_counter()
    load_weights(
        open_checkpoint(args.rank_of), requests, mesh.tp_group(devices), rank, install=held.__setitem__
    )
    seconds = time.perf_counter() - start
    share = sum(weight.nbytes for weight in held.values())
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(
        json.dumps({"rank": rank, "share_bytes": share, "peak_rss_bytes": peak, "load_s": round(seconds, 2)})
    )


def measure(
    folder: Path, args: argparse.Namespace, world: int, quant: str, largest: int
) -> list[dict[str, Any]]:
    """Load with `world` fresh processes; one record a rank, with its bound."""
    with tempfile.TemporaryDirectory() as meeting:
        children = []
        for rank in range(world):
            variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
            environ = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            environ |= {"TP_STORE_FILE": f"{meeting}/store", "OMP_NUM_THREADS": "1"}
            command = [
                sys.executable,
                __file__,
                "--rank-of",
                str(folder),
                "--gib",
                str(args.gib),
                "--quants",
                quant,
            ]
            children.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
        try:
            outputs = [child.communicate(timeout=TIMEOUT_S)[0] for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
    failed = [rank for rank, child in enumerate(children) if child.returncode]
    if failed:
        raise SystemExit(
            f"rank {failed[0]} of {world} ({quant}) failed with code {children[failed[0]].returncode}"
        )
    records = [json.loads(output.splitlines()[-1]) for output in outputs]
    for record in records:
        bound = record["share_bytes"] + largest + ALLOWANCE_BYTES
        record |= {"world_size": world, "quant": quant, "bound_bytes": bound}
        record["within"] = record["peak_rss_bytes"] <= bound
    return records


def card(args: argparse.Namespace, checkpoint_bytes: int, largest: int) -> dict[str, Any]:
    """Hardware, versions and what was loaded."""
    from importlib.metadata import version

    cpu = next(
        (x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "unknown"
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
    )
    return {
        "benchmark": "load_memory",
        "command": "python benchmarks/load_memory.py " + " ".join(sys.argv[1:]),
        "cpu": f"{cpu}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "torch": version("torch"),
        "safetensors": version("safetensors"),
        "commit": commit.stdout.strip() or "unknown",
        "checkpoint_bytes": checkpoint_bytes,
        "largest_tensor_bytes": largest,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def render(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Peak memory of a rank while it loads", ""]
    lines += [f"- {key}: {value}" for key, value in document.items() if key != "ranks"]
    lines += [
        "",
        "| ranks | quant | rank | share MB | peak RSS MB | bound MB | room MB | load s |",
        "|" + "---|" * 8,
    ]
    for r in document["ranks"]:
        share, peak, bound = (r[key] / 1e6 for key in ("share_bytes", "peak_rss_bytes", "bound_bytes"))
        numbers = f"{share:.0f} | {peak:.0f} | {bound:.0f} | {bound - peak:.0f} | {r['load_s']}"
        lines.append(f"| {r['world_size']} | {r['quant']} | {r['rank']} | {numbers} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peak memory of a rank while it loads, against its bound.")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--worlds", default="1,2", help="numbers of ranks, by commas")
    parser.add_argument("--quants", default="none,int8,int4", help="quantisations, by commas")
    parser.add_argument("--folder", default=None, help="where the checkpoint is written (a disk, not tmpfs)")
    parser.add_argument("--output", type=Path, default=None, help="folder for the .md and .json")
    parser.add_argument("--hardware", default="cpu", help="word for the hardware in the file names")
    parser.add_argument("--rank-of", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank_of is not None:
        run_rank(args)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        largest = write_checkpoint(folder, plan_of(args.gib, 1))
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        document = {**card(args, written, largest), "ranks": []}
        for world in map(int, args.worlds.split(",")):
            for quant in args.quants.split(","):
                document["ranks"] += measure(folder, args, world, quant, largest)
    text = render(document)
    print(text)
    if args.output is not None:
        stem = args.output / f"load_memory_{args.hardware}_{time.strftime('%Y%m')}"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 0 if all(record["within"] for record in document["ranks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
