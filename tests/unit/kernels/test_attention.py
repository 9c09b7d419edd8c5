"""Attention over the block table against its twin, and the twin against torch's attention.

Tolerances, absolute, on values of size one: fp32 2e-6 (sums in another order), bf16 and fp16 caches and
queries one rounding of the output, 2^-7 and 2^-10, where rows of many queries go through torch's flash
attention, which rounds weights as well: twice that. fp32 queries over a bf16 cache: fp32's where a row has
few queries, bf16's where it has many. An int8 cache is read as it was written, so the same holds of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from tp_runtime.kernels import reference
from tp_runtime.kernels.attention import Scales, cache_write, paged_attention
from tp_runtime.kernels.cpu import build

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-7, torch.float16: 2 * 2**-10}
FP8 = torch.float8_e4m3fn
TOLERANCE[torch.int8] = TOLERANCE[torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """rows: (queries, context) of each; window 0: none; padding: tokens beyond the last row's."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    rows: tuple[tuple[int, int], ...]
    window: int = 0
    padding: int = 0


@dataclass
class Step:
    """The tensors of one case. The cache, or its scales, are full of NaN where nobody wrote."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    scales: Scales | None

    @classmethod
    def build(cls, case: Case, dtype: torch.dtype, cache_dtype: torch.dtype, backend: str = "auto") -> Step:
        generator = torch.Generator().manual_seed(len(case.rows))
        blocks = [-(-context // case.block_size) for _, context in case.rows]
        shape = (sum(blocks) + 2, case.kv_heads, case.block_size, case.head_dim)
        keys, values, scales = empty_cache(shape, cache_dtype)
        free = torch.randperm(sum(blocks) + 1, generator=generator) + 1
        table = torch.zeros(len(case.rows), max(blocks) + 1, dtype=torch.int32)
        for row, ((_, context), count) in enumerate(zip(case.rows, blocks, strict=True)):
            own, free = free[:count], free[count:]
            table[row, :count] = own.int()
            position = torch.arange(context)
            slots = own[position // case.block_size] * case.block_size + position % case.block_size
            k, v = torch.randn(2, context, case.kv_heads, case.head_dim, generator=generator).to(dtype)
            cache_write(k, v, keys, values, slots, scales=scales, backend=backend)
        starts = torch.tensor([0] + [queries for queries, _ in case.rows]).cumsum(0).int()
        tokens = int(starts[-1]) + case.padding
        q = torch.randn(tokens, case.heads, case.head_dim, generator=generator).to(dtype)
        lens = torch.tensor([context for _, context in case.rows], dtype=torch.int32)
        return cls(q, keys, values, table, starts, lens, scales)

    def attend(self, case: Case, backend: str = "auto", wide: bool = False) -> torch.Tensor:
        q, keys, values = self.q, self.keys, self.values
        if wide:
            q = q.float()
            keys, values = (x if self.scales else x.float() for x in (keys, values))
        scale = case.head_dim**-0.5
        lines = (self.block_table, self.query_start, self.context_lens)
        return paged_attention(
            q, keys, values, *lines, scale, case.window, scales=self.scales, backend=backend
        )

    def alone(self, row: int, token: int, queries: int, context: int) -> Step:
        """Only `queries` of a row, from `token` of the step on, the last of them at the end of `context`."""
        starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, queries], [context]))
        q, table = self.q[token : token + queries], self.block_table[row : row + 1]
        return replace(self, q=q, block_table=table, query_start=starts, context_lens=lens)


def empty_cache(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, Scales | None]:
    """Keys, values and scales: NaN, and of an int8 cache any numbers with NaN for scales."""
    if dtype is not torch.int8:
        keys, values = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        return keys, values, None
    keys, values = (torch.randint(-128, 128, shape, dtype=dtype) for _ in range(2))
    key_scales, value_scales = (torch.full(shape[:3], float("nan")) for _ in range(2))
    return keys, values, (key_scales, value_scales)


MIXED = ((1, 300), (1, 5), (3, 700), (0, 9), (17, 100))
CASES = [
    Case(8, 2, 64, 32, MIXED, padding=3),
    Case(9, 3, 64, 32, ((1, 256), (2, 1000))),
    Case(4, 4, 80, 16, ((1, 1), (5, 5), (16, 513))),
    Case(4, 1, 16, 8, ((1, 50), (5, 129), (16, 600)), window=7),
    Case(4, 2, 128, 32, ((1, 50), (5, 129), (16, 600), (30, 400), (40, 40)), window=130),
    Case(8, 2, 64, 32, ((41, 41), (100, 333), (2, 70), (50, 2001))),
    Case(4, 2, 32, 16, ((300, 900), (1, 700), (150, 150), (140, 141)), window=200),
    Case(3, 3, 48, 8, ((45, 61), (129, 130), (64, 64)), window=9),
    Case(6, 2, 24, 8, ((2, 20), (1, 9), (40, 50))),  # a head_dim that only the reference takes
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.int8),
]


@pytest.fixture(autouse=True, scope="module")
def _needs_kernels() -> None:
    assert build.available(), "the suite needs g++"


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_the_twin(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    step = Step.build(case, *dtypes)
    y, expected = step.attend(case), step.attend(case, "reference", wide=True)
    error = (y.float() - expected).abs()
    print(f"{case} {dtypes}: largest error {error.max():.2e}, mean {error.mean():.2e}")
    many = torch.repeat_interleave(
        torch.tensor([queries > 16 for queries, _ in case.rows]), step.query_start.diff()
    )
    many = torch.cat([many, torch.zeros(case.padding, dtype=torch.bool)])
    assert y.dtype == dtypes[0]
    assert many.all() or error[~many].amax() <= TOLERANCE[dtypes[0]]
    assert not many.any() or error[many].amax() <= TOLERANCE[dtypes[1]]
    assert not y[int(step.query_start[-1]) :].any(), "padding is zero"


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_batch_mates_queries_and_threads_change_no_bit(case: Case, cache_dtype: torch.dtype) -> None:
    step, threads = Step.build(case, torch.bfloat16, cache_dtype), torch.get_num_threads()
    together = step.attend(case)
    try:
        torch.set_num_threads(1)
        assert torch.equal(together, step.attend(case))
    finally:
        torch.set_num_threads(threads)
    for row, (queries, context) in enumerate(case.rows):
        first = int(step.query_start[row])
        if queries > 16:
            y = step.alone(row, first, queries, context).attend(case)
            assert torch.equal(y, together[first : first + queries]), row
            continue
        for i in range(queries):
            one = step.alone(row, first + i, 1, context - queries + 1 + i)
            assert torch.equal(one.attend(case)[0], together[first + i]), (row, i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_cache_write_like_the_twin(cache_dtype: torch.dtype, dtype: torch.dtype) -> None:
    qkv = torch.randn(7, 4 * 2, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    slots = torch.tensor([0, 5, 9, 8, 31, 17, 3])
    caches = {}
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        keys, values, scales = empty_cache((4, 2, 8, 48), cache_dtype)
        cache_write(qkv[:, 4:6], qkv[:, 6:], keys, values, slots, scales=scales, backend=backend)
        caches[backend] = (keys, values, *(scales or ()))
    for fast, slow in zip(caches["auto"], caches["reference"], strict=True):
        assert torch.equal(fast.nan_to_num(7), slow.nan_to_num(7))


def awkward_vectors() -> torch.Tensor:
    """[T, 1, 16]: ties, zeros, the smallest and the largest numbers, and what is not finite."""
    x = torch.randn(10, 1, 16, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1] = torch.arange(16) - 7.5  # at a scale of 1, ties
    x[1, 0, 0] = 127
    x[2] *= 1e-38
    x[3] = torch.arange(16) * 1e-45
    x[4] = x[4] / x[4].abs().max() * 3e38
    x[5, 0, 3], x[6, 0, 3], x[7, 0, 3] = float("nan"), float("inf"), float("-inf")
    x[8] = -x[1]
    return x


def test_awkward_vectors_in_an_int8_cache() -> None:
    x = awkward_vectors()
    expected, expected_scale = reference.quantize_int8(x)
    keys, values, scales = empty_cache((2, 1, 8, 16), torch.int8)
    assert scales is not None
    cache_write(x, x, keys, values, torch.arange(len(x)), scales=scales)
    for cache, scale in ((keys, scales[0]), (values, scales[1])):
        assert torch.equal(cache[:, 0].flatten(0, 1)[: len(x)], expected.squeeze(1))
        assert torch.equal(scale.flatten()[: len(x)].nan_to_num(-1), expected_scale.squeeze(1).nan_to_num(-1))
    finite = torch.tensor([0, 1, 2, 4, 8, 9])
    error = (expected[finite].double() * expected_scale[finite, :, None] - x[finite]).abs()
    assert (error <= expected_scale[finite, :, None] * 0.501).all(), "half a scale"
    assert expected_scale[5:8].isnan().all() and not expected_scale[finite].isnan().any()
    assert expected[1, 0, 1:4].tolist() == [-6, -6, -4], "ties go to even numbers"


def test_a_new_token_in_an_old_slot_is_all_that_is_read() -> None:
    """What a rejected draft wrote is overwritten, its scale too."""
    case = Case(4, 2, 32, 8, ((1, 20), (20, 20)))
    step = Step.build(case, torch.float32, torch.int8)
    expected = step.attend(case)
    assert step.scales is not None
    slot = step.block_table[0, 2:3].long() * 8 + 3  # the row's last token
    block, place = slot // 8, slot % 8
    caches = (step.keys, step.values, *step.scales)
    kept = [cache[block, :, place].clone() for cache in caches]
    k, v = torch.randn(2, 1, 2, 32) * 100
    cache_write(k, v, step.keys, step.values, slot, scales=step.scales)
    assert not torch.equal(step.attend(case), expected)
    k, v = (x.float() * scale.unsqueeze(-1) for x, scale in zip(kept[:2], kept[2:], strict=True))
    cache_write(k, v, step.keys, step.values, slot, scales=step.scales)
    assert torch.allclose(step.attend(case), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 12])
def test_the_twin_on_a_whole_prompt_is_torchs_own_call(dtype: torch.dtype, window: int) -> None:
    case = Case(6, 2, 24, 8, ((20, 20),), window)
    step = Step.build(case, dtype, dtype, "reference")
    blocks = step.block_table[0, :3].long()
    k, v = (c[blocks].transpose(0, 1).flatten(1, 2)[None, :, :20] for c in (step.keys, step.values))
    q = step.q.transpose(0, 1)[None]
    age = torch.arange(20)[:, None] - torch.arange(20)[None, :]
    mask = (age >= 0) & (age < window) if window else None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not window, enable_gqa=True)
    assert torch.equal(step.attend(case, "reference"), y[0].transpose(0, 1))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_graph_under_compile(backend: str, cache_dtype: torch.dtype) -> None:
    case = Case(4, 2, 16, 8, ((2, 9), (1, 30)))
    step = Step.build(case, torch.float32, cache_dtype)
    caches = (step.keys, step.values, *(step.scales or ()))
    copies = tuple(cache.clone() for cache in caches)
    k, v = torch.randn(2, 3, 2, 16)
    slots = torch.tensor([0, 1, 2])

    def run(keys: torch.Tensor, values: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        scales = (rest[0], rest[1]) if rest else None
        cache_write(k + 1, v, keys, values, slots, scales=scales, backend=backend)
        lines = (step.block_table, step.query_start, step.context_lens)
        y = paged_attention(step.q, keys, values, *lines, 0.25, scales=scales, backend=backend)
        return y * 2

    expected = run(*caches)
    assert torch.equal(torch.compile(run, fullgraph=True)(*copies), expected)
    for copy, cache in zip(copies, caches, strict=True):
        assert torch.equal(copy.nan_to_num(), cache.nan_to_num())


def test_impossible_steps_are_refused() -> None:
    case = Case(4, 2, 16, 8, ((2, 9),))
    step = Step.build(case, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="an int8 cache has scales"):
        replace(step, keys=step.keys.char(), values=step.values.char()).attend(case)
    step.context_lens[0] = 100
    with pytest.raises(RuntimeError, match="row 0 has 2 queries and a context of 100"):
        step.attend(case)
    with pytest.raises(RuntimeError, match="outside the cache"):
        cache_write(
            torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), step.keys, step.values, torch.tensor([9999])
        )


def test_an_fp8_cache_in_the_twin() -> None:
    torch.manual_seed(0)
    k, v = torch.randn(5, 1, 16), torch.randn(5, 1, 16)
    v[3, 0, 2], v[4, 0, 1] = 1000.0, -torch.inf  # which fp8 cannot hold
    fp8, plain = (
        [torch.full((2, 1, 8, 16), torch.nan).to(dtype) for _ in "kv"] for dtype in (FP8, torch.float)
    )
    slots = torch.tensor([8, 9, 10, 11, 12])
    cache_write(k, v, *fp8, slots, backend="reference")
    cache_write(k.to(FP8).float(), v.clamp(-448, 448).to(FP8).float(), *plain, slots, backend="reference")
    assert torch.equal(fp8[1].float().nan_to_num(7), plain[1].nan_to_num(7))
    lines = (torch.tensor([[1]]).int(), torch.tensor([0, 2]).int(), torch.tensor([5]).int())
    found, wanted = (
        paged_attention(torch.ones(2, 1, 16), *cache, *lines, 0.25, backend="reference")
        for cache in (fp8, plain)
    )
    assert torch.equal(found, wanted) and not found.isnan().any()
