"""Peers: the files made for them, their bytes, and transformers in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tp_runtime.benchmark import peers
from tp_runtime.benchmark.launching import RunFailed
from tp_runtime.checkpoint.inventory import stored_tensors
from tp_runtime.config import EngineConfig
from tp_runtime.engine.source import resolve
from tp_runtime.models.config import ModelConfig

TINY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
BODY = 2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128)
HEAD = 512 * 64


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0"])
def test_random_gguf_is_the_model(kind: str, tmp_path: Path) -> None:
    """Our own reader finds the shape that was asked for, in the format that was asked for."""
    path = tmp_path / "random.gguf"
    peers.write_random_gguf(path, TINY, kind)
    found = resolve(str(path)).config
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(found, name) == getattr(TINY, name), name
    stored = stored_tensors(path)
    assert stored["model.layers.1.mlp.down_proj.weight"].type_name == kind


def test_weight_bytes_by_hand() -> None:
    """Q4_0 is 4.5 bits a weight and keeps its head at the 8.5 of Q8_0."""
    assert peers.weight_bytes(TINY, 4.5, 8.5) == int(BODY * 4.5 / 8 + HEAD * 8.5 / 8)


def test_transformers_in_its_own_process() -> None:
    spec = {
        "runtime": "transformers", "path": None, "config": asdict(TINY), "threads": 1, "prompt_tokens": 8,
        "new_tokens": 4, "repeat": 2, "ceiling_bytes": 4_000_000,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tp_runtime.benchmark.peer_child", json.dumps(spec)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["threads"] == 1
    assert min(found["tok_s"], found["prefill_tok_s"], found["read_ceiling_gb_s"]) > 0


def row(runtime: str, name: str, tok_s: float, **more: Any) -> dict[str, Any]:
    """One result, as peers makes it."""
    plain = {"against": name, "bits_per_weight": 4.5, "threads": 2, "prefill_tok_s": 100.0, "mbu": None}
    return {
        **plain,
        "runtime": runtime,
        "format": name,
        "tok_s": tok_s,
        "weight_bytes_per_token": 10**9,
        **more,
    }


def test_table_compares_like_with_like() -> None:
    """Ours over a peer's, of the rows that stand beside each other."""
    ours, theirs = row("tp_runtime", "int4", 30.0), row("llama.cpp", "Q4_0", 20.0, against="int4")
    shown = peers.table(peers.beside_eager([ours, theirs]))
    assert "| llama.cpp | Q4_0 | 4.5 | 1000.0 | 2 | 20.00 | - | 100 | 1.50 | - |" in shown


def test_ours_stand_beside_eager() -> None:
    """Six times eager's speed; 0.80 of 3.5 times fewer bytes at an MBU of 0.5 is 5.6 times."""
    ours = row("tp_runtime", "int4", 30.0)
    eager = row("transformers", peers.EAGER, 5.0, against="none", mbu=0.5, weight_bytes_per_token=35 * 10**8)
    found, theirs = peers.beside_eager([ours, eager])
    assert found["over_eager"] == pytest.approx(6.0) and found["over_eager_bound"] == pytest.approx(5.6)
    assert theirs["over_eager"] is None
    assert "6.00 (5.60)" in peers.table([found, theirs])


@pytest.mark.parametrize(
    ("kind", "bits", "ours"), [("Q4_1", 5.0, 5.0), ("Q4_0", 4.5, 4.5), ("Q8_0", 8.5, 4.5)]
)
def test_a_file_says_its_bits_and_bytes(kind: str, bits: float, ours: float, tmp_path: Path) -> None:
    """Of both sides: 4-bit formats keep a file's offsets; the head has its own bits, the looked-up table none."""
    path = tmp_path / "stored.gguf"
    peers.write_random_gguf(path, TINY, kind)
    found = peers.stored_row(path, "int4")
    assert (found.format, found.bits) == (kind, bits)
    assert found.weight_bytes == int(BODY * bits / 8 + HEAD * 8.5 / 8)
    assert peers.stored_bits(EngineConfig(quant="int4"), path) == ours


def test_a_peer_that_dies_is_left_out_and_ours_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = peers.Row("tp_runtime", "int8", "int8", 8.0), peers.Row("llama.cpp", "Q8_0", "int8", 8.5)
    asked: list[str] = []

    def measure(row: peers.Row) -> dict[str, Any]:
        asked.append(row.runtime)
        if row == theirs and len(asked) > 2:
            raise RunFailed(-4)
        return {"tok_s": 1.0}

    found, failed = peers._turns([ours, theirs], 3, measure)
    assert list(found) == [ours] and len(found[ours]) == 3
    assert failed == {theirs: "the measurement ended by SIGILL"}
    assert asked == ["tp_runtime", "llama.cpp"] * 2 + ["tp_runtime"], "asked again after it failed"
    assert "llama.cpp Q8_0 is left out: the measurement ended by SIGILL" in capsys.readouterr().out
    with pytest.raises(RunFailed):
        peers._turns([theirs, ours], 1, lambda row: measure(ours) if row != ours else _fail())


def _fail() -> dict[str, Any]:
    raise RunFailed(1)
