"""tp-bench on GPUs: the documents it prints there, with figures checked for consistency, never for speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SMALL = ["--prompt-tokens", "40", "--new-tokens", "9", "--repeat", "2", "--device", "cuda"]
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Flags that name a model without weights."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return ["--model", str(tmp_path), "--random-weights"]


def tp_bench(words: list[str], timeout: float = 280) -> dict[str, Any]:
    """The document of a run."""
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "tp_runtime.bench", *words, "--json"],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environ,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "destroy_process_group" not in done.stderr, "groups were left open"
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.gpus(1)
def test_decode(tiny: list[str]) -> None:
    document = tp_bench(["decode", *tiny, *SMALL, "--quant", "int8", "--profile"])
    assert document["device"] == "cuda" and len(document["card"]["gpus"]) == 1 and document["card"]["cuda"]
    assert document["cache_resident"] and document["mbu"] is None
    assert document["read_ceiling_gb_s"] == max(document["read_ceilings_gb_s"]) > 100
    assert 0 < document["prefill_share"] < 1 and document["matmul_tflop_s"] > 1
    assert document["peak_device_bytes"][0] > 0
    assert document["kernels"] and document["prefill_kernels"]


@pytest.mark.gpus(1)
def test_kernels() -> None:
    words = ["kernels", "--device", "cuda", "--models", "smollm2-135m", "--quant", "none,int8,fp8,int4-g64"]
    rows = tp_bench([*words, "--rows", "1,5,512", "--attention", "300"])["kernels"]
    assert {row["rows"] for row in rows} == {1, 5, 512}
    assert all(row["gb_s"] > 0 and 0 < row["share"] < 1.5 for row in rows)
    assert "attention" in {row["op"].split()[-1] for row in rows}


@pytest.mark.gpus(2)
def test_collectives() -> None:
    words = ["collectives", "--device", "cuda", "--nproc", "2", "--bytes", "8192,65536", "--soak", "1000"]
    document = tp_bench(words)
    rows = document["collectives"]
    assert {row["backend"] for row in rows} >= {"push", "nccl"}
    assert all(row["same_on_all_ranks"] and 0 < row["p50_us"] <= row["p99_us"] for row in rows)
    assert all(row["exact"] for row in rows if row["backend"] == "push")
    assert document["soak"]["sums"] >= 1000 and document["soak"]["mistakes"] == 0


@pytest.mark.gpus(2)
def test_scaling(tiny: list[str], tmp_path: Path) -> None:
    words = ["scaling", *tiny, *SMALL, "--quant", "int8,int4-g64", "--nproc", "1,2", "--rounds", "1"]
    document = tp_bench([*words, "--output", str(tmp_path / "out")], timeout=500)
    assert len(document["scaling"]) == 4 and not document["left_out"]
    assert document["all_reduce_us"]["2"] > 0
