"""What a command leaves in its --output, and finds there when it is run again. No torch.

A run is kept with the code, the host, the command line and the round it belongs to, and taken again only
where all of these are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .card import commit, cpu_model, gpus_and_driver

_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = (".py", ".cpp", ".h", ".toml")


def read_document(path: Path, otherwise: dict[str, Any]) -> dict[str, Any]:
    """The JSON document in `path`, or `otherwise` where there is none. Raises ConfigError."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else otherwise
    except (OSError, ValueError):
        raise ConfigError(f"{path} cannot be read; move it away, or give another --output") from None


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Files of a folder, by name. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            partial = folder / f"{name}.partial"
            partial.write_text(text)
            partial.replace(folder / name)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error.strerror}; give another") from None


def code_state() -> str:
    """The commit; with changes that are not committed, or outside a repository, the sources' digest too."""
    at = commit()
    if at is not None and not at.endswith("-dirty"):
        return at
    digest = sha256()
    for folder, folders, names in os.walk(_PACKAGE, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.endswith(_SOURCES):
                digest.update(name.encode() + (Path(folder) / name).read_bytes())
    return f"{at or 'no commit'}+{digest.hexdigest()[:12]}"


def host() -> str:
    """This host's CPUs and GPUs, in one line."""
    gpus, driver = gpus_and_driver()
    cards = f", {len(gpus)} x {gpus[0]}, driver {driver}" if gpus else ""
    return f"{cpu_model()}, {os.cpu_count()} CPUs{cards}"


class KeptRuns:
    """Documents of runs in folder/name, written as they come. folder: None keeps them in memory."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self._folder, self._name = folder, name
        found = {"runs": {}} if folder is None else read_document(folder / name, {"runs": {}})
        self._runs: dict[str, dict[str, Any]] = found["runs"]
        self._where = "" if folder is None else f"{code_state()} | {host()}"

    def find(self, words: Sequence[str], ranks: int, turn: int = 0) -> dict[str, Any] | None:
        """The document of that command line, where it is here."""
        return self._runs.get(self._key(words, ranks, turn))

    def keep(self, words: Sequence[str], ranks: int, turn: int, document: dict[str, Any]) -> None:
        """Put it beside the others. Raises ConfigError where the folder cannot be written."""
        self._runs[self._key(words, ranks, turn)] = document
        if self._folder is not None:
            write_files(self._folder, {self._name: json.dumps({"runs": self._runs}, indent=1) + "\n"})

    def _key(self, words: Sequence[str], ranks: int, turn: int) -> str:
        return f"{self._where} | --nproc {ranks} {' '.join(words)} | round {turn}"
