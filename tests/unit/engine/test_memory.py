"""Sums from shapes: bytes a token, bytes a rank, what fits, and the figures' definitions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tp_runtime.checkpoint.inventory import TensorInfo
from tp_runtime.config import CACHE_DTYPES, EngineConfig
from tp_runtime.engine import host_memory
from tp_runtime.engine.build import cache_shape
from tp_runtime.engine.device_memory import device_memory_errors
from tp_runtime.engine.figures import Timing, last_level_cache_bytes, weight_bytes_per_token
from tp_runtime.engine.host_memory import free_bytes_by_rank, host_free_bytes
from tp_runtime.engine.kv_cache import KVCache
from tp_runtime.engine.memory import (
    OVERHEAD_BYTES,
    MemoryPlan,
    context_limit,
    formats,
    memory_plan,
    sharding_plan,
)
from tp_runtime.errors import ConfigError, MemoryLimitError
from tp_runtime.models import registry
from tp_runtime.models.config import ModelConfig

SMOL = (49152 * 576, 30 * (576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536))


def config_of(name: str) -> ModelConfig:
    entry = registry.find(name)
    assert entry is not None
    return entry.config


@pytest.mark.parametrize(
    ("quant", "head_bytes", "body_bytes"),
    [
        ("none", 2.0, 2.0),
        ("int8", 1.0, 1.0),
        ("int4", 1.0, 0.5 + 2 / 32),
        ("int4-g64", 1.0, 0.5 + 2 / 64),
        ("int8-g32", 1 + 2 / 32, 1 + 2 / 32),
    ],
)
@pytest.mark.parametrize("world", [1, 3])
def test_weight_bytes_per_token(quant: str, head_bytes: float, body_bytes: float, world: int) -> None:
    """The unsharded model's matrices, the tied head once; int8 has an fp32 scale a row."""
    model = config_of("smollm2-135m")
    found = weight_bytes_per_token(sharding_plan(model, world), True, formats(EngineConfig(quant=quant)), 2)
    rows = 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)
    wanted = SMOL[0] * head_bytes + SMOL[1] * body_bytes
    wanted += 4 * 49152 if head_bytes == 1.0 else 0
    wanted += 4 * rows if body_bytes == 1.0 else 0
    assert found == pytest.approx(wanted, rel=1e-12)


def test_untied_embeddings_are_looked_up_and_not_read() -> None:
    model = config_of("llama-70b")
    found = weight_bytes_per_token(sharding_plan(model, 1), False, formats(EngineConfig()), 2)
    layer = 8192 * 8192 * 2 + 2 * 1024 * 8192 + 3 * 8192 * 28672
    assert found == 2 * (80 * layer + 128256 * 8192)


def test_formats() -> None:
    format_of = formats(EngineConfig(quant="int4", int4_asym=True))
    body, head = format_of("model.layers.0.mlp.up_proj.weight"), format_of("lm_head.weight")
    assert body is not None and (body.name, body.asymmetric) == ("int4-g32", True)
    assert head is not None and head.name == "int8"
    assert (
        format_of("model.norm.weight") is None and format_of("model.layers.0.self_attn.q_proj.bias") is None
    )
    plain_head = formats(EngineConfig(quant="int4", head_quant="none"))
    assert plain_head("model.embed_tokens.weight") is None


@pytest.mark.parametrize(("context", "limit"), [(None, 8192), (100, 100), (131072, 131072)])
def test_context(context: int | None, limit: int) -> None:
    assert context_limit(EngineConfig(context=context), config_of("llama-8b")) == limit


def test_context_beyond_the_model() -> None:
    with pytest.raises(ConfigError, match="beyond this model's 8192 positions"):
        context_limit(EngineConfig(context=8193), config_of("smollm2-135m"))


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    model, config = config_of("llama-70b"), EngineConfig(quant="int8", context=8192)
    plan = sharding_plan(model, 8)
    made = memory_plan(
        model, plan, config, dtype="bf16", format_of=formats(config), limits=[10 << 30] * 7 + [None]
    )
    assert [rank.fits for rank in made.ranks] == [True] * 7 + [None]
    first = made.ranks[0]
    assert first.cache_bytes == 2 * 80 * 128 * 8192 * 2, "one KV head of 128 a rank, in bf16"
    assert first.total_bytes == first.weight_bytes + first.cache_bytes + OVERHEAD_BYTES
    made.check("llama-70b")
    small = memory_plan(model, plan, config, dtype="bf16", format_of=formats(config), limits=[9 << 30] * 8)
    with pytest.raises(MemoryLimitError, match=r"on rank 0 .* and 9\.00 GiB are free there; use more ranks"):
        small.check("llama-70b")


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_planned_cache_is_the_one_that_is_made(cache_dtype: str, world: int) -> None:
    model = config_of("llama-1b")
    config = EngineConfig(cache_dtype=cache_dtype, context=4096)
    plan = sharding_plan(model, world)
    sums = memory_plan(model, plan, config, dtype="fp32", format_of=formats(config), limits=[None] * world)
    number_bytes = {"auto": 4, "bf16": 2, "int8": 1, "fp8": 1}[cache_dtype]
    for rank in sums.ranks:
        shape = cache_shape(plan, rank.rank, model, config, "fp32")
        assert rank.cache_bytes == shape.block_bytes * shape.blocks_for(4096)
        vector_bytes = model.head_dim * number_bytes + (4 if cache_dtype == "int8" else 0)
        assert rank.cache_bytes == 2 * model.num_layers * shape.num_kv_heads * 4096 * vector_bytes
        cache = KVCache(shape, 3, "cpu")
        tensors = [*cache.keys, *cache.values, *(x for scales in cache.scales if scales for x in scales)]
        assert sum(tensor.nbytes for tensor in tensors) == 3 * shape.block_bytes


