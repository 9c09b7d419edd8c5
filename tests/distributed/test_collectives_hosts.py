"""Collectives of a group over several hosts: shared memory inside each, c10d among them.

One machine plays the hosts: ranks that give attach different host names share no memory. Sums are compared
exactly: a host's in fp32 in rank order rounded to the dtype, then the hosts' in fp32 in their order.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from tp_testing.ranks import run_ranks

from tp_runtime import collectives
from tp_runtime.collectives import hosts, shm
from tp_runtime.errors import CollectiveError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
COUNTS = (1, 2049, (1 << 14) + 1, shm.SLOT_BYTES // 2 + 5)
PLACES = ("aab", "aabb", "abcc", "abab")  # the host of each rank


def _inputs(count: int, dtype: torch.dtype, world: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [(torch.randn(count, generator=generator) * 10).to(dtype) for _ in range(world)]


def _expected(inputs: list[torch.Tensor], places: str, reduction: str) -> torch.Tensor:
    by_host = [[x for x, p in zip(inputs, places, strict=True) if p == name] for name in sorted(set(places))]
    return hosts._reduced([hosts._reduced(parts, reduction) for parts in by_host], reduction)


def exact(places: str) -> tuple[str, int]:
    group, world, checked = dist.group.WORLD, len(places), 0
    rank = group.rank()
    transport = collectives.attach(group, 60.0, host=places[rank])
    for dtype in DTYPES:
        for count in COUNTS:
            inputs = _inputs(count, dtype, world)
            for reduction in ("sum", "max", "min"):
                y = collectives.all_reduce(inputs[rank], group, reduction)
                assert torch.equal(y, _expected(inputs, places, reduction)), (dtype, count, reduction)
                checked += 1
            gathered = collectives.all_gather(inputs[rank], group)
            assert torch.equal(gathered, torch.stack(inputs)), (dtype, count)
            for source in range(world):
                x = inputs[rank].clone()
                collectives.broadcast_(x, group, source)
                assert torch.equal(x, inputs[source]), (dtype, count, source)
    return transport, checked


@pytest.mark.parametrize("places", PLACES)
def test_exact_and_the_same_on_every_rank(places: str) -> None:
    assert run_ranks(len(places), exact, places) == [("shm+c10d", len(DTYPES) * len(COUNTS) * 3)] * len(
        places
    )


def rest() -> None:
    group = dist.group.WORLD
    collectives.attach(group, 60.0, host="aab"[group.rank()])
    x = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
    assert torch.equal(collectives.all_reduce(x, group), 3 * x)
    assert collectives.all_reduce(torch.empty(0, 3), group).shape == (0, 3)
    assert collectives.all_gather(torch.empty(0), group).shape == (3, 0)
    with pytest.raises(RuntimeError, match=r"int64, not torch\.bool"):
        collectives.all_reduce(torch.ones(2, dtype=torch.bool), group)
    nan = torch.tensor([float("nan") if group.rank() == 2 else 1.0, 5.0])
    assert torch.equal(collectives.all_reduce(nan, group, "max").isnan(), torch.tensor([True, False]))
    op = getattr(torch.ops, collectives.all_reduce_op(group).replace("::", " ").split()[0])
    assert torch.equal(op.all_reduce(torch.ones(3), "sum", group.group_name), torch.full((3,), 3.0))

    def step(x: torch.Tensor) -> torch.Tensor:
        return collectives.all_gather(collectives.all_reduce(x * 0.5, group) + 1, group)

    x = torch.arange(64.0)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))


def test_shapes_strides_types_nan_and_compiled_graphs() -> None:
    run_ranks(3, rest, timeout=300)


def one_host_each() -> str:
    group = dist.group.WORLD
    return collectives.attach(group, 60.0, host=str(group.rank()))


def test_hosts_of_one_rank_each_go_through_c10d() -> None:
    assert run_ranks(2, one_host_each) == ["c10d", "c10d"]


def test_ranks_that_see_each_other_form_hosts() -> None:
    one, two = [True, True, False, False], [False, False, True, True]
    assert shm._by_host([one, one, two, two]) == (((0, 1), (2, 3)), "")
    assert shm._by_host([[True, False], [False, True]]) == ((), "no two of the 2 ranks share a /dev/shm")
    lopsided = [[True, True, False], [True, True, True], [False, True, True]]
    found, trouble = shm._by_host(lopsided)
    assert found == () and "ranks 0 and 1 see each other's files" in trouble


def fault(who: int, hangs: bool) -> tuple[str, float]:
    """Ranks 0 and 1 on a host, 2 on another; rank `who` sleeps past the deadline, or ends long before it."""
    group = dist.group.WORLD
    collectives.attach(group, 60.0, host="aab"[group.rank()])
    collectives.all_reduce(torch.ones(1), group)
    collectives.set_timeout(group, 2.0 if hangs else 60.0)
    dist.barrier(group)
    if group.rank() == who:
        if not hangs:
            return "ended", 0.0
        time.sleep(4.0)
    started, message = time.monotonic(), "no error"
    try:
        for _ in range(3):
            collectives.all_reduce(torch.ones(1), group)
    except CollectiveError as error:
        message = str(error)
    took = time.monotonic() - started
    with pytest.raises(CollectiveError):
        collectives.broadcast_(torch.ones(1), group)
    return message, took


@pytest.mark.parametrize("hangs", [True, False])
@pytest.mark.parametrize("who", [1, 2])
def test_a_lost_rank_is_an_error_on_all_hosts(who: int, hangs: bool) -> None:
    found = run_ranks(3, fault, who, hangs)
    blamed = (
        "rank 2 of 3, on another host, did not take part in all_reduce" if who == 2 else "rank 1 of 3 (pid"
    )
    assert blamed in found[0][0], found
    assert all(message != "no error" and took < 30.0 for message, took in found), found
