"""Sensitivity to rounding: what is printed, kept, measured once, compared with scores, and refused."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.causal_lm import SMALL
from support.checkpoints import llama
from support.command_line import avss, mistake, succeed
from support.experiments import cell_times
from support.quantized import block_fp8

from avss_dist import ablate, score
from avss_dist.analysis.scorecard import best_readings, score_cards
from avss_dist.report.page.page import _scorecards
from avss_dist.warehouse.reader import Warehouse

TEXT = "builtin:pydoc"
Save = Callable[[Any, Path], Path]
SIZES = ("--max-sequences", 6, "--sequence-length", 32, "--sequences-per-shard", 3, "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> Path:
    """Weights so large that rounding matters, and maps of 32 and 64 inputs."""
    folder = tmp_path_factory.mktemp("sensitivity") / "model"
    return save_checkpoint(llama(num_hidden_layers=4, intermediate_size=64, initializer_range=0.3), folder)


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with a run, and the measured and predicted effect of two formats, predicted on other rows too."""
    warehouse = tmp_path_factory.mktemp("sensitivity") / "w"
    score(model, corpus=TEXT, warehouse=warehouse, **SMALL)
    options = {"corpus": TEXT, "warehouse": warehouse, "quantize": ["int4", "Q4_0"], **SMALL, "dtype": "float32"}
    ablate(model, **options)
    ablate(model, **options, skip_sequences=6, rounded_layers=False, leave_one_out=False)
    return warehouse


def options_of(model: Path, warehouse: Path, *formats: str) -> tuple[Any, ...]:
    named = [word for name in formats for word in ("--quantize", name)]
    return ("ablate", model, "--corpus", TEXT, "-w", warehouse, *SIZES, "--no-leave-one-out", *named)


def test_ablate_shows_what_is_measured_and_predicted(model: Path, tmp_path: Path) -> None:
    options = options_of(model, tmp_path, "int4", "q4_0")
    done = succeed(*options)
    told = " ".join(done.stdout.split())
    for words in ("int4, 4.", "q4_0, 4.5 bits: increase", "predicted", "mlp.down_proj", "order the layers as this"):
        assert words in told, told
    times = cell_times(tmp_path)
    table = avss(*options, "--format", "csv")
    assert len(times) == 2 * 3 and cell_times(tmp_path) == times  # by shard: predicted, and measured by format
    rows = [*csv.DictReader(io.StringIO(table.stdout))]
    assert len(rows) == 2 * 4 * (1 + 7)
    for name in ("int4", "q4_0"):
        of_layer = [row for row in rows if (row["format"], row["layer"]) == (name, "2")]
        (layer,) = [row for row in of_layer if not row["map"]]
        maps = [row for row in of_layer if row["map"]]
        for column in ("first_order", "second_order", "predicted", "output_error", "num_weights"):
            assert float(layer[column]) == pytest.approx(sum(float(row[column]) for row in maps))
        assert f"{float(layer['increase']):.5f}" in told and f"{float(layer['predicted']):.5f}" in told
        assert float(layer["increase_stderr"]) > 0 and float(layer["loss"])
        assert {row["map"] for row in maps} == {
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        }


def test_rows_of_the_warehouse_name_what_is_rounded(measured: Path) -> None:
    rows = Warehouse(measured).table("evaluations").to_pylist()
    places = {row["rounding"] for row in rows if row["task"] == f"rounding:{TEXT}"}
    assert {"int4@0", "q4_0@3", "int4@2.mlp.up_proj"} <= places and None not in places
    losses = {row["rounding"]: row for row in rows if row["task"] == f"rounded:int4:{TEXT}" and row["metric"] == "loss"}
    assert losses.keys() == {None, *(f"int4@{layer}" for layer in range(4))}
    whole = {
        row["value"]
        for row in rows
        if row["task"] == f"ablation:{TEXT}" and row["metric"] == "loss" and not row["drop"]
    }
    assert {losses[None]["value"]} == whole
    joined = Warehouse(measured).sql(
        """SELECT p.layer, m.value - w.value AS measured, p.value AS predicted
        FROM evaluations p JOIN evaluations m USING (rounding) JOIN evaluations w ON m.run_id = w.run_id
        WHERE p.metric = 'predicted' AND m.metric = 'loss' AND w.metric = 'loss' AND w.rounding IS NULL
        AND p.rounding LIKE 'int4@%'"""
    )
    assert joined.num_rows == 2 * 4  # two texts


def test_the_scorecard_compares_with_rounded_layers(measured: Path) -> None:
    store = Warehouse(measured)
    cards = score_cards(store, store.runs().to_pylist())
    rows = [row for row in best_readings(cards).to_pylist() if row["format"] == "int4"]
    scores = {row["score"]: row for row in rows}
    expected = {"avss", "block_influence", "left_out:loss", "last", "predicted", "output_error"}
    assert expected <= {*scores}
    assert scores["rounded:q4_0"]["same_text"] is True
    assert scores["predicted"]["same_text"] is False
    assert scores["block_influence"]["same_text"] is None
    assert all(-1 <= row["spearman_loss"] <= 1 for row in rows if row["spearman_loss"] is not None)
    evaluations = store.table("evaluations").to_pylist()
    ranks = []
    for name in ("int4", "q4_0"):
        of_format = [row for row in evaluations if row["task"] == f"rounded:{name}:{TEXT}" and row["metric"] == "loss"]
        losses = {row["rounding"]: row["value"] for row in of_format}
        ranks.append(np.argsort(np.argsort([losses[f"{name}@{layer}"] for layer in range(4)])))
    assert scores["rounded:q4_0"]["spearman_loss"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    done = succeed("findings", "--truth", "-w", measured)
    told = " ".join(done.stdout.split())
    for words in (
        "weights rounded to int4",
        "weights rounded to q4_0",
        "loss, rounded to q4_0",
        "first + second order",
        "of other text",
    ):
        assert words in told, told
    removals = [row for row in cards.to_pylist() if row["format"] is None]
    assert {"loss"} <= {row["score"] for row in removals}
    assert "output_error" not in {row["score"] for row in removals}


def test_the_page_shows_removed_layers_alone(measured: Path) -> None:
    store = Warehouse(measured)
    runs = store.runs().to_pylist()
    (section,) = _scorecards(store, runs, {run["run_id"]: "model" for run in runs})
    shown = [name for column in section.tables[0].columns[:1] for name in column.values]  # type: ignore[union-attr]
    assert "block influence" in shown and "error of outputs" not in shown
    assert len(shown) == len({*shown})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quantize", "int4-g129"), ("Unknown number format 'int4-g129'", "Did you mean 'int4-g128'?")),
        (("--quantize", "tq1_0"), ("tq1_0 cannot take", "not a multiple of 256", "can take every linear map", "int4")),
        (
            ("--quantize", "int4", "--partition", "tensor_parallel", "--ranks", 2),
            ("--partition tensor_parallel has a part of each weight", "fsdp, zero3"),
        ),
    ],
)
def test_mistakes_are_explained(options: tuple[Any, ...], words: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    told = mistake("ablate", model, "--corpus", TEXT, "-w", tmp_path / "w", *SIZES, "--no-leave-one-out", *options)
    assert all(part in told for part in words), told
    assert "Traceback" not in told


def test_a_quantized_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    folder = block_fp8(model, tmp_path / "fp8")
    for more in ((), ("--dequantize",)):
        done = mistake(*options_of(folder, tmp_path / "w", "int4"), *more)
        assert "is quantized already (fp8" in done and "Name the checkpoint that it was made of" in done
