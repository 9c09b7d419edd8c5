"""Small tokenizers of the common kinds, trained here and written in Hugging Face's layout."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from tp_testing.awkward_text import PROSE

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def _byte_level(pre_tokenizer, normalizer=None, control=CONTROL) -> FastTokenizer:
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE * 4, trainer)
    return tokenizer


def _split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _with_bos(tokenizer: FastTokenizer) -> FastTokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def gpt2() -> FastTokenizer:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3() -> FastTokenizer:
    return _with_bos(_byte_level(_split(LLAMA3)))


def qwen2() -> FastTokenizer:
    tokenizer = _byte_level(_split(QWEN2), normalizers.NFC())
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer


def _sentencepiece_bpe() -> FastTokenizer:
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = FastTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=CONTROL + alphabet, show_progress=False)
    tokenizer.train_from_iterator(sum((text.split(" ") for text in PROSE), []) * 4, trainer)
    state = json.loads(tokenizer.to_str())  # byte tokens are words of the vocabulary, not special ones
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in CONTROL]
    tokenizer = FastTokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return _with_bos(tokenizer)


def llama2_legacy() -> FastTokenizer:
    return _sentencepiece_bpe()


def llama2_first() -> FastTokenizer:
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def unigram() -> FastTokenizer:
    tokenizer = FastTokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=CONTROL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(PROSE * 4, trainer)
    return tokenizer


def starred_flags() -> FastTokenizer:
    """Control tokens that take white space along, or count between words only."""
    tokenizer = gpt2()
    tokenizer.add_special_tokens(
        [
            AddedToken("<|user|>", rstrip=True, normalized=False),
            AddedToken("<mask>", lstrip=True, normalized=False),
            AddedToken("STOP", single_word=True, normalized=False),
        ]
    )
    return tokenizer


KINDS: dict[str, Callable[[], FastTokenizer]] = {
    maker.__name__: maker
    for maker in (gpt2, llama3, qwen2, llama2_legacy, llama2_first, unigram, starred_flags)
}


def write_directory(directory: Path, tokenizer: FastTokenizer, **config: object) -> Path:
    """`directory` with tokenizer.json and tokenizer_config.json in it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def train_sentencepiece(model_type: str = "bpe", **options: object) -> bytes:
    """A SentencePiece model with Llama's settings, serialised."""
    model = io.BytesIO()
    settings: dict[str, object] = {
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE * 20), model_writer=model, model_type=model_type, **settings
    )
    return model.getvalue()


def write_gguf(path: Path, metadata: dict[str, object]) -> Path:
    """A GGUF file with these key-values and no tensors; lists of numbers and texts become arrays."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            assert isinstance(value, list), f"{key} is a {type(value).__name__}"
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_metadata(tokenizer: FastTokenizer, pre: str | None, **more: object) -> dict[str, object]:
    """The key-values of a byte-level BPE vocabulary; added tokens are control or user-defined ones."""
    state = json.loads(tokenizer.to_str())
    vocab = {**state["model"]["vocab"], **{t["content"]: t["id"] for t in state["added_tokens"]}}
    kinds = dict.fromkeys(vocab.values(), 1)
    kinds.update({t["id"]: 3 if t["special"] else 4 for t in state["added_tokens"]})
    return {
        "tokenizer.ggml.model": "gpt2",
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.token_type": [kinds[i] for i in range(len(vocab))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def sentencepiece_metadata(model: bytes, **more: object) -> dict[str, object]:
    """The key-values of a SentencePiece vocabulary."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())

    def kind(token_id: int) -> int:
        if processor.is_unknown(token_id):
            return 2
        if processor.is_control(token_id):
            return 3
        return 6 if processor.is_byte(token_id) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }
