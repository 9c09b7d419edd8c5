"""Weights as the CUDA kernels want them, made once when they are loaded.

bf16, fp8 and int8 stay [n, k], row by row. int4 is stored in planes: for every pair of groups of G columns,
G bytes of which byte j holds column j of the first group low and of the second one high, so that the bytes
of a row lie together and unpack into two tiles that have one scale a row each. Group scales (and offsets)
are kept pair by pair, [pairs, n] words of two fp16, so that a tile's lie together. Missing columns at the
end are filled with values whose scale is 0.

Legend: N rows, K columns, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import unpack_nibbles


def takes(*, bits: int, group_size: int, head: int, n: int, k: int) -> bool:
    """True where the kernels can read such a weight: rows of whole 16 bytes, groups of whole columns."""
    if n == 0 or k == 0:
        return False
    if bits == 4:
        return group_size in (32, 64, 128) and head == 0
    return group_size == 0 and k % 16 == 0


def padded_columns(k: int, group_size: int) -> int:
    """Columns a plane-packed row of k columns covers: whole pairs of groups."""
    return -(-k // (2 * group_size)) * 2 * group_size


def pack_planes(q: Tensor, k: int, group_size: int) -> Tensor:
    """uint8 [N, ceil(k/2)] with column 2j low in byte j -> uint8 [N, padded/2] in planes."""
    padded = padded_columns(k, group_size)
    out = torch.empty((q.shape[0], padded // 2), dtype=torch.uint8, device=q.device)
    step = max(1, (64 << 20) // max(padded, 1))
    for start in range(0, q.shape[0], step):
        rows = unpack_nibbles(q[start : start + step], k)
        if padded > k:
            rows = torch.nn.functional.pad(rows, (0, padded - k))
        pairs = rows.view(rows.shape[0], -1, 2, group_size)
        out[start : start + step] = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)
    return out


def unpack_planes(packed: Tensor, k: int, group_size: int) -> Tensor:
    """The inverse of pack_planes, unpacked: uint8 [N, k] in 0..15."""
    pairs = packed.view(packed.shape[0], -1, group_size)
    return torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)[:, :k]


def pair_groups(scale: Tensor, k: int, group_size: int) -> Tensor:
    """fp16 [N, groups] -> int32 [pairs, N]: the scales of a pair of groups, the first one low.

    Groups that are not there are 0. Words of 32 bits are the least that cp.async moves.
    """
    missing = padded_columns(k, group_size) // group_size - scale.shape[1]
    padded = torch.nn.functional.pad(scale.half(), (0, missing))
    return padded.view(padded.shape[0], -1, 2).transpose(0, 1).contiguous().view(torch.int32).squeeze(-1)


def pack(
    q: Tensor, scale: Tensor, offset: Tensor | None, *, bits: int, group_size: int, k: int
) -> tuple[Tensor, ...]:
    """The tensors of PreparedWeight kind "cuda": weight, scale and, with offsets, those.

    q, scale, offset: canonical, as kernels.linear.prepare gets them.
    """
    if bits == 8:
        return q.contiguous(), scale.float().contiguous()
    planes = pack_planes(q, k, group_size)
    scales = [pair_groups(each, k, group_size) for each in (scale, offset) if each is not None]
    return (planes, *scales)
