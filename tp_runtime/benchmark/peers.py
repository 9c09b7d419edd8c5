"""peers: the same shape in llama.cpp (llama-cpp-python) and in transformers, interleaved with ours.

Every round runs each row once, each in a process of its own on the same threads; a row's figure is the
median over rounds. A peer that is not installed, or that fails, is named and left out. Formats differ in
their scales, so each row shows the bits a weight takes on its side, and its own MBU by its own bytes and
its own reading of the ceiling. Weights are random unless --gguf gives both sides one file, whose tensors
then say what a token reads. Beside a peer's row stands our speed in the same bits over it; beside ours, its
speed over eager bf16 and the target of that, 0.80 x the ratio of bytes / eager's own MBU.
No torch here.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.inventory import stored_tensors
from ..config import EngineConfig
from ..engine.memory import formats
from ..engine.source import ModelSource, resolve
from ..errors import ConfigError
from ..models.config import ModelConfig
from .definitions import bits_of, bits_per_weight, is_cache_resident, linears, mbu
from .launching import Progress, RunFailed, run_program, run_ranks
from .options import Options, check_engine, engine_words, quants

GGUF_OF = {"none": "BF16", "int8": "Q8_0", "int8-g32": "Q8_0", "int4": "Q4_0", "int4-g32": "Q4_0"}
GGUF_BITS = {"BF16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0}
_PACKAGES = {"llama.cpp": "llama_cpp", "transformers": "transformers"}
EAGER = "eager bf16"
_EAGER_SHARE = 0.80  # of the ratio of bytes over eager's own MBU: what is asked of us
_HEAD_OF = {
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q4_0": "Q8_0",
    "Q4_1": "Q8_0",
}  # as our int4 keeps its head in int8


@dataclass(frozen=True)
class Row:
    """One runtime in one format. against: our format it stands beside. path: a peer's GGUF file."""

    runtime: str
    format: str
    against: str
    bits: float
    weight_bytes: int | None = None
    path: str | None = None


def missing() -> tuple[str, ...]:
    """Peers that are not installed."""
    return tuple(name for name, module in _PACKAGES.items() if importlib.util.find_spec(module) is None)


def weight_bytes(config: ModelConfig, body_bits: float, head_bits: float) -> int:
    """Bytes that a token's linears take, the head at its own bits."""
    shapes = list(linears(config))
    body = sum(n * k for name, n, k in shapes if name != "head") * config.num_layers
    return int(body * body_bits / 8 + config.vocab_size * config.hidden_size * head_bits / 8)


def stored_row(path: Path, quant: str) -> Row:
    """llama.cpp's row of a GGUF file, by what it stores: bits of the layers' linears, bytes of a token."""
    linears = {name: t for name, t in stored_tensors(path).items() if len(t.shape) == 2}
    body = [t for name, t in linears.items() if name.startswith("model.layers.")]
    looked_up = "model.embed_tokens.weight" if "lm_head.weight" in linears else None
    kinds = Counter(t.type_name for t in body)
    values = sum(t.shape[0] * t.shape[1] for t in body)
    return Row(
        "llama.cpp",
        "+".join(kind for kind, _ in kinds.most_common()),
        quant,
        8 * sum(t.nbytes for t in body) / values,
        sum(t.nbytes for name, t in linears.items() if name != looked_up),
        str(path),
    )


def stored_bits(engine: EngineConfig, path: Path) -> float:
    """Bits of a weight of the layers as we hold the file: 4-bit formats keep the offsets it has."""
    stored = stored_tensors(path)
    format_of = formats(engine, stored)
    body = [name for name, t in stored.items() if len(t.shape) == 2 and name.startswith("model.layers.")]
    sizes = [stored[name].shape[0] * stored[name].shape[1] for name in body]
    bits = sum(bits_of(format_of(name)) * size for name, size in zip(body, sizes, strict=True))
    return bits / sum(sizes)


