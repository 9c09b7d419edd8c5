"""torch.compile takes a decoder layer whole, and one graph serves every layer of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tp_runtime.models.config import ModelConfig
from tp_runtime.models.llama import DecoderLayer, Llama, causal_attention

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    qk_norm=True,
    attention_bias=True,
)


def _step(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """One layer over this layer's cache: here just a copy in and attention within the step."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache.copy_(k)
        v_cache.copy_(v)
        return causal_attention(q, k_cache, v_cache)

    return layer(x, cos, sin, attend)


@torch.inference_mode()
def test_one_graph_for_all_layers() -> None:
    torch.manual_seed(0)
    model = Llama(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(_step, fullgraph=True, dynamic=False, backend=backend)
    cos, sin = model.rotary(torch.arange(11))
    x = torch.randn(11, CONFIG.hidden_size)
    caches = torch.zeros(CONFIG.num_layers, 2, 11, CONFIG.num_kv_heads, CONFIG.head_dim)
    for layer, (k_cache, v_cache) in zip(model.model.layers, caches, strict=True):
        wanted = layer(x, cos, sin, lambda _, q, k, v: causal_attention(q, k, v))
        x = compiled(layer, x, cos, sin, k_cache, v_cache)
        assert torch.equal(x, wanted)
        assert k_cache.abs().sum() > 0
    torch._dynamo.reset()
    assert len(graphs) == 1, f"{CONFIG.num_layers} layers needed {len(graphs)} graphs"
