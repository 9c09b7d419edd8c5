"""Scaling without ranks: what is left out, what is kept for the next run, what is predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tp_runtime.benchmark import kept, options, scaling
from tp_runtime.benchmark.launching import RunFailed
from tp_runtime.errors import MemoryLimitError

WORDS = ["scaling", "--model", "llama-70b", "--device", "cuda", "--rounds", "1"]
LAYERS, ALL_REDUCE_US, CEILING = 80, 10.0, 4000.0
BYTES = {"none": 141e9, "int8": 70e9}


def run_of(quant: str, ranks: int, step_ms: float) -> dict[str, Any]:
    """A decode's document, as far as scaling reads it."""
    return {
        "quant": quant, "world_size": ranks, "threads": 8, "dtype": "bf16", "device": "cuda", "layers": LAYERS,
        "weight_bytes_per_token": BYTES[quant], "cache_resident": False, "compile_cold_s": None,
        "compile_warm_s": None, "tok_s": 1e3 / step_ms, "tok_s_p10": 1e3 / step_ms, "tok_s_p90": 1e3 / step_ms, "mbu": 0.8, "read_ceiling_gb_s": CEILING * ranks,
        "prefill_tok_s": 1e4, "prefill_share": 0.5, "peak_rss_bytes": [1] * ranks, "ttft_s": 0.1,
        "peak_device_bytes": [2] * ranks, "card": {"cpu": "a CPU"},
    }  # fmt: skip


class Ranks:
    """Stands for run_ranks. Two ranks take half of one's weights, 2 ms and the sums."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []
        self.fail: set[tuple[str, int]] = set()

    def __call__(self, words: list[str], nproc: int, **_: object) -> dict[str, Any]:
        if words[0] == "collectives":
            self.ran.append((words[0], nproc))
            assert words[-2:] == ["--device", "cuda"]
            row = {"op": "all_reduce", "in_compiled": True, "dtype": "float32"}
            return {"collectives": [{**row, "p50_us": ALL_REDUCE_US}, {**row, "p50_us": 99.0}]}
        quant = words[words.index("--quant") + 1] if "--quant" in words else "none"
        self.ran.append((quant, nproc))
        if (quant, nproc) in self.fail:
            raise RunFailed(3)
        sums_ms = (2 * LAYERS + 1) * ALL_REDUCE_US / 1e3 if nproc > 1 else 0.0
        return run_of(quant, nproc, BYTES[quant] / CEILING / nproc / 1e6 + 2.0 + sums_ms)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    made = Ranks()

    def check(options: options.Options, nproc: int) -> None:
        assert options.engine is not None
        if (options.engine.quant, nproc) == ("none", 1):
            raise MemoryLimitError("141 GB do not fit")

    monkeypatch.setattr(scaling, "run_ranks", made)
    monkeypatch.setattr(scaling, "check_engine", check)
    monkeypatch.setattr(scaling.plot, "write", lambda *_: False)
    monkeypatch.setattr(kept, "code_state", lambda: "abc")
    monkeypatch.setattr(kept, "host", lambda: "two cards")
    return made


def run(folder: Path, *words: str) -> dict[str, Any]:
    asked = options.parse([*WORDS, "--output", str(folder), *words], in_job=False)
    return scaling.run(asked)


def test_what_cannot_fit_is_left_out(ranks: Ranks, tmp_path: Path) -> None:
    document = run(tmp_path, "--nproc", "1,2", "--quant", "none,int8")
    assert [(row["quant"], row["world_size"]) for row in document["scaling"]] == [
        ("none", 2), ("int8", 1), ("int8", 2),
    ]  # fmt: skip
    assert document["left_out"] == [{"quant": "none", "world_size": 1, "why": "141 GB do not fit"}]
    assert ranks.ran.count(("collectives", 2)) == 1 and ("collectives", 1) not in ranks.ran
    table = (tmp_path / "scaling.md").read_text()
    assert "| int8 | 2 x GPU |" in table and "none over 1 ranks left out: 141 GB" in table


def test_predictions_rest_on_the_format_s_own_fewest_ranks(ranks: Ranks, tmp_path: Path) -> None:
    none, one, two = run(tmp_path, "--nproc", "1,2", "--quant", "none,int8")["scaling"]
    assert two["over_fewest_predicted"] == pytest.approx(two["over_fewest"], rel=0.02)
    assert two["collectives_share"] == pytest.approx(161 * ALL_REDUCE_US * two["tok_s"] / 1e6)
    assert (none["fewest"], none["over_fewest"], none["over_fewest_predicted"]) == (2, 1.0, pytest.approx(1))
    assert (none["is_fitted"], one["is_fitted"], two["is_fitted"]) == (False, True, False)


def test_runs_are_not_made_again(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on where it stopped; other code runs all of it again."""
    ranks.fail = {("int8", 2)}
    first = run(tmp_path, "--nproc", "1,2", "--quant", "int8")
    assert [row["world_size"] for row in first["scaling"]] == [1]
    assert [each["world_size"] for each in first["left_out"]] == [2]
    ranks.fail, ranks.ran = set(), []
    second = run(tmp_path, "--nproc", "1,2", "--quant", "int8")
    assert ranks.ran == [("int8", 2), ("collectives", 2)]
    assert second["left_out"] == [] and len(second["scaling"]) == 2
    ranks.ran = []
    assert run(tmp_path, "--nproc", "1,2", "--quant", "int8")["scaling"] == json.loads(
        json.dumps(second["scaling"])
    )
    assert ranks.ran == []
    monkeypatch.setattr(kept, "code_state", lambda: "def")
    run(tmp_path, "--nproc", "1,2", "--quant", "int8")
    assert len(ranks.ran) == 3


def test_where_all_fails_the_run_does(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(MemoryLimitError):
        run(tmp_path, "--nproc", "1", "--quant", "none")
    ranks.fail = {("int8", 1)}
    with pytest.raises(RunFailed):
        run(tmp_path, "--nproc", "1", "--quant", "int8")


def test_changed_sources_are_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "commit", lambda: "abc")
    assert kept.code_state() == "abc"
    monkeypatch.setattr(kept, "commit", lambda: "abc-dirty")
    dirty = kept.code_state()
    assert dirty.startswith("abc-dirty+") and dirty == kept.code_state()
    monkeypatch.setattr(kept, "commit", lambda: None)
    assert kept.code_state().startswith("no commit+")
