"""Small checkpoints made up on the spot: GGUF files of every block type, and plans that cut weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tp_runtime.sharding.plan import Ranges, WeightPlan

BLOCK_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# Where a block of the types that gguf cannot write has its fp16 scales.
_SCALE_BYTES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(rng: np.random.Generator, shape: tuple[int, int], type_name: str) -> np.ndarray:
    """Stored bytes, uint8 [rows, bytes a row], of random values around 1 in one of BLOCK_TYPES."""
    kind = gguf.GGMLQuantizationType[type_name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if type_name not in _SCALE_BYTES:
        values = rng.standard_normal(shape, dtype=np.float32)
        return np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8).reshape(shape[0], -1)
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block_size, block_bytes), dtype=np.uint8)
    for at in _SCALE_BYTES[type_name]:
        scales = rng.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def dequantized(blocks: np.ndarray, type_name: str) -> np.ndarray:
    """The fp32 values of random_blocks, by the gguf package."""
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name])


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    *,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file, written by the gguf package.

    tensors: name -> (stored bytes [rows, bytes] or fp32 [n], type name). metadata: "{arch}" in a key
    stands for the architecture.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata or {}).items():
        key = key.replace("{arch}", architecture)
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)
    for name, (data, type_name) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA_METADATA: dict[str, Any] = {
    "{arch}.block_count": 1,
    "{arch}.context_length": 128,
    "{arch}.embedding_length": 64,
    "{arch}.feed_forward_length": 96,
    "{arch}.attention.head_count": 4,
    "{arch}.attention.head_count_kv": 2,
    "{arch}.attention.layer_norm_rms_epsilon": 1e-5,
    "{arch}.rope.freq_base": 10000.0,
}


def cut(name: str, shape: tuple[int, ...], dim: int | None, *stops: int) -> WeightPlan:
    """A plan that cuts `dim` at `stops`: one range a rank. dim None: whole on every rank."""
    if dim is None:
        return WeightPlan(name, shape, "replicate")
    edges = (0, *stops, shape[dim])
    parts: tuple[Ranges, ...] = tuple(((a, b),) for a, b in zip(edges, edges[1:], strict=False))
    return WeightPlan(name, shape, "row" if dim == 1 else "column", dim, parts)
