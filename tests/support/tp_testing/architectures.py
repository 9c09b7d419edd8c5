"""Tiny random models of transformers' causal-LM architectures, from tests/data/tiny_architectures."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FILE = Path(__file__).parents[2] / "data" / "tiny_architectures" / "configs.json"
CASES: dict[str, dict[str, Any]] = json.loads(_FILE.read_text())["cases"]
NEAR_START = ("A_log", "dt_", ".D", "lambda", "time_", "sinks", "_bias")  # parts of names of steep parameters


def settings(arch: str, changes: dict[str, int]) -> dict[str, Any]:
    """The configuration's keyword arguments, with `changes` wherever it has such a key."""
    found = copy.deepcopy(CASES[arch]["config_kwargs"])
    for part in (found, *(found[k] for k in ("text_config", "decoder", "decoder_config") if k in found)):
        if isinstance(part, dict):
            part.update({key: value for key, value in changes.items() if key in part})
    return found


def build(arch: str, changes: dict[str, int] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """(the fp32 model with all weights drawn, so that a wrong cut shows; its keyword inputs)."""
    import transformers

    model_class = getattr(transformers, CASES[arch]["cls"])
    config = transformers.CONFIG_MAPPING[arch](**settings(arch, changes or {}))
    if not isinstance(config, model_class.config_class):
        parts = (getattr(config, name, None) for name in ("text_config", "decoder", "decoder_config"))
        config = next(part for part in parts if isinstance(part, model_class.config_class))
    torch.manual_seed(0)
    model: nn.Module = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2 and not any(part in name for part in NEAR_START) and "norm" not in name:
                parameter.copy_(drawn * (0.5 if "emb" in name else 1 / math.sqrt(parameter.shape[-1])))
            else:
                parameter.add_(0.1 * drawn)
    return model, inputs(arch)


def inputs(arch: str) -> dict[str, Any]:
    """Token ids [2, 12], and what else the architecture's forward needs."""
    kind = CASES[arch].get("inputs_kind")
    rows = 8 if kind == "codebooks" else 2
    ids: Tensor = torch.randint(5, 246, (rows, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "use_cache": False} if kind == "nocache" else {"input_ids": ids}
