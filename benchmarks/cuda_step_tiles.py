"""Tiles of a decoding step's linears, chosen by the time of the step they stand in.

A linear alone, back to back with copies of itself (cuda_gemv.py), is not what the step runs: its neighbours
are small kernels that overlap with its start and its end, and the fastest tile alone has lost in the step.
Here one rank's share of a model, cut to some layers of random weights, decodes one token on one GPU (sums are
of itself alone); for each linear in turn every tile is captured with all else as it is, and the fastest
stays.

    python benchmarks/cuda_step_tiles.py [--cases llama-8b/1:none,llama-70b/2:int8] [--layers 12]
        [--linears gate_up,down] [--rows 1] [--json FILE]

A case is MODEL/RANKS:FORMAT. Tiles are compiled by many processes first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cuda_gemv import INT4_TILES, TILES, in_processes

LINEARS = ("gate_up", "down", "qkv", "out", "head")
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8)
_REPLAYS = 7
_POSITION = 200  # of the token: as deep as the middle of 128 + 128


def share_of(model: str, ranks: int, layers: int) -> Any:
    """The configuration of one rank's share, as a model of its own."""
    from tp_runtime.models import registry

    entry = registry.find(model)
    assert entry is not None, f"{model} is no model of configs/models"
    c = entry.config
    return replace(
        c, num_heads=c.num_heads // ranks, num_kv_heads=c.num_kv_heads // ranks, num_layers=layers,
        intermediate_size=c.intermediate_size // ranks, vocab_size=c.vocab_size // ranks,
    )  # fmt: skip


def write_config(c: Any, folder: Path) -> None:
    """As Hugging Face's config.json has it."""
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim, "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta, "tie_word_embeddings": False, "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))


