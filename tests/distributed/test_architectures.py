"""Architectures of transformers, split by `shard` over real ranks: are they right, split and lean?

Right: logits within 1e-3 of the largest, fp32. Split: the fullest rank holds at most 1.25 / world + 0.125 of the
matrix weights that are no embedding. Lean: at most two collectives a layer and four more. The default selection
is a few structures that differ most; `make test-full` measures all 123 and three settings of heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tp_testing.architectures import CASES, build
from tp_testing.ranks import run_ranks

from tp_runtime.errors import ShardingError
from tp_runtime.mesh import init_mesh
from tp_runtime.sharding.shard import shard

TOLERANCE = 1e-3
QUICK = ["llama", "gpt2", "gpt_neox", "falcon", "bloom", "olmo2"]
VARIANTS: dict[str, dict[str, int]] = {
    "as they are": {},
    "one key-value head": {"num_key_value_heads": 1},
    "6 heads, 3 of keys": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
}


class _Collectives(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("tp_runtime", "tp_shm") and "all_" in func.__name__
        return func(*args, **(kwargs or {}))


def _matrices(model: nn.Module) -> int:
    skipped = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in skipped)


def _logits(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out[0]


def measure(names: list[str], changes: dict[str, int]) -> list[dict[str, Any]]:
    """One row an architecture that builds and runs whole: largest and mean error, share, collectives."""
    rows = []
    for name in names:
        try:
            model, inputs = build(name, changes)
            with torch.no_grad():
                wanted = _logits(model(**inputs)).float()
        except Exception:  # noqa: BLE001  (settings that the architecture itself refuses are no case)
            continue
        row: dict[str, Any] = {
            "name": name,
            "layers": _layers(model),
            "error": 9.0,
            "mean": 9.0,
            "share": 1.0,
        }
        whole = _matrices(model)
        try:
            shard(model, init_mesh(), cache=False)
            row["share"] = _matrices(model) / max(whole, 1)
            with torch.no_grad(), _Collectives() as seen:
                error = (_logits(model(**inputs)).float() - wanted).abs() / wanted.abs().max()
            row.update(error=float(error.max()), mean=float(error.mean()), collectives=seen.count)
        except ShardingError as refusal:
            row["refused"] = str(refusal)
        rows.append(row)
    return rows


def _layers(model: nn.Module) -> int:
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    return int(getattr(config, "num_hidden_layers", 0) or 0)


def judge(ranks: list[list[dict[str, Any]]], world: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """Names that are silently wrong, right, right and split, and lean besides."""
    wrong, right, split, lean = [], [], [], []
    for per_rank in zip(*ranks, strict=True):
        name = per_rank[0]["name"]
        share = max(row["share"] for row in per_rank)
        error = max(row["error"] for row in per_rank)
        print(
            f"{name}: largest error {error:.1e}, mean {per_rank[0]['mean']:.1e}, share {share:.3f}, {per_rank[0]}"
        )
        if "refused" in per_rank[0]:
            continue
        if error > TOLERANCE:
            wrong.append(name)
            continue
        right.append(name)
        if share <= 1.25 / world + 0.125:
            split.append(name)
            if per_rank[0]["collectives"] <= 2 * per_rank[0]["layers"] + 4:
                lean.append(name)
    return wrong, right, split, lean


def test_a_few_architectures_are_right_split_and_lean() -> None:
    wrong, _, _, lean = judge(run_ranks(2, measure, QUICK, {}, timeout=300.0), 2)
    assert wrong == [] and lean == QUICK


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_architectures(variant: str, world: int) -> None:
    ranks = run_ranks(world, measure, list(CASES), VARIANTS[variant], timeout=3000.0)
    wrong, right, split, lean = judge(ranks, world)
    total = len(ranks[0])
    print(f"{variant}, world {world}: {len(right)} right, {len(split)} split, {len(lean)} lean of {total}")
    assert wrong == []
    assert len(split) >= 0.85 * total
