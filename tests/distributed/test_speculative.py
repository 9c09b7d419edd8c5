"""Speculation on tiny random models: the tokens are those written without a draft, on every rank.

fp32, so that a difference of rounding between a step of one token and one of several decides nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tp_testing.ranks import run_ranks

DRAFTS: dict[str, dict[str, Any]] = {
    "lookup": {"draft": "lookup", "draft_adaptive": False},
    "self": {"draft": "self:int8", "draft_adaptive": False, "draft_tokens": 4},
    "skip": {"draft": "skip:1", "draft_adaptive": False, "draft_tokens": 3},
    "model": {"draft": "{other}", "draft_adaptive": False, "draft_tokens": 2},
    "on one rank": {"draft": "self:int8", "draft_ranks": "one", "draft_adaptive": False},
    "measured": {"draft": "self:int8", "draft_adaptive": False},
    "adaptive": {"draft": "lookup"},
    "adaptive self": {"draft": "self:int8", "draft_ranks": "all"},
    "exact": {
        "draft": "self:int4-g32",
        "draft_ranks": "all",
        "speculate_exact": True,
        "draft_adaptive": False,
        "draft_tokens": 3,
    },
    "int8 cache": {"draft": "self:int8", "draft_adaptive": False, "draft_tokens": 4, "cache_dtype": "int8"},
}
# How a step runs: module by module, compiled by torch, or as one call of the C++ kernels.
STEPS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "compiled": {"native_step": False},
    "native": {},
}
SELECTED = {
    ("lookup", 2, "native"),
    ("self", 1, "eager"),
    ("skip", 2, "native"),
    ("on one rank", 2, "eager"),
    ("measured", 2, "native"),
    ("int8 cache", 2, "native"),
}
CASES = [
    pytest.param(name, world, step, marks=[] if (name, world, step) in SELECTED else [pytest.mark.full])
    for name in DRAFTS
    for world in (1, 2, 3)
    for step in STEPS
]
LENGTHS = (3, 45, 17)


def save_model(folder: Path, layers: int, vocab_size: int = 131) -> str:
    """A tiny random Llama. Models of different depth share their first layers and their vocabulary."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=3, head_dim=16, max_position_embeddings=128 if layers < 3 else 256,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_prompts() -> list[list[int]]:
    """The last one repeats itself, for lookups."""
    prompts = [[(7 * i * i + 3 * n) % 120 + 3 for i in range(n)] for n in LENGTHS]
    return [*prompts[:2], prompts[2][:6] * 3]


def body(path: str, settings: dict[str, Any]) -> tuple[list[Any], dict[str, Any] | None]:
    """Greedy and sampled answers, one prompt at a time and all together; the figures of the last call."""
    from tp_runtime.config import SamplingParams
    from tp_runtime.engine.llm import LLM

    greedy = SamplingParams(max_new_tokens=24, ignore_eos=True)
    punished = SamplingParams(max_new_tokens=24, repetition_penalty=1.3, logprobs=2, ignore_eos=True)
    each = [greedy, SamplingParams(max_new_tokens=7, temperature=0.8, seed=5), punished]
    with LLM(path, dtype="fp32", max_batch=3, prefill_chunk=32, **settings) as llm:
        found: list[Any] = [llm.generate([prompt], greedy)[0].tokens for prompt in make_prompts()]
        found.append([done.tokens for done in llm.generate(make_prompts(), greedy)])
        mixed = llm.generate(make_prompts(), each)
        found.append([mixed[0].tokens, mixed[2].tokens])
        found.append([len(mixed[1].tokens), len(mixed[2].logprobs or ()), mixed[1].finish_reason])
        pools = [llm.pool]
        speculator = llm.speculator
        if speculator is not None and getattr(speculator.drafter, "runner", None) is not None:
            pools.append(getattr(speculator.drafter, "pool", llm.pool))
        for pool in pools:
            pool.sanity_checks()
            assert pool.num_free == pool.num_blocks - 1, "blocks were not given back"
        figures = None
        if speculator is not None and llm.rank == 0:
            figures = speculator.report.to_dict()
    return found, figures


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_model(folder / "target", 4), save_model(folder / "draft", 2)


@pytest.fixture(scope="module")
def without_draft(models: tuple[str, str]) -> Any:
    made: dict[str, Any] = {}

    def get(cache_dtype: str = "auto") -> Any:
        if cache_dtype not in made:
            settings = {"compile": False, "cache_dtype": cache_dtype}
            made[cache_dtype] = run_ranks(1, body, models[0], settings, timeout=300)[0][0]
        return made[cache_dtype]

    return get


