"""The command lines: what is refused, in one sentence and without torch, and what ranks are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tp_runtime import bench, generate
from tp_runtime.benchmark import options
from tp_runtime.config import EngineConfig
from tp_runtime.errors import ConfigError, TPError

DECODE = ["decode", "--model", "llama-1b"]
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
DRAFTED = [*DECODE, "--draft", "skip:8"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no command"),
        (["sing"], "'sing' is no command"),
        ([*DECODE, "--nproc", "0"], "above 0"),
        ([*DECODE, "--nproc", "1,x"], "such as 1,2"),
        ([*DECODE, "--new-tokens", "1"], "the least is 2"),
        ([*DECODE, "--repeat", "0"], "the least is 1"),
        ([*DECODE, "--quant", "int3"], "int3"),
        ([*DECODE, "--bogus"], "--bogus"),
        (["decode", "--model", "llama-1z"], "llama-1b"),
        (["kernels", "--models", "zork"], "llama-1b"),
        (["kernels", "--rows", "100"], "512"),
        (["kernels", "--quant", "int8,zip"], "int8,zip"),
        (["scaling", "--model", "llama-1b", "--batch", "2"], "batch 1"),
        (["kernels", "--quant", "fp8"], "--device cpu"),
        (["kernels", "--device", "cuda", "--quant", "int8-g32"], "no kernel for --device cuda"),
        (["kernels", "--device", "cuda", "--threads", "2"], "--threads is for CPUs"),
        (["collectives", "--soak", "100"], "add --device cuda"),
        ([*DECODE, "--device", "cpu", "--profile"], "add --device cuda"),
        ([*DECODE, "--contexts", "64,8192"], "above --new-tokens 64"),
        ([*DECODE, "--contexts", "8192,128"], "has to rise"),
        ([*DECODE, "--contexts", "100,150"], "give a deeper one"),
        ([*DECODE, "--contexts", "128,8192", "--context", "512"], "leave it out"),
        ([*DECODE, "--force-acceptance", "0.7"], "needs a draft"),
        ([*DRAFTED, "--force-acceptance", "0"], "above 0 and at most at 1"),
        ([*DRAFTED, "--force-acceptance", "1.5"], "above 0 and at most at 1"),
        ([*DRAFTED, "--force-acceptance", "nan"], "above 0 and at most at 1"),
        ([*DRAFTED, "--force-acceptance", "often"], "--force-acceptance"),
        ([*DECODE, "--draft", "lookup", "--force-acceptance", "0.7"], "--draft is lookup"),
        (["scaling", *DRAFTED[1:], "--force-acceptance", "0.7"], "--force-acceptance"),
    ],
)
def test_refused(words: list[str], says: str) -> None:
    with pytest.raises(TPError) as error:
        options.parse(words, in_job=False)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "nproc", "says"),
    [
        ([*DECODE, "--startup"], 2, "tp-bench decode --startup"),
        ([*DECODE, "--nproc", "2"], 2, "--nproc"),
        (["scaling", "--model", "llama-1b"], 2, "tp-bench scaling --nproc 2"),
        (["collectives"], 1, "--nproc 2"),
        (DECODE, 64, "64 ranks"),
    ],
)
def test_refused_for_a_job(words: list[str], nproc: int, says: str) -> None:
    with pytest.raises(TPError) as error:
        bench.check(words, nproc)
    assert says in str(error.value)


def test_accepted_for_a_job() -> None:
    assert bench.check([*DECODE, "--layers", "1"], 2) is None


def test_a_named_model_without_weights_gets_random_ones() -> None:
    engine = options.parse([*DECODE], in_job=True).engine
    assert engine is not None and engine.random_weights


def test_acceptance_is_forced_at_random_weights_alone(tmp_path: Path) -> None:
    forced = ["--draft", "self:int8", "--force-acceptance", "0.7"]
    assert options.parse([*DECODE, *forced], in_job=True).args.force_acceptance == 0.7
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    save_file({"model.norm.weight": np.ones(64, np.float32)}, tmp_path / "model.safetensors")
    words = ["decode", "--model", str(tmp_path), *forced]
    with pytest.raises(ConfigError, match="is for random weights, and .* has real ones here"):
        options.parse(words, in_job=True)
    assert options.parse([*words, "--random-weights"], in_job=True).args.force_acceptance == 0.7


def test_acceptance_cannot_be_forced_by_settings(tmp_path: Path) -> None:
    """Neither by a file of settings, nor by the engine's own, nor by another program's flags."""
    file = tmp_path / "run.toml"
    file.write_text("force_acceptance = 0.7\n")
    for words in ([*DECODE, "--config", str(file)], ["scaling", *DECODE[1:], "--config", str(file)]):
        with pytest.raises(ConfigError, match="unknown settings: force_acceptance"):
            options.parse(words, in_job=True)
    with pytest.raises(ConfigError, match="--force-acceptance"):
        generate.check(["--model", "llama-1b", "--random-weights", "--force-acceptance", "0.7"], 1)
    assert not any("accept" in name for name in EngineConfig().to_dict())


def test_the_context_has_room() -> None:
    words = [*DECODE, "--prompt-tokens", "100", "--new-tokens", "20"]
    engine = options.parse(words, in_job=True).engine
    assert engine is not None and engine.context == 120
    deeper = options.parse([*words, "--context", "8192"], in_job=True).engine
    assert deeper is not None and deeper.context == 8192
    several = options.parse([*words, "--contexts", "128,8192"], in_job=True).engine
    assert several is not None and several.context == 8192


def test_ranks_are_not_told_of_ranks() -> None:
    words = ["decode", "--nproc", "1,2", "--json", "--no-numa", "--timeout=3", "--startup", "--layers", "1"]
    assert options.words_for_ranks(words) == ["decode", "--json", "--layers", "1"]


def test_engine_words_make_the_same_engine() -> None:
    """A case of scaling, as the command line of its rank, is read back as the same settings."""
    words = [
        *DECODE,
        "--quant",
        "int4",
        "--no-native-step",
        "--layers",
        "3",
        "--bytes",
        "4096",
        "--repeat",
        "2",
    ]
    first = options.parse(words, in_job=True)
    assert first.engine is not None
    again = options.parse(["decode", *options.engine_words(first.engine, first.args)], in_job=True)
    assert again.engine == first.engine
    assert (again.args.bytes, again.args.repeat) == (4096, 2)
    assert isinstance(again.engine, EngineConfig)


@pytest.mark.parametrize("words", [["--help"], *([mode, "--help"] for mode in options.MODES)])
def test_help_has_examples_and_no_torch(words: list[str]) -> None:
    code = (
        "import sys; from tp_runtime import bench; code = bench.main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "tp-bench" in done.stdout


def test_error_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "TP_LAUNCHER_PID"):
        monkeypatch.delenv(name, raising=False)
    assert bench.main(["decode", "--model", "nowhere"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1


def test_counts() -> None:
    assert options.counts("1,2") == (1, 2)
    with pytest.raises(ConfigError):
        options.parse(["collectives", "--bytes", "4096,-1"], in_job=True)
