"""scaling: decode over numbers of ranks and formats, interleaved, laid over the analytic model of predict.py.

Every round runs each case once, in a job of its own, so that a slow minute of the host falls on all of
them; a case's figure is the median over rounds. What the model knows of this host is measured in the same
runs: the read ceiling of each number of ranks, and the all-reduce of the step's size. Figures of the two
constants it is fitted with come from the points of the fewest ranks; all others are predictions. No torch
here.
"""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..engine.source import resolve
from ..errors import ConfigError
from ..models.config import ModelConfig
from . import plot, startup
from .definitions import Spread
from .launching import Progress, run_ranks
from .options import Options, check_engine, engine_words, quants
from .predict import Fit, Host, Prediction, find_host, fit_overhead, predict

_FP32_BYTES = 4


def run(options: Options) -> dict[str, Any]:
    """Measure, or only predict; the document. Raises TPError, RunFailed."""
    engine = options.engine
    assert engine is not None, "scaling has a model"
    source = resolve(engine.model, weights=engine.weights, random_weights=True, layers=engine.layers)
    if options.args.predict:
        document = _predicted(options, source.name, source.config)
    else:
        document = _measured(options, source.name, source.config)
    _write(document, options.args)
    return document


def _predicted(options: Options, name: str, model: ModelConfig) -> dict[str, Any]:
    """Predictions for a host that is not here, with the assumed constants."""
    host, fit, args = find_host(options.args.predict), Fit(), options.args
    rows = [
        {"model": name, "quant": engine.quant, **predict(host, model, engine, ranks, fit).to_dict()}
        for engine in _engines(options)
        for ranks in args.nproc or host.ranks
    ]
    return {"model": name, "host": host.name, "fit": vars(fit), "predictions": rows}


def _measured(options: Options, name: str, model: ModelConfig) -> dict[str, Any]:
    args, nproc = options.args, options.args.nproc or (1,)
    cases = [(engine, ranks) for engine in _engines(options) for ranks in nproc]
    for engine, ranks in cases:
        check_engine(Options("decode", args, engine), ranks)
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    progress = Progress(len(cases) * args.rounds)
    for turn in range(args.rounds):
        for engine, ranks in cases:
            words = ["decode", *engine_words(engine, args)]
            found = run_ranks(words, ranks, numa=not args.no_numa, timeout_s=args.timeout)
            if args.startup and turn == 0:
                found |= startup.measure(words, ranks, numa=not args.no_numa, timeout_s=args.timeout)
            runs.setdefault((engine.quant, ranks), []).append(found)
            sys.stdout.write(progress.step() + "\n")
            sys.stdout.flush()
    reduce_us = {ranks: _all_reduce_us(model, ranks, args) for ranks in nproc if ranks > 1}
    points = [_point(found) for found in runs.values()]
    rows, fit = _over_model(options, model, points, reduce_us)
    return {
        "model": name,
        "host": "here",
        "rounds": args.rounds,
        "fit": vars(fit),
        "all_reduce_us": reduce_us,
        "scaling": rows,
        "card": runs[cases[-1][0].quant, cases[-1][1]][-1]["card"],
    }


def _engines(options: Options) -> Iterator[EngineConfig]:
    assert options.engine is not None, "scaling has a model"
    for quant in quants(options):
        yield options.engine.with_changes(quant=quant)


def _all_reduce_us(model: ModelConfig, ranks: int, args: Namespace) -> float:
    """Median of a reduction of the step's size, in a compiled chain, over whatever transport serves it."""
    num_bytes = model.hidden_size * _FP32_BYTES
    words = ["collectives", "--bytes", str(num_bytes)]
    rows = run_ranks(words, ranks, numa=not args.no_numa, timeout_s=args.timeout, quiet=True)["collectives"]
    ours = [r for r in rows if r["op"] == "all_reduce" and r["in_compiled"] and r["dtype"] == "float32"]
    return float(ours[0]["p50_us"])


