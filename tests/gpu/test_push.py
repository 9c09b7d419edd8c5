"""Sums over GPUs by pushing: exact, the same on every rank, and never for ever. Needs two GPUs."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist
from tp_testing.ranks import run_ranks

CASES = (
    (torch.bfloat16, 8192), (torch.float32, 8192), (torch.bfloat16, 254), (torch.float32, 100_000)
)  # fmt: skip
pytestmark = pytest.mark.gpus(2)


def _group(timeout_s: float = 20.0, max_words: int = 1 << 17):  # type: ignore[no-untyped-def]
    from tp_runtime.collectives.push_group import PushGroup

    torch.cuda.set_device(dist.get_rank())
    group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    return group, PushGroup(group, "cuda", max_words=max_words, timeout_s=timeout_s)


def _ordered_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The slow twin: all ranks' x, added in fp32 in the order of the ranks."""
    every = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(every, x, group=group)
    total = torch.zeros_like(x, dtype=torch.float32)
    for each in every:
        total += each.float()
    return total.to(x.dtype)


def _sums(rounds: int) -> list[str]:
    group, push = _group()
    rank, wrong = dist.get_rank(), []
    torch.manual_seed(rank)
    random.seed(rank)
    for turn in range(rounds):
        for dtype, count in CASES:
            x = torch.randn(count, device="cuda").to(dtype)
            out = torch.full_like(x, torch.nan)
            if turn % 5 == 4:
                time.sleep(random.random() * 0.01)
            push.all_reduce(x, out)
            push.advance(1)
            if not torch.equal(out, _ordered_sum(x, group)):
                wrong.append(f"{dtype} {count}, turn {turn}")
    push.check()
    return wrong


def test_sums_are_exact_and_equal() -> None:
    assert run_ranks(2, _sums, 40, timeout=120) == [[], []]


def _graph_soak(replays: int) -> int:
    """Chains of 40 reductions in a graph, random pauses on both sides, every result checked on the GPU."""
    group, push = _group()
    rank, size = dist.get_rank(), 8192
    torch.manual_seed(1)
    parts = torch.randn(40, group.size(), size, device="cuda").bfloat16()
    expected = (parts[:, 0].float() + parts[:, 1].float()).bfloat16()
    x, out = parts[:, rank].contiguous(), torch.empty(40, size, device="cuda", dtype=torch.bfloat16)
    mistakes = torch.zeros(1, dtype=torch.int64, device="cuda")

    def chain() -> None:
        for op in range(40):
            push.all_reduce(x[op], out[op], op=op)
        push.advance(40)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.fill_(torch.nan)
        chain()
        mistakes += (out != expected).sum()
    random.seed(rank)
    for turn in range(replays):
        graph.replay()
        if turn % 50 == 0:
            time.sleep(random.random() * 0.003)
    push.check()
    return int(mistakes)


def test_soak() -> None:
    """80,000 reductions; the whole million is `make test-full`'s."""
    assert run_ranks(2, _graph_soak, 2_000, timeout=120) == [0, 0]


@pytest.mark.full
def test_soak_of_a_million() -> None:
    assert run_ranks(2, _graph_soak, 25_000, timeout=300) == [0, 0]


def _left_alone() -> str:
    from tp_runtime.errors import CollectiveError

    group, push = _group(timeout_s=1.5)
    x = torch.ones(512, device="cuda")
    if dist.get_rank() == 1:
        time.sleep(6)
        return "slept"
    started = time.monotonic()
    push.all_reduce(x, torch.empty_like(x))
    try:
        push.check()
    except CollectiveError as error:
        return f"{error} after {time.monotonic() - started:.1f} s"
    return "nothing was noticed"


def test_a_missing_peer_is_noticed() -> None:
    alone, _ = run_ranks(2, _left_alone, timeout=60)
    print(alone)
    assert "waited 1.5 s for a peer" in alone
