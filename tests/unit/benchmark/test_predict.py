"""The analytic model: by hand, in its limits, its fit, and every host that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from tp_runtime.benchmark import predict as predicting
from tp_runtime.benchmark.predict import Fit, Host, find_host, fit_overhead, predict, rank_bytes
from tp_runtime.config import EngineConfig
from tp_runtime.engine.figures import weight_bytes_per_token
from tp_runtime.engine.memory import formats, sharding_plan
from tp_runtime.errors import ConfigError
from tp_runtime.models.config import ModelConfig
from tp_runtime.models.registry import find

HOST = Host("h", 2, 100.0, 0.8, 0.5, flag_us=1.0, copy_gb_s=10.0, ranks=(1, 2))
SHIPPED = sorted(path.stem for path in predicting.FOLDER.glob("*.toml"))


def model(name: str) -> ModelConfig:
    entry = find(name)
    assert entry is not None
    return entry.config


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_one_rank_reads_the_bytes_of_a_token(quant: str) -> None:
    """The model's bytes at one rank are the definition's; over four ranks the fullest has at least a quarter."""
    config, engine = model("llama-1b"), EngineConfig(model="llama-1b", quant=quant)
    whole = weight_bytes_per_token(sharding_plan(config, 1), True, formats(engine), 2)
    assert rank_bytes(config, engine, 1) == whole
    assert whole / 4 <= rank_bytes(config, engine, 4) < whole / 3.8


def test_bandwidth_follows_the_nodes() -> None:
    assert HOST.bandwidth_gb_s(2) == pytest.approx(80)
    assert HOST.bandwidth_gb_s(1) == pytest.approx(80 * 2 * 0.5)  # over two nodes, interleaved
    assert HOST.bandwidth_gb_s(4) == pytest.approx(40)  # two ranks share a node


def test_a_step_by_hand() -> None:
    config, engine = model("llama-1b"), EngineConfig(model="llama-1b", quant="int8")
    found = predict(HOST, config, engine, 2, Fit(0.8, 500.0))
    assert found.weights_ms == pytest.approx(rank_bytes(config, engine, 2) / (80e9 * 0.8) * 1e3)
    one_us = 2 * 1 * 1.0 + 2 * 1 / 2 * 2048 * 4 / 10e9 * 1e6
    assert found.collectives_ms == pytest.approx((2 * 16 + 1) * one_us / 1e3)
    assert found.tok_s == pytest.approx(1e3 / (found.weights_ms + found.collectives_ms + 0.5))


def test_one_rank_has_no_collectives() -> None:
    found = predict(HOST, model("llama-1b"), EngineConfig(model="llama-1b"), 1, Fit())
    assert found.collectives_ms == 0


def test_fit_recovers_share_and_overhead() -> None:
    """Points made with a share of 0.8 and 0.5 ms are fitted by these."""
    fit = fit_overhead([(ms, ms / 0.8 + 0.5) for ms in (20.0, 40.0, 80.0)], 1)
    assert fit.kernel_share == pytest.approx(0.8)
    assert fit.overhead_us == pytest.approx(500)


@pytest.mark.parametrize(
    "points", [[(10.0, 9.0)], [(10.0, 12.0), (20.0, 21.0)], [(10.0, 9.0), (20.0, 25.0)], [(10.0, 0.1)]]
)
def test_fit_stays_possible(points: list[tuple[float, float]]) -> None:
    """Noise fits no share above 1 and no negative overhead."""
    fit = fit_overhead(points, 1)
    assert 0 < fit.kernel_share <= 1
    assert fit.overhead_us >= 0


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_hosts(name: str) -> None:
    """Every one parses, holds int4 and int8 of llama-70b at all its ranks, and orders them by bytes."""
    host, config = find_host(name), model("llama-70b")
    for ranks in host.ranks:
        int8, int4 = (
            predict(host, config, EngineConfig(model="llama-70b", quant=quant), ranks, Fit()).tok_s
            for quant in ("int8", "int4")
        )
        assert 0 < int8 < int4, f"{ranks} ranks: {int8:.1f} and {int4:.1f} tokens/s"


def test_hosts_of_the_issue_ship() -> None:
    assert set(SHIPPED) == {"2x8480", "2x6980p-snc3", "8x8490h"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("nodes = 2", "nodes = 0"), "above 0"),
        (lambda text: text.replace("nodes = 2\n", ""), "lacks ['nodes']"),
        (lambda text: text + "watts = 3\n", "unknown ['watts']"),
        (lambda text: text.replace("ranks = [1, 2]", "ranks = [0]"), "above 0"),
        (lambda text: text + "nodes =", "cannot be read"),
    ],
)
def test_bad_host(change: object, says: str, tmp_path: Path) -> None:
    good = (predicting.FOLDER / "2x8480.toml").read_text()
    path = tmp_path / "host.toml"
    path.write_text(change(good))  # type: ignore[operator]
    with pytest.raises(ConfigError) as error:
        find_host(str(path))
    assert says in str(error.value)


def test_unknown_host() -> None:
    with pytest.raises(ConfigError, match="2x8480"):
        find_host("nowhere")
