"""docs/launch.md shows what the tool shows, and names options and variables that exist."""

from __future__ import annotations

import re
import subprocess
import sys

from tp_testing import launch_docs

from tp_runtime import env
from tp_runtime.launch import cli


def test_drawings_are_the_tools_own() -> None:
    text = launch_docs.PAGE.read_text()
    assert launch_docs.render(text) == text, "run python -m tp_testing.launch_docs (PYTHONPATH=tests/support)"
    shown = {host for _, host, *_ in launch_docs._BLOCK.findall(text)}
    assert shown == {*launch_docs.HOSTS, *launch_docs.REAL}


def test_options_and_variables_exist() -> None:
    text = launch_docs.PAGE.read_text()
    known = set(re.findall(r"--[a-z-]+", cli._parser().format_help())) | {
        "--cpus",
        "--shm-size",
        "--chat",
        "--model",
    }
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= known
    assert set(re.findall(r"`(TP_[A-Z_]+)", text)) <= {variable.name for variable in env.VARIABLES}


def test_every_option_is_explained() -> None:
    text = launch_docs.PAGE.read_text()
    help_text = subprocess.run(
        [sys.executable, "-m", "tp_runtime.launch.cli", "--help"], capture_output=True, text=True, timeout=60
    ).stdout
    options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", help_text, re.MULTILINE)) - {"--help"}
    assert not {option for option in options if f"`{option}" not in text}
