"""From what a user calls a model to its shape, its weights and its tokenizer. No torch.

A model is, in this order: a name of configs/models; a folder in Hugging Face layout or a GGUF file; a hub
id, org/name. A name finds weights in $TP_MODEL_PATH/<name>, in an installed package that brings a file, or
in the Hugging Face cache, and downloads nothing; a hub id is looked up in the cache, then downloaded.
Where weights carry a config of their own it is used, and must have the shape that was named.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import env
from ..checkpoint.gguf_file import gguf_config
from ..checkpoint.gguf_header import is_gguf, read_gguf_header
from ..checkpoint.inventory import has_own_head, stored_tensors
from ..checkpoint.json_file import read_json_object
from ..errors import CheckpointError, ConfigError, ModelNotFoundError
from ..models import registry
from ..models.config import ModelConfig, ModelConfigError

DEMO_MODEL = "smollm2-135m"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_WEIGHTS = "*.safetensors"
_HUB_FILES = [_HUB_WEIGHTS, "*.json", "*.jinja", "tokenizer.model"]
# Shape fields: weights that differ in one of them cannot be what was named.
_SHAPE = [field.name for field in fields(ModelConfig) if field.type == "int" and "max" not in field.name]


@dataclass(frozen=True)
class ModelSource:
    """A model, found.

    name: as the user called it. config: its shape, cut to the layers asked for. kind: "hf" (safetensors),
    "gguf" or "random". weights_path: a folder or file (None: random). tokenizer_path: a folder or a GGUF
    file (None: there is none). own_head: its config.json ties the head to the embedding, and the weights hold
    another one, which is what `config` and all the rest go by.
    """

    name: str
    config: ModelConfig
    kind: str
    weights_path: Path | None
    tokenizer_path: Path | None
    own_head: bool = False

    @cached_property
    def gguf_metadata(self) -> Mapping[str, object] | None:
        """Key-values of the GGUF file that holds the tokenizer; None where it lies in a folder."""
        if self.tokenizer_path is None or not is_gguf(self.tokenizer_path):
            return None
        return read_gguf_header(self.tokenizer_path, keep_arrays=True).metadata


def resolve(
    model: str | None,
    *,
    weights: str | None = None,
    random_weights: bool = False,
    layers: int | None = None,
) -> ModelSource:
    """Find a model and check the headers of its weights.

    model: see the module; None: `weights`, or the demo model. weights: a path that replaces the weights
    `model` would find. random_weights: take only the shape. layers: keep that many of its layers.
    Raises ModelNotFoundError where there is no such model or no weights, CheckpointError for damaged
    weights or ones of another shape, and ConfigError for settings that exclude each other and for paths
    that may not be entered.
    """
    try:
        return _resolve(model, weights, random_weights, layers)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be opened: {error.strerror}; give another path") from None


def _resolve(model: str | None, weights: str | None, random_weights: bool, layers: int | None) -> ModelSource:
    if weights is not None and random_weights:
        raise ConfigError("--weights and --random-weights exclude each other; give one of them")
    if model is None and weights is not None:
        source = _from_path(weights, env.user_path(weights, "--weights"))
    else:
        source = _named(model, weights, random_weights)
    if random_weights:
        source = replace(source, kind="random", weights_path=None)
    elif source.weights_path is not None:
        stored_tensors(source.weights_path)
        if source.config.tie_word_embeddings and has_own_head(source.weights_path):
            untied = replace(source.config, tie_word_embeddings=False)
            source = replace(source, config=untied, own_head=True)
    return source if layers is None else replace(source, config=_cut(source.config, layers))


def _named(model: str | None, weights: str | None, random_weights: bool) -> ModelSource:
    name = DEMO_MODEL if model is None else model
    entry = _entry(name)
    if entry is None:
        source = _from_path(name, _locate(name, shape_only=random_weights))
        return source if weights is None else _with_weights(source, env.user_path(weights, "--weights"))
    if weights is not None:
        return _with_weights(
            ModelSource(name, entry.config, "random", None, None), env.user_path(weights, "--weights")
        )
    for place in _places(entry):
        if place.exists():
            return _with_weights(ModelSource(name, entry.config, "random", None, None), place)
    if random_weights:
        return ModelSource(name, entry.config, "random", None, _demo_tokenizer(entry.config))
    raise ModelNotFoundError(_no_weights(entry, was_named=model is not None))


def _entry(name: str) -> registry.ModelEntry | None:
    try:
        return registry.find(name)
    except ModelConfigError as error:
        raise ConfigError(str(error)) from None


def _locate(model: str, *, shape_only: bool) -> Path:
    """The folder or file behind a path or a hub id. shape_only: of a hub id, weights are not wanted."""
    path = env.user_path(model, "--model")
    if path.exists():
        return path
    if _HUB_ID.fullmatch(model) and path.suffix not in (".gguf", ".safetensors"):
        return _cached_snapshot(model, shape_only) or _download(model, shape_only)
    if "/" in model or path.suffix in (".gguf", ".safetensors"):
        raise ModelNotFoundError(
            f"{path} does not exist; give a folder in Hugging Face layout or a GGUF file"
        )
    close = difflib.get_close_matches(model, registry.names(), n=1)
    hint = f"; did you mean {close[0]}" if close else ""
    raise ModelNotFoundError(
        f"model {model!r} is not known: no file or folder is there, it is no hub id (org/name), and the "
        f"names are {', '.join(registry.names())}{hint}"
    )


def _from_path(name: str, path: Path) -> ModelSource:
    """The source of a folder in Hugging Face layout, or of a GGUF file (also one alone in a folder)."""
    if not path.exists():
        raise ModelNotFoundError(
            f"{path} does not exist; give a folder in Hugging Face layout or a GGUF file"
        )
    found = _own_config(path)
    if found is None:
        raise ModelNotFoundError(
            f"{path} has no config.json and is no GGUF file, so the model's shape is unknown; name the model "
            f"with --model and pass this as --weights"
        )
    place, config = found
    return _found(ModelSource(name, config, "random", None, None), place)


def _own_config(path: Path) -> tuple[Path, ModelConfig] | None:
    """(where the weights are, the config that comes with them); None where none comes.

    A safetensors file has the config.json that lies beside it.
    """
    if path.is_dir() and not (path / "config.json").is_file():
        inside = sorted(path.glob("*.gguf"))
        if len(inside) != 1:
            return None
        path = inside[0]
    try:
        if is_gguf(path):
            return path, ModelConfig.from_hf(gguf_config(read_gguf_header(path)))
        beside = (path if path.is_dir() else path.parent) / "config.json"
        if beside.is_file():
            return path, ModelConfig.from_hf(_with_end_ids(beside))
    except ModelConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return None


def _with_end_ids(path: Path) -> dict[str, Any]:
    """config.json at `path`, with the end ids that generation_config.json beside it adds."""
    raw = read_json_object(path)
    beside = path.with_name("generation_config.json")
    more = read_json_object(beside).get("eos_token_id") if beside.is_file() else None
    ours, theirs = (
        [] if ids is None else ids if isinstance(ids, list) else [ids]
        for ids in (raw.get("eos_token_id"), more)
    )
    return {**raw, "eos_token_id": [*ours, *(token for token in theirs if token not in ours)]}


def _with_weights(source: ModelSource, path: Path) -> ModelSource:
    """`source` with the weights at `path`, whose own config, where there is one, must have its shape."""
    if not path.exists():
        raise ModelNotFoundError(
            f"--weights {path} does not exist; give a folder, a safetensors or a GGUF file"
        )
    found = _own_config(path)
    if found is None:
        return _found(source, path)
    place, config = found
    for field in _SHAPE:
        theirs, ours = getattr(config, field), getattr(source.config, field)
        if theirs != ours:
            raise CheckpointError(
                f"{place} is not of the shape of {source.name}: its {field} is {theirs}, not {ours}; give "
                f"weights that belong to {source.name}, or name their own model"
            )
    return _found(replace(source, config=config), place)


def _found(source: ModelSource, weights_path: Path) -> ModelSource:
    """`source` with these weights, and the tokenizer beside or inside them unless it has one."""
    if is_gguf(weights_path):
        kind, tokenizer_path = "gguf", weights_path
    else:
        kind, tokenizer_path = "hf", weights_path if weights_path.is_dir() else weights_path.parent
    return replace(
        source,
        kind=kind,
        weights_path=weights_path,
        tokenizer_path=source.tokenizer_path or tokenizer_path,
    )


def _cut(config: ModelConfig, layers: int) -> ModelConfig:
    if not 1 <= layers <= config.num_layers:
        raise ConfigError(f"--layers {layers} is not possible: this model has 1 to {config.num_layers}")
    return replace(config, num_layers=layers)


def _places(entry: registry.ModelEntry) -> Iterator[Path]:
    """Where weights of a named model may lie on this machine, the preferred place first."""
    root = env.get_path("TP_MODEL_PATH")
    if root is not None:
        yield root / entry.name
        yield root / f"{entry.name}.gguf"
    if entry.package_file is not None:
        packaged = _package_file(entry.package_file)
        if packaged is not None:
            yield packaged
    for hub_id in entry.hub:
        snapshot = _cached_snapshot(hub_id)
        if snapshot is not None:
            yield snapshot


def _package_file(file: str) -> Path | None:
    """A file that an installed package brings, found without importing the package."""
    package, _, inside = file.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / inside).is_file():
            return Path(folder) / inside
    return None


def _demo_tokenizer(config: ModelConfig) -> Path | None:
    """For made-up weights, whose text means nothing: the demo model's tokenizer, where its ids exist."""
    demo = _entry(DEMO_MODEL)
    assert demo is not None and demo.package_file is not None, "the demo model comes with a package"
    return _package_file(demo.package_file) if config.vocab_size >= demo.config.vocab_size else None


