"""The table of targets: what is read off documents, what is run again, what is left for want of time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tp_runtime.benchmark import options, target_rows, targets
from tp_runtime.benchmark.launching import RunFailed
from tp_runtime.errors import ConfigError

CARD = {"cpu": "a CPU", "cpus": 2, "date": "2026-11-26", "load_average_at_start": 0.1, "load_average": 2.0}


def collectives(p50_us: float) -> dict[str, Any]:
    row = {"op": "all_reduce", "backend": "shm", "dtype": "bfloat16", "bytes": 4096, "in_compiled": True}
    return {
        "card": CARD,
        "collectives": [{**row, "p50_us": p50_us}, {**row, "in_compiled": False, "p50_us": 1.0}],
    }


def asked(folder: Path, *words: str) -> options.Options:
    return options.parse(["targets", "--output", str(folder), *words], in_job=False)


def figures(name: str, found: target_rows.Documents) -> list[target_rows.Figure]:
    return list(next(row for row in target_rows.rows() if row.name == name).judge(found))


def test_rows_are_measured_once_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as they end, not run again at the same commit, run again at another."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> dict[str, Any]:
        ran.append(command)
        return collectives(2.5)

    monkeypatch.setattr(targets, "run_program", run)
    monkeypatch.setattr(targets, "commit", lambda: "abc")
    for _ in range(2):
        targets.run(asked(tmp_path, "--rows", "collectives"))
    assert len(ran) == 1 and ran[0][-1] == "--json" and "collectives" in ran[0]
    monkeypatch.setattr(targets, "commit", lambda: "def")
    targets.run(asked(tmp_path, "--rows", "collectives"))
    assert len(ran) == 2
    monkeypatch.setattr(targets, "commit", lambda: "def-dirty")
    targets.run(asked(tmp_path / "dirty", "--rows", "collectives"))
    targets.run(asked(tmp_path / "dirty", "--rows", "collectives"))
    assert len(ran) == 4, "nobody knows what differs"
    written = json.loads((tmp_path / "targets.json").read_text())["rows"]["collectives"]
    assert written["commit"] == "def" and [figure["met"] for figure in written["figures"]] == [True]
    table = (tmp_path / "targets.md").read_text()
    assert "| <= 3 | 2.500 | yes |" in table and "load 0.1 to 2.0" in table


def test_a_failed_row_is_said_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> dict[str, Any]:
        raise RunFailed(3)

    monkeypatch.setattr(targets, "run_program", fail)
    targets.run(asked(tmp_path, "--rows", "collectives"))
    assert "ended with code 3" in (tmp_path / "targets.md").read_text()
    monkeypatch.setattr(targets, "run_program", lambda command, **_: collectives(3.5))
    found = targets.run(asked(tmp_path, "--rows", "collectives"))
    assert found["rows"]["collectives"]["figures"][0]["met"] is False


def test_rows_beyond_the_time_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "run_program", lambda command, **_: pytest.fail("there is no time"))
    found = targets.run(asked(tmp_path, "--minutes", "0.5", "--rows", "collectives,mbu"))
    assert found["left"] == ["collectives", "mbu"] and found["rows"] == {}


def test_unknown_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="collectives"):
        targets.run(asked(tmp_path, "--rows", "sing"))


def test_every_row_s_commands_are_taken() -> None:
    for row in target_rows.rows():
        for words in row.commands:
            if "--gguf" not in words:
                options.parse(words.split(), in_job=False)


def test_a_model_in_the_caches_gives_way_to_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-1b takes 2.5 GB in bf16, and llama-3b 1.9 GB with most of it in int4."""
    monkeypatch.setattr(target_rows, "is_cache_resident", lambda num_bytes: num_bytes < 1_258_291_200)
    assert [target_rows.mbu_model(quant) for quant in target_rows.QUANTS] == [
        "llama-1b",
        "llama-3b",
        "llama-3b",
    ]


def test_kernels_are_judged_by_their_worst_shape() -> None:
    row = {"quant": "int8", "threads": 1, "ceiling_gb_s": 10.0}
    cases = [
        {**row, "op": "a", "rows": 1, "gb_s": 9.5, "share": 0.95}, {**row, "op": "a", "rows": 4, "gb_s": 9.5, "share": 0.95},
        {**row, "op": "b", "rows": 1, "gb_s": 8.9, "share": 0.89}, {**row, "op": "b", "rows": 4, "gb_s": 4.45, "share": 0.45},
    ]  # fmt: skip
    share, time = figures("kernels-llama-1b", [[{"kernels": cases}]])
    assert (share.value, share.met) == (0.89, False) and share.what.endswith("b")
    assert (time.value, time.met) == (2.0, False) and time.what.endswith("b")


def test_ranks_are_held_to_the_lower_of_ratio_and_ceilings() -> None:
    """Two ranks at 1.8 times one thread meet a ceiling that only grew by 1.7."""
    one, two, thread = (
        [{"tok_s": s, "read_ceiling_gb_s": c}] for s, c in ((18.2, 17.0), (18.0, 17.0), (10.0, 10.0))
    )
    found = figures("ranks", [one, two, thread] * 3)
    assert [figure.met for figure in found] == [True] * 6
    assert found[1].target == pytest.approx(1.7)


def test_a_peer_that_is_missing_meets_nothing() -> None:
    ours = {
        "runtime": "tp_runtime",
        "format": "int4",
        "over_eager": 5.0,
        "over_eager_bound": 4.8,
        "read_ceiling_gb_s": 1.0,
    }
    assert {figure.met for figure in figures("peers", [[{"peers": [ours]}]])} == {None}
    assert [figure.met for figure in figures("eager", [[{"peers": [ours]}]])] == [True]
