"""What `shard` says on every rank where it cannot go on, and that it uses a mesh's tp axis by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from tp_testing.ranks import run_ranks

from tp_runtime.errors import ConfigError, ShardingError
from tp_runtime.mesh import init_mesh
from tp_runtime.sharding.shard import shard


class Uncopied(nn.Module):
    """A model that cannot be copied, which no planner expects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise OSError("no copies")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _fails() -> str:
    try:
        shard(Uncopied(), init_mesh(), cache=False)
    except (OSError, ShardingError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_an_unexpected_error_of_rank_0_reaches_all() -> None:
    first, second = run_ranks(2, _fails, timeout=60.0)
    assert first == "OSError: no copies"
    assert second == "ShardingError: rank 0 found no plan (OSError: no copies)"


def _pair() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def _on_a_named_axis() -> tuple[tuple[int, ...], float, str]:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    model = _pair()
    with torch.no_grad():
        wanted = model(x)
        shard(
            model,
            init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tp")),
            example_inputs=x,
            cache=False,
        )
        error = float((model(x) - wanted).abs().max())
    try:
        shard(_pair(), init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model")), example_inputs=x)
    except ConfigError as refusal:
        return tuple(model[0].weight.shape), error, str(refusal)
    return (), error, ""


def test_the_tp_axis_of_a_mesh_is_used_by_name() -> None:
    for shape, error, refusal in run_ranks(2, _on_a_named_axis):
        print(f"largest error {error:.1e}")
        assert shape == (8, 8) and error <= 1e-5
        assert "none is called 'tp'" in refusal and "\n" not in refusal
