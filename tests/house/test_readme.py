"""The README's commands run as they stand (all but `make test`, which runs this)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```console\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line != "make test"
]
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)


def run(command: list[str], repository: Path) -> str:
    scripts = Path(sys.executable).parent
    variables = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "VENV": str(scripts.parent)}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=repository,
        env=variables,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, repository: Path) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        words += [f"VENV={Path(sys.executable).parent.parent}"]
    output = run(words, repository)
    if "capital of France" in command or "make demo" in command:
        assert "Paris" in output, output


@pytest.mark.parametrize("block", PROGRAMS, ids=["llm", "shard"])
def test_python(block: str, repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(block)
    assert run([sys.executable, str(path)], repository).strip()


def test_blocks_were_found() -> None:
    assert "make demo" in COMMANDS and len(COMMANDS) >= 7