@pytest.mark.parametrize(("name", "world", "step"), CASES)
def test_tokens_are_those_without_a_draft(
    name: str, world: int, step: str, models: tuple[str, str], without_draft: Any
) -> None:
    settings = {
        key: value.format(other=models[1]) if key == "draft" else value for key, value in DRAFTS[name].items()
    }
    results = run_ranks(world, body, models[0], {**STEPS[step], **settings}, timeout=500)
    for found, _ in results:
        assert found == without_draft(settings.get("cache_dtype", "auto"))
    figures = results[0][1]
    print(
        {key: figures[key] for key in ("acceptance_by_position", "tokens_per_target_pass", "drafted_tokens")}
    )
    if name != "adaptive self":  # which costs what its target costs here, and is rightly left alone
        assert figures["drafted_tokens"] > 0
    assert all(figures is None for _, figures in results[1:])


def stopping_body(path: str, settings: dict[str, Any], eos: int, stop_after: int) -> tuple[Any, ...]:
    """An end token and a length limit inside an accepted run; nothing after them is kept."""
    from tp_runtime.config import SamplingParams
    from tp_runtime.engine.llm import LLM

    prompt = make_prompts()[0]
    with LLM(path, dtype="fp32", compile=False, **settings) as llm:
        object.__setattr__(llm.built, "eos_ids", frozenset({eos}))
        ended = llm.generate([prompt], SamplingParams(max_new_tokens=24))[0]
        short = llm.generate([prompt], SamplingParams(max_new_tokens=stop_after, ignore_eos=True))[0]
        one = llm.generate([prompt], SamplingParams(max_new_tokens=1, ignore_eos=True))[0]
        llm.pool.sanity_checks()
    return ended.tokens, ended.finish_reason, short.tokens, short.finish_reason, one.tokens


def test_ends_inside_an_accepted_run(models: tuple[str, str], without_draft: Any) -> None:
    """The target as its own draft in all but name: everything is accepted, so ends fall inside runs."""
    tokens = without_draft()[0]
    eos = next(token for token in tokens[6:] if tokens.index(token) >= 6)
    end = tokens.index(eos) + 1
    settings = {"draft": models[0], "draft_adaptive": False, "draft_tokens": 5}
    ((ended, why, short, limit, one),) = run_ranks(1, stopping_body, models[0], settings, eos, 9)
    assert ended == tokens[:end] and why == "stop"
    assert short == tokens[:9] and limit == "length"
    assert one == tokens[:1]


def narrow_body(path: str, draft: str) -> tuple[Any, ...]:
    """A draft whose context ends before the answer does, and a prompt that it cannot hold."""
    from tp_runtime.config import SamplingParams
    from tp_runtime.engine.llm import LLM
    from tp_runtime.errors import RequestError

    prompt = (make_prompts()[1] * 3)[:120]
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    with LLM(path, dtype="fp32", compile=False) as llm:
        wanted = llm.generate([prompt], params)[0].tokens
    with LLM(path, dtype="fp32", compile=False, draft=draft, draft_adaptive=False) as llm:
        found = llm.generate([prompt], params)[0].tokens
        assert llm.speculator is not None
        drafted = llm.speculator.report.to_dict()["drafted_tokens"]
        try:
            llm.generate([prompt + prompt[:8]], params)
        except RequestError as error:
            return found, wanted, drafted, str(error)
    raise AssertionError("a prompt beyond the draft's context was taken")


def test_a_draft_with_a_shorter_context(models: tuple[str, str]) -> None:
    ((found, wanted, drafted, message),) = run_ranks(1, narrow_body, *models)
    assert found == wanted
    assert 0 < drafted < 60, "the draft must fall silent at its 128 tokens"
    assert "128 tokens" in message and "holds 128" in message


