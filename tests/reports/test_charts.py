"""Pictures of scores: axes, gaps, captions and titles that say no more than was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.command_line import avss
from support.rows import column
from support.warehouses import run_row, write_scores

from avss_dist.reports.chart import layers_chart

SCORED = ("avss_smoothed", "avss_low", "avss_high")
BASELINES = ("block_influence", "angular_distance", "relative_magnitude", "update_variance_ratio")


def score_rows(run_id: str, ends: Sequence[tuple[float | None, ...]], **columns: Any) -> list[dict[str, Any]]:
    """Rows of ``scores`` with the given score, lower and upper end by layer."""
    place = {"run_id": run_id, "site": "update", "recipe": "pooled", "threshold": 1e-5, "threshold_kind": "absolute"}
    rows = []
    for layer, values in enumerate(ends):
        about = {"layer": layer, "layer_name": f"layers.{layer}", "depth": (layer + 0.5) / len(ends), "rank": layer + 1}
        rows.append(place | about | dict.fromkeys(BASELINES) | dict(zip(SCORED, values, strict=True)) | columns)
    return rows


def draw(ends: Sequence[tuple[float | None, ...]], **columns: Any) -> dict[str, Any]:
    """The specification of a picture of one run."""
    spec: dict[str, Any] = layers_chart([run_row("a")], score_rows("a", ends, **columns)).to_dict()
    return spec


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
    done = avss("show", "-w", tmp_path / "w", "-o", file)
    assert done.exit_code == 0, done.stderr
    points = re.findall(r'aria-roledescription="point"[^>]*translate\(([\d.]+),([\d.]+)\)', file.read_text())
    assert len({height for _, height in points}) == 4


def marks(spec: dict[str, Any], panel: int = 0) -> list[str]:
    """The kinds of marks of a panel."""
    return [layer["mark"]["type"] for layer in spec["concat"][panel]["layer"]]


def test_a_band_has_a_gap_at_a_layer_without_an_interval() -> None:
    (band,) = [
        layer["mark"]
        for layer in draw([(1.0, 0.5, 2.0), (2.0, None, None), (1.0, 0.5, 2.0)])["concat"][0]["layer"]
        if layer["mark"]["type"] == "area"
    ]
    assert band["invalid"] == "break-paths-filter-domains"


def test_an_interval_between_two_gaps_is_a_line() -> None:
    assert "rule" in marks(draw([(1.0, None, None), (2.0, 1.0, 3.0), (1.0, None, None)]))


def test_without_intervals_there_is_neither_a_band_nor_a_word_of_it() -> None:
    spec = draw([(1.0, None, None), (2.0, None, None)])
    assert marks(spec) == ["line", "point"]
    assert ("Band" in str(spec["title"])) is False


def test_scores_that_no_layer_has_are_not_drawn() -> None:
    spec = draw([(1.0, None, None), (2.0, None, None)], angular_distance=0.3)
    assert column(spec["concat"], "title") == ["smoothed AVSS", "angular distance"]


def test_a_layer_without_a_rank_is_not_among_the_lowest() -> None:
    """It has NaN or infinite activations, and a score of the others."""
    rows = score_rows("a", [(0.1, None, None), (1.0, None, None), (2.0, None, None), (3.0, None, None)])
    rows[0]["rank"] = None
    for rank, row in enumerate(rows[1:], start=1):
        row["rank"] = rank
    text = json.dumps(layers_chart([run_row("a")], rows).to_dict())
    assert re.findall(r'"lowest_avss": (\w+)', text)[:4] == ["false", "true", "false", "false"]


def test_colors_in_a_legend_are_those_of_the_lines() -> None:
    runs = [run_row("a"), run_row("b")]
    scores = [row for run in runs for row in score_rows(run["run_id"], [(1.0, 0.5, 2.0)] * 3)]
    spec = layers_chart(runs, scores).to_dict()
    assert spec["concat"][0]["layer"][-1]["encoding"]["color"]["legend"]["symbolOpacity"] == 1


def test_the_caption_has_the_tokens_of_the_smallest_and_the_largest_run() -> None:
    runs = [run_row("a", num_tokens=8192), run_row("b", num_tokens=4096, dtype="bfloat16")]
    scores = [row for run in runs for row in score_rows(run["run_id"], [(1.0, 0.5, 2.0)] * 3)]
    (subtitle,) = layers_chart(runs, scores).to_dict()["title"]["subtitle"]
    assert "; 4,096 to 8,192 tokens of text.txt, float32, bfloat16." in subtitle


@pytest.mark.parametrize(
    ("command", "title"),
    [
        ("show --run *", "Layer scores by depth"),
        ("compare", "Agreement of layer rankings"),
        ("compare --along step", "Ranks along training step"),
    ],
)
def test_a_page_of_a_picture_is_titled_by_what_it_shows(tmp_path: Path, command: str, title: str) -> None:
    for step in range(2):
        about = {"model": "org/a", "series": "a", "training_step": step, "revision": f"r{step}"}
        write_scores(tmp_path / "w", f"a-{step}", [1.0, 3.0, 2.0, float(step)], **about)
    file = tmp_path / "picture.html"
    done = avss(*command.split(), "-w", tmp_path / "w", "-o", file)
    assert done.exit_code == 0, done.stderr
    html = file.read_text(encoding="utf-8")
    assert re.findall(r"<title>(.*?)</title>|aria-label=\"(.*?)\"", html)[:2] == [(title, ""), ("", title)]
