"""Decoding on GPUs through the public engine: prefill and decode speed at batch 1, share of the read ceiling.

    tp-launch --nproc 2 benchmarks/cuda_decode.py --model llama-70b --quant int8 [--prompt-tokens 128]
        [--new-tokens 128] [--repeat 5] [--rows 1] [--profile]

Random weights. Each repeat is one generate call of greedy rows; the medians are reported, and the spread.
The ceiling is each GPU's read-only kernel of the same run. --profile: time a token by kernel, from torch's
profiler over a few replays. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from typing import Any


def profile(llm: Any, rows: int, top: int = 12) -> list[dict[str, Any]]:
    """Microseconds a token by kernel. Every rank calls it; rank 0 drives."""
    import torch
    from tp_runtime import SamplingParams

    prompts = [[5 + row] * 8 for row in range(rows)]
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        llm.generate(prompts, SamplingParams(max_new_tokens=33, ignore_eos=True))
        torch.cuda.synchronize()
    kernels = [
        {"kernel": event.key[:60], "us_a_token": event.device_time_total / 32, "calls": event.count}
        for event in found.key_averages()
    ]
    kernels.sort(key=lambda each: -each["us_a_token"])
    return kernels[:top]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prefill-tokens", type=int, default=0)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    started = time.perf_counter()
    import torch
    from tp_runtime import LLM, SamplingParams
    from tp_runtime.engine.report import run_figures

    chunk = max(512, args.prefill_tokens)
    llm = LLM(
        args.model, random_weights=True, quant=args.quant, device="cuda", measure_ceiling=True,
        context=4096, max_batch=max(args.rows, 1), prefill_chunk=chunk, layers=args.layers,
    )  # fmt: skip
    with llm:
        ready = time.perf_counter() - started
        prompts = [[(7 * i + 31 * row) % 30000 + 3 for i in range(args.prompt_tokens)] for row in range(args.rows)]
        params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True)
        speeds, first = [], []
        for _ in range(args.repeat + 1):
            llm.generate(prompts, params)
            if llm.rank == 0:
                speeds.append(llm.timing.tok_s)
                first.append(llm.timing.ttft_s)
        long = []
        if args.prefill_tokens:
            prompt = [[(11 * i) % 30000 + 3 for i in range(args.prefill_tokens)]]
            for _ in range(4):
                llm.generate(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
                if llm.rank == 0:
                    long.append(llm.timing.ttft_s)
        kernels = profile(llm, args.rows) if args.profile else []
        figures = run_figures(llm)
        if llm.rank != 0:
            return
    speed = statistics.median(speeds[1:])
    ceiling, token_bytes = figures["read_ceiling_gb_s"], figures["weight_bytes_per_token"]
    document = {
        "model": args.model, "layers": args.layers, "quant": args.quant, "world_size": llm.world_size,
        "rows": args.rows, "tokens": [args.prompt_tokens, args.new_tokens],
        "tok_s": speed, "tok_s_each": speeds[1:], "ms_a_step": 1e3 * args.rows / speed,
        "mbu": token_bytes * speed / args.rows / (ceiling * 1e9), "read_ceiling_gb_s": ceiling,
        "weight_bytes_per_token": token_bytes, "ttft_s": statistics.median(first[1:]),
        "first_ttft_s": first[0], "ready_s": ready, "prefill_tokens": args.prefill_tokens,
        "prefill_s": statistics.median(long[1:]) if long else None,
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "kernels": kernels,
    }  # fmt: skip
    for each in kernels:
        print(f"{each['us_a_token']:9.1f} us {each['calls']:6d} {each['kernel']}", file=sys.stderr)
    print(f"{args.model} {args.quant} x{llm.world_size}, {args.rows} rows: {speed:.1f} tokens/s, MBU "
          f"{document['mbu']:.2f}, ready in {ready:.0f} s", file=sys.stderr)  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
