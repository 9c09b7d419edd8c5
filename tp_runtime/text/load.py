"""Finding and reading a model's tokenizer: a directory in Hugging Face layout, or a GGUF file.

In a directory, tokenizer.json (read by `tokenizers`) goes before tokenizer.model (read by
`sentencepiece`). Beside it: tokenizer_config.json, special_tokens_map.json, added_tokens.json,
chat_template.jinja or .json, and the end-of-text ids of generation_config.json and config.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import TokenizerError
from .tokenizer import ControlToken, Conventions, Tokenizer


def load_tokenizer(path: Path | str, gguf_metadata: Mapping[str, object] | None = None) -> Tokenizer:
    """The tokenizer of the model at `path`.

    path: a directory in Hugging Face layout, or a GGUF file. gguf_metadata: the file's key-values (int,
    float, bool, str and lists of them), where the caller has read them already; the engine always has.
    Without them the `gguf` package reads the file, which takes seconds and trusts the file's counts.
    Raises TokenizerError where there is none or it cannot be used.
    """
    path = Path(path)
    if gguf_metadata is None and path.is_dir():
        return _from_directory(path)
    if gguf_metadata is None and not path.is_file():
        raise TokenizerError(f"no tokenizer at {path}: there is no such file or directory")
    from .gguf_vocab import tokenizer_from_gguf

    return tokenizer_from_gguf(gguf_metadata or _gguf_metadata(path), str(path))


def _gguf_metadata(path: Path) -> dict[str, object]:
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
        return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    except (OSError, ValueError, LookupError) as error:
        raise TokenizerError(f"{path} is no readable GGUF file: {_one_line(error)}") from None


def _from_directory(directory: Path) -> Tokenizer:
    files = _Files.read(directory)
    try:
        if (directory / "tokenizer.json").is_file():
            return _from_tokenizer_json(files)
        if (directory / "tokenizer.model").is_file():
            return _from_sentencepiece(files)
    except (TokenizerError, MemoryError):
        raise
    except Exception as error:  # what tokenizers and sentencepiece raise has no type of its own
        name = "tokenizer.json" if (directory / "tokenizer.json").is_file() else "tokenizer.model"
        raise TokenizerError(
            f"{directory / name} cannot be used: {_one_line(error)}; give a readable file of a known kind"
        ) from error
    raise TokenizerError(
        f"no tokenizer in {directory}: neither tokenizer.json nor tokenizer.model is there; copy one of them"
        " from where the weights come from"
    )


@dataclass(frozen=True)
class _Files:
    """The small files beside a tokenizer. named: {"bos_token": "<s>", ...}, from two of them."""

    directory: Path
    config: Mapping[str, object]
    named: Mapping[str, str]
    end_ids: frozenset[int]
    chat_template: str | None

    @classmethod
    def read(cls, directory: Path) -> _Files:
        config = _read_json(directory / "tokenizer_config.json")
        named = _named_tokens({**_read_json(directory / "special_tokens_map.json"), **config})
        jsons = ("generation_config.json", "config.json")
        end_ids = [_read_json(directory / name).get("eos_token_id") for name in jsons]
        return cls(directory, config, named, frozenset(_ints(end_ids)), _chat_template(directory, config))

    def added_tokens(self) -> dict[int, dict]:
        """Tokens beside the model's own vocabulary: id -> {"content", "special", "lstrip", ...}."""
        listed = _read_json(self.directory / "added_tokens.json")
        found = {
            token_id: {"content": text} for text, token_id in listed.items() if isinstance(token_id, int)
        }
        decoder = self.config.get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            found.update({int(token_id): token for token_id, token in decoder.items()})
        return found

    def is_written_by_template(self, text: str) -> bool:
        return bool(text.strip()) and text in (self.chat_template or "")

    def around(self, bos_id: int | None, eos_id: int | None) -> tuple[tuple, tuple]:
        """What encode puts before and after a text, by add_bos_token (default: yes) and add_eos_token."""
        add_bos = self.config.get("add_bos_token", True) and bos_id is not None
        add_eos = self.config.get("add_eos_token", False) and eos_id is not None
        return ((bos_id,) if add_bos else ()), ((eos_id,) if add_eos else ())

    def conventions(self, bos_id: int | None, eos_id: int | None, around: tuple[tuple, tuple]) -> Conventions:
        return Conventions(
            bos_id=bos_id,
            eos_ids=self.end_ids | ({eos_id} if eos_id is not None else set()),
            prefix_ids=around[0],
            suffix_ids=around[1],
            chat_template=self.chat_template,
            named=self.named,
        )


