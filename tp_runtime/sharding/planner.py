"""Finding a plan and proving it: a shortened copy, a search, simulated ranks, and the whole model's plan.

`Search` decides from traces what divides. The plan that results runs on simulated ranks; what differs from
the whole model is left whole and the search goes on. Then what no pair divides is cut where that is worth a
collective, and the plan of the traced layers becomes that of all.
"""

from __future__ import annotations

import time
from dataclasses import replace
from math import prod
from typing import Any

import psutil
from torch import nn

from .. import log
from ..errors import ShardingError
from .build import Analysis, build_plan
from .expand import expand_plan
from .gathers import choose_gathers, choose_vocabulary, sharing_weight
from .inputs import Example, find_example
from .plan import WeightPlan
from .proof import proof_size
from .search import Search
from .shardplan import ShardPlan
from .surrogate import Surrogate, make_surrogate, named_shapes
from .unreached import extra_calls, record_calls, siblings, summed_twice
from .verify import Mismatch, simulate

LARGE_MODEL = 1 << 25  # parameters beyond which one layer of each structure is proved, and no more
BUDGET_S = 15.0  # seconds of searching (_used_s) after which the last, optional cuts are not looked for
PROVED_LIMIT = 1 << 28  # values of those layers that are always run; more where memory is free


def search_plan(
    model: nn.Module,
    world: int,
    example_inputs: Any = None,
    *,
    styles: dict[str, str] | None = None,
    verify: bool = True,
) -> ShardPlan:
    """A plan that was proved on an example; weights that could not be divided are whole in it.

    Layers of the same structure are traced once, and the plan is proved on all of them. Where that fails,
    because layers differ in ways their structure does not show, all of them are traced. styles: what a
    declared plan allows, by parameter name; None: anything. verify: prove the plan, on ranks simulated in
    this process. Raises ShardingError where the model cannot be traced.
    """
    if world == 1:
        return replicated(model, 1, "one rank holds everything")
    short = make_surrogate(model, shorten=True)
    if short.places:
        try:
            example = find_example(short.model, example_inputs)
        except ShardingError:
            example = None
        if example is not None:
            plan = _search(model, short, example, world, styles, verify)
            if plan is not None:
                return plan
    whole = make_surrogate(model)
    plan = _search(model, whole, find_example(whole.model, example_inputs), world, styles, verify)
    return replicated(model, world, "no way to divide it was proved") if plan is None else plan


def prove(model: nn.Module, plan: ShardPlan, example_inputs: Any = None) -> None:
    """Raise ShardingError, naming the module, where ranks of this plan do not agree with the whole model."""
    example = find_example(make_surrogate(model).model, example_inputs)
    mismatch = simulate(model, plan, example, set())
    if mismatch is not None:
        raise ShardingError(
            f"the plan is wrong in {mismatch.module or 'the model'}: {mismatch.what}; use plan='trace', or "
            "correct it"
        )


def replicated(model: nn.Module, world: int, reason: str) -> ShardPlan:
    """The plan that divides nothing."""
    plans = (WeightPlan(n, shape, "replicate", reason=reason) for n, shape in named_shapes(model))
    return ShardPlan(world, tuple(plans))


def _search(
    model: nn.Module,
    surrogate: Surrogate,
    example: Example,
    world: int,
    styles: dict[str, str] | None,
    verify: bool,
) -> ShardPlan | None:
    """A plan for model; None where none was proved."""
    began = _now()
    called, arguments = record_calls(make_surrogate(surrogate.model).model, example)
    extra = extra_calls(make_surrogate(surrogate.model).model, called, arguments)
    if verify and proof_size(surrogate.model, example) > _proved_limit(model):
        log.get_logger().warning(
            "a layer of %s is too large to run here; its plan is traced and not proved", type(model).__name__
        )
        verify = False
    search = Search(surrogate, replace(example, calls=example.calls + extra), world, verify)
    if styles is not None:
        _restrict(search, {surrogate.stand_in(name): style for name, style in styles.items()})
    plan, proved = _proved(search)
    if not proved:
        return None
    if styles is None and _used_s(began) < BUDGET_S:
        plan = _with_vocabulary(search, _with_gathers(search, plan))
    elif styles is None:
        log.get_logger().warning(
            "finding a plan took over %d s; what only a gather could cut stays whole, as vocabularies do",
            BUDGET_S,
        )
        plan = replace(plan, cut_short=True)
    _say_too_few(search, plan)
    if search.shown:
        log.get_logger().warning(
            "hooks on %s see whole activations, which are gathered for them or stay whole; remove hooks that "
            "you do not need before shard",
            ", ".join(sorted(search.shown)),
        )
    twins = siblings(surrogate.model, called)
    plan = replace(expand_plan(plan, surrogate, model, twins), branches=tuple(sorted(search.branches)))
    large = sum(p.numel() for p in model.parameters()) > LARGE_MODEL or any(
        p.is_meta for p in model.parameters()
    )
    if not verify or large or not (surrogate.places or twins):
        return plan
    calls = surrogate.original_calls(model, search.example)
    return plan if simulate(model, plan, calls, set()) is None else None


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _used_s(began: tuple[float, float]) -> float:
    """Seconds since `began` on the clock or of this process's CPUs, whichever are fewer: neither a busy host
    nor a pool of threads shortens the search.
    """
    return min(now - then for now, then in zip(_now(), began, strict=True))


