"""Pieces that ranks load, put together, are the whole byte for byte; and a rank's peak memory is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tp_testing.checkpoints import cut
from tp_testing.ranks import run_ranks

from tp_runtime.checkpoint import Checkpoint, RandomCheckpoint, WeightRequest, load_weights, open_checkpoint
from tp_runtime.errors import CheckpointError
from tp_runtime.kernels.reference import unpack_nibbles
from tp_runtime.layout import weight_format
from tp_runtime.quant.tensor import QuantizedTensor
from tp_runtime.sharding.plan import Plan, WeightPlan
from tp_runtime.sharding.rules import DecoderShape, plan_decoder

# Layout, values (4-bit ones unpacked), scales, offsets of one rank's piece; a plain one is values alone.
Piece = dict[str, Any]

SMOLLM2 = DecoderShape(
    hidden_size=576,
    intermediate_size=1536,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    tied=True,
)


def as_piece(weight: torch.Tensor | QuantizedTensor) -> Piece:
    if isinstance(weight, torch.Tensor):
        return {"q": weight.float().numpy()}
    k = weight.layout.local_shape[1]
    q = weight.q if weight.format.bits == 8 else unpack_nibbles(weight.q, k)
    return {
        "q": q.numpy(),
        "groups": None if weight.format.group_size is None else weight.layout.groups,
        "scale": weight.scale.numpy(),
        "offset": None if weight.offset is None else weight.offset.numpy(),
    }


def load_pieces(
    checkpoint: Checkpoint,
    plan: Plan,
    quant: str,
    group: dist.ProcessGroup | None,
    rank: int,
    layers: int = 99,
) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {}

    def install(name: str, weight: torch.Tensor | QuantizedTensor) -> None:
        pieces[name] = as_piece(weight)

    form = weight_format(quant)
    requests = [
        WeightRequest(w.name, w, form if len(w.shape) == 2 else None, torch.float32) for w in plan.weights
    ]

    def beyond(name: str) -> bool:
        return ".layers." in name and int(name.split(".")[2]) >= layers

    load_weights(checkpoint, requests, group, rank, install=install, may_remain=beyond)
    return pieces


def require_joined(plan: Plan, whole: dict[str, Piece], ranks: list[dict[str, Piece]]) -> None:
    """Every rank's piece of every weight is the part of the whole that the plan gives it."""
    for weight in plan.weights:
        for rank, pieces in enumerate(ranks):
            require_part(weight, rank, whole[weight.name], pieces[weight.name])


def require_part(weight: WeightPlan, rank: int, whole: Piece, ours: Piece) -> None:
    where = f"{weight.name} of rank {rank}"
    rows: Any = slice(None)
    cols: Any = slice(None)
    ranges = weight.part(rank)
    if ranges is not None:
        index = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        rows, cols = (index, cols) if weight.dim == 0 else (rows, index)
    expected = whole["q"][rows]
    assert np.array_equal(ours["q"], expected[:, cols] if expected.ndim == 2 else expected), where
    for kind in ("scale", "offset"):
        expected = whole.get(kind)
        assert (expected is None) == (ours.get(kind) is None), where
        if expected is not None:
            groups = slice(None) if ours["groups"] is None else (slice(None), slice(*ours["groups"]))
            assert np.array_equal(ours[kind], expected[rows][groups]), f"{kind} of {where}"


# Columns of 576 cut as 9 heads over 2, 3, 4 ranks (one cut lies inside a group of 128), and anywhere.
STOPS = {2: [(384,), (37,)], 3: [(192, 384), (100, 101)], 4: [(192, 320, 448), (1, 95, 500)]}


def hand_plan(world: int) -> Plan:
    """o_proj of 9 heads, and matrices cut anywhere by columns and rows."""
    stops = [(), *STOPS[world]] if world > 1 else [(), (), ()]
    cuts = [cut(f"row{i}.weight", (40, 576), 1 if world > 1 else None, *at) for i, at in enumerate(stops[1:])]
    rows = cut("column.weight", (40, 576), 0 if world > 1 else None, *list(range(7, 7 * world, 7)))
    return Plan(world, (*cuts, rows, WeightPlan("whole.weight", (40, 576), "replicate")))