def _hub_cache() -> Path:
    home = env.get_path("HF_HOME")
    assert home is not None, "HF_HOME has a default"
    return env.get_path("HF_HUB_CACHE") or home / "hub"


def _cached_snapshot(hub_id: str, shape_only: bool = False) -> Path | None:
    """The newest complete snapshot of a hub id in the Hugging Face cache; None where there is none."""
    root = _hub_cache() / ("models--" + hub_id.replace("/", "--"))
    revisions = sorted((root / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    main = root / "refs" / "main"
    if main.is_file():
        revisions.insert(0, root / "snapshots" / main.read_text().strip())
    for snapshot in revisions:
        if (snapshot / "config.json").is_file() and (shape_only or _is_complete(snapshot)):
            return snapshot
    return None


def _is_complete(snapshot: Path) -> bool:
    """False where the download of the weights was interrupted."""
    try:
        return bool(stored_tensors(snapshot))
    except CheckpointError:
        return False


def _download(hub_id: str, shape_only: bool) -> Path:
    """Fetch a snapshot (resumable, with progress) through huggingface_hub."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelNotFoundError(
            f"{hub_id} is not in the Hugging Face cache ({_hub_cache()}) and fetching it needs "
            f"huggingface_hub; install it with: pip install 'tp-runtime[hub]'"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = [pattern for pattern in _HUB_FILES if not (shape_only and pattern == _HUB_WEIGHTS)]
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # noqa: BLE001  (its transports raise errors that share no base)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFoundError(
            f"{hub_id} is not in the Hugging Face cache ({_hub_cache()}) and the hub could not deliver it "
            f"({reason}); check the id, the network and your access, or give a folder with its files"
        ) from None


def _no_weights(entry: registry.ModelEntry, *, was_named: bool) -> str:
    root = env.get_path("TP_MODEL_PATH")
    looked = [str(root / entry.name) if root is not None else f"$TP_MODEL_PATH/{entry.name} (not set)"]
    if entry.package_file is not None:
        looked.append(f"the installed packages ({entry.package_file})")
    if entry.hub:
        looked.append(f"the Hugging Face cache {_hub_cache()} ({', '.join(entry.hub)})")
    ways = [f"`{entry.install}`"] if entry.install is not None else []
    if entry.hub and not ways:
        ways.append(f"`--model {entry.hub[0]}`, which downloads them")
    get = f"get them with {ways[0]}, or " if ways else ""
    asked = "" if was_named else " (the demo model, as no --model was given)"
    return (
        f"{entry.name}{asked}: no weights found; looked in {', '.join(looked)}; {get}use --weights PATH or "
        f"--random-weights"
    )
