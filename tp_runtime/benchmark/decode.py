"""decode: one model, one format, this job's ranks. definitions.py says what each figure means.

With --force-acceptance each run is followed by one of the same engine without its draft.

After a warm-up each repetition prefills the batch and decodes --new-tokens tokens of each row through
LLM.generate, as any caller does: sampling, the step's broadcast and all Python are inside. With a --context
beyond prompt and answer, decoding starts from prompts that fill it, and prefill keeps its own. Several
--contexts take turns; the times of a token at each stand beside the bytes it reads there. Peak memory
is read after the warm-up, before the memory of the read ceiling is there. The rate of matmuls is read
before and after each prompt; on GPUs last, after the engine has let the ranks and its weights go. Every
rank makes the same calls.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..config import EngineConfig, SamplingParams
from ..engine.figures import Timing, peak_rss_bytes
from ..engine.llm import LLM
from ..engine.speculative.forced import ForcedAcceptance
from ..engine.speculative.report import SpeculationReport, speculation_words
from ..models.config import ModelConfig
from . import cuda
from .definitions import (
    PREFILL_ROWS,
    Spread,
    cache_bytes_per_token,
    ceiling_bytes,
    is_cache_resident,
    linears,
    mbu,
    prefill_operations,
    prefill_share,
)
from .read import Ceiling, ReadCeiling, total

_MATMUL_PASSES = 3


def measure(args: Namespace, engine: EngineConfig) -> tuple[dict[str, Any], bool]:
    """The document of this job's decoding, the same on every rank, and whether this rank speaks."""
    with LLM(**engine.to_dict()) as llm:
        if args.first_token:
            _generate(llm, args.prompt_tokens, 1, args.batch)
            taken = time.time() - psutil.Process().create_time()
            return {"first_token_s": taken, "device": llm.built.device}, llm.rank == 0
        # A group of our own: rank 0 may send idle messages over the engine's at any time. Its tensors are
        # the host's.
        group = dist.new_group(list(range(llm.world_size)), backend="gloo")
        document = _measured(llm, args, group)
        if args.profile:
            document |= cuda.profiles(llm, args.prompt_tokens, args.new_tokens, args.batch)
    config, world_size, speaks = llm.built.model_config, llm.world_size, llm.rank == 0
    if document["device"] == "cuda":
        cuda.finish(group)
        del llm
        cuda.release()
        rate = cuda.matmul_rate(config, world_size, args.prompt_tokens, group)
        document |= _prefill(config, args, [document["ttft_s"]], [rate])
    return document, speaks


def _measured(llm: LLM, args: Namespace, group: dist.ProcessGroup) -> dict[str, Any]:
    depths = [context - args.new_tokens for context in args.contexts or (llm.context,)]
    deep = depths[-1]  # tokens a row has when decoding starts
    if args.force_acceptance is not None:
        assert llm.speculator is not None, "options.py refuses it without a draft"
        llm.speculator.forced = ForcedAcceptance(args.force_acceptance)
        _without_draft(llm, args, deep)
    _generate(llm, deep, args.new_tokens, args.batch)
    on_gpu = llm.built.device == "cuda"
    rss = _of_each_rank(peak_rss_bytes(), group)
    on_device = _of_each_rank(torch.cuda.max_memory_allocated(), group) if on_gpu else None
    ceiling = _ceiling(args.bytes, on_gpu, group)
    prefills: list[Timing] = []
    decodes: list[list[Timing]] = []
    plain: list[Timing] = []
    speculator = llm.speculator
    speculation = None if speculator is None else SpeculationReport(speculator.plan.name, speculator.most)
    matmul = None if on_gpu else MatmulRate(llm.built.model_config, llm.world_size, group)
    rates: list[float] = []
    around: list[float] = []
    before = ceiling.read()
    for _ in range(args.repeat):
        decodes.append([_generate(llm, depth, args.new_tokens, args.batch) for depth in depths])
        if speculator is not None and speculation is not None:
            speculation.passes += speculator.report.passes  # of the last context
        if args.force_acceptance is not None:
            plain.append(_without_draft(llm, args, deep))
        around.append(max(before, ceiling.read()))
        rate = 0.0 if matmul is None else matmul.read()
        prefills.append(_generate(llm, args.prompt_tokens, 1, args.batch))
        rates.append(rate if matmul is None else max(rate, matmul.read()))
        before = ceiling.read()
    # Rank 0 drives and knows the times; the others take part in its sums with zeros.
    speeds = [[total(timing.tok_s or 0.0, group) for timing in turn] for turn in decodes]
    firsts = [total(timing.ttft_s, group) for timing in prefills]
    document = _document(llm, args, [turn[-1] for turn in speeds], Spread.of(firsts), ceiling, around)
    if speculation is not None and plain:
        plain_speeds = [total(timing.tok_s or 0.0, group) for timing in plain]
        document |= _forced(args, [turn[-1] for turn in speeds], plain_speeds, speculation)
    if matmul is not None:
        document |= _prefill(llm.built.model_config, args, firsts, rates)
    return document | {
        "peak_rss_bytes": rss,
        "peak_device_bytes": on_device,
        "contexts": _over_contexts(llm, args, speeds),
        "speculation": None if speculation is None else speculation.to_dict(),
    }


