"""tp-bench decode --force-acceptance on tiny random models, over one and two ranks."""

from __future__ import annotations

from typing import Any

import pytest
from tp_testing import draft_pair
from tp_testing.ranks import run_ranks

WORDS = "--no-draft-adaptive --draft-tokens 4 --prompt-tokens 6 --repeat 2 --bytes 4000000 --dtype fp32"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return draft_pair.write(tmp_path_factory.mktemp("pair"))


def bench_body(words: list[str]) -> tuple[dict[str, Any], list[list[Any]]]:
    """The document, and the tokens of every call that this rank saw."""
    from tp_runtime.benchmark import decode, options
    from tp_runtime.engine.llm import LLM

    seen: list[list[Any]] = []
    real = LLM.generate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = real(self, *args, **kwargs)
        seen.append([one.tokens for one in done])
        return done

    LLM.generate = watched  # type: ignore[method-assign]
    found = options.parse(words, in_job=True)
    assert found.engine is not None
    document, _ = decode.measure(found.args, found.engine)
    if document["tok_s"]:
        print(decode.line(document))
    return document, seen


@pytest.mark.parametrize(("world", "probability", "batch"), [(1, 1.0, 1), (2, 1.0, 1), (2, 0.5, 2)], ids=str)
def test_as_many_stand_as_were_asked_for(
    models: tuple[str, str], world: int, probability: float, batch: int
) -> None:
    tokens = 121 if probability == 1 else 300
    words = ["decode", "--model", models[0], "--random-weights", "--draft", models[1], *WORDS.split()]
    words += ["--force-acceptance", str(probability), "--batch", str(batch), "--new-tokens", str(tokens)]
    results = run_ranks(world, bench_body, words, timeout=300)
    document, seen = results[0]
    assert all(other == seen for _, other in results[1:]), "ranks saw other tokens"
    found = document["speculation"]
    assert document["random_weights"] and document["forced_acceptance"] == probability
    assert found["drafted_tokens"] >= 190
    if probability == 1:
        assert found["accepted_tokens"] == found["drafted_tokens"]
        assert found["tokens_per_target_pass"] == 5, "120 tokens after the first, five a pass"
    else:
        # 500 draws and more: a standard deviation of 0.022
        assert found["acceptance"] == pytest.approx(probability, abs=0.09)
    assert document["speed_up"] == pytest.approx(document["tok_s"] / document["plain_tok_s"], rel=0.5)
    assert document["speed_up_predicted"] > 0
    # Warm-up without and with the draft, then turns of with and without. Prefill has calls of its own.
    calls = [answer for answer in seen if len(answer[0]) == tokens]
    plain, drafted = [calls[at] for at in (0, 3, 5)], [calls[at] for at in (1, 2, 4)]
    assert len(calls) == 6
    assert all(answer == plain[0] for answer in plain), "without a draft nothing is drawn"
    assert all(answer != plain[0] for answer in drafted)