def save_tokenizer(folder: Path) -> None:
    """128 tokens of one byte each: models with more rows in their embedding are padded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:128]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def answers(path: str, params: Any, **settings: Any) -> tuple[list[Any], dict[str, Any] | None]:
    """Texts and tokens of seven prompts over three rows, and the figures."""
    from tp_runtime.engine.llm import LLM

    prompts = (make_prompts() * 3)[:7]
    each = [params(number) for number in range(len(prompts))]
    with LLM(path, dtype="fp32", compile=False, max_batch=3, **settings) as llm:
        done = llm.generate(prompts, each)
        llm.pool.sanity_checks()
        assert llm.pool.num_free == llm.pool.num_blocks - 1, "blocks were not given back"
        figures = None if llm.speculator is None else llm.speculator.report.to_dict()
    return [(one.tokens, one.text, one.finish_reason) for one in done], figures


def greedy(number: int, **changes: Any) -> Any:
    from tp_runtime.config import SamplingParams

    return SamplingParams(**{"max_new_tokens": 12 + number, "ignore_eos": True, **changes})


def sampled(number: int) -> Any:
    return greedy(number, temperature=0.7, top_p=0.95, repetition_penalty=1.1, seed=number)


def queue_body(path: str) -> None:
    """More prompts than rows, greedy and sampled, by a draft that has the room of a small step alone."""
    for params in (greedy, sampled):
        wanted, _ = answers(path, params)
        for chunk in (4, 512):
            found, figures = answers(path, params, draft="lookup", draft_adaptive=False, prefill_chunk=chunk)
            assert found == wanted, f"{params.__name__}, steps of {chunk}"
            assert figures is not None and figures["drafted_tokens"] > 0
    found, figures = answers(path, greedy, draft=path, draft_adaptive=False, draft_tokens=15, prefill_chunk=6)
    assert found == answers(path, greedy)[0]
    assert figures is not None and figures["acceptance"] > 0.9


def test_more_prompts_than_rows(models: tuple[str, str]) -> None:
    """Lookups compare with the target's own draw, so sampled rows are token for token those without a draft."""
    run_ranks(1, queue_body, models[0], timeout=300)


def stop_body(path: str, drafts: list[str]) -> None:
    """Drafts with other paddings of the vocabulary; and a stop string inside an accepted run."""
    wanted, _ = answers(path, greedy)
    for draft in drafts:
        found, figures = answers(path, greedy, draft=draft, draft_adaptive=False, draft_tokens=3)
        assert found == wanted, draft
        assert figures is not None and figures["drafted_tokens"] > 0
    text = wanted[0][1]
    assert len(text) > 9, "a stop string lies a few tokens behind the beginning"

    def stopping(number: int) -> Any:
        return greedy(number, stop=(text[6:8],))

    cut, _ = answers(path, stopping)
    assert cut[0][2] == "stop" and len(cut[0][0]) < len(wanted[0][0])
    found, figures = answers(path, stopping, draft=path, draft_adaptive=False, draft_tokens=15)
    assert found == cut
    assert figures is not None and figures["acceptance"] > 0.9


def test_padded_vocabularies_and_stop_strings(tmp_path: Path) -> None:
    paths = [save_model(tmp_path / str(size), 2, size) for size in (131, 128, 137)]
    for path in paths:
        save_tokenizer(Path(path))
    run_ranks(1, stop_body, paths[0], paths[1:], timeout=300)


def exact_body(path: str) -> None:
    from tp_runtime.config import SamplingParams
    from tp_runtime.engine.llm import LLM

    params = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=3)
    found = []
    for draft in ({}, {"draft": "lookup", "draft_adaptive": False, "draft_tokens": 4}):
        settings = {"dtype": "bf16", "native_step": False, "speculate_exact": True, "max_batch": 1, **draft}
        with LLM(path, **settings) as llm:
            found.append([llm.generate([prompt], params)[0] for prompt in make_prompts()])
            if llm.speculator is not None:
                assert llm.speculator.report.to_dict()["drafted_tokens"] > 0
    for one, other in zip(*found, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == other.logprobs, "bits differ"


@pytest.mark.full
def test_exact_is_exact_through_torch_compile(models: tuple[str, str]) -> None:
    run_ranks(1, exact_body, models[0], timeout=500)


def no_room_body(path: str, wanted: Any) -> bool:
    """Rank 0 cannot hold the whole draft beside its part of it: nothing is compared, and no rank waits."""
    from tp_runtime.config import SamplingParams
    from tp_runtime.engine import build
    from tp_runtime.engine.llm import LLM
    from tp_runtime.errors import MemoryLimitError

    real = build.build_runner

    def without_room(source: Any, config: Any, mesh: Any, device: str) -> Any:
        if mesh.size() == 1:
            raise MemoryLimitError("no room")
        return real(source, config, mesh, device)

    build.build_runner = without_room
    settings = {"draft": "self:int8", "draft_adaptive": False, "compile": False}
    with LLM(path, dtype="fp32", **settings) as llm:
        found = llm.generate([make_prompts()[0]], SamplingParams(max_new_tokens=24, ignore_eos=True))
    assert found[0].tokens == wanted
    return llm.speculator.drafter.runner is not None


def test_no_room_for_a_whole_draft(models: tuple[str, str], without_draft: Any) -> None:
    assert run_ranks(2, no_room_body, models[0], without_draft()[0], timeout=200) == [True, True]
