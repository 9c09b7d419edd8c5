"""What --draft asks for: parsed and checked before any rank exists. No torch.

lookup        n-grams of prompt and answer
self:FORMAT   the target's weights in another format, say self:int4-g64
skip:N        the target without N of its layers
anything else a model, named as --model names one; its vocabulary must be the target's
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ...checkpoint.inventory import stored_tensors
from ...config import EngineConfig
from ...errors import ConfigError, ModelNotFoundError, RequestError
from ...layout import weight_format
from ...log import once
from ...text import Tokenizer
from ..figures import weight_bytes_per_token
from ..memory import (
    DTYPE_BYTES,
    OVERHEAD_BYTES,
    MemoryPlan,
    context_limit,
    formats,
    memory_plan,
    sharding_plan,
)
from ..source import ModelSource, resolve
from ..tokenizing import has_vocabulary, open_tokenizer

KINDS = "lookup, self:FORMAT, skip:N, or a model as --model takes one"


@dataclass(frozen=True)
class DraftPlan:
    """A draft, checked against its target.

    name: as the user wrote it. kind: "lookup", "skip" or "model". skipped: layers left out ("skip").
    source, engine: the model that drafts and its settings ("model"). on_one: it is whole on rank 0 for
    certain. context: tokens a row may hold before the draft falls silent.
    """

    name: str
    kind: str
    context: int
    skipped: int = 0
    source: ModelSource | None = None
    engine: EngineConfig | None = None
    on_one: bool = False

    def check_prompt(self, num_tokens: int) -> None:
        """Raise RequestError for a prompt that the draft cannot hold."""
        if num_tokens >= self.context:
            raise RequestError(
                f"the prompt has {num_tokens} tokens and the context of --draft {self.name} holds "
                f"{self.context}; shorten it, or use a draft with a longer context or --draft lookup"
            )


def plan_draft(engine: EngineConfig, target: ModelSource) -> DraftPlan | None:
    """The draft of these settings; None where none is asked for.

    Raises ConfigError for an unknown kind, a draft with another vocabulary or settings that do not apply,
    and what resolve() raises for damaged weights.
    """
    name = engine.draft
    if name is None:
        return None
    context = context_limit(engine, target.config)
    head, colon, rest = name.partition(":")
    if name != "lookup" and head in ("lookup", "skip", "self") and (not colon or head == "lookup"):
        raise ConfigError(f"--draft {name!r} is not known; use {KINDS}")
    if head in ("lookup", "skip", "self") and engine.draft_quant is not None:
        raise ConfigError(
            f"--draft-quant is for a draft that is another model, and --draft is {name}; leave it away"
        )
    if name == "lookup":
        return DraftPlan(name, "lookup", context)
    if head == "skip":
        return DraftPlan(name, "skip", context, skipped=_skipped(rest, target.config.num_layers))
    if head == "self":
        if weight_format(rest) == weight_format(engine.quant):
            raise ConfigError(f"--draft {name} is the target itself, so it saves nothing; use fewer bits")
        own = _settings(engine, context, quant=rest, head_quant=None)
        return DraftPlan(
            name, "model", context, source=target, engine=own, on_one=engine.draft_ranks == "one"
        )
    return _other_model(name, engine, target, context)


def draft_memory(draft: DraftPlan, target: MemoryPlan) -> MemoryPlan | None:
    """What a draft model holds beside its target, on the same ranks; None for a draft that holds nothing."""
    if draft.source is None or draft.engine is None:
        return None
    stored = None if draft.source.weights_path is None else stored_tensors(draft.source.weights_path)
    world = 1 if draft.on_one else len(target.ranks)
    left = [
        None if r.limit_bytes is None else r.limit_bytes - r.total_bytes + OVERHEAD_BYTES
        for r in target.ranks
    ]
    return memory_plan(
        draft.source.config,
        sharding_plan(draft.source.config, world),
        draft.engine,
        dtype=target.dtype,
        format_of=formats(draft.engine, stored),
        limits=left[:world],
    )


def warn_if_larger(draft: DraftPlan, target: ModelSource, engine: EngineConfig, dtype: str) -> None:
    """Say so where a draft model reads more a token than its target. engine: the target's settings."""
    if draft.source is None or draft.engine is None:
        return
    ours, theirs = _token_bytes(target, engine, dtype), _token_bytes(draft.source, draft.engine, dtype)
    if theirs > ours:
        once(
            f"--draft {draft.name} reads {theirs / 1e6:.0f} MB a token and the target {ours / 1e6:.0f} MB, "
            f"so drafting cannot pay; use a smaller draft"
        )


def _token_bytes(source: ModelSource, engine: EngineConfig, dtype: str) -> int:
    stored = None if source.weights_path is None else stored_tensors(source.weights_path)
    plan, tied = sharding_plan(source.config, 1), source.config.tie_word_embeddings
    return weight_bytes_per_token(plan, tied, formats(engine, stored), DTYPE_BYTES[dtype])


def _skipped(text: str, num_layers: int) -> int:
    most = num_layers - 1
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise ConfigError(
            f"--draft skip:{text} is impossible with {num_layers} layers; use skip:1 to skip:{most}"
        )
    return int(text)


def _settings(engine: EngineConfig, context: int, **changes: object) -> EngineConfig:
    """The target's settings for a model beside it: no cache size of its own, no draft."""
    return engine.with_changes(
        context=context,
        cache_bytes=None,
        draft=None,
        draft_quant=None,
        draft_tokens=None,
        draft_adaptive=True,
        draft_ranks="auto",
        speculate_exact=False,
        **changes,
    )


def _other_model(name: str, engine: EngineConfig, target: ModelSource, context: int) -> DraftPlan:
    try:
        source = resolve(name, random_weights=engine.random_weights)
    except ModelNotFoundError as error:
        raise ConfigError(f"--draft {name!r} is neither {KINDS}: {error}") from None
    refuse_other_vocabulary(target, source)
    context = min(context, source.config.max_position_embeddings)
    quant = engine.draft_quant or engine.quant
    own = _settings(engine, context, model=name, weights=None, layers=None, quant=quant, head_quant=None)
    return DraftPlan(name, "model", context, source=source, engine=own, on_one=engine.draft_ranks == "one")


def refuse_other_vocabulary(target: ModelSource, draft: ModelSource) -> None:
    """Raise ConfigError unless a token id means the same to both. Padding of the embedding may differ."""
    if not (has_vocabulary(target) and has_vocabulary(draft)):
        ours, theirs = target.config.vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise ConfigError(
                f"--draft {draft.name} has {theirs} tokens and {target.name} has {ours}, and no tokenizers "
                f"are here that say which are the same; use a draft with the target's vocabulary"
            )
        return
    if target.tokenizer_path == draft.tokenizer_path:
        return
    tokenizer, other = cast(Tokenizer, open_tokenizer(target)), cast(Tokenizer, open_tokenizer(draft))
    for token in range(max(tokenizer.vocab_size, other.vocab_size)):
        here, there = tokenizer.token_bytes(token), other.token_bytes(token)
        if here != there:
            raise ConfigError(
                f"--draft {draft.name} has another vocabulary than {target.name}: token {token} is {there!r} "
                f"there and {here!r} here; use a draft of the same family, or --draft lookup"
            )
