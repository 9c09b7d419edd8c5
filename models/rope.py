"""Rotary positions: the frequencies of each kind of scaling, and turning a head by its position.

Pair i of a head (elements i and i + head_dim/2, the layout Hugging Face checkpoints have) turns by
position * theta^(-2i/head_dim). Models trained on short contexts reach longer ones with smaller
frequencies: "linear" divides all of them (https://arxiv.org/abs/2306.15595), "llama3" only the slow ones
with a smooth passage between (Llama 3.1), "yarn" the same by number of turns, and it also sharpens
attention (https://arxiv.org/abs/2309.00071). All of it in fp32: at position 100,000 a bf16 angle is noise.

Legend: B leading dims (any number), S tokens, H heads, D head_dim, F = D/2 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(frequencies [head_dim / 2] in fp32 on the CPU, factor on both cos and sin).

    The CPU is named so that a model built on the meta device has real frequencies.
    """
    base_F = config.rope_theta ** (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    )
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / base_F, 1.0
    if scaling["rope_type"] == "linear":
        return 1.0 / base_F / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(1.0 / base_F, scaling), 1.0
    assert scaling["rope_type"] == "yarn", f"{scaling['rope_type']} passed ModelConfig's check"
    return _yarn(base_F, config, scaling), _yarn_attention_factor(scaling)


def _llama3(inv_freq_F: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength_F = 2 * math.pi / inv_freq_F
    # 0 where a wave fits the old context less than `low` times, 1 where it fits more than `high` times.
    smooth_F = (original / wavelength_F - low) / (high - low)
    between_F = (1 - smooth_F) * inv_freq_F / factor + smooth_F * inv_freq_F
    slow_F, fast_F = wavelength_F > original / low, wavelength_F < original / high
    return torch.where(slow_F, inv_freq_F / factor, torch.where(fast_F, inv_freq_F, between_F))


def _yarn(base_F: Tensor, config: ModelConfig, scaling: Mapping[str, Any]) -> Tensor:
    original, dim = scaling["original_max_position_embeddings"], config.head_dim

    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns this often over the old context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair_with(scaling.get("beta_fast", 32)), pair_with(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    ramp_F = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)
    kept_F = 1 - ramp_F
    return 1.0 / (scaling["factor"] * base_F) * (1 - kept_F) + 1.0 / base_F * kept_F


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
    return grown(1.0)


def turn(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Every head of x turned by its token's angles. Computed in cos's dtype (fp32), returned in x's."""
    x = x_BSHD.to(cos_BSD.dtype)
    left, right = x.chunk(2, dim=-1)
    across = torch.cat((-right, left), dim=-1)
    return (x * cos_BSD.unsqueeze(-2) + across * sin_BSD.unsqueeze(-2)).to(x_BSHD.dtype)
