"""Settings: defaults, then a file, then flags; whatever is unknown or impossible is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from tp_runtime import env, generate, log
from tp_runtime.config import EngineConfig, SamplingParams
from tp_runtime.errors import ConfigError, RequestError, TPError
from tp_runtime.flags import Parser, add_engine_flags, add_sampling_flags, configurations


def settings(*words: str) -> tuple[EngineConfig, SamplingParams]:
    parser = Parser("test", "", "")
    add_engine_flags(parser)
    add_sampling_flags(parser)
    return configurations(parser.parse_args(words))


def test_defaults() -> None:
    assert settings() == (EngineConfig(), SamplingParams())


def test_every_setting_has_a_flag() -> None:
    words = "--model m --weights w --random-weights --layers 2 --dtype fp32 --quant int4 --int4-asym"
    words += " --head-quant none"
    words += " --cache-dtype bf16 --device cpu --kernels reference --no-compile --context 64 --max-batch 2"
    words += " --no-native-step --draft smollm2-135m --draft-quant int8 --draft-tokens 3 --no-draft-adaptive"
    words += " --draft-ranks one --speculate-exact --collectives c10d"
    words += " --cache-bytes 4096 --prefill-chunk 16 --threads 1 --collective-timeout 5 --load-timeout 7"
    words += (
        " --max-new-tokens 3 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1"
    )
    words += (
        " --presence-penalty 0.2 --frequency-penalty 0.3 --seed 9 --stop x --stop y --ignore-eos --logprobs 2"
    )
    engine, sampling = settings(*words.split())
    plain = EngineConfig(), SamplingParams()
    same = [name for name, value in engine.to_dict().items() if value == getattr(plain[0], name)]
    same += [
        name for name in SamplingParams.field_names() if getattr(sampling, name) == getattr(plain[1], name)
    ]
    assert same == []
    assert sampling.stop == ("x", "y") and engine.collective_timeout_s == 5


def test_a_file_and_flags_that_win(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('quant = "int8"\ncontext = 128\ntemperature = 0.7\nstop = ["."]\n')
    engine, sampling = settings("--config", str(tmp_path / "run.toml"), "--context", "256")
    assert (engine.quant, engine.context, sampling.temperature, sampling.stop) == ("int8", 256, 0.7, (".",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('quantt = "int8"', "unknown settings: quantt"),
        ("quant = ", "is not TOML"),
        ('context = "x"', "is not a whole number"),
    ],
)
def test_a_bad_file(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(ConfigError, match=says):
        settings("--config", str(tmp_path / "run.toml"))


@pytest.mark.parametrize(
    "words",
    [
        "--quant int5", "--context 0", "--layers -1", "--temperature nan", "--top-p 0", "--top-k -1",
        "--min-p 2",
        "--seed -1", "--repetition-penalty 0", "--repetition-penalty 1e-42", "--max-new-tokens 0", "--collective-timeout 0", "--quan int8",
        "--device tpu", "--kernels fast", "--config /none.toml", "--threads 0", "--logprobs -1",
    ],
)  # fmt: skip
def test_refused(words: str) -> None:
    with pytest.raises((ConfigError, RequestError)) as caught:
        settings(*words.split())
    assert isinstance(caught.value, TPError) and "\n" not in str(caught.value)


def test_an_int8_cache_on_a_gpu(tmp_path: Path) -> None:
    words = ["--prompt", "x", "--model", "llama-1b", "--random-weights", "--device", "cuda"]
    with pytest.raises(ConfigError, match="int8 was asked for on a GPU.*--device cpu") as caught:
        generate.check([*words, "--cache-dtype", "int8"], 1)
    assert "\n" not in str(caught.value)


def test_an_fp8_cache_on_cpus() -> None:
    words = ["--prompt", "x", "--model", "llama-1b", "--random-weights", "--device", "cpu"]
    with pytest.raises(ConfigError, match="fp8 was asked for on CPUs.*--cache-dtype int8") as caught:
        generate.check([*words, "--cache-dtype", "fp8"], 1)
    assert "\n" not in str(caught.value)


def test_paths_are_taken_for_models() -> None:
    config = EngineConfig(model=Path("m"), weights=Path("w"), draft=Path("d"))  # type: ignore[arg-type]
    assert (config.model, config.weights, config.draft) == ("m", "w", "d")


@pytest.mark.parametrize("name", ["loud", ""])
def test_an_unknown_log_level(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_LOG_LEVEL", name)
    if not name:
        assert log._level() == logging.INFO
        return
    with pytest.raises(ConfigError, match="'loud' is not known; use one of: debug, info, warning, error"):
        log._level()


def test_a_timeout_is_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_COLLECTIVE_TIMEOUT", "-3")
    with pytest.raises(ConfigError, match="TP_COLLECTIVE_TIMEOUT=-3 is no positive number of seconds"):
        env.get_seconds("TP_COLLECTIVE_TIMEOUT")


@pytest.mark.parametrize(
    ("rank", "local_rank", "running", "says"),
    [
        (0, 0, False, "error: "), (1, 1, False, ""), (4, 0, False, "[rank 4] error: "),
        (0, 0, True, "error: "), (1, 1, True, "[rank 1] error: "),
    ],
)  # fmt: skip
def test_a_rank_says_its_error_once_a_host_or_for_itself(
    rank: int,
    local_rank: int,
    running: bool,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    log.complain(ConfigError("why"), of_input=not running)
    assert capsys.readouterr().err == (f"{says}why\n" if says else "")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop string is empty"):
        settings("--stop", "")


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.check(["--prompt", "x", "--quant", "int8", "--print-config"], 1) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["engine"]["quant"] == "int8" and shown["sampling"]["temperature"] == 0


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.check(["--help"], 1) == 0
    assert "examples:" in capsys.readouterr().out


def test_numbers_of_numpy_become_plain_ones() -> None:
    params = SamplingParams(seed=np.int64(3), temperature=np.float32(0.5), logprobs=np.uint8(2))  # type: ignore[arg-type]
    found = (params.seed, params.temperature, params.logprobs)
    assert found == (3, 0.5, 2) and [type(number) for number in found] == [int, float, int]
    assert SamplingParams(temperature=1).temperature == 1
