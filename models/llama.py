"""The Llama family on one device, plainly written: the model every parallel and quantised path is held to.

Pre-norm decoder layers (RMSNorm, grouped-query attention with rotary positions, SwiGLU), as described by
ModelConfig. It imports torch and nothing else, and knows nothing of ranks, caches or number formats. Who
needs those puts them in from outside:
- attention over a cache comes in through `attend(layer, q, k, v)`;
- head counts are read from what the projections return, so projections that hold some of the heads work;
- `Attention.qkv_proj` and `MLP.gate_up_proj` are empty places for a projection that does several at once.

Weights are left uninitialised: they come from a checkpoint, and building costs nothing (70B on the meta
device in a fraction of a second).

Legend: B leading dims (any number, also none), S tokens, E hidden_size, H query heads, K key-value heads,
D head_dim, M intermediate_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .rope import inverse_frequencies, turn

# attend(layer, q_BSHD, k_BSKD, v_BSKD) -> [..., S, H, D]; scores are scaled by head_dim ** -0.5.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal_attention(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, window: int = 0) -> Tensor:
    """Causal attention among the S tokens given. Returns [..., S, H, D].

    window: tokens a query sees, itself included; 0: all before it. Query head h uses key-value head
    h // (H / K).
    """
    seq = q_BSHD.shape[-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (q_BSHD, k_BSKD, v_BSKD))
    if 0 < window < seq:
        position_S = torch.arange(seq, device=q.device)
        age_SS = position_S[:, None] - position_S[None, :]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=(age_SS >= 0) & (age_SS < window), enable_gqa=True
        )
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(q_BSHD.shape)


class Linear(nn.Linear):
    """nn.Linear without the random start."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """nn.Embedding without the random start."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim. Normalised in fp32, rounded to x's dtype, then weighted."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size]; the same shape and dtype back."""
        x_fp32 = x.float()
        scale = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x_fp32 * scale).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention. The heads present are those the projections return."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        # Stands for q_proj, k_proj and v_proj together where it is set: x -> (q, k, v).
        self.qkv_proj: nn.Module | None = None
        self.turn: Callable[[Tensor, Tensor, Tensor], Tensor] = turn

    def forward(self, x_BSE: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, attend: Attend, layer: int) -> Tensor:
        """The attention block's output, before the residual sum."""
        if self.qkv_proj is None:
            qkv = self.q_proj(x_BSE), self.k_proj(x_BSE), self.v_proj(x_BSE)
        else:
            qkv = self.qkv_proj(x_BSE)
        q_BSHD, k_BSKD, v_BSKD = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHD, k_BSKD = self.q_norm(q_BSHD), self.k_norm(k_BSKD)
        q_BSHD, k_BSKD = self.turn(q_BSHD, cos_BSD, sin_BSD), self.turn(k_BSKD, cos_BSD, sin_BSD)
        return self.o_proj(attend(layer, q_BSHD, k_BSKD, v_BSKD).flatten(-2))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        # Stands for gate_proj and up_proj together where it is set: x -> (gate, up).
        self.gate_up_proj: nn.Module | None = None
        self.gate: Callable[[Tensor, Tensor], Tensor] = silu_mul

    def forward(self, x_BSE: Tensor) -> Tensor:
        """The MLP block's output, before the residual sum."""
        if self.gate_up_proj is None:
            gate_BSM, up_BSM = self.gate_proj(x_BSE), self.up_proj(x_BSE)
        else:
            gate_BSM, up_BSM = self.gate_up_proj(x_BSE)
        return self.down_proj(self.gate(gate_BSM, up_BSM))


class DecoderLayer(nn.Module):
    """One layer. `index` is only handed to attend, so that one compiled graph serves every layer."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BSE: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, attend: Attend) -> Tensor:
        """x [..., S, E] to the next layer's x; cos, sin [..., S, D] in fp32."""
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE), cos_BSD, sin_BSD, attend, self.index)
        return x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))


class Decoder(nn.Module):
    """The part of the model that Hugging Face calls `model`: everything but the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A model of the family; parameters are named as in Hugging Face checkpoints.

    With tied embeddings there is no `lm_head` (it is None) and the head is the embedding's weight.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head: nn.Module | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        # No buffer: to_empty() would wipe it, and a meta model would have none.
        self._inv_freq, self._rotary_scale = inverse_frequencies(config)

    def rotary(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [..., S, D] in fp32 of integer positions [..., S], for all layers of one forward."""
        if self._inv_freq.device != positions_BS.device:
            self._inv_freq = self._inv_freq.to(positions_BS.device)
        angles_BSF = positions_BS[..., None].float() * self._inv_freq
        angles_BSD = torch.cat((angles_BSF, angles_BSF), dim=-1)
        return angles_BSD.cos() * self._rotary_scale, angles_BSD.sin() * self._rotary_scale

    def attend(self, layer: int, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        """The default `attend`: the tokens given are one whole sequence a row."""
        return causal_attention(q_BSHD, k_BSKD, v_BSKD, self.config.window(layer))

    def hidden(self, ids_BS: Tensor, positions_BS: Tensor, attend: Attend | None = None) -> Tensor:
        """Final-normed hidden states [..., S, E] of token ids at integer positions, both [..., S]."""
        cos_BSD, sin_BSD = self.rotary(positions_BS)
        x_BSE = self.model.embed_tokens(ids_BS)
        for layer in self.model.layers:
            x_BSE = layer(x_BSE, cos_BSD, sin_BSD, attend or self.attend)
        return self.model.norm(x_BSE)

    def head(self, hidden_BSE: Tensor) -> Tensor:
        """Logits [..., V] in the hidden states' dtype."""
        if self.lm_head is None:
            return F.linear(hidden_BSE, self.model.embed_tokens.weight)
        return self.lm_head(hidden_BSE)

    def forward(self, ids_BS: Tensor, positions_BS: Tensor, attend: Attend | None = None) -> Tensor:
        """Logits [..., S, V]: head(hidden(...))."""
        return self.head(self.hidden(ids_BS, positions_BS, attend))
