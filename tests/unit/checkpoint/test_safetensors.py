"""Safetensors: any slice against the whole, sharded indexes, and damaged files by name."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from tp_runtime.checkpoint import open_checkpoint
from tp_runtime.checkpoint import safetensors_reader as reader
from tp_runtime.checkpoint.fill import load
from tp_runtime.checkpoint.inventory import stored_tensors
from tp_runtime.checkpoint.safetensors_header import read_safetensors_header
from tp_runtime.errors import CheckpointError

W_NK = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
TENSORS = {
    "w": W_NK,
    "half": W_NK.half(),
    "brain": W_NK.bfloat16(),
    "double": W_NK.double(),
    "norm": W_NK[:, 0].contiguous(),
    "count": torch.arange(4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    save_file(TENSORS, path / "model.safetensors", metadata={"format": "pt"})
    return path


def cuts(extent: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    pair = st.tuples(st.integers(0, extent), st.integers(0, extent)).map(sorted).map(tuple)
    return st.lists(pair, max_size=3).map(tuple)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["w", "half", "brain", "double"]),
    rows=st.none() | cuts(40),
    cols=st.none() | cuts(24),
    mapped=st.sampled_from([1, 300, 1 << 20]),
)
def test_any_slice_is_cut_from_the_whole(folder: Path, name: str, rows: Any, cols: Any, mapped: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "MAPPED_BYTES", mapped)  # pieces of one row, of some, of all
        found = open_checkpoint(folder).read(name, rows, cols, torch.float32)
    whole = TENSORS[name].float()
    expected = whole if rows is None else torch.cat([whole[a:b] for a, b in rows] or [whole[:0]])
    expected = (
        expected if cols is None else torch.cat([expected[:, a:b] for a, b in cols] or [expected[:, :0]], 1)
    )
    assert torch.equal(found, expected) and found.is_contiguous()


def test_vectors_and_dtypes(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "model.safetensors")
    assert torch.equal(checkpoint.read("norm", ((3, 9), (1, 2))), W_NK[[*range(3, 9), 1], 0])
    assert checkpoint.read("w", dtype=torch.bfloat16).dtype is torch.bfloat16
    assert checkpoint.info("brain").type_name == "BF16" and checkpoint.info("brain").nbytes == 40 * 24 * 2
    assert set(checkpoint.names()) == set(TENSORS)
    with pytest.raises(CheckpointError, match="'count' is stored as I64"):
        checkpoint.read("count")


def shard(folder: Path) -> Path:
    save_file({"a": W_NK}, folder / "model-1.safetensors")
    save_file({"b": W_NK + 1, "c": W_NK + 2}, folder / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_sharded_checkpoints(tmp_path: Path) -> None:
    index = shard(tmp_path)
    for path in (tmp_path, index):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.names()) == {"a", "b", "c"}
        assert torch.equal(checkpoint.read("c", ((1, 3),)), W_NK[1:3] + 2)


def test_one_loose_file_is_found(tmp_path: Path) -> None:
    save_file({"a": W_NK}, tmp_path / "weights.safetensors")
    assert list(stored_tensors(tmp_path)) == ["a"]


def spoiled(folder: Path, index: dict[str, Any] | str | None = None, remove: str | None = None) -> Path:
    path = shard(folder)
    if index is not None:
        path.write_text(index if isinstance(index, str) else json.dumps(index))
    if remove is not None:
        (folder / remove).unlink()
    return folder


BAD_INDEX: dict[str, tuple[dict[str, Any], str]] = {
    "shard missing": ({"remove": "model-2.safetensors"}, "lacks the shard model-2.safetensors"),
    "no map": ({"index": {"metadata": {}}}, "no weight_map"),
    "list": ({"index": "[1]"}, "not an object"),
    "no JSON": ({"index": "{"}, "not valid JSON"),
    "deep": ({"index": "[" * 200_000}, "not valid JSON"),
    "long number": ({"index": '{"a":' + "9" * 10_000 + "}"}, "not valid JSON"),
    "outside": ({"index": {"weight_map": {"a": "../x.safetensors"}}}, "not a plain file name"),
    "astray": ({"index": {"weight_map": {"b": "model-1.safetensors"}}}, "'b' is not in model-1.safetensors"),
    "not text": ({"index": {"weight_map": {"b": 3}}}, "no weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_damaged_indexes_are_one_sentence(tmp_path: Path, case: str) -> None:
    changes, said = BAD_INDEX[case]
    with pytest.raises(CheckpointError, match=said) as error:
        open_checkpoint(spoiled(tmp_path, **changes))
    assert "\n" not in str(error.value)


def file_of(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (bytes(7), "truncated"),
    "2**62-byte header": (file_of({}, length=2**62), "claims a header of 4611686018427387904"),
    "cut header": (file_of(entry([4], [0, 16]))[:30], "truncated"),
    "no JSON": (file_of(b"{{{{"), "not valid JSON"),
    "list": (file_of(b"[]"), "not an object"),
    "cut data": (file_of(entry([17], [0, 68])), "'t' ends at byte 68"),
    "2**60 values": (file_of(entry([2**60], [0, 2**62])), "'t' ends at byte"),
    "bytes and shape differ": (file_of(entry([4], [0, 20])), "not consistent"),
    "negative": (file_of(entry([-4], [0, -16])), "not consistent"),
    "fraction": (file_of(entry([4.0], [0, 16])), "not consistent"),
    "backwards": (file_of(entry([0], [16, 0])), "not consistent"),
    "unknown dtype": (file_of(entry([4], [0, 16], "F99")), "not consistent"),
    "no entry": (file_of({"t": 3}), "not consistent"),
    "three offsets": (file_of(entry([4], [0, 8, 16])), "not consistent"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files_are_one_sentence_and_no_memory(tmp_path: Path, case: str) -> None:
    data, said = BAD_FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=said) as error:
        read_safetensors_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and "\n" not in str(error.value)


def test_places_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a pickle, which is not read"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file({"a": W_NK}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files and no"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": W_NK}, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("a")


@pytest.mark.parametrize("differ", [False, True])
def test_tied_names_hold_the_same_values(tmp_path: Path, differ: bool) -> None:
    """A module may be at two names; a file may have both, with one value."""
    model = nn.Module()
    model.one = nn.Embedding(6, 4)
    model.two = nn.Linear(4, 6, bias=False)
    model.two.weight = model.one.weight
    stored = torch.randn(6, 4)
    save_file(
        {"one.weight": stored, "two.weight": stored + (torch.arange(24).view(6, 4) == 23) * float(differ)},
        tmp_path / "model.safetensors",
    )
    if differ:
        with pytest.raises(
            CheckpointError, match="holds other values for 'two.weight' than for 'one.weight'"
        ):
            load(model, tmp_path)
        assert not torch.equal(model.one.weight, stored), "nothing was filled"
    else:
        load(model, tmp_path)
        assert torch.equal(model.one.weight, stored) and model.two.weight is model.one.weight
