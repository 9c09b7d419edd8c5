"""Small hand-written models, one for each way of writing a layer that a planner has to read.

Each takes token ids [batch, sequence] and returns logits. Legend: B batch, S sequence, H hidden, N query
heads, K key-value heads, D head_dim, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEAD, NEURONS, VOCABULARY = 48, 8, 84, 96


class RootMeanSquare(nn.Module):
    """x / rms(x) * weight, over the last dim."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


def rotate(x_BNSD: Tensor) -> Tensor:
    """Rotary positions, halves convention."""
    half = x_BNSD.shape[-1] // 2
    angles = torch.arange(x_BNSD.shape[-2])[:, None] * 10.0 ** (-torch.arange(half) / half)[None]
    a, b = x_BNSD[..., :half], x_BNSD[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def attend(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """Causal attention, heads joined: [B, S, N * D]."""
    scores = q_BNSD @ k_BNSD.transpose(-1, -2) * q_BNSD.shape[-1] ** -0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(mask, float("-inf")).softmax(-1) @ v_BNSD
    return out.transpose(1, 2).flatten(2)


class GroupedAttention(nn.Module):
    """Separate projections, rotary positions, several query heads a KV head; whole_norm: over all of q and k."""

    def __init__(self, heads: int, kv_heads: int, whole_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.a = nn.Linear(HIDDEN, heads * HEAD, bias=True)
        self.b = nn.Linear(HIDDEN, kv_heads * HEAD, bias=False)
        self.c = nn.Linear(HIDDEN, kv_heads * HEAD, bias=False)
        self.d = nn.Linear(heads * HEAD, HIDDEN, bias=True)
        self.e = RootMeanSquare(heads * HEAD) if whole_norm else nn.Identity()
        self.f = RootMeanSquare(kv_heads * HEAD) if whole_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.e(self.a(x)).view(batch, length, self.heads, HEAD).transpose(1, 2)
        k = self.f(self.b(x)).view(batch, length, self.kv_heads, HEAD).transpose(1, 2)
        v = self.c(x).view(batch, length, self.kv_heads, HEAD).transpose(1, 2)
        copies = self.heads // self.kv_heads
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        return self.d(attend(rotate(q), rotate(k), v))


class FusedAttention(nn.Module):
    """One matrix [H, 3 * N * D] used as x @ W, q | k | v one after another, head sizes from its shape."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.size = heads * HEAD
        self.weight = nn.Parameter(torch.zeros(HIDDEN, 3 * self.size))
        self.bias = nn.Parameter(torch.zeros(3 * self.size))
        self.out = nn.Linear(self.size, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            torch.addmm(self.bias, x.flatten(0, 1), self.weight).view(*x.shape[:2], -1).split(self.size, -1)
        )
        shape = (*x.shape[:2], self.heads, -1)
        return self.out(attend(*(t.view(shape).transpose(1, 2) for t in (q, k, v))))


class InterleavedAttention(nn.Module):
    """One matrix whose rows are (head, q | k | v, D)."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.both = nn.Linear(HIDDEN, heads * 3 * HEAD)
        self.out = nn.Linear(heads * HEAD, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.both(x).view(*x.shape[:2], self.heads, 3 * HEAD).transpose(1, 2)
        return self.out(attend(*fused.chunk(3, -1)))


class SharedRowsAttention(nn.Module):
    """One matrix of all query heads and of one key and value head, which every query head reads."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.both = nn.Linear(HIDDEN, (heads + 2) * HEAD, bias=False)
        self.out = nn.Linear(heads * HEAD, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.both(x).view(*x.shape[:2], self.heads + 2, HEAD).transpose(1, 2)
        q, k, v = fused.split([self.heads, 1, 1], 1)
        return self.out(attend(q, k, v))


class GatedMLP(nn.Module):
    """silu(gate) * up, from one matrix; halves: gate | up, else gate and up rows alternate."""

    def __init__(self, halves: bool = True) -> None:
        super().__init__()
        self.halves = halves
        self.first = nn.Linear(HIDDEN, 2 * NEURONS)
        self.second = nn.Linear(NEURONS, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        both = self.first(x)
        gate, up = both.chunk(2, -1) if self.halves else (both[..., ::2], both[..., 1::2])
        return self.second(F.silu(gate) * up)


class Experts(nn.Module):
    """Two of four experts a token, kept in 3-D tensors; the router stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4, bias=False)
        self.first = nn.Parameter(torch.zeros(4, HIDDEN, 2 * NEURONS))
        self.second = nn.Parameter(torch.zeros(4, NEURONS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for expert in range(4):
            token, place = torch.where(chosen == expert)
            gate, up = (flat[token] @ self.first[expert]).chunk(2, -1)
            got = F.gelu(gate) * up @ self.second[expert] * weights[token, place, None]
            out.index_add_(0, token, got)
        return out.view_as(x)


class ChannelMixer(nn.Module):
    """A causal depthwise convolution over positions and a gate: channels are independent."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.channels = heads * HEAD
        self.first = nn.Linear(HIDDEN, 2 * self.channels)
        self.over_time = nn.Conv1d(self.channels, self.channels, 3, groups=self.channels, padding=2)
        self.skip = nn.Parameter(torch.zeros(self.channels))
        self.second = nn.Linear(self.channels, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        mixed, gate = self.first(x).split(self.channels, -1)
        mixed = self.over_time(mixed.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.second((mixed + x.new_ones(1) * self.skip) * F.silu(gate))


class LinearAttention(nn.Module):
    """A state of keys times values that decays by what a low-rank pair makes of the input, as in RWKV-6."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(HIDDEN, heads * HEAD, bias=False) for _ in range(3))
        self.down, self.up = nn.Linear(HIDDEN, 4), nn.Linear(4, heads * HEAD)
        self.out = nn.Linear(heads * HEAD, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.query(x), self.key(x), self.value(x), torch.exp(-self.up(torch.tanh(self.down(x))).exp())
        q, k, v, kept = (part.view(batch, tokens, self.heads, -1) for part in parts)
        state, rows = x.new_zeros(batch, self.heads, HEAD, HEAD), []
        for token in range(tokens):
            new = k[:, token, :, :, None] * v[:, token, :, None, :]
            state = state * kept[:, token, :, :, None] + new
            rows.append((q[:, token, :, None, :] @ state).squeeze(2))
        return self.out(torch.stack(rows, 1).flatten(2))


class AbsorbedAttention(nn.Module):
    """Attention in a latent space: one projection's weight, a matrix a head, is multiplied into queries and
    results (DeepSeek's attention as it is written for decoding).
    """

    def __init__(self, heads: int, kv_heads: int, latent: int = 20) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.down = nn.Linear(HIDDEN, heads * HEAD, bias=False), nn.Linear(HIDDEN, latent)
        self.norm, self.up = RootMeanSquare(latent), nn.Linear(latent, 2 * heads * HEAD, bias=False)
        self.out = nn.Linear(heads * HEAD, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        latent = self.norm(self.down(x))
        to_keys, to_values = self.up.weight.view(self.heads, 2 * HEAD, -1).split(HEAD, 1)
        query = self.query(x).unflatten(-1, (self.heads, HEAD))
        query = torch.einsum("bthd,hdr->bthr", query, to_keys)
        scores = torch.einsum("bthr,bsr->bhts", query, latent) * HEAD**-0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        mixed = torch.einsum("bhts,bsr->bthr", scores.masked_fill(~seen, -1e9).softmax(-1), latent)
        return self.out(torch.einsum("bthr,hdr->bthd", mixed, to_values).flatten(2))


class Decoder(nn.Module):
    """Embedding, two layers of mixer and MLP, norm and head (tied: the embedding's own matrix)."""

    def __init__(
        self,
        mixer: Callable[[], nn.Module],
        mlp: Callable[[], nn.Module],
        tied: bool = False,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(HIDDEN), mixer(), RootMeanSquare(HIDDEN), mlp()]) for _ in range(2)
        )
        self.last = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.parallel = parallel
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for before_mixer, mixer, before_mlp, mlp in self.layers:  # type: ignore[misc]
            if self.parallel:
                x = x + mixer(before_mixer(x)) + mlp(before_mlp(x))
            else:
                x = x + mixer(before_mixer(x))
                x = x + mlp(before_mlp(x))
        return self.head(self.last(x))


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "grouped": lambda n, k: Decoder(lambda: GroupedAttention(n, k), GatedMLP),
    "fused": lambda n, k: Decoder(lambda: FusedAttention(n, k), lambda: GatedMLP(False), tied=True),
    "interleaved": lambda n, k: Decoder(lambda: InterleavedAttention(n, k), GatedMLP, parallel=True),
    "shared rows": lambda n, k: Decoder(lambda: SharedRowsAttention(n, k), GatedMLP),
    "experts": lambda n, k: Decoder(lambda: GroupedAttention(n, k), Experts),
    "whole norm": lambda n, k: Decoder(lambda: GroupedAttention(n, k, True), GatedMLP),
    "channels": lambda n, k: Decoder(lambda: ChannelMixer(n, k), GatedMLP),
    "linear attention": lambda n, k: Decoder(lambda: LinearAttention(n, k), GatedMLP),
    "absorbed": lambda n, k: Decoder(lambda: AbsorbedAttention(n, k), GatedMLP),
}


def build(name: str, heads: tuple[int, int] = (8, 4)) -> tuple[nn.Module, Tensor]:
    """(the model with drawn weights, token ids [2, 12]); heads: query heads and key-value heads."""
    generator = torch.Generator().manual_seed(1)
    model = MODELS[name](*heads).eval()
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
        parameter.data = drawn * scale + (parameter.dim() == 1)
        parameter.requires_grad_(False)
    return model, torch.randint(0, VOCABULARY, (2, 12), generator=generator)
