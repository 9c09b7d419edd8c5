"""Attention, rotary positions and cache writing on the GPU against plain PyTorch."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from tp_runtime.kernels import reference

BLOCK = 32
CACHES = [torch.bfloat16]
if os.environ.get("TRITON_INTERPRET") != "1":  # which halves small numbers on their way to fp8
    CACHES.append(torch.float8_e4m3fn)


def make_cache(
    lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(keys, values, block table): rows' blocks scattered, every slot beyond a row's length NaN."""
    most = max(-(-length // BLOCK) for length in lengths) + 1
    count = 1 + most * len(lengths)
    order = (torch.randperm(count - 1) + 1).view(len(lengths), most).int()
    keys, values = (torch.full((count, kv_heads, BLOCK, dim), torch.nan).bfloat16() for _ in range(2))
    for row, length in enumerate(lengths):
        for at in range(length):
            block = order[row, at // BLOCK]
            keys[block, :, at % BLOCK] = torch.randn(kv_heads, dim).bfloat16()
            values[block, :, at % BLOCK] = torch.randn(kv_heads, dim).bfloat16()
    return keys.to(dtype), values.to(dtype), order


def report(name: str, found: Tensor, wanted: Tensor) -> float:
    gap = (found.float().cpu() - wanted.float()).abs()
    print(f"{name}: largest {gap.max():.1e}, mean {gap.mean():.1e}")
    assert not found.isnan().any()
    return float(gap.max())


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (8, 1, 128), (3, 3, 32), (40, 2, 16)])
def test_decode(heads: int, kv_heads: int, dim: int, window: int, dtype: torch.dtype, device: str) -> None:
    from tp_runtime.kernels.cuda import attention_ops as ops

    lengths = [1, 31, 129, 256, 257, 777]  # of 129 (in tiles of 128) and 257 the newest has its own
    keys, values, table = make_cache(lengths, kv_heads, dim, dtype)
    q = torch.randn(len(lengths), heads, dim).bfloat16()
    positions, rows = torch.tensor(lengths).int() - 1, torch.arange(len(lengths)).int()
    starts, contexts = torch.arange(len(lengths) + 1).int(), torch.tensor(lengths).int()
    wanted = reference.attend_paged(
        q.float(), keys, values, table, starts, contexts, dim**-0.5, window, None, None
    )
    q, keys, values, positions, rows, table = (
        each.to(device) for each in (q, keys, values, positions, rows, table)
    )
    some, all_alone = (
        ops.DecodeScratch.make(len(lengths), heads, keys, max(lengths), most_splits=n) for n in (2, 32)
    )
    steps = [slice(None), *(slice(i, i + 1) for i in range(len(lengths)))]  # together, and each alone
    for scratch in (some, some, all_alone):  # runs of several tiles, of one; the counters are as they were
        for step in steps:
            out = torch.full_like(q[step], torch.nan)
            ops.decode_attention(
                q[step], keys, values, positions[step], rows[step], table, scratch, out,
                scale=dim**-0.5, window=window,
            )  # fmt: skip
            # The softmax's weights are rounded to bf16 before they multiply values of unit size.
            assert report(f"decode {heads}/{kv_heads} window {window}", out, wanted[step]) < 4e-2
            assert not scratch.count.any()


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (2, 1, 128)])
def test_prompt(heads: int, kv_heads: int, dim: int, window: int, dtype: torch.dtype, device: str) -> None:
    from tp_runtime.kernels.cuda import attention_ops as ops

    lengths, queries = [1, 70, 200], [1, 70, 33]
    keys, values, table = make_cache(lengths, kv_heads, dim, dtype)
    starts = torch.tensor([0, 1, 71, 104]).int()
    q = torch.randn(sum(queries) + 3, heads, dim).bfloat16()  # three tokens of padding
    contexts = torch.tensor(lengths).int()
    arguments = [each.to(device) for each in (q, keys, values, table, starts, contexts)]
    out = ops.paged_attention(*arguments, dim**-0.5, window)
    wanted = reference.attend_paged(
        q.float(), keys, values, table, starts, contexts, dim**-0.5, window, None, None
    )
    assert report(f"prompt {heads}/{kv_heads} window {window}", out, wanted) < 4e-2
    assert not out[-3:].any()


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("extras", [False, True])
def test_rope_write(extras: bool, dtype: torch.dtype, device: str) -> None:
    from tp_runtime.kernels.cuda import attention_ops as ops

    tokens, heads, kv_heads, dim, splits = 3, 4, 2, 32, 2
    size = (heads + 2 * kv_heads) * dim
    qkv = torch.randn(splits, tokens, size)
    bias = torch.randn(size) if extras else None
    qkv[:, 0, -1] = 400.0  # a value that is beyond fp8: the largest number stands for it
    norms = (torch.rand(dim) + 0.5, torch.rand(dim) + 0.5, 1e-5) if extras else None
    angles = torch.rand(64, dim // 2) * 6
    positions, rows = torch.tensor([0, 33, 40]).int(), torch.tensor([1, 0, 0]).int()
    table = torch.tensor([[3, 1], [2, 0]]).int()
    q = torch.full((tokens, heads, dim), torch.nan).bfloat16().to(device)
    keys, values = (torch.full((4, kv_heads, BLOCK, dim), torch.nan).to(dtype).to(device) for _ in range(2))
    moved = None if norms is None else (norms[0].to(device), norms[1].to(device), norms[2])
    ops.rope_write(
        qkv.to(device), None if bias is None else bias.to(device), angles.cos().to(device),
        angles.sin().to(device), moved, positions.to(device), rows.to(device), table.to(device), q, keys, values,
    )  # fmt: skip
    x = (qkv.sum(0) + (0 if bias is None else bias)).view(tokens, -1, dim)
    turned = x[:, : heads + kv_heads].clone()
    if norms is not None:
        rms = (turned.pow(2).mean(-1, keepdim=True) + norms[2]).rsqrt()
        weight = torch.cat((norms[0].expand(heads, dim), norms[1].expand(kv_heads, dim)))
        turned = turned * rms * weight
    angle = angles[positions.long()].repeat(1, 2).unsqueeze(1)
    across = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), dim=-1)
    turned = turned * angle.cos() + across * angle.sin()
    # Rounded once to bf16 (by the interpreter towards zero): 2^-8 of values up to five.
    assert report("q", q, turned[:, :heads]) < 4e-2
    most = torch.finfo(dtype).max
    for token, (position, row) in enumerate(zip(positions.tolist(), rows.tolist(), strict=True)):
        block = int(table[row, position // BLOCK])
        for name, cache, wanted in (
            ("k", keys, turned[token, heads:]),
            ("v", values, x[token, heads + kv_heads :]),
        ):
            wanted = wanted.clamp(-most, most)
            # fp8 has three bits of mantissa: 2^-4 of a value, and by the interpreter twice that.
            share = wanted.abs() * (2**-3 if dtype == torch.float8_e4m3fn else 2**-7) + 4e-2
            assert (
                report(name, cache.float()[block, :, position % BLOCK] / share.to(device), wanted / share) < 1
            )
    keys = keys.float()
    assert int(keys.isnan().sum()) == (keys[0].numel() * 4 - tokens * kv_heads * dim)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("dim", [16, 128])
def test_a_token_alone_after_its_rotation(dim: int, dtype: torch.dtype, device: str) -> None:
    """Token after token, the newest key and value written just before, and the old ones loaded before that."""
    from tp_runtime.kernels.cuda import attention_ops as ops

    heads, kv_heads, first, count = 4, 2, 125, 6
    keys, values, table = make_cache([first], kv_heads, dim, dtype)
    keys, values, table = (each.to(device) for each in (keys, values, table))
    qkv = torch.randn(count, 2, 1, (heads + 2 * kv_heads) * dim, device=device)
    angles = torch.rand(first + count, dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    position, row = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
    q, out = torch.empty(2, 1, heads, dim, dtype=torch.bfloat16, device=device).unbind(0)
    scratch = ops.DecodeScratch.make(1, heads, keys, first + count)
    projected = qkv[0].clone()
    position.fill_(first)

    def run() -> None:
        ops.rope_write(projected, None, cos, sin, None, position, row, table, q, keys, values)
        ops.decode_attention(
            q, keys, values, position, row, table, scratch, out, scale=dim**-0.5, window=0
        )  # fmt: skip

    step = run
    if device == "cuda":
        run()  # compiled; what it wrote is written again
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        step = graph.replay
    for number in range(count):
        projected.copy_(qkv[number])
        position.fill_(first + number)
        step()
        length = torch.tensor([first + number + 1]).int()
        wanted = reference.attend_paged(
            q.float().cpu(), keys.cpu(), values.cpu(), table.cpu(), torch.tensor([0, 1]).int(), length,
            dim**-0.5, 0, None, None,
        )  # fmt: skip
        assert report(f"position {first + number}", out, wanted) < 4e-2
