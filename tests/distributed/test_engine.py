"""The engine on tiny random models of every kind in the family, against transformers and the plain model.

Heads divide in some configurations and not in others; prompts come alone and in threes of different
lengths, longer than a prefill chunk, over several cache blocks.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tp_testing import draft_pair
from tp_testing.ranks import run_ranks

COMMON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 2}),
    "mistral": ("Mistral", {"sliding_window": 20, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 6}),
}
LENGTHS = (3, 45, 17)
NEW_TOKENS = 24
PATHS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "compiled": {"native_step": False},
    "native": {},
}
# Every family runs natively, every world on every path.
SELECTED = {
    ("llama", 2, "native"), ("llama3", 3, "native"), ("mistral", 2, "native"), ("qwen2", 3, "native"),
    ("qwen3", 1, "native"), ("llama3", 1, "eager"), ("mistral", 1, "compiled"), ("qwen3", 2, "compiled"),
    ("qwen2", 2, "eager"), ("llama", 3, "compiled"), ("mistral", 3, "eager"),
}  # fmt: skip
CASES = [
    pytest.param(*case, marks=[] if case in SELECTED else [pytest.mark.full])
    for case in product(FAMILIES, (1, 2, 3), PATHS)
]


def make_prompts() -> list[list[int]]:
    return [[(7 * i * i + 3 * n) % 120 + 3 for i in range(n)] for n in LENGTHS]


def save_model(family: str, folder: Path, **others: Any) -> Any:
    """A tiny random model in Hugging Face layout, and the model itself. others: further settings."""
    import torch
    import transformers

    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **changes, **others})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def greedy(model: Any, ids: list[int]) -> tuple[int, ...]:
    import torch

    found = list(ids)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return tuple(found[len(ids) :])


def body(path: str, how: str, collectives: str = "auto") -> list[list[tuple[int, ...]]]:
    """The tokens of each prompt alone, then of all three together."""
    from tp_runtime.config import SamplingParams
    from tp_runtime.engine.llm import LLM

    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = make_prompts()
    settings = {
        "dtype": "fp32",
        "max_batch": 3,
        "prefill_chunk": 32,
        "collectives": collectives,
        **PATHS[how],
    }
    with LLM(path, **settings) as llm:
        assert (llm.runner.native is not None, llm.runner.compiled) == (how == "native", how == "compiled")
        alone = [llm.generate([prompt], params)[0].tokens for prompt in prompts]
        together = [done.tokens for done in llm.generate(prompts, params)]
        llm.pool.sanity_checks()
        assert llm.pool.num_free == llm.pool.num_blocks - 1, "blocks were not given back"
    return [alone, together]


@pytest.mark.parametrize(("family", "world", "how"), CASES)
def test_greedy_tokens_equal_transformers(family: str, world: int, how: str, tmp_path: Path) -> None:
    model = save_model(family, tmp_path)
    wanted = [greedy(model, ids) for ids in make_prompts()]
    for answers in run_ranks(world, body, str(tmp_path), how, timeout=300):
        assert answers[0] == wanted, "one prompt at a time"
        assert answers[1] == wanted, "three prompts in one batch"


@pytest.mark.parametrize("world", [1, 2])
def test_a_stored_head_counts_where_the_config_ties_it(world: int, tmp_path: Path) -> None:
    model = save_model("qwen2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    wanted = [greedy(model, ids) for ids in make_prompts()]
    for answers in run_ranks(world, body, str(tmp_path), "eager"):
        assert answers == [wanted, wanted]


@pytest.mark.full
@pytest.mark.parametrize("collectives", ["shm", "c10d"])
@pytest.mark.parametrize("how", ["native", "eager"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (12, 3)])  # divided by eight, and not
def test_eight_ranks(heads: int, kv_heads: int, how: str, collectives: str, tmp_path: Path) -> None:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    model = save_model("llama3", tmp_path, **shape)
    wanted = [greedy(model, ids) for ids in make_prompts()]
    for answers in run_ranks(8, body, str(tmp_path), how, collectives, timeout=600):
        assert answers[0] == wanted, "one prompt at a time"
        assert answers[1] == wanted, "three prompts in one batch"


def bits_body(path: str) -> tuple[bool, float]:
    """World 1, reference kernels, one unpadded prefill step: equal to the plain model's logits?"""
    import torch

    from tp_runtime.engine.kv_blocks import SCRATCH_BLOCK
    from tp_runtime.engine.llm import LLM
    from tp_runtime.engine.step import Row, Step

    prompt = make_prompts()[1]
    with LLM(path, dtype="fp32", compile=False, kernels="reference", prefill_chunk=64) as llm:
        blocks = tuple(llm.pool.allocate(2))
        assert SCRATCH_BLOCK not in blocks
        found = llm.runner.execute(Step((Row(tuple(prompt), 0, blocks, len(prompt)),)))
        with torch.inference_mode():
            wanted = llm.runner.model(torch.tensor(prompt), torch.arange(len(prompt)))
        return torch.equal(found, wanted), float((found - wanted).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_path_is_the_plain_model_bit_for_bit(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    ((equal, worst),) = run_ranks(1, bits_body, str(tmp_path))
    assert equal, f"largest difference {worst:.2e}"


def graphs_body(path: str, quant: str) -> list[int]:
    """Compiled graphs after warm-up, after one prompt, and after prompts of other lengths and batches."""
    from torch._dynamo.utils import counters

    from tp_runtime.config import SamplingParams
    from tp_runtime.engine.llm import LLM

    counts = []
    settings = {"dtype": "fp32", "quant": quant, "native_step": False}
    with LLM(path, max_batch=3, prefill_chunk=32, **settings) as llm:  # type: ignore[arg-type]
        counts.append(counters["stats"]["unique_graphs"])
        for prompts in (make_prompts()[:1], make_prompts()[1:2], make_prompts()):
            llm.generate(prompts, SamplingParams(max_new_tokens=40, ignore_eos=True))
            counts.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counts


@pytest.mark.parametrize(
    "quant",
    ["int8", pytest.param("int4", marks=pytest.mark.full), pytest.param("none", marks=pytest.mark.full)],
)
def test_nothing_is_compiled_after_warm_up(quant: str, tmp_path: Path) -> None:
    """Two graphs, one token and several, whatever comes after; fullgraph, so no graph break."""
    save_model("llama", tmp_path)
    for counts in run_ranks(2, graphs_body, str(tmp_path), quant, timeout=300):
        assert counts == [2, 2, 2, 2]


def many_body(path: str) -> list[int]:
    """Compiled graphs after each LLM of one process: five formats, and two of them again."""
    import functools

    import torch
    from torch._dynamo.utils import counters

    from tp_runtime.engine.llm import LLM

    torch.compile = functools.partial(torch.compile, backend="eager")  # the graphs alone
    counts = []
    for quant in ("none", "int8", "int4", "int8-g32", "int4-g64", "none", "int8"):
        with LLM(path, dtype="fp32", quant=quant, native_step=False, max_batch=2, context=64):
            counts.append(counters["stats"]["unique_graphs"])
    return counts


def test_a_process_may_have_any_number_of_models(tmp_path: Path) -> None:
    """torch keeps eight graphs of a function; models that are alike share theirs."""
    save_model("llama", tmp_path)
    assert run_ranks(1, many_body, str(tmp_path)) == [[2, 4, 6, 8, 10, 10, 10]]


def blocks_body(path: str, free: tuple[int, int]) -> int | str:
    """Blocks of this rank's pool, ranks finding different amounts of free memory; or the refusal."""
    import torch.distributed as dist

    from tp_runtime.engine import build
    from tp_runtime.engine.llm import LLM
    from tp_runtime.errors import MemoryLimitError

    build.host_free_bytes = lambda: 2 * free[dist.get_rank()]
    try:
        with LLM(path, dtype="fp32", compile=False, max_batch=100) as llm:
            assert llm.pool.num_blocks == llm.runner.cache.num_blocks
            return llm.pool.num_blocks
    except MemoryLimitError as error:
        return str(error)


def test_ranks_agree_on_the_cache(tmp_path: Path) -> None:
    """Rank 0 numbers the blocks of all: as many as the rank with the least memory can hold, or none at all."""
    from tp_runtime.engine.memory import OVERHEAD_BYTES

    save_model("llama", tmp_path)
    few = run_ranks(2, blocks_body, str(tmp_path), (OVERHEAD_BYTES + (1 << 30), OVERHEAD_BYTES + (4 << 20)))
    assert few[0] == few[1]
    refusals = run_ranks(2, blocks_body, str(tmp_path), (OVERHEAD_BYTES + (1 << 30), OVERHEAD_BYTES))
    assert refusals[0] == refusals[1] and "are free there" in str(refusals[0])


def broken_off_body(path: str, draft: str | None) -> list[tuple[str, ...]]:
    """The answers to three prompts, before and after calls that an error, or Ctrl-C, ended in the middle."""
    from tp_runtime.config import SamplingParams
    from tp_runtime.engine.llm import LLM

    settings: dict[str, Any] = {"draft": draft, "draft_adaptive": False, "draft_tokens": 3} if draft else {}
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    found = []
    with LLM(
        path, random_weights=True, dtype="fp32", max_batch=2, context=64, compile=False, **settings
    ) as llm:
        for error in (None, KeyError, KeyboardInterrupt, None):

            def broken(_: int, __: str, error: type[BaseException] | None = error) -> None:
                if error is not None:
                    raise error

            prompts = ["abc", "abcabcabc", "hello"] if error is None else ["to be broken off"] * 3
            try:
                found.append(tuple(done.text for done in llm.generate(prompts, params, on_text=broken)))
            except (KeyError, KeyboardInterrupt) as raised:
                assert type(raised) is error
            pools = [llm.pool, getattr(getattr(llm.speculator, "drafter", None), "pool", llm.pool)]
            for pool in pools:
                pool.sanity_checks()
                assert pool.num_free == pool.num_blocks - 1, "blocks were not given back"
            if llm.speculator is not None:
                held = {
                    **vars(llm.speculator),
                    **vars(llm.speculator.drafter),
                    **vars(llm.speculator._chooser),
                }
                rows = [held.get(name) for name in ("_held", "_indices", "_offers", "_stood", "_rates")]
                assert not any(rows), rows
    return found


@pytest.mark.parametrize("draft", [None, "lookup", "self:int8"])
def test_an_error_in_the_middle_leaves_nothing_behind(draft: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**draft_pair.TINY, "vocab_size": 300}))
    ((before, after),) = run_ranks(1, broken_off_body, str(tmp_path), draft)
    assert before == after and all(before)


def broken_ranks_body(path: str) -> list[str]:
    """What two calls raise of which an error on rank 0 ends the first."""
    from tp_runtime.engine.llm import LLM
    from tp_runtime.errors import TPError

    def broken(_: int, __: str) -> None:
        raise KeyError("mine")

    said = []
    with LLM(
        path, random_weights=True, dtype="fp32", context=64, compile=False, collective_timeout_s=5.0
    ) as llm:
        for _ in range(2):
            try:
                llm.generate(["abc"], on_text=broken)
            except (KeyError, TPError) as error:
                said.append(f"{type(error).__name__}: {error}")
    return said


def test_ranks_that_may_be_apart_do_not_go_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**draft_pair.TINY, "vocab_size": 300}))
    first, second = run_ranks(2, broken_ranks_body, str(tmp_path), timeout=120)
    assert first[0] == "KeyError: 'mine'" and second[0].startswith("CollectiveError")
    assert all("an error ended an earlier call" in said[1] for said in (first, second)), (first, second)
