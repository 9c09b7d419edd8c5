"""What a run says about itself: figures beside the physical ceiling, as a document and as a line."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from .figures import CACHE_FACTOR, last_level_caches, peak_rss_bytes
from .speculative.report import speculation_words

if TYPE_CHECKING:
    from .llm import LLM


def run_figures(llm: LLM) -> dict[str, Any]:
    """Speed and memory of the last generate call. Every rank calls it: peak memory is gathered."""
    built, timing, ceiling = llm.built, llm.timing, llm.read_ceiling_gb_s
    token_bytes = built.weight_bytes_per_token
    peaks, caches = _of_all_ranks(llm)
    resident = built.device == "cpu" and token_bytes < CACHE_FACTOR * caches
    speed = timing.tok_s if timing is not None else None
    # With a draft, weights are not read once a token.
    claim = speed is not None and ceiling is not None and not resident and llm.speculator is None
    return {
        "model": llm.source.name,
        "world_size": llm.world_size,
        "device": built.device,
        "dtype": built.dtype,
        "quant": llm.config.quant,
        "ttft_s": timing.ttft_s if timing is not None else None,
        "tok_s": speed,
        "weight_bytes_per_token": token_bytes,
        "read_ceiling_gb_s": ceiling,
        "mbu": token_bytes * speed / (ceiling * 1e9) if claim else None,  # type: ignore[operator]
        "cache_resident": resident,
        "speculation": llm.speculator.report.to_dict() if llm.speculator is not None else None,
        "peak_rss_bytes": peaks,
    }


def _of_all_ranks(llm: LLM) -> tuple[list[int], int]:
    """Every rank's peak memory, and the bytes of all last-level caches that ranks may run on."""
    own = (peak_rss_bytes(), {(socket.gethostname(), cpus): n for cpus, n in last_level_caches().items()})
    found: list[Any] = [own] * llm.world_size
    if llm.world_size > 1:
        dist.all_gather_object(found, own, group=llm.runner.group)
    caches = {place: size for _, sizes in found for place, size in sizes.items()}
    return [peak for peak, _ in found], sum(caches.values())


def figures_line(document: dict[str, Any]) -> str:
    """The figures for people."""
    speed = document["tok_s"]
    parts = [f"first token {document['ttft_s']:.2f} s"]
    parts.append("one token only, no speed" if speed is None else f"{speed:.1f} tokens/s")
    parts.append(f"{document['weight_bytes_per_token'] / 1e6:.0f} MB read a token")
    if document["mbu"] is not None:
        ceiling = document["read_ceiling_gb_s"]
        parts.append(f"{document['mbu']:.0%} of the {ceiling:.1f} GB/s this host reads")
    elif document["cache_resident"]:
        parts.append("the weights fit the caches, so no share of the memory bandwidth is claimed")
    elif document["speculation"] is None:
        parts.append("the host's read bandwidth is not known")
    if document["speculation"] is not None:
        parts.append(speculation_words(document["speculation"]))
    ranks, dtype = document["world_size"], document["dtype"]
    parts.append(f"{ranks} rank{'s' * (ranks > 1)}, {document['quant']}/{dtype} on {document['device']}")
    return " | ".join(parts)
