"""From a planned draft to a Speculator, on every rank.

A draft model can be split over the ranks like the target, or be whole on rank 0. Split, each of its steps
takes a descriptor and two sums a layer across ranks; whole, rank 0 reads all its weights alone. Which is
faster depends on its size and on the links, so with --draft-ranks auto both are loaded, timed on decode
steps, and the slower one is dropped.
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ... import mesh as meshes
from ...collectives import broadcast_
from ...config import MOST_DRAFT_TOKENS, EngineConfig
from ...errors import MemoryLimitError
from ...log import once
from ..kv_blocks import SCRATCH_BLOCK
from ..runner import ModelRunner
from ..source import ModelSource
from ..step import Row, Step
from .interface import Announce, Drafter
from .kind import DraftPlan, plan_draft
from .lookup import LookupDraft
from .model import ModelDraft
from .skip import SkipDraft, kept_layers
from .speculator import Speculator
from .timing import settle

if TYPE_CHECKING:
    from ..build import Built

_MODEL_TOKENS = 7  # most drafted by a model where the user gave no number
_TIMED_STEPS = 9


def build_speculator(
    config: EngineConfig, source: ModelSource, target: Built, mesh: DeviceMesh, announce: Announce
) -> Speculator | None:
    """The speculation these settings ask for; None for none. Every rank calls it, after loading the target.

    announce: runs a step of the draft on all ranks. Raises what plan_draft and build_runner raise.
    """
    if config.speculate_exact:
        target.runner.min_tokens = 2
    plan = plan_draft(config, source)
    if plan is None:
        return None
    if target.device == "cpu":
        target.runner.exact_tokens = MOST_DRAFT_TOKENS + 1
    # Of a GPU: its captured step, where it has one.
    few_at_once = target.device == "cpu" or target.runner.burst_steps > 0
    vocab_size = target.model_config.vocab_size
    most = config.draft_tokens or (MOST_DRAFT_TOKENS if plan.kind == "lookup" else _MODEL_TOKENS)
    drafter: Drafter
    if plan.kind == "lookup":
        drafter = LookupDraft()
    elif plan.kind == "skip":
        layers = kept_layers(source.config.num_layers, plan.skipped)
        drafter = SkipDraft(target.runner, layers, vocab_size=vocab_size, announce=announce)
    else:
        drafter = _model_draft(plan, config.draft_ranks, target, mesh, announce)
    return Speculator(
        drafter,
        plan,
        most=most,
        adaptive=config.draft_adaptive,
        max_tokens=target.runner.max_tokens,
        exact_tokens=MOST_DRAFT_TOKENS + 1 if few_at_once else None,
        device=target.device,
    )


def _model_draft(
    plan: DraftPlan, where: str, target: Built, mesh: DeviceMesh, announce: Announce
) -> ModelDraft:
    from ..build import build_runner

    assert plan.source is not None and plan.engine is not None, "a model draft has both"
    world, built, lone = meshes.tp_size(mesh), None, None
    if world == 1 or where in ("all", "auto"):
        built = build_runner(plan.source, plan.engine, mesh, target.device)
    if world > 1 and where in ("one", "auto"):
        own = _own_mesh(target.device)
        if own is not None:
            lone = _lone(plan, own, target.device, may_fail=where == "auto")
        dist.barrier(meshes.tp_group(mesh))
    if world > 1 and where == "auto":
        assert built is not None
        if _split_is_faster(built.runner, None if lone is None else lone.runner, mesh):
            lone = None
        else:
            built = None
    split = built is not None
    used = built if split else lone
    return ModelDraft(
        None if used is None else used.runner,
        context=plan.context,
        draft_vocab=plan.source.config.vocab_size,
        vocab_size=target.model_config.vocab_size,
        announce=announce if split and world > 1 else None,
    )


def _lone(plan: DraftPlan, own: DeviceMesh, device: str, *, may_fail: bool) -> Built | None:
    """The draft whole on rank 0. may_fail: None where it does not fit there beside the split one."""
    from ..build import build_runner

    assert plan.source is not None and plan.engine is not None, "a model draft has both"
    try:
        return build_runner(plan.source, plan.engine, own, device)
    except MemoryLimitError as error:
        if not may_fail:
            raise
        once(f"the draft is split over the ranks, as rank 0 cannot hold both to compare: {error}")
        return None


def _own_mesh(device: str) -> DeviceMesh | None:
    """A mesh of rank 0 alone; None on the others. Every rank calls it."""
    group = dist.new_group([0])
    if dist.get_rank() != 0:
        return None
    return DeviceMesh.from_group(group, device, mesh_dim_names=(meshes.TP_AXIS,))


def _split_is_faster(split: ModelRunner, lone: ModelRunner | None, mesh: DeviceMesh) -> bool:
    """Rank 0's clock decides for all ranks; without a lone one there is nothing to compare.

    The descriptor's broadcast is part of a split step.
    """
    group = meshes.tp_group(mesh)
    if not _verdict(lone is not None, group):
        return True
    descriptor = torch.zeros(64, dtype=torch.int32)
    times = []
    for runner in (split, lone):
        dist.barrier(group)
        runs = []
        for _ in range(_TIMED_STEPS if runner is not None else 0):
            assert runner is not None
            began = time.perf_counter()
            if runner is split:
                broadcast_(descriptor, group)
            runner.execute(Step((Row((0,), 0, (SCRATCH_BLOCK,), 1),)))
            settle(runner.device)
            runs.append(time.perf_counter() - began)
        times.append(statistics.median(runs) if runs else 0.0)
    faster = _verdict(times[0] <= times[1], group)
    if lone is not None:
        told = f"{1000 * times[0]:.1f} ms a step split, {1000 * times[1]:.1f} ms whole on rank 0"
        once(f"the draft runs {'split over the ranks' if faster else 'on rank 0'}: {told}", logging.INFO)
    return faster


def _verdict(mine: bool, group: dist.ProcessGroup) -> bool:
    """Rank 0's answer, on all ranks."""
    return bool(broadcast_(torch.tensor([int(mine)], dtype=torch.int32), group).item())
