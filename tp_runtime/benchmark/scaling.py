"""scaling: decode over numbers of ranks and formats, interleaved, laid over the analytic model of predict.py.

Every round runs each case once, in a job of its own, so that a slow minute of the host falls on all of
them; a case's figure is the median over rounds. What the model knows of this host is measured in the same
runs: the read ceiling of each number of ranks, and the all-reduce of the step's size. Figures of the two
constants it is fitted with come from the points of the fewest ranks; all others are predictions. Beside them
stands what each format's own step over the fewest ranks predicts: its weights over the ceiling, its sums, and
the rest as it was.

A case that cannot fit, or that fails, is left out with a sentence. With --output, runs are kept as they end
and not made again by the same command on the same code and host. No torch here.
"""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..engine.source import resolve
from ..errors import LaunchError, MemoryLimitError
from ..models.config import ModelConfig
from . import plot, startup
from .definitions import Spread
from .kept import KeptRuns, write_files
from .launching import Progress, RunFailed, run_ranks
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


@dataclass(frozen=True)
class Case:
    """One format over some ranks. words: the command line of its decode."""

    engine: EngineConfig
    ranks: int
    words: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int]:
        return self.engine.quant, self.ranks

    def left_out(self, why: str) -> dict[str, Any]:
        """As the document has it; said on stderr, too."""
        sys.stderr.write(f"{self.engine.quant} over {self.ranks} ranks is left out: {why}\n")
        return {"quant": self.engine.quant, "world_size": self.ranks, "why": why}


def _measured(options: Options, name: str, model: ModelConfig) -> dict[str, Any]:
    args = options.args
    kept = KeptRuns(_folder(args), "scaling_runs.json")
    cases, left_out = _cases(options)
    runs, failed = _runs(cases, kept, args)
    last = max((found[-1] for found in runs.values()), key=lambda run: int(run["world_size"]))
    several = sorted({ranks for _, ranks in runs if ranks > 1})
    reduce_us = {ranks: _all_reduce_us(model, ranks, last["device"], kept, args) for ranks in several}
    points = [_point(found) for found in runs.values()]
    rows, fit = _over_model(options, model, points, reduce_us)
    return {
        "model": name,
        "host": _hardware(last["card"]),
        "rounds": args.rounds,
        "fit": vars(fit),
        "all_reduce_us": reduce_us,
        "scaling": rows,
        "left_out": left_out + failed,
        "card": last["card"],
    }


def _hardware(card: dict[str, Any]) -> str:
    """What the ranks ran on, in words."""
    gpus = card.get("gpus") or []
    return f"{len(gpus)} x {gpus[0]}" if gpus else str(card["cpu"])


def _cases(options: Options) -> tuple[list[Case], list[dict[str, Any]]]:
    """What can be measured, and what has no room here. Raises TPError, also where nothing has room."""
    args, cases, left_out = options.args, [], []
    small: MemoryLimitError | None = None
    for engine in _engines(options):
        for ranks in args.nproc or (1,):
            words = ("decode", *engine_words(engine, args))
            case = Case(engine, ranks, words)
            try:
                check_engine(Options("decode", args, engine), ranks)
            except MemoryLimitError as error:
                small = error
                left_out.append(case.left_out(str(error)))
            else:
                cases.append(case)
    if small is not None and not cases:
        raise small
    return cases, left_out


def _runs(
    cases: Sequence[Case], kept: KeptRuns, args: Namespace
) -> tuple[dict[tuple[str, int], list[dict[str, Any]]], list[dict[str, Any]]]:
    """Documents of each case by round, and the cases that failed, which have none.

    Raises what the last one raised where all of them failed.
    """
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    failed: dict[tuple[str, int], dict[str, Any]] = {}
    trouble: RunFailed | LaunchError | None = None
    turns = [(turn, case) for turn in range(args.rounds) for case in cases]
    progress = Progress(sum(kept.find(_marked(case, args), case.ranks, turn) is None for turn, case in turns))
    for turn, case in turns:
        if case.key in failed:
            continue
        found = kept.find(_marked(case, args), case.ranks, turn)
        if found is None:
            try:
                found = _run(case, args, with_startup=args.startup and turn == 0)
            except (RunFailed, LaunchError) as error:
                trouble = error
                failed[case.key] = case.left_out(str(error))
                runs.pop(case.key, None)
                continue
            kept.keep(_marked(case, args), case.ranks, turn, found)
            sys.stdout.write(progress.step() + "\n")
            sys.stdout.flush()
        runs.setdefault(case.key, []).append(found)
    if trouble is not None and not runs:
        raise trouble
    return runs, list(failed.values())


def _marked(case: Case, args: Namespace) -> tuple[str, ...]:
    """The words that a run is kept by: fresh starts are part of it."""
    return (*case.words, "--startup") if args.startup else case.words


def _run(case: Case, args: Namespace, *, with_startup: bool) -> dict[str, Any]:
    found = run_ranks(case.words, case.ranks, numa=not args.no_numa, timeout_s=args.timeout)
    if with_startup:
        found |= startup.measure(case.words, case.ranks, numa=not args.no_numa, timeout_s=args.timeout)
    return found


