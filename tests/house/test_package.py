"""The wheel holds one top-level name and everything it needs; generated documents are current."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tp_runtime import env


def test_wheel(repository: Path, tmp_path: Path) -> None:
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(tmp_path),
            str(repository),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"tp_runtime"}
    for part in (
        "py.typed",
        "launch/cli.py",
        "models/llama.py",
        "quant/tensor.py",
        "configs/models/llama-70b.toml",
    ):
        assert f"tp_runtime/{part}" in names, f"{part} is missing from the wheel"
    sources = [name for name in names if name.endswith((".cpp", ".h"))]
    tree = [p for p in (repository / "tp_runtime").rglob("*") if p.suffix in (".cpp", ".h")]
    assert len(sources) == len(tree), "C++ sources are missing from the wheel"
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    code = "import tp_runtime, tp_runtime.launch.cli as c; print(tp_runtime.__file__, c.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert where.stdout.count(str(installed)) == 2, where.stdout + where.stderr


def test_environment_document_is_current(repository: Path) -> None:
    assert (repository / "docs/env.md").read_text() == env.render(), "run make docs"


def test_links_into_the_package(repository: Path) -> None:
    for name in ("launch", "models", "quant", "configs"):
        assert os.readlink(repository / "tp_runtime" / name) == f"../{name}"


def test_environment_is_read_in_one_place(repository: Path) -> None:
    """os.environ and os.getenv appear in env.py alone (setting a child's environment aside)."""
    for path in [
        p for top in ("tp_runtime", "launch", "models", "quant") for p in (repository / top).rglob("*.py")
    ]:
        if path.name != "env.py" and "os.getenv" in path.read_text():
            raise AssertionError(f"{path} reads the environment; declare the variable in env.py")
