"""Attention over the block table against its twin, and the twin against torch's attention.

Tolerances, absolute, on values of size one: fp32 2e-6 (sums in another order), bf16 and fp16 caches and
queries one rounding of the output, 2^-7 and 2^-10, where rows of many queries go through torch's flash
attention, which rounds weights as well: twice that. fp32 queries over a bf16 cache: fp32's where a row has
few queries, bf16's where it has many.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from tp_runtime.kernels.attention import cache_write, paged_attention
from tp_runtime.kernels.cpu import build

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-7, torch.float16: 2 * 2**-10}


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
    """The tensors of one case. The cache is full of NaN where nobody wrote."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor

    @classmethod
    def build(cls, case: Case, dtype: torch.dtype, cache_dtype: torch.dtype, backend: str = "auto") -> Step:
        generator = torch.Generator().manual_seed(len(case.rows))
        blocks = [-(-context // case.block_size) for _, context in case.rows]
        shape = (sum(blocks) + 2, case.kv_heads, case.block_size, case.head_dim)
        keys, values = (torch.full(shape, float("nan")).to(cache_dtype) for _ in range(2))
        free = torch.randperm(sum(blocks) + 1, generator=generator) + 1
        table = torch.zeros(len(case.rows), max(blocks) + 1, dtype=torch.int32)
        for row, ((_, context), count) in enumerate(zip(case.rows, blocks, strict=True)):
            own, free = free[:count], free[count:]
            table[row, :count] = own.int()
            position = torch.arange(context)
            slots = own[position // case.block_size] * case.block_size + position % case.block_size
            k, v = torch.randn(2, context, case.kv_heads, case.head_dim, generator=generator).to(dtype)
            cache_write(k, v, keys, values, slots, backend=backend)
        starts = torch.tensor([0] + [queries for queries, _ in case.rows]).cumsum(0).int()
        tokens = int(starts[-1]) + case.padding
        q = torch.randn(tokens, case.heads, case.head_dim, generator=generator).to(dtype)
        lens = torch.tensor([context for _, context in case.rows], dtype=torch.int32)
        return cls(q, keys, values, table, starts, lens)

    def attend(self, case: Case, backend: str = "auto", wide: bool = False) -> torch.Tensor:
        q, keys, values = self.q, self.keys, self.values
        if wide:
            q, keys, values = q.float(), keys.float(), values.float()
        scale = case.head_dim**-0.5
        lines = (self.block_table, self.query_start, self.context_lens)
        return paged_attention(q, keys, values, *lines, scale, case.window, backend=backend)


MIXED = ((1, 300), (1, 5), (3, 700), (0, 9), (17, 100))
CASES = [
    Case(8, 2, 64, 32, MIXED, padding=3),
    Case(9, 3, 64, 32, ((1, 256), (2, 1000))),
    Case(4, 4, 80, 16, ((1, 1), (5, 5), (16, 513))),
    Case(4, 1, 16, 8, ((1, 50), (5, 129), (16, 600)), window=7),
    Case(4, 2, 128, 32, ((1, 50), (5, 129), (16, 600), (30, 400), (40, 40)), window=130),
    Case(6, 2, 24, 8, ((2, 20), (1, 9))),  # a head_dim that only the reference takes
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
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
    assert y.dtype == dtypes[0] and error[~many].amax() <= TOLERANCE[dtypes[0]]
    assert not many.any() or error[many].amax() <= TOLERANCE[dtypes[1]]
    assert not y[int(step.query_start[-1]) :].any(), "padding is zero"


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_batch_mates_queries_and_threads_change_no_bit(case: Case) -> None:
    step, threads = Step.build(case, torch.bfloat16, torch.bfloat16), torch.get_num_threads()
    together = step.attend(case)
    try:
        torch.set_num_threads(1)
        assert torch.equal(together, step.attend(case))
    finally:
        torch.set_num_threads(threads)
    for row, (queries, context) in enumerate(case.rows):
        for i in range(queries if queries <= 16 else 0):
            token = int(step.query_start[row]) + i
            one = Step(
                step.q[token : token + 1],
                step.keys,
                step.values,
                step.block_table[row : row + 1],
                torch.tensor([0, 1], dtype=torch.int32),
                torch.tensor([context - queries + 1 + i], dtype=torch.int32),
            )
            assert torch.equal(one.attend(case)[0], together[token]), (row, i)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cache_write_like_the_twin(cache_dtype: torch.dtype) -> None:
    qkv = torch.randn(7, 4 * 2, 16)
    slots = torch.tensor([0, 5, 9, 8, 31, 17, 3])
    caches = {}
    for backend in ("auto", "reference"):
        keys, values = (
            torch.zeros(4, 2, 8, 16, dtype=cache_dtype),
            torch.zeros(4, 2, 8, 16, dtype=cache_dtype),
        )
        cache_write(qkv[:, 4:6], qkv[:, 6:], keys, values, slots, backend=backend)
        caches[backend] = (keys, values)
    for fast, slow in zip(caches["auto"], caches["reference"], strict=True):
        assert torch.equal(fast, slow)


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


def test_one_graph_under_compile() -> None:
    case = Case(4, 2, 16, 8, ((2, 9), (1, 30)))
    step = Step.build(case, torch.float32, torch.float32)
    keys, values = step.keys.clone(), step.values.clone()
    k, v = torch.randn(2, 3, 2, 16)
    slots = torch.tensor([0, 1, 2])

    def run(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        cache_write(k + 1, v, keys, values, slots)
        lines = (step.block_table, step.query_start, step.context_lens)
        return paged_attention(step.q, keys, values, *lines, 0.25) * 2

    expected = run(step.keys, step.values)
    assert torch.equal(torch.compile(run, fullgraph=True)(keys, values), expected)
    assert torch.equal(keys.nan_to_num(), step.keys.nan_to_num())


def test_impossible_steps_are_refused() -> None:
    case = Case(4, 2, 16, 8, ((2, 9),))
    step = Step.build(case, torch.float32, torch.float32)
    step.context_lens[0] = 100
    with pytest.raises(RuntimeError, match="row 0 has 2 queries and a context of 100"):
        step.attend(case)
    with pytest.raises(RuntimeError, match="outside the cache"):
        cache_write(
            torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), step.keys, step.values, torch.tensor([9999])
        )


def test_avx2_like_the_twin() -> None:
    nodes = [
        f"{__file__}::test_like_the_twin",
        f"{__file__}::test_batch_mates_queries_and_threads_change_no_bit",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", *nodes]
    environ = os.environ | {"TP_CPU_ISA": "avx2"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
