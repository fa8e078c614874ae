"""Sparsities of an experiment: every method at every level, curves, and what keeps enough."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import avss, files
from support.experiments import run_job_in

from avss_dist.analysis.sparsity_curves import Curve, Point, sparsity_curves
from avss_dist.core.errors import AvssError
from avss_dist.warehouse.reader import Warehouse

pytestmark = pytest.mark.nightly

JOB = """
warehouse: {warehouse}
models: [{model}]
corpora: ["builtin:pydoc"]
settings: {{max_sequences: 4, sequence_length: 32, batch_size: 4, device: cpu, sites: [inputs]}}
experiment:
  tasks: ["perplexity:builtin:pydoc"]
  shares: []
  sparsities: [0.3, 0.7]
  sparsity_methods: [uniform, wina]
  max_sequences: 8
  skip_sequences: 8
"""


def test_every_method_at_every_level_is_compared_with_the_dense_model(tiny_llama: Path, tmp_path: Path) -> None:
    path, rows = run_job_in(tmp_path, JOB, tiny_llama)
    losses = {(row["method"], row["sparsity"]): row for row in rows if row["metric"] == "loss"}
    levels = [*product(("uniform", "wina"), (0.3, 0.7))]
    assert list(losses) == [("whole model", None), *levels]
    assert len({row["value"] for row in losses.values()}) == 5
    assert all(losses[of]["retention_low"] <= losses[of]["retention_high"] for of in levels)
    evaluations = Warehouse(tmp_path / "w").table("evaluations").to_pylist()
    assert [curve.method for curve in sparsity_curves(rows)] == ["uniform", "wina"]
    planned = Warehouse(tmp_path / "w").table("sparsity").to_pylist()
    for curve in sparsity_curves(rows):
        for point in curve.points:
            assert point.measured == pytest.approx(point.target, abs=0.04)
            key = point.row["sparsity_plan"]
            assert {row["value"] for row in evaluations if (row["sparsity_plan"], row["metric"]) == (key, "loss")} == {
                point.row["value"]
            }
            maps = {(one["layer"], f"realized:{one['map']}"): one["sparsity"] for one in planned
                    if one["sparsity_plan"] == key}  # fmt: skip
            off = [abs(row["value"] - maps[row["layer"], row["metric"]]) for row in evaluations
                   if row["sparsity_plan"] == key and (row["layer"], row["metric"]) in maps]  # fmt: skip
            assert len(off) == len(maps) and point.farthest == pytest.approx(max(off))
            assert point.within == pytest.approx(np.mean(np.array(off) <= 0.01))
    before = files(tmp_path / "w" / "cells")
    shown = avss("run", path)
    assert shown.exit_code == 0 and "uniform keeps 99% at a sparsity of" in shown.stdout
    assert files(tmp_path / "w" / "cells") == before
    assert avss("report", "-w", tmp_path / "w", "-o", tmp_path / "r.html").exit_code == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("wina keeps 99%") == 1 and "The plan that was made last: wina, 70% of the weights" in page


def test_methods_read_as_many_rows_as_are_said(tiny_llama: Path, tmp_path: Path) -> None:
    """Thresholds are quantiles of the whole text of the run all the same."""
    alike = JOB.replace("[uniform, wina]", "[loss]")
    counts = []
    for folder, more in ((tmp_path / "all", ""), (tmp_path / "some", "  sparsity_max_sequences: 2\n")):
        folder.mkdir()
        run_job_in(folder, alike + more, tiny_llama)
        warehouse = Warehouse(folder / "w")
        cells = warehouse.sql("SELECT weights FROM cells WHERE metric LIKE 'first_order:%'").to_pylist()
        (run,) = warehouse.runs().to_pylist()
        counts.append(({token for cell in cells for token in cell["weights"]}, run["num_sequences"]))
    assert counts == [({4 * 31.0}, 4), ({2 * 31.0}, 4)]  # all tokens of a row but the first are predicted


def test_the_critical_sparsity_is_where_the_curve_crosses() -> None:
    def curve(*kept: float) -> Curve:
        rows: list[dict[str, Any]] = [{"sparsity": 0.25 * (i + 1), "retention": one} for i, one in enumerate(kept)]
        return Curve(task="t", method="m", points=tuple(Point(row=row, measured=None) for row in rows))

    assert curve(0.98, 0.88).critical(0.99) == pytest.approx(0.125)
    assert curve(1.01, 0.96, 0.94).critical(0.95) == pytest.approx(0.625)
    assert curve(1.0, 0.999).critical(0.95) == 0.5
    assert "99% at a sparsity of at least 50.0%" in curve(1.0, 0.999).sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites: [inputs]": "sites: [block]"}, "is scored without query_input, output_input, up_input, neuron"),
        ({"[uniform, wina]": "[unifrom]"}, "Did you mean"),
        ({"sparsities: [0.3, 0.7]": "sparsities: [1.0]"}, "less than 1"),
        ({"sparsities: [0.3, 0.7]": "sparsities: []"}, "shares and sparsities are both empty."),
        (
            {"wina": "teal", "experiment:": "execution: {{executor: ray, partition: zero3}}\nexperiment:"},
            "`partition` zero3 has a part of each weight, and teal needs it whole.",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_scored(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    job = JOB
    for before, after in changes.items():
        job = job.replace(before, after)
    with pytest.raises(AvssError, match=re.escape(message)):
        run_job_in(tmp_path, job, tiny_llama)
    assert not (tmp_path / "w").exists()