def _point(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One case over its rounds."""
    speed = Spread.of([run["tok_s"] for run in found])
    shares = [run["mbu"] for run in found if run["mbu"] is not None]
    kept = (
        "quant", "world_size", "threads", "dtype", "weight_bytes_per_token", "cache_resident", "layers",
        "compile_cold_s", "compile_warm_s",
    )  # fmt: skip
    return {
        **{name: found[0][name] for name in kept},
        "tok_s": speed.median,
        "tok_s_p10": speed.p10,
        "tok_s_p90": speed.p90,
        "mbu": statistics.median(shares) if shares else None,
        "read_ceiling_gb_s": max(run["read_ceiling_gb_s"] for run in found),
        "prefill_tok_s": statistics.median(run["prefill_tok_s"] for run in found),
        "prefill_share": statistics.median(run["prefill_share"] for run in found),
        "peak_rss_bytes": [
            max(peaks) for peaks in zip(*(run["peak_rss_bytes"] for run in found), strict=True)
        ],
        "ttft_s": statistics.median(run["ttft_s"] for run in found),
    }


def _over_model(
    options: Options, model: ModelConfig, points: list[dict[str, Any]], reduce_us: dict[int, float]
) -> tuple[list[dict[str, Any]], Fit]:
    """The points, each with what the model says of it."""
    fewest = min(point["world_size"] for point in points)
    bare = Fit(1.0, 0.0)
    base = [
        (_modelled(options, model, point, reduce_us, bare), 1e3 / point["tok_s"])
        for point in points
        if point["world_size"] == fewest
    ]
    fit = fit_overhead([(p.weights_ms, taken - p.collectives_ms) for p, taken in base], fewest)
    rows = []
    for point in points:
        says = _modelled(options, model, point, reduce_us, fit)
        one = [p for p in points if p["quant"] == point["quant"] and p["world_size"] == fewest]
        rows.append(
            {
                **point,
                "over_fewest": point["tok_s"] / one[0]["tok_s"],
                "model_tok_s": says.tok_s,
                "model": says.to_dict(),
                "is_fitted": point["world_size"] == fewest,
            }
        )
    return rows, fit


def _modelled(
    options: Options, model: ModelConfig, point: dict[str, Any], reduce_us: dict[int, float], fit: Fit
) -> Prediction:
    """One point by the model, with what was measured here in place of a host's description."""
    assert options.engine is not None, "scaling has a model"
    ranks = point["world_size"]
    measured = reduce_us.get(ranks, 0.0)
    flag_us = measured / (2 * (ranks - 1)) if ranks > 1 else 1.0
    # The measured reduction moves the step's own bytes, so all of it goes into the flags' term.
    host = Host("here", 1, point["read_ceiling_gb_s"], 1.0, 1.0, flag_us, float("inf"))
    engine = options.engine.with_changes(quant=point["quant"], dtype=point["dtype"])
    return predict(host, model, engine, ranks, fit)


def markdown(document: dict[str, Any]) -> str:
    """The document as tables."""
    lines = [f"# Decoding {document['model']} on {document['host']}", ""]
    if "predictions" in document:
        lines += ["| quant | ranks | bytes a rank | weights ms | collectives ms | overhead ms | tokens/s |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [
            f"| {r['quant']} | {r['num_ranks']} | {r['rank_bytes'] / 1e9:.2f} GB | {r['weights_ms']:.2f} | "
            f"{r['collectives_ms']:.2f} | {r['overhead_ms']:.2f} | {r['tok_s']:.2f} |"
            for r in document["predictions"]
        ]
        lines += ["", "Nothing was measured; the constants are assumptions of configs/hosts and predict.py."]
        return "\n".join(lines) + "\n"
    lines += [f"- {key}: {value}" for key, value in document["card"].items()]
    lines += [f"- rounds: {document['rounds']}, fit: {document['fit']}", ""]
    lines += [
        "| quant | ranks x threads | tokens/s (p10..p90) | over fewest ranks | MBU | ceiling GB/s | model | "
        "prefill share |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in document["scaling"]:
        share = "-" if r["mbu"] is None else f"{r['mbu']:.3f}"
        says = f"{r['model_tok_s']:.2f}" + (" (fitted)" if r["is_fitted"] else "")
        lines.append(
            f"| {r['quant']} | {r['world_size']} x {r['threads']} | {r['tok_s']:.2f} ({r['tok_s_p10']:.2f}.."
            f"{r['tok_s_p90']:.2f}) | {r['over_fewest']:.2f} | {share} | "
            f"{r['read_ceiling_gb_s']:.1f} | {says} | {r['prefill_share']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _write(document: dict[str, Any], args: Namespace) -> None:
    """Tables to stdout; with --output files too."""
    sys.stdout.write(markdown(document))
    if args.output is None:
        return
    folder = Path(args.output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scaling.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "scaling.md").write_text(markdown(document))
    except OSError as error:
        raise ConfigError(
            f"--output {folder} cannot be written: {error.strerror}; give another folder"
        ) from None
    plot.write(document, folder / "scaling.png")