def hand_checkpoint(folder: str | None) -> Checkpoint:
    if folder is not None:
        return open_checkpoint(folder)
    return RandomCheckpoint({weight.name: weight.shape for weight in hand_plan(2).weights})


def hand_rank(world: int, quant: str, folder: str | None) -> dict[str, Piece]:
    return load_pieces(hand_checkpoint(folder), hand_plan(world), quant, dist.group.WORLD, dist.get_rank())


QUANTS = ("none", "int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128")


def selection(*selected: tuple[Any, ...], **axes: tuple[Any, ...]) -> pytest.MarkDecorator:
    """The product of the axes; cases outside `selected` are part of the full matrix only."""
    cases = [
        pytest.param(*c, marks=() if c in selected else pytest.mark.full) for c in product(*axes.values())
    ]
    return pytest.mark.parametrize(tuple(axes), cases)


@selection(
    (2, "none", "safetensors"),
    (2, "int8", "random"),
    (2, "int4-g64", "random"),
    (2, "int4-g128", "safetensors"),
    (3, "int8", "safetensors"),
    (3, "int4-g32", "random"),
    (3, "int4-g128", "random"),
    (4, "none", "random"),
    (4, "int8-g32", "safetensors"),
    (4, "int4-g128", "random"),
    world=(2, 3, 4),
    quant=QUANTS,
    stored=("random", "safetensors"),
)
def test_pieces_of_576_columns_are_the_whole(tmp_path: Path, world: int, quant: str, stored: str) -> None:
    folder = None
    if stored == "safetensors":
        made = hand_checkpoint(None)
        save_file(
            {name: made.read(name, dtype=torch.bfloat16) for name in made.names()}, tmp_path / "m.safetensors"
        )
        folder = str(tmp_path)
    whole = load_pieces(hand_checkpoint(folder), hand_plan(1), quant, None, 0)
    require_joined(hand_plan(world), whole, run_ranks(world, hand_rank, world, quant, folder))


def smollm2_rank(path: str, world: int, quant: str) -> dict[str, Piece]:
    plan = plan_decoder(SMOLLM2, world)
    return load_pieces(
        open_checkpoint(path), plan, quant, dist.group.WORLD, dist.get_rank(), SMOLLM2.num_layers
    )


@selection((2, "int4-g128"), (3, "int4-g32"), (4, "int8"), world=(2, 3, 4), quant=QUANTS)
def test_pieces_of_the_demo_model_are_the_whole(smollm2_gguf: Path, world: int, quant: str) -> None:
    path = str(smollm2_gguf)
    whole = load_pieces(open_checkpoint(path), plan_decoder(SMOLLM2, 1), quant, None, 0, SMOLLM2.num_layers)
    require_joined(plan_decoder(SMOLLM2, world), whole, run_ranks(world, smollm2_rank, path, world, quant))


def broken_rank(folder: str) -> str:
    plan = Plan(2, (cut("w", (8, 64), 1, 32),))
    try:
        load_pieces(open_checkpoint(folder), plan, "int8", dist.group.WORLD, dist.get_rank())
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_all_ranks_refuse_what_only_one_reads(tmp_path: Path) -> None:
    values = torch.ones(8, 64)
    values[3, 40] = float("nan")
    save_file({"w": values}, tmp_path / "model.safetensors")
    for said in run_ranks(2, broken_rank, str(tmp_path)):
        assert "tensor 'w': a value is not finite" in said


@pytest.mark.parametrize(
    ("gib", "worlds", "quants"),
    [(0.5, "2", "int8"), pytest.param(4.0, "1,2", "none,int8,int4", marks=pytest.mark.full)],
)
def test_peak_memory_is_bounded(
    repository: Path, tmp_path: Path, gib: float, worlds: str, quants: str
) -> None:
    """Own share + largest tensor + 700 MB; the full run has the several gigabytes that show a leak."""
    command = [sys.executable, "benchmarks/load_memory.py", "--gib", str(gib), "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--worlds", worlds, "--quants", quants],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for record in json.loads(done.stdout.splitlines()[-1])["ranks"]:
        room = (record["bound_bytes"] - record["peak_rss_bytes"]) / 1e6
        print(f"{record['quant']}, rank {record['rank']} of {record['world_size']}: {room:.0f} MB below")
        assert record["within"] and record["peak_rss_bytes"] > record["share_bytes"]
