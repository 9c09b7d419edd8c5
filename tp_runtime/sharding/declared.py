"""Plans that somebody wrote, as limits of the search: what they name must divide that way, and nothing else
may.

A declared plan says which layers are column- and row-parallel; it says nothing of head counts, of heads that
do not divide, or of whether it is right. So the trace still finds units, integers and sums, within the plan,
and the result is proved as any other. Three of transformers' own plans do not survive that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import log
from ..errors import ShardingError
from .plan import Plan, WeightPlan
from .shardplan import ShardPlan

# transformers' words and ours -> ours
STYLES = {
    "column": "column",
    "colwise": "column",
    "packed_colwise": "column",
    "row": "row",
    "rowwise": "row",
    "packed_rowwise": "row",
    "gather": "gather",
    "colwise_gather_output": "gather",
    "colwise_rep": "gather",
    "rowwise_split_input": "row",  # the trace cuts the input by itself
    "vocab": "vocab",
    "embedding_rowwise": "vocab",
    "replicate": "replicate",
}


def declared_styles(model: nn.Module, plan: Any) -> dict[str, str]:
    """Style ("column", "row", "gather", "vocab") by parameter name.

    plan: a mapping from module or parameter names ("*" for one part of a name, and names may begin inside, as
    transformers' do) to styles; a Plan; or "declared", for the model's own (`tp_plan` of transformers
    models). Raises ShardingError for an unknown style, for names that match nothing, and where a model has no
    plan.
    """
    if isinstance(plan, Plan):
        return {w.name: _style_of(model, w) for w in plan.weights if w.dim is not None}
    patterns = _own_plan(model) if isinstance(plan, str) else plan
    if not isinstance(patterns, Mapping):
        raise ShardingError(
            f"plan={plan!r} is none; use 'trace', 'declared', a Plan, or a dict of names and styles"
        )
    found: dict[str, str] = {}
    for pattern, word in patterns.items():
        if isinstance(plan, str) and word not in STYLES:
            # A module's style (moe_tp_experts, ...), which its weights' styles imply, or one we have not.
            log.get_logger().info("style %r of %r in the declared plan is not followed", word, pattern)
            continue
        style = STYLES.get(str(word))
        if style is None:
            known = ", ".join(dict.fromkeys(STYLES.values()))
            raise ShardingError(f"style {word!r} of {pattern!r} is not known; use one of: {known}")
        part = re.escape(pattern).replace(r"\*", r"[^.]+")
        matcher = re.compile(rf"(?:.*\.)?{part}(?:\.(?:weight|bias))?")
        names = [name for name, _ in model.named_parameters() if matcher.fullmatch(name)]
        if not names and not isinstance(plan, str):
            raise ShardingError(
                f"plan names {pattern!r}, which no parameter of {type(model).__name__} matches"
            )
        if style != "replicate":
            found.update(dict.fromkeys(names, style))
    return found


def _style_of(model: nn.Module, weight: WeightPlan) -> str:
    """The style of a weight of a Plan: of those cut by tokens, a head has its result gathered."""
    if weight.style != "vocab":
        return "row" if weight.style == "row" else "column"
    try:
        module = model.get_submodule(weight.name.rpartition(".")[0])
    except AttributeError:
        raise ShardingError(
            f"the plan names {weight.name}, which {type(model).__name__} has not; make a plan of this model"
        ) from None
    return "vocab" if isinstance(module, nn.Embedding) else "gather"


def _own_plan(model: nn.Module) -> Mapping[str, Any]:
    """The plan a transformers model brings."""
    own = getattr(model, "tp_plan", None)
    if not own:
        raise ShardingError(
            f"{type(model).__name__} declares no plan; use plan='trace', or a dict of names and styles"
        )
    return own


def check_followed(plan: ShardPlan, styles: dict[str, str]) -> None:
    """Raise ShardingError where a declared matrix does not divide as declared."""
    for weight in plan.weights:
        wanted = styles.get(weight.name)
        if wanted is None or len(weight.shape) < 2:
            continue
        got = "column" if weight.style == "column" else weight.style
        if got != ("column" if wanted == "gather" else wanted) and got != "vocab":
            why = f": {weight.reason}" if weight.reason else ""
            raise ShardingError(
                f"the declared plan makes {weight.name} {wanted}-parallel, but it proves to be {got}{why}; "
                "use plan='trace', or correct the plan"
            )
