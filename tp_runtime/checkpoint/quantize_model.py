"""quantize(model, "int8"): the linears of a model that nobody edited, weight-only, before or after `shard`.

Quantised values are those of the whole weight either way. After `shard` a rank holds a part: rows are whole
rows and round as they are, but of columns the scale of a row (or of a group that the cut goes through) is
known to all ranks together only, so such a weight is gathered, rounded and cut again, one at a time. Before
`shard` the linear keeps its canonical values until it is cut, because kernels pack them in an order of
their own.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..errors import ConfigError, ShardingError
from ..layout import WeightFormat, WeightLayout, weight_format
from ..quant.divisible import DivisibleQuantLinear
from ..quant.linear import QuantLinear
from ..quant.rounding import quantize as round_weight
from ..quant.rounding import row_absmax
from ..sharding.apply import applied, gather_weight
from ..sharding.multihead import without_nested_tensors
from ..sharding.plan import WeightPlan, extent


def quantize(model: nn.Module, format: str, *, skip: Iterable[str] = ()) -> nn.Module:
    """Replace every nn.Linear of the model by one whose weight stays quantised, and return the model.

    format: "int8", "int8-g32", "int4", ... skip: paths of linears to leave (the head, say). Linears whose
    weight is shared with another module (a tied head) are left too. Every rank of a sharded model calls it
    alike. Raises ConfigError for an unknown format, and ShardingError for a model on the meta device.
    """
    form = weight_format(format)
    if form is None:
        return model
    if type(model) is nn.Linear:
        raise ConfigError("the model is itself an nn.Linear, which cannot be replaced; wrap it in a module")
    state = applied(model)
    plans = {} if state is None else {w.name: w for w in state.plan.weights}
    shared = _shared(model)
    left = set(skip)
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or path in left or id(module.weight) in shared:
            continue
        if module.weight.is_meta:
            raise ShardingError(f"{path}.weight is on the meta device; load(model, path) before quantize")
        plan = plans.get(f"{path}.weight")
        made = _quantized(module, form, None if plan is None or plan.dim is None else plan, model)
        _take_hooks(module, made)
        model.set_submodule(path, made)
    _leave_fast_paths(model)
    return model


def _leave_fast_paths(model: nn.Module) -> None:
    """Of torch's own layers, which read the weights of their linears instead of calling them."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        if any(isinstance(each, QuantLinear) for each in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            else:
                without_nested_tensors(module)


def _shared(model: nn.Module) -> set[int]:
    """Parameters that several modules hold."""
    seen: set[int] = set()
    found: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (found if id(parameter) in seen else seen).add(id(parameter))
    return found


def _quantized(
    linear: nn.Linear, form: WeightFormat, plan: WeightPlan | None, model: nn.Module
) -> QuantLinear:
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    if plan is None:
        layout = WeightLayout.whole((weight.shape[0], weight.shape[1]), form)
        rounded = round_weight(weight, layout)
        return DivisibleQuantLinear(rounded, bias) if applied(model) is None else QuantLinear(rounded, bias)
    state = applied(model)
    assert state is not None, "a divided weight is of a sharded model"
    held = plan.parts[state.comm.rank]
    if plan.dim == 0:
        layout = WeightLayout.whole((extent(held), plan.shape[1]), form)
        return QuantLinear(round_weight(weight, layout), bias)
    if len(held) != 1:
        raise ShardingError(
            f"{plan.name} holds {len(held)} ranges of input columns and a quantised weight takes one; "
            f"leave it: skip=[{plan.name.rpartition('.')[0]!r}]"
        )
    whole: Tensor = gather_weight(weight, plan, state.comm)
    layout = WeightLayout((plan.shape[0], plan.shape[1]), (0, plan.shape[0]), held[0], form)
    start, stop = layout.cols if form.group_size is None else layout.covering_cols
    absmax = row_absmax(whole) if form.group_size is None else None
    return QuantLinear(round_weight(whole[:, start:stop].contiguous(), layout, absmax), bias)


def _take_hooks(old: nn.Module, new: nn.Module) -> None:
    """The collectives of a sharded linear go on with what replaces it."""
    new._forward_hooks = old._forward_hooks
    new._forward_pre_hooks = old._forward_pre_hooks
    new._forward_hooks_with_kwargs = old._forward_hooks_with_kwargs
    new._forward_pre_hooks_with_kwargs = old._forward_pre_hooks_with_kwargs
    new.train(old.training)
    for parameter in new.parameters():
        parameter.requires_grad_(False)
