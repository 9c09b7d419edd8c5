"""What tp-bench prints for programs: one document on the last line, with the fields it promises.

A model of a few kilobytes over one and two ranks; figures are checked for consistency, never for speed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SMALL = ["--prompt-tokens", "6", "--new-tokens", "3", "--repeat", "2", "--bytes", "4000000", "--json"]
DECODE_FIELDS = {
    "tok_s", "tok_s_p10", "tok_s_p90", "ttft_s", "prefill_tok_s", "prefill_share", "weight_bytes_per_token",
    "read_ceiling_gb_s", "mbu", "cache_resident", "device", "dtype", "batch", "context", "compile_cold_s",
    "compile_warm_s", "peak_rss_bytes", "world_size", "threads", "quant", "model",
}  # fmt: skip
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Flags that name a model without weights."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return ["--model", str(tmp_path), "--random-weights"]


def tp_bench(words: list[str], timeout: float = 280) -> dict[str, Any]:
    """The document of a run."""
    environ = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "tp_runtime.bench", *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environ,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check_decode(document: dict[str, Any], world_size: int) -> None:
    """All fields, and figures that agree with one another."""
    assert set(document) >= DECODE_FIELDS, f"missing: {DECODE_FIELDS - set(document)}"
    assert document["world_size"] == world_size == len(document["peak_rss_bytes"])
    assert 0 < document["tok_s_p10"] <= document["tok_s"] <= document["tok_s_p90"]
    assert document["prefill_tok_s"] == pytest.approx(6 / document["ttft_s"])
    assert 0 < document["prefill_share"] < 1 and document["matmul_tflop_s"] > 0
    values = 128 * 64 + 64 * 64 + 256 * 64 + 64 * 128 + 96 * 64
    rows = 128 + 64 + 256 + 64 + 96
    assert document["weight_bytes_per_token"] == values + 4 * rows  # int8 and a fp32 scale a row
    assert document["cache_resident"] and document["mbu"] is None
    assert document["read_ceiling_gb_s"] == max(document["read_ceilings_gb_s"])
    readings = document["read_ceilings_gb_s"]
    beside = [max(readings[:2]), max(readings[2:4])]
    assert [turn["read_ceiling_gb_s"] for turn in document["turns"]] == beside
    assert len(document["read_ceilings_gb_s"]) == 5, "before the case, and after each run and its prompt"
    for row in document["contexts"]:
        cache = 2 * 2 * 16 * 4 * (row["context"] - 1)  # keys and values of two heads of 16, in fp32
        read = [
            document["weight_bytes_per_token"] + row["cache_bytes_per_token"] for row in document["contexts"]
        ]
        assert row["time_ratio"] > 0 and row["cache_bytes_per_token"] in (cache, cache // 2)
        assert row["bytes_ratio"] == pytest.approx(
            (values + 4 * rows + row["cache_bytes_per_token"]) / read[0]
        )


@pytest.mark.timeout(600)
def test_decode_over_one_and_two_ranks(tiny: list[str]) -> None:
    words = ["--quant", "int8", "--nproc", "1,2", "--contexts", "8,40"]
    document = tp_bench(["decode", *tiny, *SMALL, *words])
    assert document["card"]["torch"] and document["card"]["load_average_at_start"] >= 0
    for world_size, one in zip((1, 2), document["decode"], strict=True):
        check_decode(one, world_size)


@pytest.mark.timeout(600)
@pytest.mark.full
def test_decode_with_a_draft(tiny: list[str]) -> None:
    """Figures of all repetitions, and no share of the memory bandwidth."""
    words = ["decode", *tiny, "--nproc", "1", *SMALL, "--draft", "lookup", "--no-draft-adaptive"]
    document = tp_bench([*words, "--context", "64"])
    found = document["speculation"]
    assert set(found) >= {
        "acceptance_by_position", "tokens_per_target_pass", "draft_ms", "verify_ms", "overhead_ms",
        "speedup_measured", "speedup_predicted",
    }  # fmt: skip
    assert document["mbu"] is None and found["target_passes"] >= 2
    assert found["tokens_per_target_pass"] >= 1 and found["verify_ms"] > 0


@pytest.mark.timeout(600)
@pytest.mark.full
def test_decode_with_a_deep_context_and_fresh_starts(tiny: list[str]) -> None:
    words = ["--quant", "int8", "--context", "40", "--startup"]
    document = tp_bench(["decode", *tiny, *SMALL, *words])
    check_decode(document, 1)
    assert document["context"] == 40
    assert document["compile_cold_s"] > 0 and document["compile_warm_s"] > 0


@pytest.mark.timeout(600)
def test_kernels() -> None:
    words = ["kernels", "--models", "smollm2-135m", "--quant", "none,int4", "--rows", "1,4,512"]
    document = tp_bench([*words, "--attention", "64", "--bytes", "4000000", "--json"])
    rows = document["kernels"]
    for row in rows:
        assert set(row) >= {"op", "quant", "group", "n", "k", "rows", "threads", "gb_s", "share"}
        assert row["gb_s"] > 0 and row["share"] > 0
    assert {row["rows"] for row in rows} == {1, 4, 512}
    assert {row["op"].split()[-1] for row in rows} == {"qkv", "o", "gate_up", "down", "head", "attention"}
    assert {row["group"] for row in rows if row["quant"] == "int4"} == {32}


@pytest.mark.timeout(600)
@pytest.mark.full
def test_collectives_of_two_ranks() -> None:
    document = tp_bench(["collectives", "--nproc", "2", "--bytes", "4096", "--json"])
    rows = document["collectives"]
    for row in rows:
        assert set(row) == {"op", "backend", "dtype", "bytes", "p50_us", "p99_us", "in_compiled"}
        assert 0 < row["p50_us"] <= row["p99_us"]
    assert {row["op"] for row in rows} == {"all_reduce", "all_gather", "broadcast"}
    assert {row["backend"] for row in rows} >= {"gloo"}
    assert any(row["in_compiled"] for row in rows)


@pytest.mark.timeout(900)
@pytest.mark.full
def test_scaling_writes_its_files(tiny: list[str], tmp_path: Path) -> None:
    """Both numbers of ranks, two formats, one round; the PNG where matplotlib is installed."""
    words = ["scaling", *tiny, *SMALL, "--quant", "int8,int4", "--nproc", "1,2", "--rounds", "1"]
    document = tp_bench([*words, "--output", str(tmp_path / "out")], timeout=800)
    points = {(row["quant"], row["world_size"]): row for row in document["scaling"]}
    assert set(points) == {("int8", 1), ("int8", 2), ("int4", 1), ("int4", 2)}
    for row in points.values():
        assert row["model_tok_s"] > 0
        assert row["is_fitted"] == (row["world_size"] == 1)
    written = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert written == json.loads(json.dumps(document))
    assert "| int4 | 2 x 1 |" in (tmp_path / "out" / "scaling.md").read_text()
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "out" / "scaling.png").exists() == drawn
