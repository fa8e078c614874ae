"""The driver: every shard counts once, the same bytes however the work is done, nothing lost, golden scores."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.planning import plan, run_spec
from support.tables import assert_same_tables, measured_files

import avss_dist
from avss_dist.analysis.chosen import choose_runs
from avss_dist.core.errors import AvssError, ConfigError, RunFailed
from avss_dist.core.settings import Settings
from avss_dist.evaluation.events import ignore
from avss_dist.executors import interface
from avss_dist.executors.interface import Outcome, RunShards
from avss_dist.executors.local import LocalExecutor
from avss_dist.runs.driver import Driver
from avss_dist.runs.events import OnRunEvent, RunEvent, ShardMeasured
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

SMALL: dict[str, Any] = {
    "corpus": "builtin:pydoc",
    "max_sequences": 22,
    "sequence_length": 16,
    "batch_size": 3,
    "sequences_per_shard": 4,
    "executor": "local",
}


def score(model: Path, out: Path, **changes: Any) -> avss_dist.Run:
    return avss_dist.score(model, warehouse=out, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run = score(tiny_llama, out)
    assert (run.status, run.num_shards, run.resumed_shards, run.num_tokens) == ("done", 6, 0, 22 * 16)
    return out


def drive(model: Path, out: Path, executor: Any, on_event: OnRunEvent = ignore) -> avss_dist.Run:
    """Return a run with an executor of the test."""
    store = Store(out)
    store.create()
    with closing(executor):
        ((_, ending),) = Driver(store, executor, on_event).run([run_spec(model, **SMALL)])
    assert isinstance(ending, avss_dist.Run), ending
    return ending


def test_a_model_with_a_long_name_is_scored_and_found(tiny_llama: Path, tmp_path: Path) -> None:
    """250 characters, beside which a folder's name has no room for more; failures are recorded too."""
    name = "long-" + "n" * 245
    model = shutil.copytree(tiny_llama, tmp_path / name)
    run = score(model, tmp_path / "w", max_sequences=4)
    assert (run.status, run.run_id.startswith(name[:80]), len(run.run_id)) == ("done", True, 80 + 17 + 11)
    assert score(model, tmp_path / "w", max_sequences=4).run_id == run.run_id
    warehouse = Warehouse(tmp_path / "w")
    assert warehouse.runs()["run_id"].to_pylist() == [run.run_id]
    assert choose_runs(warehouse, [name])[0]["model"] == str(model)
    assert warehouse.table("scores", run_ids=[run.run_id]).num_rows > 0
    missing = tmp_path / ("gone-" + "n" * 245)
    (failed,) = avss_dist.score_all([str(missing)], warehouse=tmp_path / "w", **SMALL)
    assert failed.status == "failed" and len(failed.run_id) == 80 + 17 + 11


class Interfering(LocalExecutor):
    """An executor whose results are real, and arrive in an unusual way."""

    def __init__(self, how: str) -> None:
        super().__init__(Settings())
        self.how = how
        self.asked: list[int] = []

    def run(self, runs: Iterator[RunShards]) -> Iterator[Outcome]:  # type: ignore[override]
        for run in runs:
            self.asked = [shard.shard_id for shard in run.shards]
            results = list(super().run(iter([run])))
            if self.how == "backwards":
                yield from reversed(results)
            elif self.how == "twice":
                for result in results:
                    yield result
                    yield results[0]
                    yield result
            elif self.how == "crash":
                yield from results[1:4]
                raise RuntimeError("the machine is on fire")
            elif self.how == "interrupt":
                yield from results[2:5]
                raise KeyboardInterrupt
            else:
                yield from results


