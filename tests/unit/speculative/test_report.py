"""The figures of a run against sums done by hand, and what they say where there is nothing to say."""

from __future__ import annotations

import pytest

from tp_runtime.engine.speculative.report import Pass, SpeculationReport, speculation_words


def made() -> SpeculationReport:
    """Two plain passes of 10 ms; then drafts of 2, 2 and 1 tokens, of which 2, 0 and 1 stand."""
    report = SpeculationReport("lookup", 4)
    for _ in range(2):
        report.add(Pass(((0, 0, 1),), 0.0, 0.009, 0.010))
    report.add(Pass(((2, 2, 3),), 0.001, 0.010, 0.012))
    report.add(Pass(((2, 0, 1),), 0.001, 0.010, 0.012))
    report.add(Pass(((1, 1, 2),), 0.001, 0.010, 0.011))
    return report


def test_figures_by_hand() -> None:
    found = made().to_dict()
    assert found["target_passes"] == 5
    assert found["drafted_tokens"] == 5 and found["accepted_tokens"] == 3
    assert found["acceptance"] == pytest.approx(3 / 4)
    assert found["acceptance_by_position"] == pytest.approx([2 / 3, 1 / 2])
    assert found["tokens_per_target_pass"] == pytest.approx(8 / 5)
    assert found["draft_ms"] == pytest.approx(3 / 5)
    assert found["verify_ms"] == pytest.approx(48 / 5)
    assert found["overhead_ms"] == pytest.approx((55 - 3 - 48) / 5)
    assert found["speedup_measured"] == pytest.approx(8 * 0.010 / 0.055)
    expected = 2 + 2 * (1 + 0.75 + 0.75**2) + (1 + 0.75)
    assert found["speedup_predicted"] == pytest.approx(expected * 0.010 / (2 * 0.010 + 3 * 0.011))


def test_constant_k_is_the_formula() -> None:
    """(1 - a^(k+1)) / ((1 - a)(k c + v)), had no pass been plain."""
    report = SpeculationReport("self:int4", 4)
    report.add(Pass(((0, 0, 1),), 0.0, 0.010, 0.010))
    for _ in range(1000):
        report.add(Pass(((4, 3, 4),), 4 * 0.003, 0.0115, 0.024))
    a, c, v, k = 0.75, 0.3, 1.15, 4
    wanted = (1 - a ** (k + 1)) / ((1 - a) * (k * c + v))
    assert report.to_dict()["speedup_predicted"] == pytest.approx(wanted, rel=2e-3)


def test_a_plain_pass_that_was_measured_apart() -> None:
    report = SpeculationReport("self:int4", 4)
    for _ in range(1000):
        report.add(Pass(((4, 3, 4),), 4 * 0.003, 0.0115, 0.024))
    assert report.speedups() == (None, None)
    a, c, v, k = 0.75, 0.3, 1.15, 4
    measured, predicted = report.speedups(0.010)
    assert measured == pytest.approx(4 * 0.010 / 0.024)
    assert predicted == pytest.approx((1 - a ** (k + 1)) / ((1 - a) * (k * c + v)))


def test_an_end_token_cuts_a_run_short() -> None:
    report = SpeculationReport("lookup", 4)
    report.add(Pass(((4, 4, 2),), 0.0, 0.01, 0.01))
    assert report.to_dict()["tokens_per_target_pass"] == 2


def test_nothing_to_say() -> None:
    empty = SpeculationReport("lookup", 4).to_dict()
    assert empty["acceptance"] is None and empty["speedup_measured"] is None and empty["draft_ms"] is None
    assert "no pass" in speculation_words(empty)
    never_plain = SpeculationReport("lookup", 4)
    never_plain.add(Pass(((4, 2, 3),), 0.0, 0.01, 0.01))
    found = never_plain.to_dict()
    assert found["speedup_measured"] is None and found["speedup_predicted"] is None
    assert "67% of drafted" in speculation_words(found)


def test_words() -> None:
    assert speculation_words(made().to_dict()) == (
        "draft lookup: 75% of drafted tokens stood, 1.60 tokens a pass, 1.45 times the speed without"
    )