def _proved_limit(model: nn.Module) -> int:
    """Values of a proof: what a planner without weights may hold, and a quarter of the free memory where the
    model is there. A value takes 4 bytes in the whole copy and 4 on its rank.
    """
    if any(p.is_meta for p in model.parameters()):
        return PROVED_LIMIT
    return max(PROVED_LIMIT, int(psutil.virtual_memory().available) // 4 // 8)


def _restrict(search: Search, styles: dict[str, str]) -> None:
    """Only the weights of a declared plan may be divided."""
    for name, parameter in search.surrogate.model.named_parameters():
        if parameter.dim() > 1 and name not in styles:
            search.decisions.whole[name] = "the declared plan leaves it whole"
    by_style: dict[str, set[str]] = {}
    for name, style in styles.items():
        by_style.setdefault(style, set()).add(name.rpartition(".")[0])
    search.decisions.gathers.update(by_style.get("gather", ()))
    for path in by_style.get("vocab", ()):
        table = search.surrogate.model.get_submodule(path)
        if isinstance(table, nn.Embedding):
            search.decisions.vocabularies.add(path)
            search.decisions.gathers.update(sharing_weight(search.surrogate.model, table))


def _say_too_few(search: Search, plan: ShardPlan) -> None:
    """Warn of what more ranks than units leave whole, or cut by columns with a collective of its own."""
    gathered = {gather.module for gather in plan.gathers}
    pairs = {w.name for w in plan.weights if w.dim is not None and w.name.rpartition(".")[0] not in gathered}
    short = {name: units for name, units in search.too_few.items() if name not in pairs}
    if short:
        name, units = max(short.items(), key=lambda found: found[1])
        log.get_logger().warning(
            "%d ranks are more than %s and what goes with it can be divided over (%d units); use %d ranks or "
            "fewer",
            search.world,
            name,
            units,
            units,
        )


def _proved(search: Search) -> tuple[ShardPlan, bool]:
    """A plan that agrees with the whole model, by leaving whole what does not."""
    while True:
        analysis = search.settle()
        plan, problems = build_plan(analysis, search.decisions)
        if not search.settled:
            return plan, False
        around = summed_twice(plan, {path for path, _, _ in search.example.calls if path})
        if around is not None:
            apart = Mismatch(around, "what the example does not reach there cannot be summed with the rest")
            if not blame(search, analysis, apart, problems):
                return plan, False
            continue
        if not search.verify:
            return plan, True
        mismatch = simulate(search.surrogate.model, plan, search.example, analysis.whole_results)
        if mismatch is None:
            return plan, True
        if not blame(search, analysis, mismatch, problems):
            return plan, False


def _with_gathers(search: Search, plan: ShardPlan) -> ShardPlan:
    """The plan, with weights that stayed whole cut by columns where that is worth a collective."""
    refused: set[str] = set()
    for _ in range(4):
        chosen = choose_gathers(search.surrogate.model, plan, refused, search.surrogate.repeats)
        if not chosen:
            return plan
        refused.update(chosen)
        before = search.decisions.copy()
        search.decisions.gathers.update(chosen)
        for name in [n for n in search.decisions.whole if n.rpartition(".")[0] in chosen]:
            del search.decisions.whole[name]
        tried, proved = _proved(search)
        if proved and _held(tried) < _held(plan):
            plan = tried
        else:
            search.decisions = before
    return plan


def _with_vocabulary(search: Search, plan: ShardPlan) -> ShardPlan:
    """The plan, with an embedding cut by tokens, and a head that is tied to it, where that is worth it."""
    chosen = choose_vocabulary(search.surrogate.model, plan, search.surrogate.repeats)
    if chosen is None:
        return plan
    before = search.decisions.copy()
    embedding, heads = chosen
    search.decisions.vocabularies.add(embedding)
    search.decisions.gathers.update(heads)
    search.decisions.whole.pop(f"{embedding}.weight", None)
    tried, proved = _proved(search)
    if proved and _held(tried) < _held(plan):
        return tried
    search.decisions = before
    return plan


def _held(plan: ShardPlan) -> int:
    """Values on the fullest rank."""
    return max(sum(prod(w.local_shape(rank)) for w in plan.weights) for rank in range(plan.world_size))


def blame(search: Search, analysis: Analysis, mismatch: Mismatch, problems: list[str]) -> bool:
    """Leave whole what is divided in the failing module, or around it; False where nothing is divided."""
    path = mismatch.module
    reason = f"sharded it fails in {path or 'the model'}: {mismatch.what}"[:200]
    while True:
        prefix = path + "." if path else ""
        names = {
            name
            for family in analysis.families
            for name in family.sources
            if name.startswith(prefix) and name in analysis.trace.order and name not in search.decisions.whole
        } | {name for name in search.decisions.marks if name.startswith(prefix)}
        if names:
            for name in names:
                search.decisions.whole[name] = reason
                search.decisions.marks.pop(name, None)
            return True
        if not path:
            return False
        path = path.rpartition(".")[0]
