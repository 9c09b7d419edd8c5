"""Collectives over shared memory and c10d: the sums, their bits, and what happens when a peer fails.

Sums are compared exactly with a loop in rank order (bf16 and fp16 added in fp32, rounded once): the
tolerance is zero. Times are only compared with deadlines, generously.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tp_testing.ranks import run_ranks

from tp_runtime import collectives, env
from tp_runtime.collectives import ops, shm
from tp_runtime.errors import CollectiveError, ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
SLOT = shm.SLOT_BYTES
# Element counts of 2 bytes each around one cache line, the change to two shots (8 KiB) and the slot.
COUNTS = (1, 7, 31, 33, 2048, (1 << 12) - 1, 1 << 12, (1 << 12) + 1, 100_003, SLOT // 2 - 1, SLOT // 2 + 5)


def _inputs(count: int, dtype: torch.dtype, world: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [(torch.randn(count, generator=generator) * 10).to(dtype) for _ in range(world)]


def _expected(inputs: list[torch.Tensor], reduction: str) -> torch.Tensor:
    dtype = inputs[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    combine = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[reduction]
    result = inputs[0].to(wide)
    for x in inputs[1:]:
        result = combine(result, x.to(wide))
    return result.to(dtype)


def _check_all(group: dist.ProcessGroup, counts: tuple[int, ...]) -> int:
    rank, world, checked = group.rank(), group.size(), 0
    for dtype in DTYPES:
        for count in counts:
            inputs = _inputs(count, dtype, world)
            for reduction in ("sum", "max", "min"):
                y = collectives.all_reduce(inputs[rank], group, reduction)
                assert torch.equal(y, _expected(inputs, reduction)), (dtype, count, reduction)
                checked += 1
            assert torch.equal(collectives.all_gather(inputs[rank], group), torch.stack(inputs)), (
                dtype,
                count,
            )
            for source in range(world):
                x = inputs[rank].clone()
                collectives.broadcast_(x, group, source)
                assert torch.equal(x, inputs[source]), (dtype, count, source)
    return checked


def exact(counts: tuple[int, ...]) -> tuple[str, int]:
    group = dist.group.WORLD
    return collectives.attach(group, 60.0), _check_all(group, counts)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_exact_and_the_same_on_every_rank(world: int) -> None:
    counts = COUNTS if world == 2 else COUNTS[2:9:2]
    results = run_ranks(world, exact, counts)
    assert results == [("shm", len(DTYPES) * len(counts) * 3)] * world


def started() -> list[float]:
    """What a sum that was begun has become. By gloo: NCCL's runs with the prompts of tests/gpu."""
    group = dist.group.WORLD
    x = torch.arange(5.0) + 100 * group.rank()  # sums of whole numbers are exact in any order
    wait = collectives.start_all_reduce_(x, group)
    wait()
    return x.tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_sum_that_is_begun_is_there_after_the_wait(world: int) -> None:
    wanted = [world * i + 100 * sum(range(world)) for i in range(5)]
    assert run_ranks(world, started) == [wanted] * world


def test_world_of_one_is_a_no_op() -> None:
    ((transport, _),) = run_ranks(1, exact, (5,))
    assert transport == "c10d"


def subgroups() -> list[float]:
    outer, inner = dist.group.WORLD, dist.new_group([0, 2])
    rank, results = outer.rank(), []
    if rank in (0, 2):
        assert collectives.attach(inner, 60.0) == "shm"
        results.append(float(collectives.all_reduce(torch.tensor([10.0**rank]), inner)))
    results.append(float(collectives.all_reduce(torch.tensor([10.0**rank]), outer)))  # attaches by itself
    if rank in (0, 2):
        results.append(float(collectives.all_reduce(torch.tensor([10.0**rank]), inner)))
    return results


def test_a_group_of_some_ranks() -> None:
    assert run_ranks(3, subgroups) == [[101.0, 111.0, 101.0], [111.0], [101.0, 111.0, 101.0]]