def test_free_memory_of_this_host() -> None:
    one, two = free_bytes_by_rank(1, "cpu"), free_bytes_by_rank(2, "cpu")
    assert len(one) == 1 and len(two) == 2
    assert all(value is not None and value > 0 for value in one + two)
    assert two[0] < one[0] * 0.75, "two ranks share what one has"


def test_caches_and_speed() -> None:
    assert last_level_cache_bytes() >= 0
    assert Timing(1.0, 2.0, 10).tok_s == 5
    assert Timing(1.0, 0.0, 0).tok_s is None


def test_a_cache_of_given_size_counts() -> None:
    model = config_of("smollm2-135m")
    plan = sharding_plan(model, 2)

    def made(cache_bytes: int) -> MemoryPlan:
        config = EngineConfig(cache_bytes=cache_bytes, context=100)
        form = formats(config)
        return memory_plan(model, plan, config, dtype="bf16", format_of=form, limits=[8 << 30] * 2)

    with pytest.raises(MemoryLimitError, match="one row of 100 tokens takes 1966080 bytes a rank; 1 are"):
        made(1).check("smollm2-135m")
    with pytest.raises(MemoryLimitError, match=r"KV cache 93132\.26 GiB .* 8\.00 GiB are free there"):
        made(10**14).check("smollm2-135m")
    made(4 << 30).check("smollm2-135m")


@pytest.mark.parametrize(
    ("stored", "asymmetric"),
    [("Q4_K", True), ("Q5_K", True), ("Q5_1", True), ("Q4_1", True), ("Q6_K", False), ("Q5_0", False),
     ("Q8_0", False), ("Q4_0", False), ("F16", None)],
)  # fmt: skip
@pytest.mark.parametrize("asked", [False, True])
def test_int4_keeps_the_scheme_of_a_gguf(stored: str, asymmetric: bool | None, asked: bool) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    inventory = {name: TensorInfo((64, 64), stored, 4096)}
    form = formats(EngineConfig(quant="int4", int4_asym=asked), inventory)(name)
    assert form is not None and form.asymmetric == (asked if asymmetric is None else asymmetric)


def write_cgroup(root: Path, files: dict[str, str]) -> None:
    own = {"proc/self/mounts": "none /cg cgroup2 rw 0 0\n", "proc/self/cgroup": "0::/job\n"}
    for name, text in {**own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_container_may_take_what_its_limit_leaves(tmp_path: Path) -> None:
    stat = "anon 600000\nactive_file 150000\ninactive_file 50000\n"
    used = {"cg/job/memory.max": "1000000", "cg/job/memory.current": "800000", "cg/job/memory.stat": stat}
    write_cgroup(tmp_path, {**used, "cg/memory.max": "max", "cg/memory.current": "5"})
    assert host_free_bytes(str(tmp_path)) == 400_000


def test_the_limit_holds_for_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each rank has a NUMA node with more free memory than the container may take."""
    placed = SimpleNamespace(ranks=[SimpleNamespace(mem_nodes=(node,)) for node in (0, 1)])
    monkeypatch.setattr(host_memory, "plan_ranks", lambda *_: placed)
    monkeypatch.setattr(host_memory, "_free_of_node", lambda node: (3 if node else 1) << 30)
    monkeypatch.setattr(host_memory, "host_free_bytes", lambda: 1 << 30)
    assert free_bytes_by_rank(2, "cpu") == [1 << 28, 3 << 28]


def test_a_full_gpu_is_one_sentence() -> None:
    said = "CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a total capacity of 139.80 GiB"
    with (
        pytest.raises(
            MemoryLimitError, match=r"896\.00 MiB was asked for .* more than 2 ranks .*--quant"
        ) as it,
        device_memory_errors(2),
    ):
        raise torch.OutOfMemoryError(said)
    assert "\n" not in str(it.value)
