"""Which program the ranks run: a file, a module (-m), or a script that comes with this package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import LaunchError

BUNDLED = ("bench", "generate")
_PACKAGE = __name__.split(".")[0]


@dataclass(frozen=True)
class Script:
    """A file (module is None) or a module, which runs as __main__ with `name` as its sys.argv[0]."""

    name: str
    module: str | None = None

    @property
    def command(self) -> list[str]:
        """The words that name it on rank_main's command line."""
        return ["-m", self.module] if self.name == self.module else [self.name]

    @property
    def is_bundled(self) -> bool:
        """Whether it comes with this package."""
        return self.module is not None and self.module in {f"{_PACKAGE}.{stem}" for stem in BUNDLED}


def resolve(name: str, as_module: bool = False) -> Script:
    """The program called `name`. Raises LaunchError where there is none."""
    if as_module:
        if not _exists(name.partition(".")[0]):
            raise LaunchError(f"-m {name}: no module is called so here; install it, or set PYTHONPATH")
        return Script(name, name)
    if os.path.isfile(name):
        if not os.access(name, os.R_OK):
            raise LaunchError(f"script {name!r} may not be read by this user; change its permissions")
        return Script(name)
    stem = Path(name).stem
    bundled = [stem for stem in BUNDLED if importlib.util.find_spec(f"{_PACKAGE}.{stem}") is not None]
    if name in (stem, f"{stem}.py") and stem in bundled:
        return Script(name, f"{_PACKAGE}.{stem}")
    raise LaunchError(
        f"script {name!r} is no file here ({os.getcwd()}) and none of the bundled scripts "
        f"({', '.join(f'{stem}.py' for stem in bundled)}); give the path of a Python file"
    )


def _exists(module: str) -> bool:
    """Whether ranks would find a module of this name: they look here first, which this program does not."""
    here = importlib.machinery.PathFinder.find_spec(module, [os.getcwd()])
    return bool(module) and (here is not None or importlib.util.find_spec(module) is not None)


def split(argv: list[str]) -> tuple[Script, list[str]]:
    """The program and its arguments from rank_main's command line. Raises LaunchError."""
    as_module = argv[:1] == ["-m"]
    words = argv[1:] if as_module else argv
    if not words:
        raise LaunchError("no script was given; use python -m tp_runtime.launch.rank_main SCRIPT ARGS")
    return resolve(words[0], as_module), words[1:]
