"""Models that nobody edited, split by `shard`, give the whole model's results at every world size.

Small hand-written modules with literal structure of their own, so that nothing rests on a known model: grouped
query attention, fused projections, experts, convolutions, norms over a whole projection. fp32; ranks differ
from the whole model only in the order of sums.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from tp_testing.ranks import run_ranks
from tp_testing.small_models import MODELS, build

from tp_runtime.mesh import init_mesh
from tp_runtime.sharding.shard import shard, unshard

# Largest difference over largest value: sums over ranks in fp32 of a few hundred values.
TOLERANCE = 2e-5


def _held(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def _compare(name: str, heads: tuple[int, int]) -> tuple[float, float, float, bool]:
    """(largest and mean error over the largest value, share of matrix weights, whether unshard restores)."""
    model, inputs = build(name, heads)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        wanted: Tensor = model(inputs)
        whole = _held(model)
        shard(model, init_mesh(), example_inputs=(inputs,), cache=False)
        got: Tensor = model(inputs)
        share = _held(model) / whole
        unshard(model)
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        same = same and torch.equal(model(inputs), wanted)
    error = (got - wanted).abs() / wanted.abs().max()
    return float(error.max()), float(error.mean()), share, same


CASES = [(name, (9, 3)) for name in MODELS] + [("grouped", (10, 2)), ("grouped", (4, 1)), ("grouped", (8, 8))]
# Copied heads under a norm over all of them cannot be summed over ranks: attention stays whole.
MOST = {("whole norm", (9, 3), 4): 0.44}
QUICK = {2: CASES[:-3], 3: [("grouped", (4, 1))], 4: [("grouped", (9, 3)), ("interleaved", (9, 3))]}


def _check(world: int, name: str, heads: tuple[int, int]) -> None:
    outcomes = run_ranks(world, _compare, name, heads)
    for rank, (largest, mean, share, same) in enumerate(outcomes):
        print(
            f"{name} {heads} world {world} rank {rank}: largest {largest:.2e}, mean {mean:.2e}, share {share:.3f}"
        )
        assert largest <= TOLERANCE, (name, heads, rank)
        assert same, f"unshard of {name} {heads} does not restore rank {rank}"
    most = MOST.get((name, heads, world), 1.0 if world == 1 else 1.25 / world + 0.1)
    assert max(o[2] for o in outcomes) <= most, (name, heads)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_results_are_the_whole_models(world: int) -> None:
    for name, heads in QUICK.get(world, CASES[:1]):
        _check(world, name, heads)


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("name", "heads"), CASES)
def test_every_model_at_every_world_size(world: int, name: str, heads: tuple[int, int]) -> None:
    _check(world, name, heads)
