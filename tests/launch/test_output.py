"""Ranks' output on its way: prefixes, unfinished lines, reports, and what is held back for the first word."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tp_runtime.launch import output, reports


@pytest.fixture
def told() -> list[tuple[int, dict[str, Any]]]:
    return []


@pytest.fixture
def ranks(told: list[tuple[int, dict[str, Any]]]) -> Iterator[output.RankOutput]:
    made = output.RankOutput(
        {0: 4, 1: 5}, log_dir=None, show_all=False, attempt=0, on_report=lambda r, d: told.append((r, d))
    )
    yield made
    made.close()


def write(ranks: output.RankOutput, local_rank: int, data: bytes) -> None:
    stream = next(s for s in ranks.streams if s.local_rank == local_rank and s.is_stderr)
    os.write(stream.write_fd, data)
    ranks.read(stream)


def test_lines_have_their_rank_once(ranks: output.RankOutput, capfd: pytest.CaptureFixture[str]) -> None:
    write(ranks, 1, b"plain\n[rank 5/8] of the project's own log\n[rank5]: of torch\n\nlast\n")
    assert capfd.readouterr().err == (
        "[rank 5] plain\n[rank 5/8] of the project's own log\n[rank5]: of torch\n[rank 5] \n[rank 5] last\n"
    )


def test_lines_of_two_ranks_are_not_torn(ranks: output.RankOutput, capfd: pytest.CaptureFixture[str]) -> None:
    write(ranks, 0, b"first ")
    write(ranks, 1, b"other ")
    write(ranks, 0, b"rank\n")
    write(ranks, 1, b"rank\n")
    assert capfd.readouterr().err == "[rank 4] first rank\n[rank 5] other rank\n"


def test_a_line_that_does_not_end_is_shown_soon(
    ranks: output.RankOutput, capfd: pytest.CaptureFixture[str]
) -> None:
    write(ranks, 0, b"\r 10%")
    assert ranks.flush_partial_lines(time.monotonic()) is True
    ranks.flush_partial_lines(time.monotonic() + 1.0)
    assert capfd.readouterr().err.endswith(" 10%")
    assert ranks.flush_partial_lines(time.monotonic()) is False


def test_reports_are_heard_and_not_shown(
    ranks: output.RankOutput, told: list[tuple[int, dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    write(ranks, 1, b'before\n\x1e{"kind": "raised", "ty')
    write(ranks, 1, b'pe": "ValueError"}\nafter\n\x1enot a report\n')
    assert told == [(1, {"kind": "raised", "type": "ValueError"})]
    assert capfd.readouterr().err == "[rank 5] before\n[rank 5] after\n[rank 5] \x1enot a report\n"
    assert ranks.last_line(1) == "not a report"


@pytest.mark.parametrize("flushed", [False, True])
def test_a_report_after_an_unfinished_line_is_heard(
    flushed: bool,
    ranks: output.RankOutput,
    told: list[tuple[int, dict[str, Any]]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    write(ranks, 1, b"loading 40%")
    if flushed:
        ranks.flush_partial_lines(time.monotonic() + 1.0)
    write(ranks, 1, b'\x1e{"kind": "exits", "code": 4}\nlast\n')
    assert told == [(1, {"kind": "exits", "code": 4})]
    assert capfd.readouterr().err == "[rank 5] loading 40%\n[rank 5] last\n"


def test_what_is_held_comes_after_the_first_word(
    ranks: output.RankOutput, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks.hold()
    write(ranks, 1, b"Traceback\n")
    output.say("error: rank 5 was first")
    ranks.release()
    assert capfd.readouterr().err == "error: rank 5 was first\n[rank 5] Traceback\n"


def test_a_rank_reports_only_to_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TP_LAUNCHER_PID", raising=False)
    reports.report("warning", text="nobody listens")
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("TP_LAUNCHER_PID", "1")
    reports.report("warning", text="x" * 5000)
    line = capfd.readouterr().err.encode()
    assert len(line) < 4096
    document = reports.parse(line)
    assert document is not None and document["kind"] == "warning"


def test_a_log_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--log-dir .*file: Not a directory; give a folder"):
        output.RankOutput(
            {0: 0}, log_dir=tmp_path / "file", show_all=False, attempt=0, on_report=lambda r, d: None
        )
