"""What can be refused before any rank exists, and the plan of a run, from shapes and headers. No torch."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .. import env
from ..checkpoint.inventory import check_tensors, stored_tensors
from ..config import EngineConfig, SamplingParams
from ..errors import ConfigError, RequestError
from .device import pick_device, pick_dtype, refuse_cache_dtype
from .figures import weight_bytes_per_token
from .host_memory import free_bytes_by_rank
from .memory import (
    DTYPE_BYTES,
    MemoryPlan,
    context_limit,
    formats,
    gib,
    layer_of,
    memory_plan,
    sharding_plan,
)
from .source import ModelSource, resolve
from .speculative.kind import DraftPlan, draft_memory, plan_draft, warn_if_larger
from .tokenizing import open_tokenizer


def preflight(engine: EngineConfig, sampling: SamplingParams, nproc: int, requests: Sequence[Any]) -> None:
    """Raise the TPError that a run of `requests` over `nproc` ranks would end in, where it can be known.

    requests: texts, or lists of chat messages.
    """
    source, context, draft = preflight_engine(engine, nproc)
    _refuse_long_prompts(source, requests, context)
    if draft is not None and draft.context < context:
        for count in _long_prompts(source, requests, draft.context):
            draft.check_prompt(count)


def preflight_engine(engine: EngineConfig, nproc: int) -> tuple[ModelSource, int, DraftPlan | None]:
    """The model's source, the context and the draft, after refusing what cannot be loaded over the ranks."""
    _refuse_cache_folder()
    source = _source(engine)
    device = pick_device(engine)
    refuse_cache_dtype(engine, device)
    _refuse_format(engine, device)
    plan = sharding_plan(source.config, nproc)
    stored = None if source.weights_path is None else stored_tensors(source.weights_path)
    if stored is not None:
        wanted = {weight.name: weight.shape for weight in plan.weights}
        beyond = source.config.num_layers
        check_tensors(str(source.weights_path), stored, wanted, lambda name: layer_of(name) >= beyond)
    context = context_limit(engine, source.config)
    draft = plan_draft(engine, source)
    memory = memory_plan(
        source.config,
        plan,
        engine,
        dtype=pick_dtype(engine, device),
        format_of=formats(engine, stored),
        limits=free_bytes_by_rank(nproc, device),
    )
    memory.check(source.name)
    if draft is not None:
        beside = draft_memory(draft, memory)
        if beside is not None:
            beside.check(f"the draft {draft.name}")
        warn_if_larger(draft, source, engine, memory.dtype)
    return source, context, draft


def _refuse_format(engine: EngineConfig, device: str) -> None:
    """fp8 weights have kernels for GPUs only; on CPUs they are a reference for tests (LLM takes them)."""
    asked = {
        "--quant fp8": engine.quant == "fp8",
        "--head-quant fp8": engine.head_quant == "fp8",
        "--draft-quant fp8": engine.draft_quant == "fp8",
        "--draft self:fp8": engine.draft == "self:fp8",
    }
    for words in (words for words, is_asked in asked.items() if is_asked and device == "cpu"):
        raise ConfigError(f"{words} is for CUDA and this run is on the CPU; use int8, or --device cuda")


def _refuse_cache_folder() -> None:
    folder = env.get_path("TP_CACHE_DIR")
    assert folder is not None, "TP_CACHE_DIR has a default"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"the cache folder {folder} cannot be written ({error.strerror}); set TP_CACHE_DIR to another"
        ) from None


def _source(engine: EngineConfig) -> ModelSource:
    return resolve(
        engine.model, weights=engine.weights, random_weights=engine.random_weights, layers=engine.layers
    )


def _refuse_long_prompts(source: ModelSource, requests: Sequence[Any], context: int) -> None:
    for count in _long_prompts(source, requests, context):
        if count >= context:
            raise RequestError(
                f"the prompt has {count} tokens and the context holds {context}, answer included; shorten "
                f"it or raise --context (this model's limit is {source.config.max_position_embeddings})"
            )


def _long_prompts(source: ModelSource, requests: Sequence[Any], context: int) -> Iterator[int]:
    """Lengths in tokens of those that may be too long; texts of few bytes cannot be."""
    tokenizer = open_tokenizer(source)
    for request in requests:
        is_chat = not isinstance(request, str)
        if not is_chat and len(request.encode("utf-8", "replace")) < context // 2 and _is_unicode(request):
            continue
        messages: Sequence[Mapping[str, Any]] = request if is_chat else ()
        ids = tokenizer.encode_chat(list(messages)) if is_chat else tokenizer.encode(request)
        yield len(ids)


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which bytes of a command line that are no UTF-8 become."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def show_plan(engine: EngineConfig, nproc: int, *, as_json: bool) -> None:
    """Print how the weights divide over `nproc` ranks, every rank's bytes, and whether they fit.

    A draft that is a model stands behind its target; what it has free is what that leaves.
    """
    source = _plan_source(engine)
    device = pick_device(engine)
    dtype = pick_dtype(engine, device)
    plan = sharding_plan(source.config, nproc)
    stored = None if source.weights_path is None else stored_tensors(source.weights_path)
    format_of = formats(engine, stored)
    limits = free_bytes_by_rank(nproc, device)
    memory = memory_plan(source.config, plan, engine, dtype=dtype, format_of=format_of, limits=limits)
    token_bytes = weight_bytes_per_token(
        plan, source.config.tie_word_embeddings, format_of, DTYPE_BYTES[dtype]
    )
    draft = plan_draft(_with_shapes(engine, engine.draft), source)
    beside = None if draft is None else draft_memory(draft, memory)
    if as_json:
        document = {"model": source.name, "weight_bytes_per_token": token_bytes, **memory.to_dict()}
        if draft is not None:
            document["draft"] = {"model": draft.name, **(beside.to_dict() if beside else {"ranks": []})}
        sys.stdout.write(json.dumps({**document, "plan": json.loads(plan.to_json())}) + "\n")
        return
    sys.stdout.write(plan.to_text(dtype_bytes=DTYPE_BYTES[dtype], format_of=format_of) + "\n")
    sys.stdout.write(_memory_text(source.name, memory, f"decoding a token reads {gib(token_bytes)}") + "\n")
    if draft is not None and beside is not None:
        where = "whole on rank 0" if draft.on_one else "split over the ranks"
        sys.stdout.write(_memory_text(f"the draft {draft.name}", beside, where) + "\n")


def _plan_source(engine: EngineConfig) -> ModelSource:
    """The model's shape; a plan needs no weights."""
    return _source(engine if engine.weights is not None else _with_shapes(engine, engine.model))


def _with_shapes(engine: EngineConfig, model: str | None) -> EngineConfig:
    """Random weights where `model` names a shape that is known."""
    from ..models import registry

    known = model is not None and registry.find(model) is not None
    return engine.with_changes(random_weights=True) if known else engine


def _memory_text(name: str, memory: MemoryPlan, remark: str) -> str:
    lines = [
        f"{name}, {memory.quant}/{memory.dtype}, context {memory.context}: {remark}",
        "rank      weights    KV cache       total        free  fits",
    ]
    for rank in memory.ranks:
        free = "unknown" if rank.limit_bytes is None else gib(rank.limit_bytes)
        fits = {True: "yes", False: "no", None: "unknown"}[rank.fits]
        columns = (gib(rank.weight_bytes), gib(rank.cache_bytes), gib(rank.total_bytes), free)
        lines.append(f"{rank.rank:<4} " + "".join(f"{column:>12}" for column in columns) + f"  {fits}")
    return "\n".join(lines)
