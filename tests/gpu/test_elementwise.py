"""The kernels between a prompt's linears against PyTorch's own operations in float64."""

from __future__ import annotations

import pytest
import torch

from tp_runtime.models.llama import silu_mul
from tp_runtime.models.rope import turn


@pytest.mark.parametrize("size", [512, 515])
def test_rms_norm(size: int, device: str) -> None:
    from tp_runtime.kernels.cuda import elementwise

    x, weight = torch.randn(7, size) * 3, torch.rand(size) + 0.5
    found = elementwise.rms_norm(x.to(device), weight.to(device), 1e-5, torch.float32).cpu()
    wide = x.double()
    wanted = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    assert (found - wanted).abs().max() < 1e-5  # fp32 sums of some hundred squares


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [512, 515])
def test_add_rms_norm(size: int, biased: bool, device: str) -> None:
    from tp_runtime.kernels.cuda import elementwise

    x, added, weight = torch.randn(7, size) * 3, torch.randn(7, size).bfloat16(), torch.rand(size) + 0.5
    bias = torch.randn(size).bfloat16() if biased else None
    stream = x.to(device, copy=True)
    bias_there = None if bias is None else bias.to(device)
    found = elementwise.add_rms_norm_(
        stream, added.to(device), bias_there, weight.to(device), 1e-5, torch.float32
    )
    wide = x.double() + added.double() + (0 if bias is None else bias.double())
    wanted = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    assert (stream.cpu() - wide).abs().max() < 2e-6  # two sums of numbers below 16, in fp32
    assert (found.cpu() - wanted).abs().max() < 1e-5  # as above


@pytest.mark.parametrize(("heads", "dim"), [(5, 64), (1, 128)])
def test_turn(heads: int, dim: int, device: str) -> None:
    from tp_runtime.kernels.cuda import elementwise

    tokens = 6
    joined = torch.randn(tokens, (heads + 2) * dim)
    x = joined[:, dim : (1 + heads) * dim].unflatten(-1, (heads, dim))  # strided, as a slice of q, k and v
    angles = torch.rand(tokens, dim // 2).repeat(1, 2) * 6
    on_device = joined.to(device)[:, dim : (1 + heads) * dim].unflatten(-1, (heads, dim))
    found = elementwise.turn(on_device, angles.cos().to(device), angles.sin().to(device)).cpu()
    wanted = turn(x.double(), angles.double().cos(), angles.double().sin())
    assert (found - wanted).abs().max() < 1e-5  # two products of numbers up to five, in fp32


@pytest.mark.parametrize("size", [64, 2050])
def test_silu_mul(size: int, device: str) -> None:
    from tp_runtime.kernels.cuda import elementwise

    both = torch.randn(4, 2 * size) * 2
    moved = both.to(device)
    found = elementwise.silu_mul(moved[:, :size], moved[:, size:]).cpu()
    wanted = silu_mul(both[:, :size].double(), both[:, size:].double())
    assert (found - wanted).abs().max() < 1e-4  # exp in fp32, times values of up to ten