def candidates(kind: str, linear: str, k: int) -> list[Any]:
    """Tiles to try; only what K divides into well is split."""
    from tp_runtime.kernels.cuda.linear import Tile

    whole = linear in ("gate_up", "head")
    splits = [1] if whole else [s for s in SPLITS if s == 1 or k // s >= 640]
    if kind.startswith("int4"):
        tiles = [(bn, 0, warps, stages) for bn, warps, stages in INT4_TILES]
    else:
        tiles = [
            (bn, size // (2 if kind == "none" else 1), warps, stages) for bn, size, warps, stages in TILES
        ]
    return [Tile(bn, bk, s, warps, stages) for (bn, bk, warps, stages) in tiles for s in splits]


def inputs_of(c: Any, linear: str) -> int:
    """K of a linear."""
    return {"out": c.num_heads * c.head_dim, "down": c.intermediate_size}.get(linear, c.hidden_size)


def outputs_of(c: Any, linear: str) -> int:
    """Rows of its weight."""
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    return {"qkv": heads, "gate_up": 2 * c.intermediate_size, "head": c.vocab_size}.get(linear, c.hidden_size)


def head_kind(kind: str) -> str:
    """Of the head, where int4 leaves it in int8."""
    return "int8" if kind.startswith("int4") else kind


def compile_some(
    cases: list[tuple[str, int, str]], linears: list[str], rows: int, part: int, parts: int
) -> None:
    """This process's share of the tiles, launched once: Triton keeps the result on disk."""
    import torch

    from tp_runtime.benchmark.kernels_cuda import chain, make_weights
    from tp_runtime.engine.cuda_decode import pieces_of

    jobs: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for model, ranks, kind in cases:
        c = share_of(model, ranks, 1)
        for linear in linears:
            form, n, k = (
                head_kind(kind) if linear == "head" else kind,
                outputs_of(c, linear),
                inputs_of(c, linear),
            )
            sums = 0 if linear in ("out", "down") else pieces_of(c.hidden_size)[0]
            gated = linear == "gate_up"
            for tile in candidates(form, linear, k):
                even = (
                    (n // 2 if gated else n) % (tile.bn // (2 if gated else 1)) == 0,
                    k % max(1, tile.bk) == 0,
                )
                key = (form, gated, sums, tile.bn, tile.bk, tile.warps, tile.stages, even)
                jobs.setdefault(key, (form, n, k, tile, gated, sums))
    for form, n, k, tile, gated, sums in list(jobs.values())[part::parts]:
        try:
            weights = make_weights(form, n, k, 1)
            chain(form, weights, rows, k, tile, gated=gated, num_sums=sums, early=not gated)()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001  (a tile too large for shared memory is no answer)
            print(f"{form} [{n}, {k}] {tile}: {str(error)[:80]}", file=sys.stderr)


class StepTimer:
    """The captured step of one built model, with whatever tiles."""

    def __init__(self, llm: Any, rows: int) -> None:
        import torch

        self.runner, self.rows = llm.runner, rows
        self.weights = self.runner._decode.weights
        words = torch.zeros_like(self.runner._inputs.words)
        words[1], words[2] = _POSITION, self.runner.max_rows
        self.words = words
        table = self.runner._inputs.table[self.runner.max_rows]  # padding's: all one block, unlike a row's
        table.copy_(torch.arange(len(table)) % len(self.runner.cache.keys[0]))

    def tiles(self) -> dict[str, Any]:
        """Those the runtime chose."""
        layer = self.weights.layers[0]
        return {
            name: (self.weights.head if name == "head" else getattr(layer, name)).tile(self.rows)
            for name in LINEARS
        }

    def ms(self, tiles: dict[str, Any]) -> float:
        """Milliseconds of a step; infinite where a tile does not fit."""
        from tp_runtime.engine.cuda_decode import DecodeStep
        from tp_runtime.kernels.cuda.read_ceiling import graph_seconds

        def cut(linear: Any, name: str) -> Any:
            return replace(linear, tiles=(tiles[name],) * len(linear.tiles))

        def changed(layer: Any) -> Any:
            return replace(layer, **{n: cut(getattr(layer, n), n) for n in LINEARS if n != "head"})

        weights = replace(
            self.weights, layers=tuple(map(changed, self.weights.layers)),
            head=cut(self.weights.head, "head"),
        )  # fmt: skip
        runner = self.runner
        step = DecodeStep(
            runner.model, weights, runner.cache, runner._push, runner._inputs,
            context=runner.max_blocks * runner.cache.shape.block_size, first_id=0, device="cuda",
        )  # fmt: skip
        runner._inputs.words.copy_(self.words)
        try:
            return graph_seconds(lambda: step.run(self.rows), _REPLAYS) * 1e3
        except Exception as error:
            if "out of resource" not in str(error):
                raise
            return float("inf")


def search(
    case: tuple[str, int, str], linears: list[str], layers: int, rows: int, rounds: int
) -> dict[str, Any]:
    """The best tiles of one case, and every time found on the way."""
    import torch

    from tp_runtime.engine.llm import LLM

    model, ranks, kind = case
    c = share_of(model, ranks, layers)
    with tempfile.TemporaryDirectory() as name:
        write_config(c, Path(name))
        llm = LLM(name, random_weights=True, quant=kind, device="cuda", context=512, max_batch=1)
    timer = StepTimer(llm, rows)
    best = timer.tiles()
    first = least = timer.ms(best)
    print(f"{model}/{ranks} {kind} x{rows}: {first:.4f} ms of {layers} layers and head", flush=True)
    found = []
    for round_number in range(rounds):
        for linear in linears:
            form = head_kind(kind) if linear == "head" else kind
            chosen = best[linear]
            times = []
            for tile in candidates(form, linear, inputs_of(c, linear)):
                ms = timer.ms({**best, linear: tile})
                times.append((ms, tile))
                found.append({"linear": linear, "ms": ms, "tile": asdict(tile), "round": round_number})
            again = timer.ms(best)
            times.sort(key=lambda pair: pair[0])
            for ms, tile in times[:4]:
                per = (ms - again) * 1e3 / (1 if linear == "head" else layers)
                print(
                    f"  {linear:8s} {ms:.4f} ({per:+.2f} us each) {tuple(asdict(tile).values())}", flush=True
                )
            print(f"  {linear:8s} {again:.4f} as it was {tuple(asdict(chosen).values())}", flush=True)
            if times[0][0] < again:
                best[linear], least = times[0][1], times[0][0]
    least = timer.ms(best)
    print(f"  {first:.4f} -> {least:.4f} ms ({timer.ms(timer.tiles()):.4f} again)", flush=True)
    del timer, llm
    torch.cuda.empty_cache()
    tiles = {n: asdict(t) for n, t in best.items()}
    return {
        "case": list(case),
        "rows": rows,
        "layers": layers,
        "first_ms": first,
        "ms": least,
        "tiles": tiles,
        "times": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default="llama-8b/1:none")
    parser.add_argument("--linears", default=",".join(LINEARS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument(
        "--rounds", type=int, default=2, help="over the linears: later ones may change earlier"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    linears, cases, started = args.linears.split(","), [], time.time()
    for text in args.cases.split(","):
        shape, kind = text.split(":")
        model, ranks = shape.split("/")
        cases.append((model, int(ranks), kind))
    in_processes(compile_some, cases, linears, args.rows)
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    results = []
    for case in cases:
        results.append(search(case, linears, args.layers, args.rows, args.rounds))
        if args.json:
            Path(args.json).write_text(json.dumps(results))
    print(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
