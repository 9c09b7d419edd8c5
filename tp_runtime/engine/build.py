"""From a model's source to a runner: this rank's part of the weights, read and put into a plain model.

The model is built on the meta device, so nothing is held twice: each weight is read (only this rank's
part of it), quantised, and installed at once. Quantised linears take the place of plain ones; row-cut
linears and the embedding get their all-reduce from the sharding layers. The model's code is untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import env
from .. import mesh as meshes
from ..checkpoint import RandomCheckpoint, open_checkpoint
from ..checkpoint.base import Checkpoint
from ..checkpoint.inventory import stored_tensors
from ..checkpoint.load import WeightRequest, load_weights
from ..collectives import all_gather, all_reduce
from ..config import EngineConfig
from ..errors import ConfigError
from ..kernels.linear import PreparedLinear, prepare_plain
from ..layout import WeightFormat
from ..log import once
from ..models.config import ModelConfig
from ..models.llama import Llama
from ..native import find_compiler
from ..quant.embedding import QuantEmbedding
from ..quant.linear import QuantLinear
from ..quant.tensor import QuantizedTensor
from ..sharding.layers import wrap_modules
from ..sharding.plan import Plan
from .cuda_fuse import fuse_projections
from .device import pick_device, pick_dtype, refuse_cache_dtype
from .figures import weight_bytes_per_token
from .fused import join_projections, share_tied_table
from .graph_cache import drop_unfinished
from .host_memory import host_free_bytes
from .kv_cache import CacheShape, KVCache
from .memory import (
    DTYPE_BYTES,
    OVERHEAD_BYTES,
    context_limit,
    formats,
    layer_of,
    local_kv_heads,
    memory_plan,
    sharding_plan,
    small_cache,
)
from .native_step import native_step
from .residual import keep_residual_in_fp32
from .runner import ModelRunner
from .source import ModelSource

PREFILL_CHUNK = {"cpu": 512, "cuda": 2048}  # a GPU widens all weights to bf16 for each
CUDA_WAIT_S = 60.0  # a reduction inside a captured step waits that long for a peer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CACHE_TYPES = DTYPES | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Built:
    """A runner and what it was built from. eos_ids: the model configuration's; the tokenizer may add more."""

    runner: ModelRunner
    model_config: ModelConfig
    plan: Plan
    context: int
    dtype: str
    device: str
    eos_ids: frozenset[int]
    weight_bytes_per_token: int


def usable_device(config: EngineConfig) -> str:
    """ "cpu" or "cuda", as asked for and as torch can. Raises ConfigError where torch finds no GPU."""
    device = pick_device(config)
    if device == "cuda" and not torch.cuda.is_available():
        if config.device == "cuda":
            raise ConfigError("--device cuda was asked for and torch finds no usable GPU; use --device cpu")
        device = "cpu"
    return device


def build_runner(source: ModelSource, config: EngineConfig, mesh: DeviceMesh, device: str) -> Built:
    """Load this rank's part of the model. Every rank of the job calls it.

    Raises ShardingError, MemoryLimitError, CheckpointError or ConfigError.
    """
    refuse_cache_dtype(config, device)
    dtype = pick_dtype(config, device)
    if config.dtype is None:
        once(f"computing in {dtype}, which this {device} has; --dtype changes it", logging.INFO)
    if source.own_head:
        once(
            f"{source.name}: its config ties the head to the embedding, and the weights hold a head of other "
            f"values, which is used; tie_word_embeddings=false in config.json would say so"
        )
    compiler = find_compiler()
    if compiler is not None:
        env.set_default("CXX", compiler)  # for inductor, which by itself looks for g++ alone
    compile = config.compile and compiler is not None and device == "cpu"
    graphs = env.get_path("TORCHINDUCTOR_CACHE_DIR")
    if compile and graphs is not None:
        drop_unfinished(graphs)
    if config.compile and not compile and device == "cpu":
        once("no C++ compiler is found, so the step is not compiled; install g++, or say --no-compile")
    if config.threads is not None:
        torch.set_num_threads(min(config.threads, torch.get_num_threads()))
    world = meshes.tp_size(mesh)
    plan = sharding_plan(source.config, world)
    context = context_limit(config, source.config)
    stored = None if source.weights_path is None else stored_tensors(source.weights_path)
    format_of = formats(config, stored)
    group = meshes.tp_group(mesh)
    # Every rank judges every rank's memory, so that a load that cannot fit ends in all of them.
    limits = all_gather(torch.tensor([_free_bytes(device, world)]), group).flatten().tolist()
    memory_plan(source.config, plan, config, dtype=dtype, format_of=format_of, limits=limits).check(
        source.name
    )
    model = _load(source, config, plan, mesh, format_of, DTYPES[dtype], device)
    reference = config.kernels == "reference"
    if not reference and dtype != "fp32":
        keep_residual_in_fp32(model, DTYPES[dtype], device)
    if not reference and device == "cpu":
        join_projections(model)
        share_tied_table(model, DTYPES[dtype])
    if not reference and device == "cuda":
        fuse_projections(model)
    cache = _cache(plan, mesh, source.config, config, context, dtype, device)
    wanted = compile and config.native_step and not reference and device == "cpu"
    native = native_step(model, cache, group) if wanted else None
    head = plan["model.embed_tokens.weight" if source.config.tie_word_embeddings else "lm_head.weight"]
    settings: dict[str, Any] = {}
    kind: type[ModelRunner] = ModelRunner
    if device == "cuda":
        from .cuda_runner import CudaRunner

        kind, settings = CudaRunner, {"timeout_s": config.collective_timeout_s or CUDA_WAIT_S}
    max_rows = min(config.max_batch, cache.num_blocks - 1)  # a row has a block at least
    runner = kind(
        model,
        cache,
        group,
        head.parts,
        max_rows=max_rows,
        max_tokens=max(config.prefill_chunk or PREFILL_CHUNK[device], max_rows),
        max_blocks=cache.shape.blocks_for(context),
        compile=compile and native is None,
        reference=reference,
        native=native,
        device=device,
        **settings,
    )
    token_bytes = weight_bytes_per_token(
        plan, source.config.tie_word_embeddings, format_of, DTYPE_BYTES[dtype]
    )
    eos_ids = frozenset(source.config.eos_token_ids)
    return Built(runner, source.config, plan, context, dtype, device, eos_ids, token_bytes)


