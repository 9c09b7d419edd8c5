"""The GPU linears at the shapes of real models, each with the tile chosen for it, as many rows as have one."""

from __future__ import annotations

import pytest
import torch

ROWS = (1, 5, 12)
# (n, k) of W: of llama-70b whole and one of two, and of llama-8b. Gate and up count as one of 2 n rows.
PLAIN = [(10240, 8192), (5120, 8192), (8192, 4096), (8192, 28672), (8192, 14336), (4096, 14336), (6144, 4096)]
GATED = [(57344, 8192), (28672, 8192), (14336, 8192), (28672, 4096)]


@pytest.mark.parametrize("quant", ["none", "int8", "fp8", "int4-g32", "int4-g128"])
@pytest.mark.parametrize(
    ("shape", "gated"), [(shape, False) for shape in PLAIN] + [(shape, True) for shape in GATED], ids=str
)
def test_chosen_tiles(shape: tuple[int, int], gated: bool, quant: str) -> None:
    from tp_runtime.benchmark.kernels_cuda import group_size_of, make_weights
    from tp_runtime.kernels.cuda.linear import choose_tile, dequantize, gemv_

    (n, k), group = shape, group_size_of(quant)
    tensors = make_weights(quant, n, k, 1)[0]
    if quant == "fp8":
        numbers = tensors[0].view(torch.int8)
        numbers[numbers == -1] = 0  # NaN in fp8
    w = tensors[0] if quant == "none" else dequantize(tensors, k, group)
    for rows in ROWS:
        tile = choose_tile(tensors[0], k, rows=rows, gated=gated)
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        x /= 64 if quant == "none" else 1  # so that gates are of a size where SiLU bends
        y = torch.full((tile.splits, rows, n // (2 if gated else 1)), torch.nan, device="cuda")
        gemv_(x, tensors, y, group_size=group, gated=gated, tile=tile)
        wanted = (x.float() @ w.float().T).double()
        if gated:
            wanted = torch.nn.functional.silu(wanted[:, : n // 2]) * wanted[:, n // 2 :]
        gap = (y.sum(0) - wanted).abs() / wanted.std()
        print(f"{quant} {shape} x{rows} {tile}: largest {gap.max():.1e}, mean {gap.mean():.1e}")
        # The twin's weights are rounded to bf16, 2^-9 of each; the sums' errors are that of their spread, and
        # of a gate times an up, whose largest are some forty spreads.
        assert gap.max() < (0.1 if gated else 0.02) and gap.mean() < 2e-3