def _ceiling(num_bytes: int | None, on_gpu: bool, group: dist.ProcessGroup) -> Ceiling:
    """Of the memory that the weights are in. num_bytes: what a rank reads; None: enough."""
    if on_gpu:
        return cuda.CudaReadCeiling(cuda.bytes_to_read(num_bytes, group), group)
    return ReadCeiling(num_bytes or ceiling_bytes(), group)


def _over_contexts(llm: LLM, args: Namespace, speeds: list[list[float]]) -> list[dict[str, Any]]:
    """Each context by itself and over the first: time of a step, and the bytes that explain it.

    speeds: tokens a second by turn and context. Ratios of times are medians over the turns.
    """
    weights = llm.built.weight_bytes_per_token
    read = [weights + args.batch * _cache_bytes(llm, args, context) for context in args.contexts]
    rows = []
    for at, context in enumerate(args.contexts):
        speed = Spread.of([turn[at] for turn in speeds])
        rows.append(
            {
                "context": context,
                "tok_s": speed.median,
                "tok_s_p10": speed.p10,
                "tok_s_p90": speed.p90,
                "cache_bytes_per_token": _cache_bytes(llm, args, context),
                "time_ratio": statistics.median(turn[0] / turn[at] for turn in speeds),
                "bytes_ratio": read[at] / read[0],
            }
        )
    return rows