def _load(
    source: ModelSource,
    config: EngineConfig,
    plan: Plan,
    mesh: DeviceMesh,
    format_of: Callable[[str], WeightFormat | None],
    dtype: torch.dtype,
    device: str,
) -> Llama:
    with torch.device("meta"):
        model = Llama(source.config).to(dtype)
    requests = [WeightRequest(weight.name, weight, format_of(weight.name), dtype) for weight in plan.weights]
    checkpoint = _open(source, plan)
    backend = "reference" if config.kernels == "reference" else "auto"

    def install(name: str, value: Tensor | QuantizedTensor) -> None:
        if isinstance(value, Tensor):
            _install(model, name, value, dtype, pack=device == "cpu" and backend == "auto")
        else:
            _install_quantised(model, name, value, dtype, backend)

    load_weights(
        checkpoint,
        requests,
        meshes.tp_group(mesh),
        meshes.tp_rank(mesh),
        device=device,
        progress=meshes.tp_rank(mesh) == 0,
        install=install,
        may_remain=lambda name: layer_of(name) >= source.config.num_layers,
    )
    wrap_modules(model, plan, meshes.tp_rank(mesh), meshes.tp_group(mesh))
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, f"parameters were planned but never loaded: {left[:3]}"
    return model.eval().requires_grad_(False)


def _open(source: ModelSource, plan: Plan) -> Checkpoint:
    if source.kind == "random":
        return RandomCheckpoint({weight.name: weight.shape for weight in plan.weights})
    assert source.weights_path is not None, "a source that is not random has weights"
    return open_checkpoint(source.weights_path)


def _install(model: Llama, name: str, value: Tensor, dtype: torch.dtype, *, pack: bool) -> None:
    """Put one plain weight or bias in its place. pack: linears' weights go to the CPU kernels."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, PreparedLinear):
        module.bias = value
    elif pack and isinstance(module, nn.Linear) and leaf == "weight":
        bias = None if module.bias is None or module.bias.is_meta else module.bias.detach()
        model.set_submodule(path, _packed(value, dtype, bias))
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        if pack and isinstance(module, nn.Embedding) and model.config.tie_word_embeddings:
            model.lm_head = _packed(value, dtype, None)


def _packed(value: Tensor, dtype: torch.dtype, bias: Tensor | None) -> PreparedLinear:
    weight = replace(prepare_plain(value), round_activations=dtype is torch.bfloat16)
    return PreparedLinear(weight, bias)


def _install_quantised(
    model: Llama, name: str, value: QuantizedTensor, dtype: torch.dtype, backend: str
) -> None:
    """Put one quantised weight in its place; it brings its own module."""
    path = name.rpartition(".")[0]
    linear = QuantLinear(value, backend=backend, round_activations=dtype is torch.bfloat16)
    if not isinstance(model.get_submodule(path), nn.Embedding):
        model.set_submodule(path, linear)
        return
    model.set_submodule(path, QuantEmbedding(value, dtype))
    if model.config.tie_word_embeddings:
        model.lm_head = linear


def cache_shape(plan: Plan, rank: int, model: ModelConfig, config: EngineConfig, dtype: str) -> CacheShape:
    """What this rank's cache holds; dtype: what it computes in."""
    cache_dtype = CACHE_TYPES[dtype if config.cache_dtype == "auto" else config.cache_dtype]
    return CacheShape(model.num_layers, local_kv_heads(plan, rank, model), model.head_dim, cache_dtype)


def _cache(
    plan: Plan,
    mesh: DeviceMesh,
    model: ModelConfig,
    config: EngineConfig,
    context: int,
    dtype: str,
    device: str,
) -> KVCache:
    """The block pool: --cache-bytes, else max_batch rows of the context, less where memory is short.

    All ranks hold as many blocks as the one that can hold fewest: rank 0 numbers them for all.
    """
    shape = cache_shape(plan, meshes.tp_rank(mesh), model, config, dtype)
    one_row = shape.blocks_for(context)
    row_bytes = one_row * shape.block_bytes
    budget = config.cache_bytes
    if budget is None:
        free = _free_bytes(device, plan.world_size)
        budget = min(max(free // 2, row_bytes), free, config.max_batch * row_bytes)
    blocks = torch.tensor([budget // shape.block_bytes])
    num_blocks = int(all_reduce(blocks, meshes.tp_group(mesh), "min"))
    if num_blocks < one_row:
        raise small_cache(context, row_bytes, num_blocks * shape.block_bytes)
    return KVCache(shape, num_blocks + 1, device)


def _free_bytes(device: str, world: int) -> int:
    """Memory this rank may still take: of its GPU, or its share of the host's among the ranks there."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] - OVERHEAD_BYTES
    ranks_here = env.get_int("LOCAL_WORLD_SIZE") if env.is_set("LOCAL_WORLD_SIZE") else None
    return host_free_bytes() // min(ranks_here or world, world)
