"""Texts for people that name what they show, and do not contradict each other."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from support.command_line import avss
from support.warehouses import activations, stats_of, write_measured

from avss_dist.analysis.agreement import CorrelationSummary
from avss_dist.report.terminal.agreement import summary


def said(rho: float, given: float, *, lowest: float | None = None) -> str:
    """Return the verdict on pairs with a median correlation, and one given depth."""

    def summarized(median: float, least: float) -> CorrelationSummary:
        return CorrelationSummary(count=int(math.isfinite(median)), median=median, lowest=least, highest=median)

    pairs = pa.table({"layers": [8], "k": [2], "shared": [1]})
    spearman = summarized(rho, rho if lowest is None else lowest)
    comparison: Any = SimpleNamespace(number=1, pairs=pairs, spearman=spearman, given_depth=summarized(given, given))
    verdict, _ = summary(comparison).splitlines()
    return verdict


@pytest.mark.parametrize(
    ("rho", "given", "verdict"),
    [
        (0.99, 0.98, "the rankings are nearly the same."),
        (0.95, 0.12, "the rankings agree only because both follow depth."),
        (0.95, math.nan, "the rankings agree only because both follow depth."),
        (0.95, 0.6, "the rankings are nearly the same, in part because both follow depth."),
        (0.8, 0.75, "the rankings are alike."),
        (0.1, 0.9, "the rankings differ only in how they follow depth."),
        (0.1, -0.2, "the rankings have little in common."),
        (-1.0, math.nan, "the rankings are the other way round."),
    ],
)
def test_one_verdict_on_rankings_and_their_depth(rho: float, given: float, verdict: str) -> None:
    assert said(rho, given).endswith(f": {verdict}")
    assert said(rho, given).count("the rankings") == 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warehouse")
    x = activations()
    write_measured(root, "tiny-1", stats_of(x, before=0.7 * x), 8)
    return root


def test_what_is_shown_is_named_as_smoothed(root: Path) -> None:
    """The column `avss` is the score as published; tables show and rank `avss_smoothed`."""
    shown = avss("show", "-w", root)
    assert shown.exit_code == 0, shown.stderr
    words = shown.stdout.lower().replace("smoothed avss", "")
    assert words != shown.stdout.lower() and "avss" not in words.replace("avss_dist", "")


def test_the_picture_names_it_too(root: Path, tmp_path: Path) -> None:
    drawn = avss("show", "-w", root, "-o", tmp_path / "layers.svg")
    assert drawn.exit_code == 0, drawn.stderr
    text = (tmp_path / "layers.svg").read_text().lower()
    assert "smoothed avss (log)" in text and ">avss" not in text
