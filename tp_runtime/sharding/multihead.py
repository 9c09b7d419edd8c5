"""torch's own attention with as many heads as its weights have, and its encoders without nested tensors.

nn.MultiheadAttention reads the width of a head off its input, which is whole on every rank, and its number of
heads off an integer. The forward here computes the same from the size of a head alone, so that a trace can
follow heads through it and a rank's part of the weights runs as it is. Copies that are traced have it, and
sharded models.

Attention weights, where they are asked for (need_weights, which is torch's default), are made whole on every
rank: averaged ones are one sum over ranks, those of each head are gathered. A trace takes them for whole.

nn.TransformerEncoder turns padded rows into nested tensors, which no hook and no linear of ours takes.

Legend: B batch, L queries, S keys, H heads here, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShardingError
from .trace.hooks import unseen

Weights = Callable[[Tensor, bool], Tensor]  # of each head here [B, H, L, S], averaged? -> those of the module
_WEIGHTS = "_tp_attention_weights"
_ZEROS = "_tp_zero_padding"


def replaceable(model: nn.Module) -> Iterator[nn.MultiheadAttention]:
    """The attentions that `attend` computes as their own forward does."""
    for module in model.modules():
        if not isinstance(module, nn.MultiheadAttention) or module.bias_k is not None or module.add_zero_attn:
            continue
        if not {"in_proj_weight", "q_proj_weight"} <= module._parameters.keys():
            continue  # parametrized, or pruned
        own = type(module).forward is nn.MultiheadAttention.forward and "forward" not in vars(module)
        if own or _WEIGHTS in vars(module):
            yield module


def own_weights(weights_BHLS: Tensor, average: bool) -> Tensor:
    """Those of a module that has all heads."""
    return weights_BHLS.mean(dim=1) if average else weights_BHLS


def unseen_weights(weights_BHLS: Tensor, average: bool) -> Tensor:
    """The same, unknown to a trace."""
    with unseen():
        return own_weights(weights_BHLS, average).clone()


def replace_forward(module: nn.MultiheadAttention, weights: Weights = unseen_weights) -> None:
    """Let the module compute by `attend`."""
    vars(module)["forward"] = MethodType(attend, module)
    vars(module)[_WEIGHTS] = weights


def restore_forward(module: nn.Module) -> None:
    """Give a module, where it computes by `attend`, its own forward back."""
    if vars(module).pop(_WEIGHTS, None) is not None:
        del vars(module)["forward"]


def without_nested_tensors(model: nn.Module) -> list[Callable[[], None]]:
    """Keep the encoders in `model` from nested tensors, with the same results; what undoes it."""
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        # Of a copy that lost its hooks, the mark says that its results are those of nested tensors.
        if isinstance(module, nn.TransformerEncoder) and (module.use_nested_tensor or _ZEROS in vars(module)):
            layer = module.layers[-1]
            if any(getattr(hook, "func", None) is _zero_padding for hook in layer._forward_hooks.values()):
                continue
            fill = partial(_zero_padding, module.mask_check)
            handle = layer.register_forward_hook(fill, with_kwargs=True)
            module.use_nested_tensor, vars(module)[_ZEROS] = False, True
            undo.append(partial(_nested_again, module, handle))
    return undo


def _nested_again(encoder: nn.TransformerEncoder, handle: Any) -> None:
    handle.remove()
    encoder.use_nested_tensor = True
    vars(encoder).pop(_ZEROS, None)


def _zero_padding(mask_check: bool, layer: nn.Module, _args: Any, kwargs: dict[str, Any], out: Tensor) -> Any:
    """Of an encoder's last layer: zeros where torch would have filled up a nested tensor with them."""
    padding, mask = kwargs.get("src_key_padding_mask"), kwargs.get("src_mask")
    if padding is None or mask is not None or layer.training or out.dim() != 3:
        return None
    if torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
        return None
    if mask_check and torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
        return None
    kept = padding == 0
    aligned = (kept[:, 1:] <= kept[:, :-1]).all() if mask_check else True
    return out.masked_fill((~kept & aligned).unsqueeze(-1), 0.0)


def attend(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """nn.MultiheadAttention.forward: the same arguments, the same results up to rounding."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched = query.dim() == 3
    first = 0 if self.batch_first or not batched else 1  # where B is

    def lead(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if not batched else x.transpose(0, first)

    q_BHLD, k_BHSD, v_BHSD = (
        each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for each in _project(self, lead(query), key is query, lead(key), value is key, lead(value))
    )
    if key_padding_mask is not None and not batched:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    mask = _mask(q_BHLD, key_padding_mask, attn_mask)
    dropout = self.dropout if self.training else 0.0
    weights = None
    if need_weights:
        scores = q_BHLD * self.head_dim**-0.5 @ k_BHSD.transpose(-1, -2)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out_BHLD = weights @ v_BHSD
        weights = vars(self)[_WEIGHTS](weights, average_attn_weights)
    else:
        out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, mask, dropout)
    out: Tensor = self.out_proj(out_BHLD.transpose(1, 2).flatten(2))
    if not batched:
        return out.squeeze(0), None if weights is None else weights.squeeze(0)
    return out.transpose(0, first), weights


def _project(
    self: nn.MultiheadAttention, query: Tensor, same_key: bool, key: Tensor, same_value: bool, value: Tensor
) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, .., H * D]."""
    if self.in_proj_weight is None:
        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    elif same_key and same_value:
        return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
    else:
        weights = self.in_proj_weight.chunk(3)
    biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def _mask(q_BHLD: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """What is added to scores [B, H, L, S]. padding: [B, S]. mask: [L, S] or [B * H, L, S]. Of bool, True is
    left out.
    """
    batch, heads = q_BHLD.shape[:2]
    total: Tensor | None = None
    for each in (mask, padding):
        if each is not None and each.dtype != torch.bool and not each.is_floating_point():
            raise RuntimeError(f"only bool and floating masks are supported, not {each.dtype}")
    if mask is not None and mask.dim() == 3:
        if mask.shape[0] != batch * heads:
            raise ShardingError(
                f"attn_mask has {mask.shape[0]} rows (batch x heads), and this rank has {batch * heads}; "
                "pass shard example_inputs with such a mask, in floats"
            )
        mask = mask.unflatten(0, (batch, heads))
    for each in (mask, None if padding is None else padding[:, None, None, :]):
        if each is not None:
            if each.dtype == torch.bool:
                each = torch.zeros_like(each, dtype=q_BHLD.dtype).masked_fill_(each, float("-inf"))
            total = each if total is None else total + each
    return None if total is None else total.to(q_BHLD.dtype)
