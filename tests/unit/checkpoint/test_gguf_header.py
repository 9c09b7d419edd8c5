"""The walk over a GGUF header: equal to the gguf package on good files, one sentence on bad ones."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tp_testing.checkpoints import LLAMA_METADATA, random_blocks, write_gguf

from tp_runtime.checkpoint.gguf_header import BLOCK_TYPES, LongArray, is_gguf, read_gguf_header
from tp_runtime.errors import CheckpointError


def test_block_types_are_the_gguf_packages() -> None:
    for number, ours in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (ours.name, (ours.block_size, ours.block_bytes)) == (kind.name, gguf.GGML_QUANT_SIZES[kind])


def test_equals_the_gguf_package_on_the_demo_model(smollm2_gguf: Path) -> None:
    header, reader = read_gguf_header(smollm2_gguf, keep_arrays=True), gguf.GGUFReader(smollm2_gguf)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == theirs
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (
            ours.shape == tuple(reversed(tensor.shape.tolist())) and ours.type.name == tensor.tensor_type.name
        )
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
    assert read_gguf_header(smollm2_gguf).metadata["tokenizer.ggml.tokens"] == LongArray(49152)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    blocks = random_blocks(np.random.default_rng(0), (8, 64), "Q4_0")
    metadata = {**LLAMA_METADATA, "some.list": [1, 2, 3], "some.words": ["a", "bc"]}
    return write_gguf(tmp_path / "good.gguf", {"blk.0.ffn_up.weight": (blocks, "Q4_0")}, metadata=metadata)


def test_short_arrays_are_kept(good: Path) -> None:
    metadata = read_gguf_header(good).metadata
    assert metadata["some.list"] == [1, 2, 3] and metadata["some.words"] == ["a", "bc"]
    assert is_gguf(good) and not is_gguf(good.parent)


def header_with(
    tensors: int = 0, keys: int = 0, rest: bytes = b"", magic: bytes = b"GGUF", version: int = 3
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "other file": (b"PK\x03\x04" + bytes(60), "no GGUF file"),
    "only the magic": (b"GGUF", "truncated"),
    "version 1": (header_with(version=1), "version 1"),
    "version 9": (header_with(version=9), "version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2**60 tensors": (header_with(tensors=2**60, rest=bytes(100)), "1152921504606846976 tensors"),
    "2**60 keys": (header_with(keys=2**60, rest=bytes(100)), "1152921504606846976 metadata keys"),
    "2**62-byte key": (
        header_with(keys=1, rest=struct.pack("<Q", 2**62) + bytes(50)),
        "4611686018427387904 bytes",
    ),
    "2**62-byte value": (
        header_with(keys=1, rest=string(b"k") + struct.pack("<IQ", 8, 2**62) + bytes(50)),
        "4611686018427387904 bytes",
    ),
    "2**61 strings": (
        header_with(keys=1, rest=string(b"k") + struct.pack("<IIQ", 9, 8, 2**61) + bytes(50)),
        "2305843009213693952 array items",
    ),
    "2**63 numbers": (
        header_with(keys=1, rest=string(b"k") + struct.pack("<IIQ", 9, 4, 2**63) + bytes(50)),
        "9223372036854775808 array items",
    ),
    "array of arrays": (
        header_with(keys=1, rest=string(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(50)),
        "array of kind 9",
    ),
    "unknown kind": (header_with(keys=1, rest=string(b"k") + struct.pack("<I", 77) + bytes(50)), "kind 77"),
    "key twice": (
        header_with(keys=2, rest=2 * (string(b"k") + struct.pack("<IB", 0, 1)) + bytes(50)),
        "comes twice",
    ),
    "name is no text": (
        header_with(tensors=1, rest=tensor(b"\xff\xfe", [32]) + bytes(500)),
        "no usable GGUF",
    ),
    "alignment 0": (
        header_with(keys=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 0) + bytes(50)),
        "power of two",
    ),
    "alignment 33": (
        header_with(keys=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 33) + bytes(50)),
        "power of two",
    ),
    "no dimensions": (header_with(tensors=1, rest=tensor(b"t", []) + bytes(500)), "0 dimensions"),
    "2**31 dimensions": (
        header_with(tensors=1, rest=string(b"t") + struct.pack("<I", 2**31) + bytes(500)),
        "2147483648 dimensions",
    ),
    "huge tensor": (header_with(tensors=1, rest=tensor(b"t", [2**40, 2**40]) + bytes(500)), "truncated"),
    "offset beyond": (
        header_with(tensors=1, rest=tensor(b"t", [32], offset=2**50) + bytes(500)),
        "truncated",
    ),
    "unknown type": (header_with(tensors=1, rest=tensor(b"t", [256], kind=17) + bytes(500)), "GGML type 17"),
    "ragged blocks": (header_with(tensors=1, rest=tensor(b"t", [33], kind=2) + bytes(500)), "no multiple"),
    "tensor twice": (header_with(tensors=2, rest=2 * tensor(b"t", [32]) + bytes(500)), "comes twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_one_sentence_and_no_memory(tmp_path: Path, case: str) -> None:
    data, said = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=said) as error:
        read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf_header(tmp_path / "none.gguf")


def test_every_truncation_is_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    end = max(entry.offset + entry.nbytes for entry in read_gguf_header(good).tensors.values())
    for length in [*range(0, end, 37), end - 1]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_gguf_header(path)


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    blocks = random_blocks(np.random.default_rng(0), (8, 64), "Q8_0")
    metadata = {**LLAMA_METADATA, "words": ["a", "b"]}
    path = tmp_path_factory.mktemp("base") / "good.gguf"
    return write_gguf(path, {"blk.0.ffn_up.weight": (blocks, "Q8_0")}, metadata=metadata).read_bytes()


@settings(max_examples=200, deadline=None)
@given(noise=st.lists(st.tuples(st.integers(4, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_noise_in_the_header_never_escapes_as_another_error(
    good_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, noise: list[tuple[int, int]]
) -> None:
    data = bytearray(good_bytes)
    for at, value in noise:
        data[at] = value
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_gguf_header(path)
