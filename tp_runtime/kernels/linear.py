"""Weight-only linears: y = x W^T with W quantised, x in floating point, sums in fp32.

Decoding reads every weight once a token, so a linear of few rows runs at memory speed and its time is
bytes / bandwidth; the kernels behind this interface differ in how near they come. `prepare` packs a
weight once, when it is loaded, into whatever its kernel wants; `weight_only_linear` runs it.

Kinds: "cpu" (C++, cpu/), "cuda" (Triton, cuda/), "aten_int8" and "aten_int4" (torch's own, where no
compiler is found), "reference" (dequantise, then multiply; any shape, any device), "plain" (a floating-point
weight as it is).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .cpu import build

_BLOCK_ROWS = 16  # the C++ kernels' rows a block (cpu/src/weight.h)


@dataclass(frozen=True)
class PreparedWeight:
    """A weight as its kernel wants it.

    kind: which kernel. n, k: logical shape held here. bits: 4 or 8, or 16 and 32 for plain bf16 and fp32.
    group_size: columns that share a scale (0: one scale a row, or none). head: columns of the first group
    left of column 0. tensors: the kernel's own; a caller may move them into buffers and put them back with
    dataclasses.replace. asymmetric: groups have offsets. gated: rows are gate over up, and the linear
    returns silu(gate) * up, [..., n / 2]. round_activations: bf16's precision is enough for fp32
    activations: few rows keep 15 bits under the largest of each 32, many rows (prefill) are rounded to bf16.
    """

    kind: str
    n: int
    k: int
    bits: int
    group_size: int
    head: int
    tensors: tuple[Tensor, ...]
    asymmetric: bool = False
    gated: bool = False
    round_activations: bool = False

    @property
    def channel_scale(self) -> Tensor | None:
        """fp32, one a row and padded to whole blocks, of a "cpu" weight that has one scale a row."""
        return self.tensors[1] if len(self.tensors) > 1 else None


@torch.library.custom_op("tp_runtime::linear_reference", mutates_args=())
def _linear_reference(
    x: Tensor, q: Tensor, scale: Tensor, offset: Tensor | None, bits: int, group_size: int, head: int
) -> Tensor:
    k = x.shape[-1]
    w_NK = reference.dequantize(q, scale, offset, bits=bits, group_size=group_size, head=head, k=k)
    return torch.nn.functional.linear(x.float(), w_NK).to(x.dtype)


@_linear_reference.register_fake
def _(
    x: Tensor, q: Tensor, scale: Tensor, offset: Tensor | None, bits: int, group_size: int, head: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))


# ATen's ops want scales in the activations' dtype; they run in fp32 here, which keeps the scales exact.
@torch.library.custom_op("tp_runtime::linear_aten_int8", mutates_args=())
def _linear_aten_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).float(), q, scale)
    return y.to(x.dtype).view(*x.shape[:-1], q.shape[0])


@_linear_aten_int8.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))


@torch.library.custom_op("tp_runtime::linear_aten_int4", mutates_args=())
def _linear_aten_int4(x: Tensor, q: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
    x_MK = x.reshape(-1, x.shape[-1]).float()
    y = torch._weight_int4pack_mm_for_cpu(x_MK, q, group_size, scale_and_zero)
    return y.to(x.dtype).view(*x.shape[:-1], scale_and_zero.shape[1])


@_linear_aten_int4.register_fake
def _(x: Tensor, q: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale_and_zero.shape[1]))


def _native_kind(q: Tensor, *, bits: int, group_size: int) -> str | None:
    """ "cpu" where the C++ kernels take this weight."""
    takes = (
        q.device.type == "cpu"
        and not q.is_floating_point()
        and group_size in (0, 32, 64, 128)
        and not (bits == 4 and group_size == 0)
    )
    return "cpu" if takes and build.available() else None


def _cuda_takes(q: Tensor, *, bits: int, group_size: int, head: int, n: int, k: int) -> bool:
    """True where the Triton kernels take this weight. Triton is loaded only where there is a GPU."""
    if q.device.type != "cuda":
        return False
    from .cuda.pack import takes

    return takes(bits=bits, group_size=group_size, head=head, n=n, k=k)


def _aten_kind(q: Tensor, *, bits: int, group_size: int, head: int, n: int, k: int) -> str:
    """Which of ATen's ops takes this weight; "reference" where none does."""
    if q.device.type != "cpu" or q.is_floating_point() or n == 0 or k == 0:
        return "reference"
    if bits == 8 and group_size == 0:
        return "aten_int8"
    if bits == 4 and group_size in (32, 64, 128) and head == 0 and k % group_size == 0 and n % 16 == 0:
        return "aten_int4"
    return "reference"


