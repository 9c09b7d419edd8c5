"""Every bad input gets one sentence, a non-zero code and no traceback, before any rank starts."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Make = Callable[[Path], list[str]]
PROMPT = ["--prompt", "hello"]


def tiny_config(**changes: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "tie_word_embeddings": True, **changes,
    }  # fmt: skip


def tiny_model(folder: Path, *, with_tokenizer: bool = True, **changes: int) -> Path:
    """A Hugging Face folder whose weights are of tiny_config() and whose config may say otherwise."""
    import torch
    from safetensors.torch import save_file

    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,),
        **{f"{layer}self_attn.{name}_proj.weight": (32, 32) for name in "qkvo"},
        f"{layer}mlp.gate_proj.weight": (64, 32), f"{layer}mlp.up_proj.weight": (64, 32),
        f"{layer}mlp.down_proj.weight": (32, 64), f"{layer}input_layernorm.weight": (32,),
        f"{layer}post_attention_layernorm.weight": (32,),
    }  # fmt: skip
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))
    if with_tokenizer:
        from tokenizers import Tokenizer, decoders, models

        tokenizer = Tokenizer(models.BPE(vocab={chr(i): i - 32 for i in range(32, 96)}, merges=[]))
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def truncated_safetensors(folder: Path) -> list[str]:
    path = tiny_model(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["generate.py", "--model", str(folder), *PROMPT]


def gguf(folder: Path, content: bytes) -> list[str]:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return ["generate.py", "--model", str(path), *PROMPT]


def pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "model.gguf")
    return ["generate.py", "--model", str(folder / "model.gguf"), *PROMPT]


def long_prompt(folder: Path) -> list[str]:
    (folder / "long.txt").write_text("word " * 3000)
    return ["generate.py", "--context", "512", "--prompt-file", str(folder / "long.txt")]


def run_file(folder: Path, content: str) -> list[str]:
    (folder / "run.toml").write_text(content)
    return ["generate.py", "--config", str(folder / "run.toml"), *PROMPT]


def short_draft(folder: Path) -> list[str]:
    for name in ("target", "draft"):
        (folder / name).mkdir()
    tiny_model(folder / "target")
    tiny_model(folder / "draft", max_position_embeddings=32)
    draft = ["--draft", str(folder / "draft")]
    return ["generate.py", "--model", str(folder / "target"), *draft, "--prompt", "A" * 40]


CASES: dict[str, tuple[Make, str]] = {
    "unknown model": (lambda f: ["generate.py", "--model", "lama-70b", *PROMPT], "did you mean llama-70b"),
    "no weights": (lambda f: ["generate.py", "--model", "llama-70b", *PROMPT], "llama-70b"),
    "unknown quant": (lambda f: ["generate.py", "--quant", "int3", *PROMPT], "int3"),
    "too many ranks": (
        lambda f: ["--nproc", "12", "generate.py", *PROMPT],
        "num_heads=9 cannot be split over 12 ranks: at most one rank a query head; use --nproc 9 or fewer",
    ),
    "no ranks": (lambda f: ["--nproc", "0", "generate.py", *PROMPT], "0"),
    "long prompt": (long_prompt, "the context holds 512"),
    "empty prompt": (lambda f: ["generate.py", "--prompt", ""], "the prompt is empty"),
    "no prompt": (lambda f: ["generate.py"], "no prompt was given"),
    "missing prompt file": (lambda f: ["generate.py", "--prompt-file", str(f / "none")], "cannot be read"),
    "missing script": (lambda f: ["nothing.py"], "nothing.py"),
    "missing weights": (lambda f: ["generate.py", "--weights", str(f / "none"), *PROMPT], "none"),
    "truncated safetensors": (truncated_safetensors, "model.safetensors"),
    "empty gguf": (lambda f: gguf(f, b""), "model.gguf"),
    "truncated gguf": (lambda f: gguf(f, b"GGUF" + struct.pack("<IQQ", 3, 10, 2)), "model.gguf"),
    "2**60 tensors": (lambda f: gguf(f, b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0)), "model.gguf"),
    "2**62-byte string": (
        lambda f: gguf(f, b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"x" * 64), "model.gguf",
    ),
    "a pipe": (pipe, "no regular file"),
    "no KV heads": (
        lambda f: ["generate.py", "--model", str(tiny_model(f, num_key_value_heads=0)), *PROMPT], "num_kv_heads",
    ),
    "ranks of a lookup": (
        lambda f: ["generate.py", "--draft", "lookup", "--draft-ranks", "one", *PROMPT], "--draft-ranks is for",
    ),
    "another shape": (
        lambda f: ["generate.py", "--model", str(tiny_model(f, intermediate_size=96)), *PROMPT], "gate_proj",
    ),
    "no tokenizer": (
        lambda f: ["generate.py", "--model", str(tiny_model(f, with_tokenizer=False)), *PROMPT], "tokenizer",
    ),
    "does not fit": (
        # The KV cache alone is to take 1.3 TB a rank: no host has it free.
        lambda f: ["generate.py", "--model", "llama-70b", "--random-weights", "--cache-bytes", str(13 * 10**11), *PROMPT],
        "are free there",
    ),
    "context beyond the model": (lambda f: ["generate.py", "--context", "9000", *PROMPT], "8192 positions"),
    "bad temperature": (lambda f: ["generate.py", "--temperature", "-1", *PROMPT], "temperature"),
    "unknown flag": (lambda f: ["generate.py", "--temprature", "1", *PROMPT], "--temprature"),
    "draft of another vocabulary": (
        lambda f: ["generate.py", "--draft", str(tiny_model(f)), *PROMPT], "another vocabulary",
    ),
    "unknown draft": (lambda f: ["generate.py", "--draft", "lokup", *PROMPT], "--draft 'lokup' is neither lookup"),
    "draft without a value": (lambda f: ["generate.py", "--draft", "skip", *PROMPT], "skip:N"),
    "more layers than there are": (lambda f: ["generate.py", "--draft", "skip:30", *PROMPT], "skip:1 to skip:29"),
    "the target as its draft": (lambda f: ["generate.py", "--draft", "self:none", *PROMPT], "the target itself"),
    "no draft tokens": (
        lambda f: ["generate.py", "--draft", "lookup", "--draft-tokens", "0", *PROMPT], "use 1 to 15",
    ),
    "negative draft tokens": (
        lambda f: ["generate.py", "--draft", "lookup", "--draft-tokens", "-1", *PROMPT], "use 1 to 15",
    ),
    "a thousand draft tokens": (
        lambda f: ["generate.py", "--draft", "lookup", "--draft-tokens", "1000", *PROMPT], "use 1 to 15",
    ),
    "draft tokens without a draft": (
        lambda f: ["generate.py", "--draft-tokens", "4", *PROMPT], "no draft is given; add --draft",
    ),
    "draft quant of a lookup": (
        lambda f: ["generate.py", "--draft", "lookup", "--draft-quant", "int8", *PROMPT], "--draft-quant",
    ),
    "prompt beyond the draft's context": (short_draft, "tokens and the context of --draft"),
    "unknown user": (lambda f: ["generate.py", "--model", "~nouser/x", *PROMPT], "no such user"),
    "unknown user of the weights": (lambda f: ["generate.py", "--weights", "~nouser/x", *PROMPT], "no such user"),
    "name without end": (lambda f: ["generate.py", "--model", "x" * 5000, *PROMPT], "cannot be opened"),
    "cache too small": (lambda f: ["generate.py", "--cache-bytes", "1", *PROMPT], "1 are allowed"),
    "cache too large": (lambda f: ["generate.py", "--cache-bytes", str(10**14), *PROMPT], "are free there"),
    "fp8 on a CPU": (
        lambda f: ["generate.py", "--quant", "fp8", "--device", "cpu", *PROMPT], "--quant fp8 is for CUDA",
    ),
    "text in no encoding": (lambda f: ["generate.py", "--prompt", "a\udcff"], "surrogate"),
    "model is a number": (lambda f: run_file(f, "model = 5"), "model=5 is not a text"),
    "half a token": (lambda f: run_file(f, "context = 64.5"), "context=64.5 is not a whole number"),
    "stop is a number": (lambda f: run_file(f, "stop = [1]"), "stop=(1,) is not a list of texts"),
    "half a seed": (lambda f: run_file(f, "seed = 1.5"), "seed=1.5 is not a whole number"),
    "flag that is a number": (lambda f: run_file(f, "compile = 1"), "compile=1 is not true or false"),
    "system without chat": (lambda f: ["generate.py", "--system", "x", *PROMPT], "--chat"),
}  # fmt: skip


def launch(
    arguments: list[str], before: Callable[[], None] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """tp-launch with the arguments. before: called in the child before it becomes tp-launch."""
    command = [str(Path(sys.executable).parent / "tp-launch"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables}, preexec_fn=before,
    )  # fmt: skip


def obey_file_modes() -> None:
    """Root passes modes over by two capabilities; without them it is held to them as everybody is."""
    if os.geteuid() == 0:
        set_bound, override, read_search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        for capability in (override, read_search):
            assert ctypes.CDLL(None, use_errno=True).prctl(set_bound, capability, 0, 0, 0) == 0


def assert_refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert words in lines[0], lines[0]
    assert done.stdout == ""


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_sentence(case: str, tmp_path: Path, smollm2_gguf: Path) -> None:
    make, words = CASES[case]
    assert_refused(launch(make(tmp_path)), words)


def test_unwritable_cache_folder(tmp_path: Path, smollm2_gguf: Path) -> None:
    (tmp_path / "file").write_text("a file, so nothing can be made below it")
    done = launch(["generate.py", *PROMPT], TP_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert_refused(done, "TP_CACHE_DIR")


def test_unknown_user_of_the_hub_cache(smollm2_gguf: Path) -> None:
    done = launch(["generate.py", "--model", "llama-70b", *PROMPT], HF_HUB_CACHE="~nouser/x")
    assert_refused(done, "HF_HUB_CACHE ~nouser/x: there is no such user")


def test_a_folder_that_may_not_be_entered(tmp_path: Path, smollm2_gguf: Path) -> None:
    inside = tmp_path / "closed" / "model"
    inside.mkdir(parents=True)
    inside.parent.chmod(0)
    try:
        by_path = ["generate.py", "--model", str(inside), *PROMPT]
        assert_refused(launch(by_path, obey_file_modes), "cannot be opened")
        named = ["generate.py", "--model", "llama-70b", *PROMPT]
        assert_refused(launch(named, obey_file_modes, TP_MODEL_PATH=str(inside)), "cannot be opened")
    finally:
        inside.parent.chmod(0o700)


def test_plan_needs_no_weights_and_no_torch(tmp_path: Path) -> None:
    """The 70B plan for 8 ranks, from one process."""
    arguments = [
        "--nproc",
        "8",
        "generate.py",
        "--model",
        "llama-70b",
        "--quant",
        "int8",
        "--context",
        "8192",
    ]
    started = time.monotonic()
    done = launch([*arguments, "--plan"])
    assert time.monotonic() - started < 20
    assert done.returncode == 0, done.stderr
    assert "161 all_reduce" in done.stdout
    heading, *ranks = done.stdout.splitlines()[-9:]
    assert heading.split()[:3] == ["rank", "weights", "KV"] and heading.endswith("fits")
    # A rank has a KV head of 128 on 80 layers, in bf16 or fp32.
    kv_cache = {"0.31" if "int8/bf16" in done.stdout else "0.62"}
    assert {row.split()[3] for row in ranks} == kv_cache
    assert all(row.split()[-1] in ("yes", "no") for row in ranks)
    document = json.loads(launch([*arguments, "--plan", "--json"]).stdout)
    assert len(document["ranks"]) == 8
    assert document["weight_bytes_per_token"] == sum(
        n * k + 4 * n
        for n, k in [(128256, 8192)] + 80 * [
            (8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192),
            (28672, 8192), (28672, 8192), (8192, 28672),
        ]
    )  # fmt: skip
    code = (
        "import sys; from tp_runtime.generate import check; "
        "assert check(['--model', 'llama-70b', '--plan'], 8) == 0; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