@pytest.mark.parametrize("how", ["backwards", "twice"])
def test_order_and_duplicates_do_not_matter(how: str, tiny_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    events: list[RunEvent] = []
    drive(tiny_llama, tmp_path, Interfering(how), events.append)
    assert_same_tables(tmp_path, undisturbed)
    assert sum(isinstance(event, ShardMeasured) for event in events) == 6


@pytest.mark.parametrize(
    ("how", "error", "missing"), [("crash", RunFailed, [0, 4, 5]), ("interrupt", KeyboardInterrupt, [0, 1, 5])]
)
def test_a_broken_run_goes_on_where_it_stopped(
    how: str, error: type[BaseException], missing: list[int], tiny_llama: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        drive(tiny_llama, tmp_path, Interfering(how))
    rows = Warehouse(tmp_path).runs().to_pylist() if how == "crash" else []
    assert [row["status"] for row in rows] == (["failed"] if how == "crash" else [])
    assert all("on fire" in row["error"] for row in rows)
    executor = Interfering("plain")
    run = drive(tiny_llama, tmp_path, executor)
    assert (run.resumed_shards, executor.asked) == (3, missing)
    assert_same_tables(tmp_path, undisturbed)
    assert [row["status"] for row in Warehouse(tmp_path).runs().to_pylist()] == ["done"]


def test_a_done_run_is_not_repeated(tiny_llama: Path, undisturbed: Path) -> None:
    before = measured_files(undisturbed)
    executor = Interfering("plain")
    assert drive(tiny_llama, undisturbed, executor).status == "skipped"
    assert executor.asked == [] and measured_files(undisturbed) == before


def test_all_measured_but_not_committed_needs_no_model(
    tiny_llama: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that died after the last shard: the partials alone make the run."""
    score(tiny_llama, tmp_path)
    for name in ("runs", "scores", "layer_stats"):
        next((tmp_path / name).rglob("*.parquet")).unlink()
    monkeypatch.setattr(interface, "open_replica", lambda *_: pytest.fail("the model was opened"))
    assert score(tiny_llama, tmp_path).resumed_shards == 6
    assert_same_tables(tmp_path, undisturbed)


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 17},
        {"batch_size": 4},
        {"sequences_per_shard": 5},
        {"max_sequences": 21},
        {"skip_sequences": 1},
        {"layout": "padded"},
        {"skip_first_tokens": 1},
        {"dtype": "bfloat16"},
        {"sites": ("block",)},
        {"thresholds": (1e-3,)},
        {"attention": "eager"},
        {"layers": "layers"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_a_number_is_another_run(change: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    usual, changed = (plan(tiny_llama, tmp_path, **{**SMALL, **options}) for options in ({}, change))
    assert usual.run.run_id != changed.run.run_id


def test_what_cannot_change_a_number_is_the_same_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama.parent)
    usual = plan(tiny_llama, tmp_path, **SMALL).run.run_id
    for change in (
        {"dtype": "float32", "device": "cpu"},
        {"replicas": 1, "executor": "auto"},
        {"partition": "streaming"},
    ):
        assert plan(tiny_llama, tmp_path, **{**SMALL, **change}).run.run_id == usual
    assert plan(Path(tiny_llama.name), tmp_path, **SMALL).run.run_id == usual
    files = [tmp_path / name for name in ("one.txt", "two.txt")]
    for file in files:
        file.write_text("In the beginning was the word. " * 200)
    same = {plan(tiny_llama, tmp_path, **{**SMALL, "corpus": str(file)}).run.run_id for file in files}
    assert len(same) == 1 and usual not in same


def test_shards_are_merged_in_blocks_when_there_are_many(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More shards than blocks: the totals stay, only the units of intervals are coarser."""
    score(tiny_llama, tmp_path / "fine", sequences_per_shard=1)
    monkeypatch.setattr("avss_dist.runs.run.BOOTSTRAP_BLOCKS", 4)
    score(tiny_llama, tmp_path / "coarse", sequences_per_shard=1)
    fine, coarse = (Warehouse(tmp_path / name).scores().to_pydict() for name in ("fine", "coarse"))
    assert fine["count"] == coarse["count"] and fine["rank"] == coarse["rank"]
    for name in ("near_zero_count", "variance", "avss_smoothed"):
        np.testing.assert_allclose(np.array(fine[name], float), np.array(coarse[name], float), rtol=1e-12)
    assert fine["avss_low"] != coarse["avss_low"]


def test_the_run_row_says_what_ran(tiny_llama: Path, undisturbed: Path) -> None:
    (row,) = Warehouse(undisturbed).runs().to_pylist(maps_as_pydicts="strict")
    told = {
        "status": "done",
        "model": str(tiny_llama),
        "family": "llama",
        "architecture": "LlamaForCausalLM",
        "num_layers": 3,
        "hidden_size": 32,
        "dtype": "float32",
        "attention_implementation": "sdpa",
        "partition": "single",
        "replicas": 1,
        "corpus": "builtin:pydoc",
        "num_sequences": 22,
        "num_tokens": 352,
        "num_shards": 6,
        "sites": ["block", "update", "attention", "mlp", "neuron"],
        "device": "cpu",
        "notes": [],
    }
    assert {name: row[name] for name in told} == told
    assert row["versions"]["avss_dist"] == avss_dist.__version__ and row["versions"]["torch"]
    assert row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 1e8 and row["threads"] >= 1
    assert row["fingerprint"].startswith(row["run_id"][-10:])


def test_a_mistake_that_concerns_all_models_stops_at_once(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    options = {k: v for k, v in SMALL.items() if k != "corpus"}
    with pytest.raises(AvssError, match="no such file"):
        avss_dist.score_all(
            [str(tiny_llama), str(tiny_bert)], corpus="nothing.txt", warehouse=tmp_path / "w", **options
        )
    with pytest.raises(ConfigError, match="max_sequences"):
        avss_dist.score(tiny_llama, warehouse=tmp_path, corpus="builtin:pydoc", max_sequence=3)


# The seeded tiny Llama in float32 at |x| < 0.1: pooled variance, near-zero count, smoothed AVSS.
GOLDEN = [(1.245596e-04, 11264, 0.714326), (1.558122e-04, 11264, 0.893554), (2.426562e-04, 11258, 1.392329)]


def test_golden_scores(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i * i % 1009}" for i in range(400)), encoding="utf-8")
    score(tiny_llama, tmp_path / "w", corpus=str(text))
    rows = Warehouse(tmp_path / "w").sql(
        "SELECT variance, near_zero_count, avss_smoothed FROM scores WHERE site = 'block' AND recipe = 'pooled'"
        " AND threshold = 0.1 AND threshold_kind = 'absolute' ORDER BY layer"
    )
    np.testing.assert_allclose(np.array(rows), GOLDEN, rtol=1e-3)


def test_pooled_scores_follow_the_formula(undisturbed: Path) -> None:
    """The paper's formula over layer_stats, transcribed once more."""
    warehouse = Warehouse(undisturbed)
    stats = warehouse.sql("SELECT * FROM layer_stats WHERE site = 'block' ORDER BY layer").to_pylist()
    variance = np.array([s["pooled_variance_sum"] / s["sequence_count"] for s in stats])
    threshold = stats[0]["thresholds"].index(1e-3)
    sparsity = np.array([s["near_zero"][threshold] / s["count"] for s in stats])
    expected = (variance / variance.sum()) / (sparsity / sparsity.sum())
    rows = warehouse.sql(
        "SELECT avss, rank FROM scores WHERE site = 'block' AND recipe = 'pooled' AND threshold = 1e-3"
        " AND threshold_kind = 'absolute' ORDER BY layer"
    ).to_pydict()
    np.testing.assert_allclose(rows["avss"], expected, rtol=1e-12)
    assert rows["rank"] == [1, 2, 3]