def prepare(
    q: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    *,
    bits: int,
    group_size: int,
    head: int,
    n: int,
    k: int,
    backend: str = "auto",
) -> PreparedWeight:
    """Pack a canonical quantised weight for the best kernel this machine has.

    q: int8 or float8_e4m3fn [n, k], or bits=4: uint8 [n, ceil(k/2)] (column 2j in the low nibble of byte j).
    scale: fp32 [n] where group_size is 0, else fp16 [n, G], one for each of the G groups that columns
    head .. head+k-1 touch.
    offset: fp16 [n, G] or None; 4 bits without it mean w = scale * (q - 8). backend: "auto" or
    "reference".
    """
    assert backend in ("auto", "reference"), f"backend {backend!r} is neither auto nor reference"
    assert bits in (4, 8), f"{bits} bits a weight are not supported"
    assert tuple(q.shape) == (n, k if bits == 8 else (k + 1) // 2), f"q is {tuple(q.shape)} for [{n}, {k}]"
    shape: dict[str, Any] = {"n": n, "k": k, "bits": bits, "group_size": group_size, "head": head}
    kind = "reference"
    if backend == "auto":
        kind = _native_kind(q, bits=bits, group_size=group_size) or _aten_kind(
            q, bits=bits, group_size=group_size, head=head, n=n, k=k
        )
    if kind == "cpu":
        return _prepare_native(q, scale, offset, **shape)
    if backend == "auto" and _cuda_takes(q, **shape):
        from .cuda.pack import pack

        packed = pack(q, scale, offset, bits=bits, group_size=group_size, k=k)
        return PreparedWeight("cuda", n, k, bits, group_size, head, packed, offset is not None)
    if kind == "aten_int8":
        tensors: tuple[Tensor, ...] = (q.contiguous(), scale.float().contiguous())
    elif kind == "aten_int4":
        tensors = (*_pack_aten_int4(q, scale, offset, k),)
    else:
        tensors = (q, scale) if offset is None else (q, scale, offset)
    return PreparedWeight(kind, tensors=tensors, **shape)


def prepare_plain(weight: Tensor, *, backend: str = "auto") -> PreparedWeight:
    """Pack a floating-point weight [n, k] for the best kernel this machine has.

    bf16 and fp32 have a C++ kernel; others, and backend="reference", stay as they are for torch's linear.
    """
    assert backend in ("auto", "reference"), f"backend {backend!r} is neither auto nor reference"
    n, k = weight.shape
    native = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32)
    if backend == "reference" or not native or not build.available():
        return PreparedWeight("plain", n, k, weight.dtype.itemsize * 8, 0, 0, (weight,))
    packed = torch.ops.tp_cpu.pack_plain(weight)
    return PreparedWeight("cpu", n, k, weight.dtype.itemsize * 8, 0, 0, (packed,))


