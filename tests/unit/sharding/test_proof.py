"""What a plan is proved on: fp32 copies whose weights hide no error, with masks, at sizes that can be run."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from tp_testing.small_models import build

from tp_runtime.errors import ConfigError, ShardingError
from tp_runtime.sharding import inputs, planner, proof
from tp_runtime.sharding import search as search_module
from tp_runtime.sharding.apply import apply_plan
from tp_runtime.sharding.inputs import FEW_TOKENS, find_example
from tp_runtime.sharding.plan_cache import structure_key
from tp_runtime.sharding.proof import proof_copy, proof_size, short_vocabularies
from tp_runtime.sharding.rules import DecoderShape, plan_decoder
from tp_runtime.sharding.shard import plan, shard
from tp_runtime.sharding.surrogate import make_surrogate
from tp_runtime.sharding.verify import ThreadCommunicator, _Meeting, proves

transformers = pytest.importorskip("transformers")

SETTINGS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def llama(**changes: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SETTINGS, **changes}))
    return model.eval()


def test_a_half_precision_model_divides_as_in_fp32() -> None:
    model = llama()
    wanted = plan(model, 2, cache=False)
    assert wanted["model.layers.0.self_attn.o_proj.weight"].style == "row"
    assert plan(model.bfloat16(), 2, cache=False).weights == wanted.weights


def test_half_precision_example_inputs_are_taken() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).bfloat16()
    made = plan(model, 2, example_inputs=torch.ones(2, 8, dtype=torch.bfloat16), cache=False)
    assert made["2.weight"].style == "row"


def test_constant_weights_are_drawn_and_the_model_keeps_its_own() -> None:
    model = llama()
    example = find_example(make_surrogate(model).model)
    copy, _ = proof_copy(model, plan(model, 2, cache=False), example, shorten=True)
    norm = copy.get_parameter("model.norm.weight")
    assert len(norm.unique()) == len(norm)
    assert torch.equal(model.get_parameter("model.norm.weight"), torch.ones(32))
    head = "lm_head.weight"
    assert torch.equal(copy.get_parameter(head), model.get_parameter(head))


def test_results_that_are_zero_or_not_finite_prove_nothing() -> None:
    assert proves([torch.ones(4)])
    assert not proves([torch.zeros(4)])
    assert not proves([torch.tensor([1.0, float("nan"), float("nan"), float("nan")])])


class Zero(nn.Module):
    """A pair whose result is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) * 0.0


def test_what_proves_nothing_divides_nothing() -> None:
    made = plan(Zero(), 2, example_inputs=torch.ones(2, 8), cache=False)
    assert all(w.dim is None for w in made.weights)
    assert "proves nothing" in made["first.weight"].reason or "no way" in made["first.weight"].reason


def test_a_large_vocabulary_is_proved_by_its_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (proof, inputs):
        monkeypatch.setattr(module, "LARGE_WEIGHT", 1 << 14)
    with torch.device("meta"):
        model = llama(vocab_size=3000)
    short = make_surrogate(model, shorten=True).model
    example = find_example(short)
    assert short_vocabularies(short, example) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert proof_size(short, example) < 2 * FEW_TOKENS * 32 + 20_000
    made = plan(model, 2, cache=False)
    assert made["model.embed_tokens.weight"].style == "vocab" and made["lm_head.weight"].dim == 0
    copy, fitted = proof_copy(short, made, example, shorten=True)
    assert tuple(copy.get_parameter("lm_head.weight").shape) == (FEW_TOKENS, 32)
    assert fitted["lm_head.weight"].parts == (((0, 512),), ((512, 1024),))


def test_both_ways_through_attention_are_called() -> None:
    example = find_example(make_surrogate(llama()).model)
    masks = [kwargs.get("attention_mask") for _, _, kwargs in example.calls]
    assert masks[0] is None and masks[1] is not None and int(masks[1].min()) == 0
    assert example.cached is not None and "attention_mask" in example.cached


def test_a_search_that_does_not_settle_divides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "MAX_TRACES", 1)
    model, ids = build("grouped", (4, 1))
    made = plan(model, 3, example_inputs=(ids,), verify=False, cache=False)
    assert made.sums == () and all(w.dim is None for w in made.weights)


def test_the_cache_key_knows_ties_and_attention() -> None:
    key = structure_key(llama())
    assert structure_key(llama()) == key
    tied = llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight  # type: ignore[union-attr]
    assert structure_key(tied) != key
    eager = llama()
    eager.config._attn_implementation = "eager"  # type: ignore[union-attr]
    assert structure_key(eager) != key


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    made = plan(llama(), 2, cache=False)
    other = llama(intermediate_size=72)
    before = {name: tuple(p.shape) for name, p in other.named_parameters()}
    with pytest.raises(ShardingError, match="mlp.gate_proj.weight has shape"):
        apply_plan(other, made, ThreadCommunicator(_Meeting(2), 0))
    assert {name: tuple(p.shape) for name, p in other.named_parameters()} == before


def test_what_is_no_mesh_or_no_model_is_one_sentence() -> None:
    for wrong in ("x", 2.0, None):
        with pytest.raises(ConfigError, match="is no DeviceMesh; make one with"):
            plan(nn.Linear(8, 8), wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 is no DeviceMesh"):
        shard(nn.Linear(8, 8), 2)  # type: ignore[arg-type]
    with pytest.raises(ShardingError, match="'x' is no torch.nn.Module"):
        plan("x", 2)  # type: ignore[arg-type]


def test_inputs_that_do_not_work_are_one_sentence() -> None:
    with pytest.raises(ShardingError, match="does not run on the example_inputs") as caught:
        plan(llama(), 2, example_inputs={"input_ids": torch.ones(2, 4)}, cache=False)
    assert "\n" not in str(caught.value)


def test_a_sharded_part_of_a_model_is_noticed() -> None:
    model = llama()
    part: nn.Module = model.model.layers[0].mlp  # type: ignore[union-attr, index, assignment]
    made = plan(part, 2, example_inputs=torch.randn(2, 4, 32), cache=False)
    apply_plan(part, made, ThreadCommunicator(_Meeting(2), 0))
    with pytest.raises(ShardingError, match=r"model.layers.0.mlp is sharded already; unshard it first"):
        plan(model, 2, cache=False)


def test_more_ranks_than_heads_are_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner.log, "get_logger", lambda: logging.getLogger("sharding"))
    plan(llama(num_hidden_layers=1), 8, cache=False)
    assert "use 4 ranks or fewer" in caplog.text


class Twice(nn.Module):
    """One pair of linears at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.again = self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x + self.block(x))


def test_a_module_at_two_places_divides_once() -> None:
    made = plan(Twice(), 2, example_inputs=torch.randn(3, 8), cache=False)
    assert made["block.0.weight"].style == "column" and made["block.2.weight"].style == "row"


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_by_rules_is_followed(tied: bool) -> None:
    shape = DecoderShape(100, 32, 64, 2, 4, 2, 8, tied, False, False, False)
    rules = plan_decoder(shape, 2)
    model = llama(vocab_size=100, tie_word_embeddings=tied)
    made = plan(model, 2, plan=rules, cache=False)
    cut = {w.name: w.local_shape(0) for w in rules.weights if w.dim is not None}
    assert {w.name: w.local_shape(0) for w in made.weights if w.dim is not None} == cut


def test_inputs_that_do_not_fit_a_large_product_are_no_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LARGE_WEIGHT", 16)
    layer = nn.Linear(8, 8)
    with torch.no_grad(), inputs.Sketch():
        assert layer(torch.ones(4, 8)).shape == (4, 8)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(torch.ones(4, 32))