def _from_tokenizer_json(files: _Files) -> Tokenizer:
    import tokenizers

    from .backends import TokenizersBackend

    raw = tokenizers.Tokenizer.from_file(str(files.directory / "tokenizer.json"))
    added = dict(raw.get_added_tokens_decoder())
    for text in files.named.values():
        token_id = raw.token_to_id(text)
        if token_id is not None and not (token_id in added and added[token_id].special):
            added[token_id] = tokenizers.AddedToken(text, normalized=False, special=True)
    controls = {i: t for i, t in added.items() if t.special or files.is_written_by_template(t.content)}
    control_tokens = [
        ControlToken(t.content, i, t.special, t.lstrip, t.rstrip, t.single_word) for i, t in controls.items()
    ]
    bos_id, eos_id = (raw.token_to_id(files.named.get(name, "")) for name in ("bos_token", "eos_token"))
    backend = TokenizersBackend(raw, list(controls.values()))
    return Tokenizer(backend, control_tokens, files.conventions(bos_id, eos_id, _post_processor_ids(raw)))


def _post_processor_ids(raw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that tokenizer.json's post-processor puts before and after a text. It alone
    decides: add_bos_token in tokenizer_config.json is for the files that have no post-processor."""
    encoding = raw.encode("a", add_special_tokens=True)
    marks = encoding.special_tokens_mask
    before = marks.index(0) if 0 in marks else len(marks)
    after = len(marks) - marks[::-1].index(0) if 0 in marks else len(marks)
    return tuple(encoding.ids[:before]), tuple(encoding.ids[after:])


def _from_sentencepiece(files: _Files) -> Tokenizer:
    from .backends import SentencePieceBackend

    model = (files.directory / "tokenizer.model").read_bytes()
    added = files.added_tokens()
    special_texts = set(files.named.values())
    hidden = {i for i, token in added.items() if token.get("special") or token["content"] in special_texts}
    written = {i for i, token in added.items() if files.is_written_by_template(token["content"])}
    plain = {token["content"]: i for i, token in added.items() if i not in hidden | written}
    legacy = bool(files.config.get("legacy", True))
    backend = SentencePieceBackend(model, plain, prefix_after_control=legacy)
    processor = backend.processor
    controls = {
        i: ControlToken(processor.id_to_piece(i), i)
        for i in range(processor.vocab_size())
        if processor.is_control(i) or processor.is_unknown(i)
    }
    for i in hidden | written:
        flags = {name: bool(added[i].get(name)) for name in ("lstrip", "rstrip", "single_word")}
        controls[i] = ControlToken(added[i]["content"], i, i in hidden, **flags)
    ids = {name: getattr(processor, f"{name[:3]}_id")() for name in ("bos_token", "eos_token", "unk_token")}
    own_names = {name: processor.id_to_piece(i) for name, i in ids.items() if i >= 0}
    files = dataclasses.replace(files, named={**own_names, **files.named})
    by_text = {token.text: token.id for token in controls.values()}
    bos_id, eos_id = (by_text.get(files.named.get(name, "")) for name in ("bos_token", "eos_token"))
    around = files.around(bos_id, eos_id)
    return Tokenizer(backend, list(controls.values()), files.conventions(bos_id, eos_id, around))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_json(path: Path) -> dict:
    """The dictionary in a JSON file; {} where there is no file. Raises TokenizerError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is no readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, where a dictionary was expected")
    return value


def _named_tokens(entries: Mapping[str, object]) -> dict[str, str]:
    """All `..._token` entries that are a text, or a dictionary with one under "content"."""
    named = {}
    for name, value in entries.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            named[name] = text
    return named


def _ints(values: Iterable[object]) -> Iterable[int]:
    """The integers among `values` and the lists in it."""
    for value in values:
        if isinstance(value, int):
            yield value
        elif isinstance(value, list):
            yield from _ints(value)


def _chat_template(directory: Path, config: Mapping[str, object]) -> str | None:
    """The template of chat_template.jinja, chat_template.json or tokenizer_config.json, in that order."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{jinja} cannot be read: {error}") from None
    found = _read_json(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None