def _prepare_native(
    q: Tensor, scale: Tensor, offset: Tensor | None, *, n: int, k: int, bits: int, group_size: int, head: int
) -> PreparedWeight:
    kept = None if offset is None else offset.half().contiguous()
    grouped = scale.half().contiguous() if group_size else scale
    packed = torch.ops.tp_cpu.pack_quantized(q.contiguous(), grouped, kept, n, k, bits, group_size, head)
    tensors: tuple[Tensor, ...] = (packed,)
    if group_size == 0:
        padded = torch.zeros(-(-n // _BLOCK_ROWS) * _BLOCK_ROWS)
        padded[:n] = scale
        tensors = (packed, padded)
    return PreparedWeight("cpu", n, k, bits, group_size, head, tensors, offset is not None)


def join_rows(parts: Sequence[PreparedWeight], *, gated: bool = False) -> PreparedWeight | None:
    """One weight of all the parts' rows, in order: several linears of one input read in one go.

    gated: of two parts, gate and up; the linear returns silu(gate) * up. Returns None where the parts'
    kernel cannot join them: not the C++ one, formats that differ, or a part that ends inside a block.
    """
    first = parts[0]
    alike = all(replace(part, n=first.n, tensors=()) == replace(first, tensors=()) for part in parts)
    whole = all(part.n % _BLOCK_ROWS == 0 for part in (parts if gated else parts[:-1]))
    if first.kind != "cpu" or not alike or not whole or (gated and parts[0].n != parts[1].n):
        return None
    n = sum(part.n for part in parts)
    blocks = sum(-(-part.n // _BLOCK_ROWS) for part in parts)
    num_bytes = sum(part.tensors[0].numel() for part in parts)
    packed = torch.ops.tp_cpu.join_packed(
        [part.tensors[0] for part in parts], max(1, num_bytes // max(1, blocks)), gated
    )
    scales = [part.channel_scale for part in parts if part.channel_scale is not None]
    tensors = (packed, torch.cat(scales)) if scales else (packed,)
    return replace(first, n=n, tensors=tensors, gated=gated)


def lookup(ids: Tensor, prepared: PreparedWeight) -> Tensor:
    """Rows of a "cpu" weight, in fp32. ids: integers [...] below n. Returns [..., k]."""
    p = prepared
    shape = (p.n, p.k, p.bits, p.group_size, p.head, p.asymmetric)
    rows = torch.ops.tp_cpu.packed_rows(ids.reshape(-1).long(), p.tensors[0], p.channel_scale, *shape)
    return rows.view(*ids.shape, p.k)


def _pack_aten_int4(q: Tensor, scale: Tensor, offset: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    packed = torch._convert_weight_to_int4pack_for_cpu(reference.unpack_nibbles(q, k).int(), 1)
    scale = scale.float()
    # ATen computes (q - 8) * scale + zero.
    zero = torch.zeros_like(scale) if offset is None else offset.float() + 8 * scale
    return packed, torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


def weight_only_linear(x: Tensor, prepared: PreparedWeight) -> Tensor:
    """x W^T in x's dtype, summed in fp32. x: [..., k], fp32, bf16 or fp16. Returns [..., n]."""
    tensors = prepared.tensors
    if prepared.kind == "cpu":
        p = prepared
        shape = (p.n, p.k, p.bits, p.group_size, p.head, p.asymmetric)
        return torch.ops.tp_cpu.linear(x, tensors[0], p.channel_scale, *shape, p.gated, p.round_activations)
    if prepared.kind == "cuda":
        from .cuda.linear import linear

        return linear(x, tensors, group_size=prepared.group_size, gated=prepared.gated)
    if prepared.kind == "plain":
        return torch.nn.functional.linear(x.to(tensors[0].dtype), tensors[0]).to(x.dtype)
    if prepared.kind == "aten_int8":
        return _linear_aten_int8(x, tensors[0], tensors[1])
    if prepared.kind == "aten_int4":
        return _linear_aten_int4(x, tensors[0], tensors[1], prepared.group_size)
    offset = tensors[2] if len(tensors) > 2 else None
    return _linear_reference(
        x, tensors[0], tensors[1], offset, prepared.bits, prepared.group_size, prepared.head
    )


class PreparedModule(nn.Module):
    """Holds a prepared weight's tensors as buffers, so that `.to()` and the accounting of bytes see them."""

    def __init__(self, prepared: PreparedWeight) -> None:
        super().__init__()
        self._shape = replace(prepared, tensors=())
        self._buffer_names = [f"packed_{i}" for i in range(len(prepared.tensors))]
        for name, tensor in zip(self._buffer_names, prepared.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def prepared(self) -> PreparedWeight:
        """The weight, on the buffers as they are now."""
        return replace(self._shape, tensors=tuple(getattr(self, name) for name in self._buffer_names))


class PreparedLinear(PreparedModule):
    """y = x W^T + bias of a prepared weight.

    bias: floating point [n] or None.
    """

    def __init__(self, prepared: PreparedWeight, bias: Tensor | None = None) -> None:
        super().__init__(prepared)
        self.out_features, self.in_features = prepared.n, prepared.k
        self.bias: Tensor | None
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features], fp32, bf16 or fp16. Returns [..., out_features] in x's dtype."""
        y = weight_only_linear(x, self.prepared)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        shape = self._shape
        return f"in_features={shape.k}, out_features={shape.n}, bits={shape.bits}, kernel={shape.kind}"


class PreparedEmbedding(PreparedModule):
    """ids -> rows of a prepared "cpu" weight, in `dtype`: an embedding that shares the head's table."""

    def __init__(self, prepared: PreparedWeight, dtype: torch.dtype) -> None:
        assert prepared.kind == "cpu", f"rows of a {prepared.kind!r} weight cannot be looked up"
        super().__init__(prepared)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers [...], each below n. Returns [..., k]."""
        return lookup(ids, self.prepared).to(self.dtype)
