"""The picture of scaling: measured points over the analytic model's lines. matplotlib is optional."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def write(document: dict[str, Any], path: Path) -> bool:
    """Write the PNG; False, with a sentence on stderr, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.stderr.write(
            f"{path} was left out as matplotlib is not installed; pip install 'tp-runtime[bench]' brings it\n"
        )
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = document.get("scaling") or document["predictions"]
    for index, quant in enumerate(dict.fromkeys(row["quant"] for row in rows)):
        mine = sorted((row for row in rows if row["quant"] == quant), key=_ranks)
        ranks, color = [_ranks(row) for row in mine], f"C{index}"
        if "scaling" not in document:
            axes.plot(ranks, [row["tok_s"] for row in mine], "--", marker="x", color=color, label=quant)
            continue
        axes.plot(ranks, [row["model_tok_s"] for row in mine], "--", color=color, label=f"{quant}, model")
        middle = [row["tok_s"] for row in mine]
        down = [row["tok_s"] - row["tok_s_p10"] for row in mine]
        up = [row["tok_s_p90"] - row["tok_s"] for row in mine]
        axes.errorbar(ranks, middle, yerr=[down, up], fmt="o", color=color, label=f"{quant}, measured")
    axes.set_xticks(sorted({_ranks(row) for row in rows}))
    axes.set_xlabel("ranks")
    axes.set_ylabel("tokens/s, batch 1")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{document['model']} on {document['host']}")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _ranks(row: dict[str, Any]) -> int:
    return int(row["world_size"] if "world_size" in row else row["num_ranks"])
