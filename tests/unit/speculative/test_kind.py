"""What --draft means, which draft fits which target, and blocks that grow and shrink with a row."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_runtime.config import MOST_DRAFT_TOKENS, EngineConfig
from tp_runtime.engine.kv_blocks import BlockPool
from tp_runtime.engine.memory import MemoryPlan, RankMemory
from tp_runtime.engine.preflight import show_plan
from tp_runtime.engine.source import ModelSource, resolve
from tp_runtime.engine.speculative import kind
from tp_runtime.engine.speculative.kind import draft_memory, plan_draft, warn_if_larger
from tp_runtime.engine.speculative.skip import kept_layers
from tp_runtime.errors import ConfigError, MemoryLimitError, RequestError


@pytest.fixture
def target() -> ModelSource:
    return resolve("llama-1b", random_weights=True)


def test_kinds(target: ModelSource) -> None:
    assert plan_draft(EngineConfig(), target) is None
    lookup = plan_draft(EngineConfig(draft="lookup", context=512), target)
    assert lookup is not None and (lookup.kind, lookup.context) == ("lookup", 512)
    skip = plan_draft(EngineConfig(draft="skip:4"), target)
    assert skip is not None and (skip.kind, skip.skipped) == ("skip", 4)
    own = plan_draft(EngineConfig(draft="self:int4-g64", cache_bytes=1 << 30, draft_tokens=3), target)
    assert own is not None and own.source is target and own.engine is not None
    assert (own.engine.quant, own.engine.cache_bytes, own.engine.draft) == ("int4-g64", None, None)
    other = plan_draft(
        EngineConfig(draft="llama-1b", draft_quant="int8", random_weights=True, context=300, layers=2), target
    )
    assert other is not None and other.source is not None and other.engine is not None
    assert (other.engine.quant, other.engine.layers, other.context) == ("int8", None, 300)


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        ("lokup", "neither lookup"),
        ("lookup:3", "lookup, self:FORMAT"),
        ("skip", "skip:N"),
        ("skip:0", "use skip:1 to skip:15"),
        ("skip:16", "use skip:1 to skip:15"),
        ("skip:x", "use skip:1 to skip:15"),
        ("self", "self:FORMAT"),
        ("self:int3", "int3"),
        ("self:none", "the target itself"),
        ("/nowhere/at/all", "does not exist"),
    ],
)
def test_unusable_drafts(draft: str, words: str, target: ModelSource) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_draft(EngineConfig(draft=draft), target)


@pytest.mark.parametrize("count", [0, -1, MOST_DRAFT_TOKENS + 1, 1000])
def test_draft_tokens_out_of_range(count: int) -> None:
    with pytest.raises(ConfigError, match="use 1 to 15"):
        EngineConfig(draft="lookup", draft_tokens=count)


@pytest.mark.parametrize(
    "settings_",
    [{"draft_tokens": 3}, {"draft_quant": "int8"}, {"draft_ranks": "one"}, {"draft_adaptive": False}],
)
def test_settings_without_a_draft(settings_: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="no draft is given"):
        EngineConfig(**settings_)  # type: ignore[arg-type]


def test_a_vocabulary_without_tokenizers_must_have_the_same_size(target: ModelSource) -> None:
    alone = ModelSource("mine", target.config, "random", None, None)
    other = resolve("smollm2-135m", random_weights=True)
    with pytest.raises(ConfigError, match="has 49152 tokens and mine has 128256"):
        kind.refuse_other_vocabulary(alone, ModelSource("small", other.config, "random", None, None))
    kind.refuse_other_vocabulary(alone, ModelSource("twin", target.config, "random", None, None))


def test_a_prompt_beyond_the_drafts_context(target: ModelSource) -> None:
    plan = plan_draft(EngineConfig(draft="lookup", context=128), target)
    assert plan is not None
    plan.check_prompt(127)
    with pytest.raises(
        RequestError, match="the prompt has 128 tokens and the context of --draft lookup holds 128"
    ):
        plan.check_prompt(128)


def test_a_draft_must_fit_beside_its_target(target: ModelSource) -> None:
    plan = plan_draft(EngineConfig(draft="self:int8", context=1024), target)
    assert plan is not None
    for limit, fits in ((4 << 30, True), (3 << 30, False)):
        ranks = tuple(RankMemory(rank, 2 << 30, 1 << 20, limit) for rank in range(2))
        beside = MemoryPlan(ranks, 1024, "bf16", "none")
        found = draft_memory(plan, beside)
        assert found is not None
        if fits:
            found.check("the draft self:int8")
        else:
            with pytest.raises(MemoryLimitError, match="the draft self:int8"):
                found.check("the draft self:int8")


@pytest.mark.parametrize(("quant", "draft_quant", "said"), [("int4", "int8", True), ("none", "int8", False)])
def test_a_draft_larger_than_its_target(
    quant: str, draft_quant: str, said: bool, target: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From shapes alone, before anything is loaded."""
    warnings: list[str] = []
    monkeypatch.setattr(kind, "once", warnings.append)
    engine = EngineConfig(draft="llama-1b", draft_quant=draft_quant, quant=quant, random_weights=True)
    plan = plan_draft(engine, target)
    assert plan is not None
    warn_if_larger(plan, target, engine, "bf16")
    assert ["drafting cannot pay" in one for one in warnings] == [True] * said


def test_two_names_of_one_format(target: ModelSource) -> None:
    for quant, draft in (("int4", "self:int4-g32"), ("int4-g32", "self:int4")):
        with pytest.raises(ConfigError, match="the target itself"):
            plan_draft(EngineConfig(quant=quant, draft=draft), target)


def test_the_plan_shows_the_draft(capsys: pytest.CaptureFixture[str]) -> None:
    engine = EngineConfig(model="llama-1b", draft="self:int4-g64", draft_ranks="one")
    show_plan(engine, 2, as_json=False)
    assert "the draft self:int4-g64, int4-g64/" in capsys.readouterr().out
    show_plan(engine.with_changes(draft="llama-1b", draft_ranks="auto"), 2, as_json=True)
    document = json.loads(capsys.readouterr().out)
    ranks, draft = document["ranks"], document["draft"]
    assert draft["model"] == "llama-1b" and len(draft["ranks"]) == 2
    assert draft["ranks"][0]["weight_bytes"] == ranks[0]["weight_bytes"]
    show_plan(engine.with_changes(draft="lookup", draft_ranks="auto"), 2, as_json=True)
    assert json.loads(capsys.readouterr().out)["draft"] == {"model": "lookup", "ranks": []}


def test_kept_layers() -> None:
    assert kept_layers(6, 2) == (0, 1, 4, 5)
    assert kept_layers(6, 3) == (0, 1, 5)
    assert kept_layers(2, 1) == (0,)


@given(st.lists(st.integers(0, 40), max_size=30))
@settings(max_examples=100, deadline=None)
def test_rollback_gives_blocks_back(lengths: list[int]) -> None:
    pool, blocks = BlockPool(16, 4), []
    for length in lengths:
        pool.resize(blocks, length)
        assert len(blocks) == -(-length // 4) and len(set(blocks)) == len(blocks)
        assert pool.num_free == 15 - len(blocks)
        pool.sanity_checks()


def test_rollback_keeps_the_first_blocks() -> None:
    pool, blocks = BlockPool(16, 4), []
    pool.resize(blocks, 20)
    held = list(blocks)
    pool.resize(blocks, 9)
    assert blocks == held[:3]
    pool.resize(blocks, 9)
    assert blocks == held[:3]
    pool.resize(blocks, 0)
    assert blocks == [] and pool.num_free == 15
