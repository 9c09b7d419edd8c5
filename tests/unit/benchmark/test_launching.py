"""Starting a measurement: its lines come as they are written, its last is the document."""

from __future__ import annotations

import sys

import pytest

from tp_runtime.benchmark.launching import Progress, RunFailed, run_program
from tp_runtime.errors import LaunchError


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_are_passed_on_and_the_last_is_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(program("print('one'); print('two'); print('{\"a\": 1}')"), timeout_s=60) == {"a": 1}
    assert capsys.readouterr().out == "one\ntwo\n"


def test_quiet_keeps_lines_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(program("print('one'); print('{}')"), timeout_s=60, quiet=True) == {}
    assert capsys.readouterr().out == ""


def test_failures_are_told_apart() -> None:
    with pytest.raises(RunFailed) as failed:
        run_program(program("raise SystemExit(3)"), timeout_s=60)
    assert failed.value.code == 3
    with pytest.raises(LaunchError, match="without a document"):
        run_program(program("print('no document')"), timeout_s=60)
    with pytest.raises(LaunchError, match="--timeout"):
        run_program(program("import time; time.sleep(60)"), timeout_s=0.2)


def test_progress_counts_down() -> None:
    progress = Progress(2)
    assert progress.step().startswith("[1/2, ")
    assert progress.step() == "[2/2, 0 s left]"
