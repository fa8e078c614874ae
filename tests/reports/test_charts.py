"""Pictures of scores: axes, gaps, captions and titles that say no more than was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.command_line import succeed
from support.rows import column, where
from support.tiers import nightly
from support.warehouses import run_row, write_scores

from avss_dist.reports.chart import layers_chart

BASELINES = ("block_influence", "angular_distance", "relative_magnitude", "update_variance_ratio")


def score_rows(run_id: str, ends: Sequence[tuple[float | None, ...]], **columns: Any) -> list[dict[str, Any]]:
    """Rows of ``scores`` with the given score, lower and upper end by layer."""
    place = {"run_id": run_id, "site": "update", "recipe": "pooled", "threshold": 1e-5, "threshold_kind": "absolute"}
    rows = []
    for layer, (score, low, high) in enumerate(ends):
        row: dict[str, Any] = place | dict.fromkeys(BASELINES)
        row |= {"layer": layer, "layer_name": f"layers.{layer}", "depth": (layer + 0.5) / len(ends)}
        row |= {"avss_smoothed": score, "avss_low": low, "avss_high": high, "rank": layer + 1}
        rows.append(row | columns)
    return rows


def specification(runs: list[dict[str, Any]], scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the specification of a picture of runs."""
    return layers_chart(runs, scores).to_dict()


def draw(ends: Sequence[tuple[float | None, ...]], **columns: Any) -> dict[str, Any]:
    """The specification of a picture of one run."""
    return specification([run_row("a")], score_rows("a", ends, **columns))


THREE_LAYERS = [(1.0, 0.5, 2.0)] * 3


def draw_two_runs(**columns: Any) -> dict[str, Any]:
    """The specification of a picture of two runs, of which the second has these columns."""
    runs = [run_row("a", num_tokens=8192), run_row("b", **columns)]
    return specification(runs, score_rows("a", THREE_LAYERS) + score_rows("b", THREE_LAYERS))


def y_axis(spec: dict[str, Any], panel: int = 0) -> dict[str, Any]:
    """The vertical axis of the points of a panel."""
    axis: dict[str, Any] = spec["concat"][panel]["layer"][-1]["encoding"]["y"]
    return axis


@pytest.mark.parametrize(
    ("ends", "scale"),
    [
        ([(1.0, 0.5, 2.0), (2.0, 1.0, 3.0)], "log"),
        ([(1.0, None, None), (2.0, 1.0, 3.0)], "log"),
        ([(0.0, None, None), (2.0, 1.0, 3.0)], "linear"),
        ([(1.0, 0.0, 2.0), (2.0, 1.0, 3.0)], "linear"),
    ],
)
def test_scores_of_zero_are_drawn_on_a_linear_scale(ends: list[tuple[float | None, ...]], scale: str) -> None:
    assert y_axis(draw(ends))["scale"]["type"] == scale


def test_a_layer_without_variance_leaves_the_others_at_their_heights(tmp_path: Path) -> None:
    write_scores(tmp_path / "w", "a", [1.0, 0.0, 3.0, 5.0])
    file = tmp_path / "a.svg"
    succeed("show", "-w", tmp_path / "w", "-o", file)
    heights = re.findall(r'aria-roledescription="point"[^>]*translate\([\d.]+,([\d.]+)\)', file.read_text())
    assert len(set(heights)) == 4


def marks(spec: dict[str, Any], panel: int = 0) -> list[str]:
    """The kinds of marks of a panel."""
    return column(column(spec["concat"][panel]["layer"], "mark"), "type")


def test_a_band_has_a_gap_at_a_layer_without_an_interval() -> None:
    spec = draw([(1.0, 0.5, 2.0), (2.0, None, None), (1.0, 0.5, 2.0)])
    (band,) = where(column(spec["concat"][0]["layer"], "mark"), type="area")
    assert band["invalid"] == "break-paths-filter-domains"


def test_an_interval_between_two_gaps_is_a_line() -> None:
    spec = draw([(1.0, None, None), (2.0, 1.0, 3.0), (1.0, None, None)])
    assert "rule" in marks(spec)


def test_without_intervals_there_is_neither_a_band_nor_a_word_of_it() -> None:
    spec = draw([(1.0, None, None), (2.0, None, None)])
    assert marks(spec) == ["line", "point"]
    assert "Band" not in str(spec["title"])


def test_scores_that_no_layer_has_are_not_drawn() -> None:
    spec = draw([(1.0, None, None), (2.0, None, None)], angular_distance=0.3)
    assert column(spec["concat"], "title") == ["smoothed AVSS", "angular distance"]


def test_a_layer_without_a_rank_is_not_among_the_lowest() -> None:
    """It has NaN or infinite activations, and a score of the others."""
    rows = score_rows("a", [(0.1, None, None), (1.0, None, None), (2.0, None, None), (3.0, None, None)])
    rows[0]["rank"] = None
    rows[1]["rank"] = 1
    rows[2]["rank"] = 2
    rows[3]["rank"] = 3
    text = json.dumps(specification([run_row("a")], rows))
    is_lowest = re.findall(r'"lowest_avss": (\w+)', text)
    assert is_lowest[:4] == ["false", "true", "false", "false"]


def test_colors_in_a_legend_are_those_of_the_lines() -> None:
    encoding = draw_two_runs()["concat"][0]["layer"][-1]["encoding"]
    assert encoding["color"]["legend"]["symbolOpacity"] == 1


def test_the_caption_has_the_tokens_of_the_smallest_and_the_largest_run() -> None:
    spec = draw_two_runs(num_tokens=4096, dtype="bfloat16")
    (subtitle,) = spec["title"]["subtitle"]
    assert "; 4,096 to 8,192 tokens of text.txt, float32, bfloat16." in subtitle


@pytest.mark.parametrize(
    ("command", "title"),
    [
        ("compare", "Agreement of layer rankings"),
        *nightly(("show --run *", "Layer scores by depth"), ("compare --along step", "Ranks along training step")),
    ],
)
def test_a_page_of_a_picture_is_titled_by_what_it_shows(tmp_path: Path, command: str, title: str) -> None:
    for step in range(2):
        about = {"model": "org/a", "series": "a", "training_step": step, "revision": f"r{step}"}
        write_scores(tmp_path / "w", f"a-{step}", [1.0, 3.0, 2.0, float(step)], **about)
    file = tmp_path / "picture.html"
    succeed(*command.split(), "-w", tmp_path / "w", "-o", file)
    html = file.read_text(encoding="utf-8")
    assert re.findall(r"<title>(.*?)</title>", html)[0] == title
    assert re.findall(r"aria-label=\"(.*?)\"", html)[0] == title
