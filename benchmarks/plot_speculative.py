"""docs/speculative.svg: speed-up against acceptance by the formula, with measured pairs on it.

    python benchmarks/plot_speculative.py [RESULTS.json ...] > docs/speculative.svg

Lines: k = 1, 4 and 7 with v = 1 + 0.05 k, for a lookup (c = 0) and a draft of a third of a step (c = 0.33).
Points: the rows of results of `benchmarks/speculative.py`, at their measured acceptance and speed-up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

WIDTH, HEIGHT, MARGIN, TOP = 640, 400, 48, 6.0
COST_A_TOKEN = 0.05
LINES = (
    (1, 0.0, "#7aa6d8"), (4, 0.0, "#3a78c0"), (7, 0.0, "#174a86"),
    (1, 0.33, "#e0a87a"), (4, 0.33, "#cc7a33"), (7, 0.33, "#8f4a10"),
)  # fmt: skip


def speedup(a: float, k: int, c: float) -> float:
    """(1 - a^(k+1)) / ((1 - a)(k c + v))."""
    return sum(a**i for i in range(k + 1)) / (k * c + 1 + COST_A_TOKEN * k)


def place(a: float, times: float) -> tuple[float, float]:
    """Where a point lies."""
    x = MARGIN + a * (WIDTH - 2 * MARGIN)
    return round(x, 1), round(HEIGHT - MARGIN - min(times, TOP) / TOP * (HEIGHT - 2 * MARGIN), 1)


def axes() -> Iterator[str]:
    (left, bottom), (right, top) = place(0, 0), place(1, TOP)
    yield f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#444"/>'
    for tenth in range(0, 11, 2):
        x, y = place(tenth / 10, 0)
        yield f'<text x="{x}" y="{y + 16}" text-anchor="middle">{tenth / 10}</text>'
    for times in range(1, int(TOP) + 1):
        x, y = place(0, times)
        yield f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{times}</text>'
    x, y = place(0, 1)
    yield f'<path d="M{x} {y}H{right}" stroke="#bbb" stroke-dasharray="4 3"/>'
    yield f'<text x="{(left + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">acceptance a</text>'
    yield f'<text x="{left}" y="{top - 12}">speed-up over plain decoding</text>'


def lines() -> Iterator[str]:
    for number, (k, c, colour) in enumerate(LINES):
        points = " ".join(f"{x},{y}" for x, y in (place(i / 50, speedup(i / 50, k, c)) for i in range(51)))
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        y, draft = MARGIN + 14 * number, "lookup" if c == 0 else f"c = {c}"
        yield f'<text x="{MARGIN + 16}" y="{y}" fill="{colour}">k = {k}, {draft}</text>'


def measured(paths: list[str]) -> Iterator[str]:
    for path in paths:
        for row in json.loads(Path(path).read_text())["rows"]:
            if row.get("acceptance") is not None:
                x, y = place(row["acceptance"], row["speedup"])
                yield f'<circle cx="{x}" cy="{y}" r="3" fill="#222"><title>{row["case"]}</title></circle>'


def main() -> None:
    body = "\n".join([*axes(), *lines(), *measured(sys.argv[1:])])
    style = 'font-family="sans-serif" font-size="12"'
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>')
    print(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>')


if __name__ == "__main__":
    main()
