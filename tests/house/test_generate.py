"""generate.py from the outside: its JSON, prompts from stdin, readers that leave, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = [str(Path(sys.executable).parent / "tp-launch"), "--nproc", "2", "generate.py"]
TORCHRUN = [
    str(Path(sys.executable).parent / "torchrun"),
    "--nproc-per-node",
    "2",
    "-m",
    "tp_runtime.generate",
]
PLAIN = [sys.executable, "-m", "tp_runtime.generate"]
QUICK = ["--no-compile", "--max-new-tokens", "4", "--ignore-eos"]


def run(command: list[str], text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=240)


def test_the_document_of_json(smollm2_gguf: Path) -> None:
    """Every key, at two ranks; the prompt comes through a pipe, which the launcher reads first."""
    done = run(
        [*LAUNCH, *QUICK, "--quant", "int8", "--json", "--prompt-file", "-"], "The capital of France is"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["text"].startswith(" Paris")
    assert len(document["tokens"]) == document["new_tokens"] == 4
    assert all(isinstance(token, int) for token in document["tokens"])
    assert document["prompt_tokens"] == 5 and document["finish_reason"] == "length"
    assert (document["world_size"], document["device"], document["quant"]) == (2, "cpu", "int8")
    assert document["dtype"] in ("bf16", "fp32")
    assert document["ttft_s"] > 0 and document["tok_s"] > 0 and document["read_ceiling_gb_s"] > 0
    assert document["weight_bytes_per_token"] == 135_298_560
    peaks = document["peak_rss_bytes"]
    assert len(peaks) == 2 and all(100e6 < peak < 4e9 for peak in peaks)
    if document["cache_resident"]:
        assert document["mbu"] is None and "no share of the memory bandwidth" in done.stderr
    else:
        assert 0 < document["mbu"] < 1.5


@pytest.mark.parametrize(
    "start",
    [pytest.param(PLAIN, id="python"), pytest.param(TORCHRUN, id="torchrun")],
)
@pytest.mark.full
def test_a_prompt_from_stdin(start: list[str], smollm2_gguf: Path) -> None:
    done = run([*start, *QUICK, "--prompt-file", "-"], "The capital of France is")
    assert done.returncode == 0 and done.stdout.startswith(" Paris"), done.stderr


def test_a_reader_that_leaves_is_no_fault(smollm2_gguf: Path) -> None:
    """`tp-launch generate.py ... | head -1`: the answer ends, and so does the job, in peace."""
    command = [*LAUNCH, "--no-compile", "--ignore-eos", "--max-new-tokens", "2000", "--prompt", "Once upon"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.read(1)
    job.stdout.close()
    _, words = job.communicate(timeout=120)
    assert job.returncode == 0 and "Traceback" not in words and "error" not in words, words


def test_ctrl_c_without_a_launcher(smollm2_gguf: Path) -> None:
    command = [*PLAIN, "--no-compile", "--ignore-eos", "--max-new-tokens", "4000", "--prompt", "Once upon"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.read(1)
    job.send_signal(signal.SIGINT)
    _, words = job.communicate(timeout=60)
    assert job.returncode == -signal.SIGINT and "Traceback" not in words, words
