"""From the plan of a shortened copy to the plan of the whole model: layers of one structure divide alike."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .plan import WeightPlan
from .shardplan import ShardPlan
from .surrogate import Surrogate, named_shapes


def expand_plan(plan: ShardPlan, surrogate: Surrogate, model: nn.Module, twins: dict[str, str]) -> ShardPlan:
    """The plan for `model`, of which `surrogate` is a shortened copy. twins: modules of the copy that divide
    as another one.
    """

    def stand_in(name: str) -> str:
        path = surrogate.stand_in(name)
        for module, twin in twins.items():
            if path == module or path.startswith(module + "."):
                return twin + path[len(module) :]
        return path

    modules: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        modules.setdefault(stand_in(name), []).append(name)
    known = {weight.name: weight for weight in plan.weights}
    weights = []
    for name, shape in named_shapes(model):
        found = known.get(stand_in(name))
        if found is None or (found.shape and found.shape != shape):
            weights.append(WeightPlan(name, shape, "replicate", reason="the example inputs do not reach it"))
        else:
            weights.append(replace(found, name=name, shape=shape))
    return replace(
        plan,
        weights=tuple(weights),
        sums=tuple((m, place) for module, place in plan.sums for m in modules.get(module, [])),
        gathers=tuple(replace(g, module=m) for g in plan.gathers for m in modules.get(g.module, [])),
        slices=tuple(replace(s, module=m) for s in plan.slices for m in modules.get(s.module, [])),
        norms=tuple(replace(n, module=m) for n in plan.norms for m in modules.get(n.module, [])),
        vocabularies=tuple(m for v in plan.vocabularies for m in modules.get(v, [])),
        integers=tuple(replace(i, owner=owner) for i in plan.integers for owner in _owners(i.owner, modules)),
    )


def _owners(owner: str, modules: dict[str, list[str]]) -> list[str]:
    path, mark, attribute = owner.partition(">")
    return [module + mark + attribute for module in modules.get(path, [])]
