"""Decoding on GPUs through the public engine: prefill and decode speed at batch 1, share of the read ceiling.

    tp-launch --nproc 2 benchmarks/cuda_decode.py --model llama-70b --quant int8 [--prompt-tokens 128]
        [--new-tokens 128] [--repeat 5] [--rows 1,5] [--prefill-tokens 2048] [--profile]

Random weights. Each repeat is one generate call of greedy rows; the medians are reported, and the spread.
The ceiling is each GPU's read-only kernel of the same run. Prefill's share of the peak: 2 operations a weight
of the layers and a token, over the time to the first token, over an 8192^3 bf16 product's rate.
--profile: time a token by kernel, from torch's profiler over a few replays. The last line on stdout is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from typing import Any


def profile(llm: Any, prompts: list[list[int]], new_tokens: int, top: int = 14) -> list[dict[str, Any]]:
    """Microseconds by kernel, a decoded token (of a prompt's only token: all of it). Every rank calls it."""
    import torch

    from tp_runtime import SamplingParams

    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        llm.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
        torch.cuda.synchronize()
    steps = max(1, new_tokens - 1)
    kernels = [
        {"kernel": event.key[:60], "us": event.device_time_total / steps, "calls": event.count}
        for event in found.key_averages()
    ]
    kernels.sort(key=lambda each: -each["us"])
    return kernels[:top]


def matmul_peak_flops() -> float:
    """Operations a second of a large bf16 product on this GPU."""
    import torch

    from tp_runtime.kernels.cuda.read_ceiling import graph_seconds

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / graph_seconds(lambda: torch.mm(a, b, out=out), 9)


def decode(llm: Any, rows: int, args: argparse.Namespace, token_bytes: int, ceiling: float) -> dict[str, Any]:
    """Medians of `repeat` generate calls of `rows` greedy rows."""
    from tp_runtime import SamplingParams

    prompts = [[(7 * i + 31 * row) % 30000 + 3 for i in range(args.prompt_tokens)] for row in range(rows)]
    speeds, first = [], []
    for _ in range(args.repeat + 1):
        llm.generate(prompts, SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True))
        if llm.rank == 0:
            speeds.append(llm.timing.tok_s)
            first.append(llm.timing.ttft_s)
    if llm.rank != 0:
        return {}
    speed = statistics.median(speeds[1:])
    return {
        "rows": rows, "tok_s": speed, "tok_s_each": speeds[1:], "ms_a_step": 1e3 * rows / speed,
        "mbu": token_bytes * speed / rows / (ceiling * 1e9), "ttft_s": statistics.median(first[1:]),
        "first_ttft_s": first[0],
    }  # fmt: skip


def prefill(llm: Any, count: int) -> dict[str, Any]:
    """Median time to the first token of a prompt of `count` tokens, and its share of the matmul peak."""
    from tp_runtime import SamplingParams

    prompt, taken = [[(11 * i) % 30000 + 3 for i in range(count)]], []
    for _ in range(5):
        llm.generate(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
        if llm.rank == 0:
            taken.append(llm.timing.ttft_s)
    peak = matmul_peak_flops() * llm.world_size
    if llm.rank != 0:
        return {}
    layers = [w for w in llm.built.plan.weights if ".layers." in w.name and len(w.shape) == 2]
    seconds = statistics.median(taken[1:])
    operations = 2 * count * sum(w.shape[0] * w.shape[1] for w in layers)
    return {"tokens": count, "s": seconds, "share_of_peak": operations / seconds / peak, "peak_flops": peak}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", default="1")
    parser.add_argument("--prefill-tokens", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    rows = [int(each) for each in args.rows.split(",")]
    started = time.perf_counter()
    import torch

    from tp_runtime import LLM

    llm = LLM(
        args.model, random_weights=True, quant=args.quant, device="cuda", measure_ceiling=True,
        context=4096, max_batch=max(rows), prefill_chunk=max(512, args.prefill_tokens),
    )  # fmt: skip
    with llm:
        ready = time.perf_counter() - started
        token_bytes, ceiling = llm.built.weight_bytes_per_token, llm.read_ceiling_gb_s
        runs = [decode(llm, each, args, token_bytes, ceiling) for each in rows]
        prompt = prefill(llm, args.prefill_tokens) if args.prefill_tokens else None
        kernels, prompt_kernels = [], []
        if args.profile:
            kernels = profile(llm, [[5 + row] * 8 for row in range(rows[0])], 33)
        if args.profile and args.prefill_tokens:
            prompt_kernels = profile(llm, [[7] * args.prefill_tokens], 1)
        if llm.rank != 0:
            return
    document = {
        "command": " ".join(sys.argv), "model": args.model, "quant": args.quant,
        "world_size": llm.world_size, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens,
        "read_ceiling_gb_s": ceiling, "weight_bytes_per_token": token_bytes, "ready_s": ready,
        "runs": runs, "prefill": prompt, "kernels": kernels, "prefill_kernels": prompt_kernels,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
    }  # fmt: skip
    for each in kernels + prompt_kernels:
        print(f"{each['us']:9.1f} us {each['calls']:6d} {each['kernel']}", file=sys.stderr)
    for run in runs:
        print(
            f"{args.model} {args.quant} x{llm.world_size}, {run['rows']} rows: {run['tok_s']:.1f} tokens/s, "
            f"MBU {run['mbu']:.2f}, ready in {ready:.0f} s",
            file=sys.stderr,
        )
    print(json.dumps(document))


if __name__ == "__main__":
    main()