def every_bf16() -> None:
    """Every bf16 value, subnormal, infinite and not a number among them, on every rank."""
    group = dist.group.WORLD
    rank, world = group.rank(), group.size()
    collectives.attach(group, 60.0)
    generator = torch.Generator().manual_seed(7)
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    inputs = [bits[torch.randperm(1 << 16, generator=generator)].view(torch.bfloat16) for _ in range(world)]
    for count in (1 << 16, 8191, 37):  # both ways, and tails
        y = collectives.all_reduce(inputs[rank][:count].clone(), group)
        expected = _expected([x[:count] for x in inputs], "sum")
        same = (y.view(torch.int16) == expected.view(torch.int16)) | (y.isnan() & expected.isnan())
        assert bool(same.all()), (count, y[~same][:5], expected[~same][:5])


@pytest.mark.parametrize("world", [2, 3, 4])  # two loops of their own, and the general one between them
def test_sums_of_every_bf16_value(world: int) -> None:
    run_ranks(world, every_bf16)


def shapes_and_strides() -> None:
    group = dist.group.WORLD
    collectives.attach(group, 60.0)
    x = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
    y = collectives.all_reduce(x, group)
    assert y.shape == x.shape and torch.equal(y, 2 * x)
    assert collectives.all_reduce(torch.empty(0, 3), group).shape == (0, 3)
    assert collectives.all_gather(torch.empty(0), group).shape == (2, 0)
    with pytest.raises(RuntimeError, match="not Bool"):
        collectives.all_reduce(torch.ones(2, dtype=torch.bool), group)
    for turn, source in enumerate((0, 0, 1, 0, 1, 1, 1, 0)):  # a source may run ahead of its readers by one
        value = torch.full((3,), turn if group.rank() == source else -1)
        assert collectives.broadcast_(value, group, source).tolist() == [turn] * 3


def test_shapes_strides_and_runs_of_broadcasts() -> None:
    run_ranks(2, shapes_and_strides)


