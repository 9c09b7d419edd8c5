"""Placement next to GPUs: whose node the kernel says, whose it does not, and those a job may see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tp_testing import sysfs_writer

from tp_runtime.errors import LaunchError
from tp_runtime.launch import surroundings
from tp_runtime.launch.placement import Options, plan_ranks
from tp_runtime.launch.topology import read_topology

Machine = Callable[[str], Path]


def test_ranks_sit_next_to_their_gpus(machine: Machine) -> None:
    topology = read_topology(machine("8 GPUs"))
    ranks = plan_ranks(topology, 8).ranks
    assert [rank.gpu for rank in ranks] == list(range(8))
    assert [rank.nodes for rank in ranks] == [(0,)] * 4 + [(1,)] * 4
    assert {rank.cores for rank in ranks} == {8}
    assert ranks[0].env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    two = plan_ranks(topology, 2).ranks
    assert [rank.nodes for rank in two] == [(0,), (0,)], "GPUs 0 and 1 are both on node 0"
    visible = plan_ranks(topology, 2, Options(visible_gpus=(6, 2))).ranks
    assert [(rank.gpu, rank.nodes) for rank in visible] == [(6, (1,)), (2, (0,))]
    without = plan_ranks(topology, 2, Options(use_gpus=False)).ranks
    assert [(rank.gpu, rank.nodes) for rank in without] == [(None, (0,)), (None, (1,))]


def test_gpus_of_unknown_node_and_too_few_gpus(tmp_path: Path) -> None:
    host = sysfs_writer.Host(packages=2, gpu_nodes=(-1, -1))
    topology = read_topology(sysfs_writer.write(host, tmp_path))
    plan = plan_ranks(topology, 2)
    assert [rank.gpu for rank in plan.ranks] == [0, 1]
    assert "does not say which node GPUs 0-1 are on" in plan.warnings[0]
    plan = plan_ranks(topology, 4)
    assert {rank.gpu for rank in plan.ranks} == {None}
    assert "4 ranks and 2 GPUs" in plan.warnings[0]
    single = read_topology(sysfs_writer.write(sysfs_writer.Host(gpu_nodes=(-1,)), tmp_path / "single"))
    plan = plan_ranks(single, 1, Options(strict=True))
    assert (plan.ranks[0].gpu, plan.warnings) == (0, ()), "one node: there is no far"


def test_one_gpu_of_unknown_node_costs_the_others_nothing(tmp_path: Path) -> None:
    host = sysfs_writer.Host(packages=2, gpu_nodes=(1, -1, 1))
    plan = plan_ranks(read_topology(sysfs_writer.write(host, tmp_path)), 3)
    assert [rank.nodes for rank in plan.ranks] == [(1,), (0,), (1,)]
    assert "does not say which node GPU 1 is on" in plan.warnings[0]


def test_ranks_far_from_their_gpus_are_told(tmp_path: Path) -> None:
    """Four GPUs on a node of two cores."""
    host = sysfs_writer.Host(packages=2, cores_of_nodes=(2,), gpu_nodes=(0, 0, 0, 0))
    topology = read_topology(sysfs_writer.write(host, tmp_path))
    plan = plan_ranks(topology, 4)
    assert [rank.nodes for rank in plan.ranks] == [(0,), (0,), (1,), (1,)]
    assert plan.warnings[0].startswith("ranks 2-3 drive GPUs 2-3 of node 0 from node 1: no usable core of")
    with pytest.raises(LaunchError, match="--numa-strict: ranks 2-3 drive GPUs 2-3 of node 0"):
        plan_ranks(topology, 4, Options(strict=True))
    assert plan_ranks(topology, 4, Options(use_gpus=False)).warnings == ()
    assert plan_ranks(topology, 4, Options(visible_gpus=())).warnings == (), "CUDA_VISIBLE_DEVICES is empty"
    named = plan_ranks(topology, 4, Options(visible_gpus=(), gpu_note="named by UUID"))
    assert (named.warnings, named.ranks[0].gpu) == (("named by UUID",), None)


@pytest.mark.parametrize(
    ("text", "numbers", "note"),
    [
        (None, None, False),
        ("", (), False),
        ("-1", (), False),
        ("2, 0", (2, 0), False),
        ("1,-1,0", (1,), False),
        ("GPU-8932f937-d72c,GPU-2", (), True),
        ("MIG-1", (), True),
    ],
)
def test_visible_gpus_as_cuda_reads_them(
    text: str | None, numbers: tuple[int, ...] | None, note: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    visible, said = surroundings.visible_gpus()
    assert (visible, said is not None) == (numbers, note)