def _cache_bytes(llm: LLM, args: Namespace, context: int) -> int:
    """Of one row, in the middle of its answer."""
    vector_bytes = llm.runner.cache.shape.vector_bytes
    return cache_bytes_per_token(llm.built.model_config, context - args.new_tokens // 2, vector_bytes)


def _document(
    llm: LLM, args: Namespace, speeds: list[float], first: Spread, ceiling: Ceiling, around: list[float]
) -> dict[str, Any]:
    """speeds: tokens a second by turn. around: the larger reading of the ceiling beside each turn."""
    built, config, speed = llm.built, llm.built.model_config, Spread.of(speeds)
    token_bytes = built.weight_bytes_per_token
    on_gpu = built.device == "cuda"
    resident = (
        cuda.is_cache_resident(token_bytes, llm.world_size) if on_gpu else is_cache_resident(token_bytes)
    )
    # With a draft, weights are not read once a token.
    claim = not resident and llm.speculator is None
    return {
        "model": llm.source.name,
        "layers": config.num_layers,
        "random_weights": llm.source.kind == "random",
        "quant": llm.config.quant,
        "dtype": built.dtype,
        "device": built.device,
        "world_size": llm.world_size,
        "threads": torch.get_num_threads(),
        "batch": args.batch,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "context": llm.context,
        "repeat": args.repeat,
        "tok_s": speed.median,
        "tok_s_p10": speed.p10,
        "tok_s_p90": speed.p90,
        "ttft_s": first.median,
        "ttft_s_p10": first.p10,
        "ttft_s_p90": first.p90,
        "prefill_tok_s": args.prompt_tokens * args.batch / first.median,
        "weight_bytes_per_token": token_bytes,
        "cache_bytes_per_token": _cache_bytes(llm, args, llm.context),
        "read_ceiling_gb_s": ceiling.best,
        "read_ceilings_gb_s": ceiling.readings,
        "mbu": mbu(token_bytes, speed.median, args.batch, ceiling.best) if claim else None,
        "turns": [
            {"tok_s": its, "read_ceiling_gb_s": most} for its, most in zip(speeds, around, strict=True)
        ],
        "cache_resident": resident,
        "compile_cold_s": None,
        "compile_warm_s": None,
    }


def _generate(llm: LLM, num_tokens: int, new_tokens: int, batch: int) -> Timing:
    """One batch of prompts of `num_tokens`, answered. Ranks that only follow have times of zero."""
    vocab_size = llm.built.model_config.vocab_size
    prompt = [1 + place % min(100, vocab_size - 1) for place in range(num_tokens)]
    llm.generate([prompt] * batch, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    return llm.timing if llm.timing is not None else Timing(0.0, 0.0, 0)


def _without_draft(llm: LLM, args: Namespace, depth: int) -> Timing:
    """The same batch by the same engine, its draft laid aside on every rank for this one call."""
    speculator, llm.speculator = llm.speculator, None
    try:
        return _generate(llm, depth, args.new_tokens, args.batch)
    finally:
        llm.speculator = speculator


def _forced(
    args: Namespace, speeds: list[float], plain: list[float], speculation: SpeculationReport
) -> dict[str, Any]:
    """What forced acceptance found. speeds, plain: tokens a second by turn, with the draft and without.

    The prediction is speculative/report.py's, for a step without a draft as the plain runs had it; rank 0 has
    the passes it is made of, the others have None.
    """
    plain_tok_s = statistics.median(plain)
    return {
        "forced_acceptance": args.force_acceptance,
        "plain_tok_s": plain_tok_s,
        "speed_up": statistics.median(one / other for one, other in zip(speeds, plain, strict=True)),
        "speed_up_predicted": speculation.speedups(args.batch / plain_tok_s)[1],
    }


def _of_each_rank(value: int, group: dist.ProcessGroup) -> list[int]:
    mine = torch.tensor([value], dtype=torch.int64)
    all_of_them = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(all_of_them, mine, group=group)
    return [int(one) for one in all_of_them]


class MatmulRate:
    """Readings of the ranks' oneDNN bf16 matmul of PREFILL_ROWS rows, at the fastest of the model's shapes.

    Every rank makes and reads one. group: of all ranks.
    """

    def __init__(self, config: ModelConfig, world_size: int, group: dist.ProcessGroup) -> None:
        self._group = group
        shapes = dict.fromkeys((n, k) for _, n, k in linears(config, world_size))
        rates = {shape: self._rate(*self._operands(*shape)) for shape in shapes}
        self._x, self._weight = self._operands(*max(rates, key=lambda shape: rates[shape]))

    def read(self) -> float:
        """Operations a second."""
        return self._rate(self._x, self._weight)

    def _operands(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        return torch.randn(PREFILL_ROWS, k).bfloat16(), torch.empty(n, k, dtype=torch.bfloat16).normal_()

    @torch.inference_mode()
    def _rate(self, x: Tensor, weight: Tensor) -> float:
        best = 0.0
        F.linear(x, weight)
        for _ in range(_MATMUL_PASSES):
            dist.barrier(self._group)
            started = time.perf_counter()
            F.linear(x, weight)
            operations = 2 * PREFILL_ROWS * weight.numel()
            best = max(best, total(operations / (time.perf_counter() - started), self._group))
        return best


def _prefill(config: ModelConfig, args: Namespace, firsts: list[float], rates: list[float]) -> dict[str, Any]:
    """Of the seconds to the first token, and the rates of matmuls, by turn."""
    operations = prefill_operations(config, args.prompt_tokens) * args.batch
    return {
        "prefill_share": prefill_share(operations, firsts, rates),
        "matmul_tflop_s": statistics.median(rates) / 1e12,
    }


def _forced_words(document: dict[str, Any]) -> str:
    predicted = document["speed_up_predicted"]
    return (
        f"acceptance forced to {document['forced_acceptance']:g}, so the text is void: "
        f"{document['speed_up']:.2f} times the {document['plain_tok_s']:.2f} tokens/s without a draft"
        + ("" if predicted is None else f", predicted {predicted:.2f}")
    )


def line(document: dict[str, Any]) -> str:
    """One measurement for people."""
    share, on_gpu = document["mbu"], document["device"] == "cuda"
    parts = [
        f"{document['model']} {document['quant']:<9}",
        f"{document['world_size']} x {'GPU' if on_gpu else str(document['threads']) + ' threads'}",
        f"{document['tok_s']:7.2f} tokens/s ({document['tok_s_p10']:.2f}..{document['tok_s_p90']:.2f})",
        f"{document['weight_bytes_per_token'] / 1e6:.0f} MB a token",
    ]
    if share is not None:
        parts.append(f"MBU {share:.3f} of {document['read_ceiling_gb_s']:.1f} GB/s")
    elif document["cache_resident"]:
        parts.append("weights fit the caches: no MBU")
    if document["speculation"] is not None:
        parts.append(speculation_words(document["speculation"]))
    if document.get("forced_acceptance") is not None:
        parts.append(_forced_words(document))
    parts.append(f"first token {document['ttft_s']:.3f} s")
    parts.append(f"prefill {document['prefill_tok_s']:.0f} tokens/s, share {document['prefill_share']:.3f}")
    for title, name in (("RSS", "peak_rss_bytes"), ("GPU memory", "peak_device_bytes")):
        if document[name] is not None:
            parts.append(f"{title} {' '.join(f'{peak / 2**30:.2f}' for peak in document[name])} GiB")
    for row in document["contexts"]:
        parts.append(
            f"context {row['context']}: {row['tok_s']:.2f} tokens/s, time x {row['time_ratio']:.3f}, "
            f"bytes x {row['bytes_ratio']:.3f}"
        )
    return " | ".join(parts)