def compiled() -> bool:
    group = dist.group.WORLD
    collectives.attach(group, 60.0)

    def step(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = collectives.all_reduce(x * 0.5, group) + 1
        return collectives.all_gather(x, group).flatten(0, 1)

    x = torch.arange(64, dtype=torch.float32)
    return torch.equal(torch.compile(step, fullgraph=True)(x), step(x))


def test_inside_one_compiled_graph() -> None:
    assert run_ranks(2, compiled, timeout=300) == [True, True]


def through_c10d() -> tuple[str, int]:
    group = dist.group.WORLD
    transport = collectives.attach(group, transport="c10d")
    y = collectives.all_reduce(torch.tensor([group.rank() + 1.0]), group)
    return transport, int(y) + int(collectives.broadcast_(torch.tensor([group.rank()]), group, 1))


def test_c10d_on_request() -> None:
    assert run_ranks(2, through_c10d) == [("c10d", 4)] * 2


def full_on_one_rank() -> tuple[str, float, list[str]]:
    group = dist.group.WORLD
    if group.rank() == 1:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        shm.os.posix_fallocate = refuse
    transport = collectives.attach(group, 60.0)
    left = [path.name for path in Path("/dev/shm").glob(f"tp_runtime.*.{os.getpid()}.*")]
    return transport, float(collectives.all_reduce(torch.ones(1), group)), left


def test_a_full_dev_shm_on_one_rank_sends_all_to_c10d() -> None:
    assert run_ranks(2, full_on_one_rank) == [("c10d", 2.0, [])] * 2


def test_an_unknown_transport_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_COLLECTIVES", "pigeons")
    with pytest.raises(
        ConfigError, match=r"TP_COLLECTIVES='pigeons' is not known; use one of: auto, shm, c10d"
    ):
        ops._chosen("auto")


def test_the_argument_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_COLLECTIVES", "c10d")
    assert [ops._chosen(name) for name in ("auto", "shm", "c10d")] == ["c10d", "shm", "c10d"]


def no_room() -> str:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shm.os.posix_fallocate = refuse
    with pytest.raises(ConfigError) as caught:
        collectives.attach(dist.group.WORLD, 60.0, transport="shm")
    return str(caught.value)


def test_shared_memory_that_was_asked_for_and_is_not_there_is_an_error() -> None:
    for message in run_ranks(2, no_room):
        assert "rank 0: /dev/shm is full" in message and "--collectives auto" in message, message


def test_the_launcher_asks_for_what_a_rank_takes() -> None:
    shm._load()
    assert torch.ops.tp_shm.file_bytes(shm.SLOT_BYTES) == env.SHM_BYTES_PER_RANK


def one_hangs() -> tuple[str, float]:
    group = dist.group.WORLD
    collectives.attach(group, 60.0)
    collectives.all_reduce(torch.ones(1), group)
    collectives.set_timeout(group, 1.0)
    if group.rank() == 1:
        time.sleep(3.0)
    started = time.monotonic()
    try:
        collectives.all_reduce(torch.ones(1), group)
        collectives.all_reduce(torch.ones(1), group)
    except CollectiveError as error:
        return str(error), time.monotonic() - started
    return "no error", 0.0


def test_a_hung_peer_is_an_error_on_both_sides() -> None:
    (waited, took), (late, _) = run_ranks(2, one_hangs)
    assert "rank 1 of 2" in waited and "did not join all_reduce within 1 s" in waited, waited
    assert 0.9 < took < 10.0
    assert "rank 0 of 2 gave up" in late, late


def on_one_core() -> int:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    group = dist.group.WORLD
    collectives.attach(group, 60.0)
    x = torch.ones(2048, dtype=torch.bfloat16)
    for _ in range(500):
        collectives.all_reduce(x, group)
    return 500


def test_two_ranks_on_one_core_take_turns() -> None:
    assert run_ranks(2, on_one_core, timeout=60) == [500, 500]


LOOP = """
    import os, signal, sys, torch
    from tp_runtime import collectives
    from tp_runtime.errors import CollectiveError
    from tp_runtime.mesh import init_mesh, tp_group
    group = tp_group(init_mesh(timeout_s=60))
    assert collectives.attach(group, 60.0) == "shm"
    print("attached", flush=True)
    x = torch.ones(5000)
    try:
        while True:
            collectives.all_reduce(x, group)
    except CollectiveError as error:
        print(error, flush=True)
        os._exit(7)
"""


def _start(world: int, folder: Path) -> list[subprocess.Popen[str]]:
    """Ranks that reduce for ever, each past its attach."""
    script = folder / "loop.py"
    script.write_text(textwrap.dedent(LOOP))
    ranks = []
    for rank in range(world):
        environ = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        environ |= {"TP_STORE_FILE": str(folder / "store"), "TP_JOB_ID": f"test-{os.getpid()}"}
        command = [sys.executable, str(script)]
        ranks.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
    for process in ranks:
        assert process.stdout is not None and process.stdout.readline() == "attached\n"
    return ranks


def _files() -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"tp_runtime.test-{os.getpid()}.*")]


def test_kill_9_of_one_rank_is_an_error_on_the_others_and_leaves_nothing(tmp_path: Path) -> None:
    ranks = _start(3, tmp_path)
    try:
        assert _files() == [], "the names are gone as soon as all have mapped them"
        ranks[1].send_signal(signal.SIGKILL)
        messages = [ranks[r].communicate(timeout=30)[0] for r in (0, 2)]
        assert [ranks[r].returncode for r in (0, 2)] == [7, 7], messages
        for message in messages:
            assert "rank 1 of 3" in message or "gave up" in message, message
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert _files() == []


def test_kill_9_of_all_ranks_leaves_nothing(tmp_path: Path) -> None:
    ranks = _start(2, tmp_path)
    for process in ranks:
        process.kill()
    for process in ranks:
        process.wait()
    assert _files() == []


def test_files_of_dead_processes_are_removed() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    stale = Path(f"/dev/shm/tp_runtime.test-stale.{finished.stdout.strip()}.0")
    fresh = Path(f"/dev/shm/tp_runtime.test-fresh.{os.getpid()}.0")
    try:
        for path in (stale, fresh):
            path.touch()
            os.utime(path, (time.time() - 3600,) * 2)
        shm._remove_stale()
        assert not stale.exists() and fresh.exists()
    finally:
        for path in (stale, fresh):
            path.unlink(missing_ok=True)
