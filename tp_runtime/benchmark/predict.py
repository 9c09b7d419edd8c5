"""The analytic model of decoding one token at batch 1, which measured points are laid over. No torch.

    step = bytes of the fullest rank / (its bandwidth x kernel_share)
         + (2 layers + 1) x collective(N ranks, hidden_size fp32 values)
         + overhead

A rank's bandwidth is what its own nodes deliver to plain reading loops. A two-shot all-reduce among N ranks
waits twice for N - 1 flags and moves 2 (N - 1) / N of the message past the slowest link:

    collective(N) = 2 (N - 1) flag_us + 2 (N - 1) / N x bytes / copy_gb_s

kernel_share (what the kernels reach of the plain loops, over a whole step) and overhead (launches, norms,
sampling, Python) are fitted to the points of the smallest number of ranks that were measured; the points of
more ranks are predictions. Left out: the cache (short contexts), prefill, power and thermal limits, and what
other processes read. For hosts in configs/hosts the flag and copy figures are assumptions, written there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..engine.memory import DTYPE_BYTES, formats, sharding_plan
from ..errors import ConfigError
from ..models.config import ModelConfig

FOLDER = Path(__file__).parent.parent / "configs" / "hosts"
KERNEL_SHARE, OVERHEAD_US = 0.9, 400.0  # where nothing was measured; both of the 2-core host's order
_FP32_BYTES = 4


@dataclass(frozen=True)
class Host:
    """A host as the model sees it.

    nodes: memory nodes, alike. peak_gb_s_per_node: channels x rate. read_share: of the peak, by plain loops.
    spread_share: of several nodes' bandwidth, what one rank over all of them gets, its pages interleaved.
    ranks: numbers of ranks worth a prediction. flag_us, copy_gb_s: see the module.
    """

    name: str
    nodes: int
    peak_gb_s_per_node: float
    read_share: float
    spread_share: float
    flag_us: float
    copy_gb_s: float
    ranks: tuple[int, ...] = (1,)

    def bandwidth_gb_s(self, num_ranks: int) -> float:
        """What one of `num_ranks` ranks reads: its nodes', or its part of one that several share.

        A number of ranks that does not divide the nodes leaves some idle.
        """
        per_node = self.peak_gb_s_per_node * self.read_share
        if num_ranks > self.nodes:
            return per_node * self.nodes / num_ranks
        own_nodes = self.nodes // num_ranks
        return per_node * own_nodes * (self.spread_share if own_nodes > 1 else 1.0)

    def collective_us(self, num_ranks: int, num_bytes: int) -> float:
        """One all-reduce of `num_bytes` among `num_ranks` ranks."""
        others = num_ranks - 1
        return 2 * others * self.flag_us + 2 * others / num_ranks * num_bytes / self.copy_gb_s / 1e3


@dataclass(frozen=True)
class Fit:
    """What of a step the hardware does not explain. fitted_at: ranks of its points; None: assumed."""

    kernel_share: float = KERNEL_SHARE
    overhead_us: float = OVERHEAD_US
    fitted_at: int | None = None


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one step by where they go, and tokens a second."""

    num_ranks: int
    rank_bytes: int
    weights_ms: float
    collectives_ms: float
    overhead_ms: float

    @property
    def tok_s(self) -> float:
        """Tokens a second at batch 1."""
        return 1e3 / (self.weights_ms + self.collectives_ms + self.overhead_ms)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "tok_s": self.tok_s}


def find_host(name: str) -> Host:
    """The host of a TOML file, or of a name in configs/hosts. Raises ConfigError."""
    path = Path(name).expanduser()
    if not path.is_file():
        path = FOLDER / f"{name.removesuffix('.toml')}.toml"
    known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--predict {name} is no file, and the hosts with a name are {known}") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--predict {name} cannot be read: {error}") from None
    wanted = {f.name for f in fields(Host)}
    if set(values) != wanted:
        raise ConfigError(
            f"--predict {name} lacks {sorted(wanted - set(values))} and has unknown "
            f"{sorted(set(values) - wanted)}; a host has {', '.join(sorted(wanted))}"
        )
    return _checked(name, values)


def _checked(name: str, values: dict[str, Any]) -> Host:
    ranks = values["ranks"]
    numbers = [value for key, value in values.items() if key not in ("name", "ranks")]
    whole = isinstance(ranks, list) and all(type(count) is int and count > 0 for count in ranks) and ranks
    if not whole or not all(type(value) in (int, float) and value > 0 for value in numbers):
        raise ConfigError(
            f"--predict {name}: every figure is a number above 0, and ranks a list of whole ones"
        )
    return Host(**{**values, "ranks": tuple(ranks)})


def rank_bytes(model: ModelConfig, engine: EngineConfig, num_ranks: int) -> int:
    """Matmul weights and scales that the fullest of `num_ranks` ranks reads for one token."""
    plan, format_of = sharding_plan(model, num_ranks), formats(engine)
    plain = DTYPE_BYTES[engine.dtype or "bf16"]
    read = [
        weight
        for weight in plan.weights
        if len(weight.shape) == 2
        and (model.tie_word_embeddings or not weight.name.endswith("embed_tokens.weight"))
    ]
    return max(
        sum(weight.weight_bytes(rank, plain, format_of(weight.name)) for weight in read)
        for rank in range(num_ranks)
    )


def predict(host: Host, model: ModelConfig, engine: EngineConfig, num_ranks: int, fit: Fit) -> Prediction:
    """One token over `num_ranks` ranks of `host`. engine: format and dtype of the weights."""
    read = rank_bytes(model, engine, num_ranks)
    count = 2 * model.num_layers + 1 if num_ranks > 1 else 0
    collective_us = host.collective_us(num_ranks, model.hidden_size * _FP32_BYTES)
    return Prediction(
        num_ranks,
        read,
        weights_ms=read / (host.bandwidth_gb_s(num_ranks) * fit.kernel_share) / 1e6,
        collectives_ms=count * collective_us / 1e3,
        overhead_ms=fit.overhead_us / 1e3,
    )


def fit_overhead(points: Sequence[tuple[float, float]], fitted_at: int) -> Fit:
    """kernel_share and overhead from (ms the weights would take at full bandwidth, measured ms) of steps.

    Least squares through two or more formats; one format alone cannot tell the two apart, and so leaves
    overhead assumed. Neither is let beyond what is possible: a share of at most 1, no negative overhead.
    """
    assert points, "nothing to fit to"
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread > 0:
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
        overhead_us = 1e3 * (mean_y - slope * mean_x)
        if slope >= 1 and overhead_us >= 0:
            return Fit(1 / slope, overhead_us, fitted_at)
        if slope < 1:
            return Fit(1.0, max(0.0, 1e3 * (mean_y - mean_x)), fitted_at)
        return Fit(min(1.0, mean_x / mean_y), 0.0, fitted_at)
    left = mean_y - OVERHEAD_US / 1e3
    return Fit(min(1.0, mean_x / left) if left > 0 else 1.0, OVERHEAD_US, fitted_at)