def run(options: Options) -> dict[str, Any]:
    """Measure; the document. Raises TPError, RunFailed."""
    args, engine = options.args, options.engine
    assert engine is not None, "peers have a model"
    if args.gguf is not None:
        if engine.layers is not None:
            raise ConfigError("--layers cannot cut the file of --gguf for llama.cpp; leave one of them out")
        engine = engine.with_changes(model=args.gguf, random_weights=False)
    if args.nproc not in (None, (1,)):
        raise ConfigError("peers run in one process each; use --nproc 1 (the default)")
    check_engine(Options("decode", args, engine), 1)
    source = resolve(
        engine.model, weights=engine.weights, random_weights=engine.random_weights, layers=engine.layers
    )
    absent = missing()
    for name in absent:
        sys.stdout.write(f"{name} is not installed ({_PACKAGES[name]}) and is left out\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_rows(options, engine, source, absent, Path(folder)))
        found, failed = _turns(rows, args.repeat, lambda row: _run_row(row, options, engine, source))
    results = beside_eager([_result(row, runs) for row, runs in found.items()])
    sys.stdout.write(table(results))
    card = next(runs[-1]["card"] for row, runs in found.items() if row.runtime == "tp_runtime")
    return {
        "model": source.name,
        "missing": list(absent),
        "failed": [{"runtime": row.runtime, "format": row.format, "why": why} for row, why in failed.items()],
        "peers": results,
        "card": card,
    }


def _turns(
    rows: Sequence[Row], repeat: int, measure: Callable[[Row], dict[str, Any]]
) -> tuple[dict[Row, list[dict[str, Any]]], dict[Row, str]]:
    """Documents of each row, which take turns, and why a peer has none. Raises what our own rows raise."""
    found: dict[Row, list[dict[str, Any]]] = {}
    failed: dict[Row, str] = {}
    progress = Progress(len(rows) * repeat)
    for row in (row for _ in range(repeat) for row in rows):
        if row in failed:
            continue
        try:
            one = measure(row)
        except RunFailed as error:
            if row.runtime == "tp_runtime":
                raise
            failed[row] = str(error)
            found.pop(row, None)
            sys.stdout.write(f"{row.runtime} {row.format} is left out: {error} {progress.step()}\n")
        else:
            found.setdefault(row, []).append(one)
            sys.stdout.write(f"{row.runtime} {row.format} {one['tok_s']:.2f} tokens/s {progress.step()}\n")
        sys.stdout.flush()
    return found, failed


def _rows(
    options: Options, engine: EngineConfig, source: ModelSource, absent: tuple[str, ...], folder: Path
) -> Iterator[Row]:
    """Ours and the peers', in the order they take turns."""
    config, gguf = source.config, options.args.gguf
    for quant in quants(options):
        bits = bits_per_weight(quant)
        if gguf is not None and quant != "none":
            bits = stored_bits(engine.with_changes(quant=quant), Path(gguf))
        yield Row("tp_runtime", quant, quant, bits)
        kind = GGUF_OF.get(quant)
        if "llama.cpp" in absent or kind is None:
            continue
        if gguf is not None:
            yield stored_row(Path(gguf), quant)
            continue
        path = folder / f"{kind}.gguf"
        if not path.exists():
            write_random_gguf(path, config, kind)
        read = weight_bytes(config, GGUF_BITS[kind], GGUF_BITS[_HEAD_OF[kind]])
        yield Row("llama.cpp", kind, quant, GGUF_BITS[kind], read, str(path))
    if "transformers" not in absent:
        yield Row("transformers", EAGER, "none", 16.0, weight_bytes(config, 16, 16))


def _run_row(row: Row, options: Options, engine: EngineConfig, source: ModelSource) -> dict[str, Any]:
    args = options.args
    if row.runtime == "tp_runtime":
        words = ["decode", *engine_words(engine.with_changes(quant=row.format), args)]
        return run_ranks(words, 1, numa=not args.no_numa, timeout_s=args.timeout, quiet=True)
    spec = {
        "runtime": row.runtime,
        "path": row.path,
        "config": asdict(source.config),
        "threads": engine.threads,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repeat": args.repeat,
        "ceiling_bytes": args.bytes,
    }
    command = [sys.executable, "-m", "tp_runtime.benchmark.peer_child", json.dumps(spec)]
    return run_program(command, timeout_s=args.timeout, quiet=True)


def _result(row: Row, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row over its rounds."""
    speeds = [run["tok_s"] for run in runs]
    read = row.weight_bytes or runs[0].get("weight_bytes_per_token")
    ceiling = max(run["read_ceiling_gb_s"] for run in runs)
    share = None
    if read is not None and not is_cache_resident(read):
        share = mbu(read, statistics.median(speeds), 1, ceiling)
    return {
        "runtime": row.runtime,
        "format": row.format,
        "against": row.against,
        "bits_per_weight": round(row.bits, 3),
        "threads": runs[0]["threads"],
        "weight_bytes_per_token": read,
        "tok_s": statistics.median(speeds),
        "tok_s_all": speeds,
        "prefill_tok_s": statistics.median(run["prefill_tok_s"] for run in runs),
        "read_ceiling_gb_s": ceiling,
        "mbu": share,
    }


def beside_eager(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our rows with their speed over eager bf16's and the target of it; null without eager, or its MBU."""
    eager = next((row for row in results if row["format"] == EAGER), None)
    rows = []
    for row in results:
        over = bound = None
        if row["runtime"] == "tp_runtime" and eager is not None:
            over = row["tok_s"] / eager["tok_s"]
            if eager["mbu"] is not None:
                fewer = eager["weight_bytes_per_token"] / row["weight_bytes_per_token"]
                bound = _EAGER_SHARE * fewer / eager["mbu"]
        rows.append(row | {"over_eager": over, "over_eager_bound": bound})
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """All rows for people: a peer's with our speed over its own, ours with its speed over eager bf16."""
    ours = {row["format"]: row["tok_s"] for row in results if row["runtime"] == "tp_runtime"}
    lines = [
        "| runtime | format | bits a weight | MB a token | threads | tokens/s | MBU | prefill tokens/s | "
        "ours over it | over eager (0.80 x bytes / its MBU) |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in results:
        mine = None if row["runtime"] == "tp_runtime" else ours.get(row["against"])
        over = None if mine is None else mine / row["tok_s"]
        eager = _figure(row["over_eager"])
        if row["over_eager_bound"] is not None:
            eager += f" ({row['over_eager_bound']:.2f})"
        lines.append(
            f"| {row['runtime']} | {row['format']} | {row['bits_per_weight']:g} | "
            f"{row['weight_bytes_per_token'] / 1e6:.1f} | {row['threads']} | {row['tok_s']:.2f} | "
            f"{_figure(row['mbu'], 3)} | {row['prefill_tok_s']:.0f} | {_figure(over)} | {eager} |"
        )
    return "\n".join(lines) + "\n"


def _figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write_random_gguf(path: Path, config: ModelConfig, kind: str) -> None:
    """A llama GGUF of random weights: linears as `kind`, embedding and head as in _HEAD_OF."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    _add_vocabulary(writer, config.vocab_size)

    def matrix(name: str, n: int, k: int, type_name: str) -> None:
        data = _random_blocks(rng, n, k, type_name)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_name])

    ones = np.ones(config.hidden_size, dtype=np.float32)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    matrix("token_embd.weight", config.vocab_size, hidden, _HEAD_OF[kind])
    if not config.tie_word_embeddings:
        matrix("output.weight", config.vocab_size, hidden, _HEAD_OF[kind])
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(config.num_layers):
        at = f"blk.{layer}."
        for name, n, k in (
            ("attn_q", queries, hidden), ("attn_k", keys, hidden), ("attn_v", keys, hidden),
            ("attn_output", hidden, queries), ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):  # fmt: skip
            matrix(f"{at}{name}.weight", n, k, kind)
        writer.add_tensor(f"{at}attn_norm.weight", ones)
        writer.add_tensor(f"{at}ffn_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, vocab_size: int) -> None:
    """Made-up pieces with the bytes a SentencePiece vocabulary must have; only ids are ever used."""
    import gguf

    fixed = ["<unk>", "<s>", "</s>"]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    pieces = fixed + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds += [gguf.TokenType.BYTE] * 256
    pieces = (pieces + [f"piece{index}" for index in range(vocab_size)])[:vocab_size]
    kinds = (kinds + [gguf.TokenType.NORMAL] * vocab_size)[:vocab_size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types(kinds)


def _random_blocks(rng: Any, n: int, k: int, type_name: str) -> Any:
    """Stored bytes, uint8 [n, bytes a row]; blocks of 32 begin with an fp16 scale."""
    import numpy as np

    if type_name == "BF16":
        values = (rng.standard_normal((n, k), dtype=np.float32) * 0.02).view(np.uint32) >> 16
        return values.astype(np.uint16).view(np.uint8).reshape(n, -1)
    block_bytes = int(GGUF_BITS[type_name] * 32 / 8)
    blocks = rng.integers(0, 256, (n, k // 32, block_bytes), dtype=np.uint8)
    scale = np.float16(0.02 / (127 if type_name == "Q8_0" else 8))
    blocks[..., :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return blocks.reshape(n, -1)