def _engines(options: Options) -> Iterator[EngineConfig]:
    assert options.engine is not None, "scaling has a model"
    for quant in quants(options):
        yield options.engine.with_changes(quant=quant)


def _all_reduce_us(model: ModelConfig, ranks: int, device: str, kept: KeptRuns, args: Namespace) -> float:
    """Median of a reduction of the step's size, in a compiled chain, over whatever transport serves it."""
    num_bytes = model.hidden_size * _FP32_BYTES
    words = ["collectives", "--bytes", str(num_bytes), *(["--device", device] if device != "cpu" else [])]
    found = kept.find(words, ranks)
    if found is None:
        found = run_ranks(words, ranks, numa=not args.no_numa, timeout_s=args.timeout, quiet=True)
        kept.keep(words, ranks, 0, found)
    rows = found["collectives"]
    ours = [r for r in rows if r["op"] == "all_reduce" and r["in_compiled"] and r["dtype"] == "float32"]
    return float(ours[0]["p50_us"])


def _point(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One case over its rounds."""
    speed = Spread.of([run["tok_s"] for run in found])
    if len(found) == 1:  # the spread over its own repeats
        speed = Spread(speed.median, found[0]["tok_s_p10"], found[0]["tok_s_p90"])
    shares = [run["mbu"] for run in found if run["mbu"] is not None]
    kept = (
        "quant", "world_size", "threads", "dtype", "weight_bytes_per_token", "cache_resident", "layers",
        "compile_cold_s", "compile_warm_s", "device", "peak_device_bytes",
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
    bare = {id(point): _modelled(options, model, point, reduce_us, Fit(1.0, 0.0)) for point in points}
    base = [
        (bare[id(point)].weights_ms, _step_ms(point) - bare[id(point)].collectives_ms)
        for point in points
        if point["world_size"] == fewest
    ]
    fit = fit_overhead(base, fewest)
    rows = []
    for point in points:
        says = _modelled(options, model, point, reduce_us, fit)
        one = min((p for p in points if p["quant"] == point["quant"]), key=lambda p: int(p["world_size"]))
        mine, its = bare[id(point)], bare[id(one)]
        rest_ms = _step_ms(one) - its.weights_ms - its.collectives_ms
        predicted_ms = mine.weights_ms + mine.collectives_ms + rest_ms
        rows.append(
            {
                **point,
                "fewest": one["world_size"],
                "over_fewest": point["tok_s"] / one["tok_s"],
                "over_fewest_predicted": _step_ms(one) / predicted_ms,
                "collectives_share": mine.collectives_ms / _step_ms(point),
                "model_tok_s": says.tok_s,
                "model": says.to_dict(),
                "is_fitted": point["world_size"] == fewest,
            }
        )
    return rows, fit


def _step_ms(point: dict[str, Any]) -> float:
    return 1e3 / float(point["tok_s"])


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
    lines += [f"- {key}: {value}" for key, value in document["card"].items() if value not in (None, [])]
    lines += [f"- rounds: {document['rounds']}, fit: {document['fit']}", ""]
    lines += [
        "| quant | ranks x threads | tokens/s (p10..p90) | over fewest ranks | predicted | collectives | "
        "MBU | ceiling GB/s | model | prefill share |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for r in document["scaling"]:
        share = "-" if r["mbu"] is None else f"{r['mbu']:.3f}"
        says = f"{r['model_tok_s']:.2f}" + (" (fitted)" if r["is_fitted"] else "")
        each = "GPU" if r["device"] == "cuda" else r["threads"]
        lines.append(
            f"| {r['quant']} | {r['world_size']} x {each} | {r['tok_s']:.2f} ({r['tok_s_p10']:.2f}.."
            f"{r['tok_s_p90']:.2f}) | {r['over_fewest']:.2f} of {r['fewest']} | "
            f"{r['over_fewest_predicted']:.2f} | {r['collectives_share']:.3f} | {share} | "
            f"{r['read_ceiling_gb_s']:.1f} | {says} | {r['prefill_share']:.3f} |"
        )
    lines += [
        "",
        *(f"- all_reduce of {ranks} ranks: {us:.2f} us" for ranks, us in document["all_reduce_us"].items()),
    ]
    lines += [
        f"- {each['quant']} over {each['world_size']} ranks left out: {each['why']}"
        for each in document["left_out"]
    ]
    return "\n".join(lines) + "\n"


def _folder(args: Namespace) -> Path | None:
    return None if args.output is None else Path(args.output).expanduser()


def _write(document: dict[str, Any], args: Namespace) -> None:
    """Tables to stdout; with --output files too."""
    table, folder = markdown(document), _folder(args)
    sys.stdout.write(table)
    if folder is not None:
        document_text = json.dumps(document, indent=1) + "\n"
        write_files(folder, {"scaling.json": document_text, "scaling.md": table})
        plot.write(document, folder / "scaling.png")
