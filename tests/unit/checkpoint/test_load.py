"""load_weights in one process: what it refuses before reading, what it hands over, and its pieces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tp_testing.checkpoints import LLAMA_METADATA, cut, random_blocks, write_gguf

from tp_runtime.checkpoint import RandomCheckpoint, WeightRequest, load, load_weights, open_checkpoint
from tp_runtime.checkpoint.inventory import TensorInfo, check_tensors
from tp_runtime.errors import CheckpointError, ShardingError
from tp_runtime.layout import weight_format
from tp_runtime.quant import reference
from tp_runtime.quant.tensor import QuantizedTensor
from tp_runtime.sharding.plan import Ranges, WeightPlan

SHAPES = {"model.embed_tokens.weight": (50, 16), "model.norm.weight": (16,)}


def request(plan: WeightPlan, quant: str = "none", dtype: torch.dtype = torch.float32) -> WeightRequest:
    return WeightRequest(plan.name, plan, weight_format(quant), dtype)


def loaded(
    checkpoint: object, *requests: WeightRequest, rank: int = 0
) -> dict[str, torch.Tensor | QuantizedTensor]:
    found: dict[str, torch.Tensor | QuantizedTensor] = {}
    load_weights(checkpoint, requests, None, rank, install=found.__setitem__)  # type: ignore[arg-type]
    return found


class Untouchable(RandomCheckpoint):
    """A checkpoint that fails the test when it is read."""

    def read(self, *args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("read before the names were checked")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"model.norm.weight": (16,)}, "lacks 1 tensor: model.embed_tokens.weight"),
        (
            {**SHAPES, "model.vision.weight": (3, 3)},
            "has, and the model has not, 1 tensor: model.vision.weight",
        ),
        ({**SHAPES, "model.norm.weight": (17,)}, r"model.norm.weight \(\[17\], not \[16\]\)"),
        ({**SHAPES, "model.norm.weight": (16, 1)}, r"model.norm.weight \(\[16, 1\], not \[16\]\)"),
        ({**SHAPES, "lm_head.weight": (51, 16)}, "lm_head.weight"),
    ],
)
def test_other_tensors_are_refused_by_name_before_reading(held: dict, said: str) -> None:
    requests = [request(cut(name, shape, None)) for name, shape in SHAPES.items()]
    with pytest.raises(CheckpointError, match=said) as error:
        loaded(Untouchable(held), *requests)
    assert "random weights" in str(error.value)


def test_what_may_remain() -> None:
    held = {**SHAPES, "lm_head.weight": (50, 16), "model.layers.3.self_attn.rotary_emb.inv_freq": (8,)}
    info = {name: TensorInfo(shape, "BF16", 0) for name, shape in held.items()}
    check_tensors("x", info, SHAPES)
    info["model.layers.9.w"] = TensorInfo((1,), "BF16", 0)
    check_tensors("x", info, SHAPES, lambda name: name.startswith("model.layers.9."))
    with pytest.raises(CheckpointError, match=r"lacks 7 tensors: t0, t1, t2, t3, t4 and 2 more"):
        check_tensors("x", info, {f"t{i}": (1,) for i in range(7)})


@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32", "int4-g128"])
@pytest.mark.parametrize("piece", [1, 700, 1 << 20])
def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch, quant: str, piece: int) -> None:
    plan = cut("w", (37, 200), 0, 11)
    expected = loaded(RandomCheckpoint({"w": (37, 200)}), request(plan, quant), rank=1)["w"]
    monkeypatch.setattr(load, "PIECE_VALUES", piece)
    found = loaded(RandomCheckpoint({"w": (37, 200)}), request(plan, quant), rank=1)["w"]
    if isinstance(found, QuantizedTensor) and isinstance(expected, QuantizedTensor):
        assert torch.equal(found.q, expected.q) and torch.equal(found.scale, expected.scale)
        assert found.layout.rows == (11, 37)
    else:
        assert isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor)
        assert torch.equal(found, expected)


FUSED: tuple[Ranges, ...] = (((0, 3), (20, 24)), ((3, 20), (24, 30)))


@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32"])
def test_fused_rows_are_joined(quant: str) -> None:
    checkpoint = RandomCheckpoint({"w": (30, 64)})
    whole = loaded(checkpoint, request(cut("w", (30, 64), None), quant))["w"]
    part = loaded(checkpoint, request(WeightPlan("w", (30, 64), "column", 0, FUSED), quant), rank=1)["w"]
    rows = [*range(3, 20), *range(24, 30)]
    if isinstance(whole, QuantizedTensor) and isinstance(part, QuantizedTensor):
        assert torch.equal(reference.dequantize(part), reference.dequantize(whole)[rows])
    else:
        assert isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor)
        assert torch.equal(part, whole[rows])


def test_fused_columns_are_joined_where_plain_and_refused_where_quantised() -> None:
    checkpoint = RandomCheckpoint({"w": (8, 30)})
    plan = WeightPlan("w", (8, 30), "row", 1, FUSED)
    part = loaded(checkpoint, request(plan), rank=0)["w"]
    assert isinstance(part, torch.Tensor)
    assert torch.equal(part, checkpoint.read("w")[:, [0, 1, 2, 20, 21, 22, 23]])
    with pytest.raises(ShardingError, match="2 ranges of its input columns"):
        loaded(checkpoint, request(plan, "int8"))


def test_vectors_are_cut_and_converted() -> None:
    checkpoint = RandomCheckpoint({"b.bias": (12,)})
    part = loaded(checkpoint, request(cut("b.bias", (12,), 0, 5), dtype=torch.bfloat16), rank=1)["b.bias"]
    assert isinstance(part, torch.Tensor) and part.dtype is torch.bfloat16
    assert torch.equal(part, checkpoint.read("b.bias")[5:].bfloat16())


@pytest.mark.parametrize(
    ("stored", "quant", "kept"),
    [("Q8_0", "int8-g32", True), ("Q4_0", "int4", True), ("Q4_1", "int4", True), ("Q4_1", "int4-g64", False)],
)
def test_a_gguf_keeps_its_scheme(tmp_path: Path, stored: str, quant: str, kept: bool) -> None:
    blocks = random_blocks(np.random.default_rng(0), (8, 128), stored)
    write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (blocks, stored)}, metadata=LLAMA_METADATA)
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    found = loaded(checkpoint, request(cut(name, (8, 128), None), quant))[name]
    assert isinstance(found, QuantizedTensor)
    assert found.format.asymmetric == (stored == "Q4_1" and kept)
    error = (reference.dequantize(found) - checkpoint.read(name)).abs().max()
    assert (error == 0) == kept


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.full((4, 32), float("nan"))}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'w': a value is not finite"):
        loaded(open_checkpoint(tmp_path), request(cut("w", (4, 32), None), "int8"))


def test_headers_need_no_torch() -> None:
    modules = "tp_runtime.checkpoint, tp_runtime.checkpoint.inventory, tp_runtime.engine.source"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
