"""Plans of large models, from models without weights, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

WORLD = 8
SECONDS, BYTES = 20.0, 2 * 10**9
# The published shapes of Llama-3.1-70B and Mixtral-8x22B.
MODELS = {
    "llama": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "mixtral": {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "vocab_size": 32768,
    },
}
SCRIPT = """
import json, resource, sys, time
import torch, transformers
import tp_runtime
kind, settings, world = json.loads(sys.argv[1])
config = transformers.CONFIG_MAPPING[kind](**settings)
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
started = time.monotonic()
made = tp_runtime.plan(model, world, cache=False)
seconds, processor = time.monotonic() - started, time.process_time()
print(json.dumps({
    "seconds": seconds,
    "processor": processor,
    "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "dims": {w.name: w.dim for w in made.weights if len(w.shape) > 1},
    "shapes": {w.name: [w.local_shape(rank) for rank in range(world)] for w in made.weights},
}))
"""
# What transformers' declared plans say: the cut dim, by the end of a name.
DECLARED = {
    "q_proj.weight": 0,
    "k_proj.weight": 0,
    "v_proj.weight": 0,
    "o_proj.weight": 1,
    "mlp.gate_proj.weight": 0,
    "mlp.up_proj.weight": 0,
    "mlp.down_proj.weight": 1,
    "experts.gate_up_proj": 1,
    "experts.down_proj": 2,
    "mlp.gate.weight": None,
    "embed_tokens.weight": 0,
    "lm_head.weight": 0,
}


@pytest.mark.full
@pytest.mark.parametrize("kind", MODELS)
def test_large_models_are_planned_fast_and_as_declared(kind: str) -> None:
    asked = json.dumps([kind, MODELS[kind], WORLD])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, asked], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{kind}: {found['seconds']:.1f} s (processor {found['processor']:.1f} s with imports), {found['bytes'] / 1e9:.2f} GB"
    )
    for name, dim in found["dims"].items():
        assert dim == next(cut for end, cut in DECLARED.items() if name.endswith(end)), name
    for name, dim in found["dims"].items():
        shapes = found["shapes"][name]
        assert dim is None or all(shape == shapes[0] for shape in shapes), name
    assert found["seconds"] < SECONDS and found["bytes"] < BYTES
