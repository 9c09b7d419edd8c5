"""GGUF blocks: by hand, against the gguf package, and any slice against the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tp_testing.checkpoints import BLOCK_TYPES, LLAMA_METADATA, dequantized, random_blocks, write_gguf

from tp_runtime.checkpoint.gguf_reader import GGUFCheckpoint, blocks_to_quantized
from tp_runtime.layout import WeightLayout, weight_format
from tp_runtime.quant import reference

HALF = np.array([0.5], dtype=np.float16).view(np.uint8)
QUARTER = np.array([-0.25], dtype=np.float16).view(np.uint8)
NAME = "model.layers.0.mlp.up_proj.weight"  # its rows are in file order


def one_block(type_name: str, *pieces: np.ndarray) -> torch.Tensor:
    """The dequantised values of a single block, given its bytes."""
    raw = np.concatenate(pieces).astype(np.uint8).reshape(1, 1, -1)
    form = {"Q8_0": "int8-g32", "Q4_0": "int4-g32", "Q4_1": "int4-g32"}[type_name]
    layout = WeightLayout.whole((1, 32), weight_format(form, asymmetric=type_name == "Q4_1"))
    return reference.dequantize(blocks_to_quantized(raw, type_name, layout))[0]


def test_q8_0_by_hand() -> None:
    values = one_block("Q8_0", HALF, np.arange(-16, 16, dtype=np.int8).view(np.uint8))
    assert values.tolist() == [0.5 * value for value in range(-16, 16)]


def test_q4_0_by_hand() -> None:
    # Byte j: value j in the low nibble, value j + 16 in the high one; 8 stands for zero.
    bytes_16 = np.array([j | ((15 - j) << 4) for j in range(16)])
    values = one_block("Q4_0", HALF, bytes_16)
    assert values[:16].tolist() == [0.5 * (j - 8) for j in range(16)]
    assert values[16:].tolist() == [0.5 * (7 - j) for j in range(16)]


def test_q4_1_by_hand() -> None:
    bytes_16 = np.array([j | (3 << 4) for j in range(16)])
    values = one_block("Q4_1", HALF, QUARTER, bytes_16)
    assert values[:16].tolist() == [0.5 * j - 0.25 for j in range(16)]
    assert values[16:].tolist() == [1.25] * 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[GGUFCheckpoint, np.ndarray]]:
    """A file of one tensor [24, 512] in each block type, and its values by the gguf package."""
    rng = np.random.default_rng(3)
    made = {}
    for type_name in BLOCK_TYPES:
        blocks = random_blocks(rng, (24, 512), type_name)
        path = tmp_path_factory.mktemp("gguf") / f"{type_name}.gguf"
        write_gguf(path, {"blk.0.ffn_up.weight": (blocks, type_name)}, metadata=LLAMA_METADATA)
        made[type_name] = (GGUFCheckpoint(path), dequantized(blocks, type_name))
    return made


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_values_are_the_gguf_packages(
    files: dict[str, tuple[GGUFCheckpoint, np.ndarray]], type_name: str
) -> None:
    checkpoint, expected = files[type_name]
    assert checkpoint.info(NAME).shape == (24, 512) and checkpoint.info(NAME).type_name == type_name
    found = checkpoint.read(NAME)
    error = (found - torch.from_numpy(expected)).abs()
    print(f"{type_name}: largest error {error.max():.1e}, mean {error.mean():.1e}")
    assert error.max() == 0


ranges = st.lists(
    st.tuples(st.integers(0, 512), st.integers(0, 512)).map(lambda r: tuple(sorted(r))), max_size=3
)
row_ranges = st.lists(
    st.tuples(st.integers(0, 24), st.integers(0, 24)).map(lambda r: tuple(sorted(r))), max_size=3
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(type_name=st.sampled_from(BLOCK_TYPES), rows=row_ranges, cols=ranges)
def test_any_slice_is_cut_from_the_whole(
    files: dict[str, tuple[GGUFCheckpoint, np.ndarray]], type_name: str, rows: list, cols: list
) -> None:
    checkpoint, expected = files[type_name]
    found = checkpoint.read(NAME, tuple(rows), tuple(cols))
    by_rows = np.concatenate([expected[a:b] for a, b in rows] or [expected[:0]])
    whole = np.concatenate([by_rows[:, a:b] for a, b in cols] or [by_rows[:, :0]], axis=1)
    assert torch.equal(found, torch.from_numpy(np.ascontiguousarray(whole)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(type_name=st.sampled_from(["Q8_0", "Q4_0", "Q4_1"]), rows=row_ranges, data=st.data())
def test_stored_blocks_pass_exactly(
    files: dict[str, tuple[GGUFCheckpoint, np.ndarray]], type_name: str, rows: list, data: st.DataObject
) -> None:
    checkpoint, expected = files[type_name]
    form = checkpoint.block_format(NAME)
    assert form is not None
    k0 = data.draw(st.integers(0, 511))
    k1 = data.draw(st.integers(k0 + 1, 512))
    held = sum(b - a for a, b in rows)
    layout = WeightLayout((held, 512), (0, held), (k0, k1), form)
    found = reference.dequantize(checkpoint.read_blocks(NAME, tuple(rows), layout))
    whole = np.concatenate([expected[a:b] for a, b in rows] or [expected[:0]])[:, k0:k1]
    assert torch.equal(found, torch.from_numpy(np.ascontiguousarray(whole)))


@pytest.mark.parametrize("type_name", sorted(set(BLOCK_TYPES) - {"Q8_0", "Q4_0", "Q4_1"}))
def test_other_types_have_no_exact_form(
    files: dict[str, tuple[GGUFCheckpoint, np.ndarray]], type_name: str
) -> None:
    assert files[type_name][0].block_format(NAME) is None


def test_the_demo_model_reads_as_the_gguf_package_says(smollm2_gguf: Path) -> None:
    import gguf

    checkpoint = GGUFCheckpoint(smollm2_gguf)
    stored = {"blk.0.ffn_down.weight", "token_embd.weight", "output_norm.weight"}
    seen = {t.name: t for t in gguf.GGUFReader(smollm2_gguf).tensors if t.name in stored}
    names = {
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for ours, theirs in names.items():
        tensor = seen[theirs]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(checkpoint.read(ours), torch.from_numpy(np.array(expected)))
