"""The driver: every shard counts once, the same bytes however the work is done, nothing lost, golden scores.

And its parts: the default size of shards, what stops and logs tell of several runs, and partials that are read back.
"""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.checkpoints import checkpoint_at, llama
from support.json_files import write_json_lines
from support.oracle import assert_equal_stats
from support.planning import llama_like, plan, run_spec
from support.processes import threads_of_drivers
from support.tables import assert_same_tables, measured_files, run_rows
from support.tiers import nightly
from support.warehouses import SCALES, activations, stats_of, write_shard
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig

import avss_dist
from avss_dist.analysis.chosen import choose_runs
from avss_dist.core.errors import AvssError, ConfigError, RunFailed
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.distillation.curve import ignore
from avss_dist.evaluation.placed import PlannedTask
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.size import footprint
from avss_dist.partition.placement import Placement
from avss_dist.runs import events, merging, planner, work
from avss_dist.runs.driver import Driver
from avss_dist.runs.events import OnRunEvent, RunEvent, ShardMeasured
from avss_dist.runs.local import LocalExecutor
from avss_dist.runs.merging import ShardSummary, merge_partials
from avss_dist.runs.planner import FEWEST_SHARDS, FLOPS_OF_A_GPU, FLOPS_OF_A_THREAD, MOST_SECONDS, rows_per_shard
from avss_dist.runs.result import Run
from avss_dist.runs.threads import Submissions
from avss_dist.runs.work import Outcome, RunShards
from avss_dist.stats.layer_stats import Merged, ShardResult, merge_blocks
from avss_dist.tasks.task import Measure, Task
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.shared import share
from avss_dist.warehouse.store import Store

SMALL: dict[str, Any] = {
    "corpus": "builtin:pydoc",
    "max_sequences": 22,
    "sequence_length": 16,
    "batch_size": 3,
    "sequences_per_shard": 4,
    "executor": "local",
}


CHECKPOINT = Checkpoint(name="org/tiny", source="hub", path="/tiny", revision="0" * 40)
PINNED = Settings(dtype="float32", device="cpu", attention="sdpa", sequences_per_shard=4, max_sequences=12)
CORPUS = CorpusPlan(
    source="t", corpus_fingerprint="c", tokens_fingerprint="t" * 64, shards=(), num_sequences=12, num_tokens=96
)


class KeyedMeasure(Measure):
    def identity(self) -> dict[str, Any]:
        return {"measure": "measure"}

    def __call__(self, model: Any, intervention: Intervention = NO_INTERVENTION) -> list[Any]:
        return []


def score(model: Path, out: Path, **changes: Any) -> avss_dist.Run:
    return avss_dist.score(model, warehouse=out, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run = score(tiny_llama, out)
    assert run.status == "done"
    assert run.num_shards == 6
    assert run.resumed_shards == 0
    assert run.num_tokens == 22 * 16
    return out


def drive(model: Path, out: Path, executor: Any, on_event: OnRunEvent = ignore) -> avss_dist.Run:
    """Return a run with an executor of the test."""
    store = Store(out)
    store.storage.create()
    with closing(executor):
        driver = Driver(store, executor, on_event)
        ((_, ending),) = driver.run([run_spec(model, **SMALL)])
    assert isinstance(ending, avss_dist.Run), ending
    return ending


def test_a_model_with_a_long_name_is_scored_and_found(tiny_llama: Path, tmp_path: Path) -> None:
    """250 characters, beside which a folder's name has no room for more; failures are recorded too."""
    name = "long-" + "n" * 245
    model = shutil.copytree(tiny_llama, tmp_path / name)
    warehouse_folder = tmp_path / "w"
    run = score(model, warehouse_folder, max_sequences=4)
    assert run.status == "done"
    assert run.run_id.startswith(name[:80])
    assert len(run.run_id) == 80 + 17 + 11
    assert score(model, warehouse_folder, max_sequences=4).run_id == run.run_id
    warehouse = Warehouse(warehouse_folder)
    assert warehouse.runs()["run_id"].to_pylist() == [run.run_id]
    assert choose_runs(warehouse, [name])[0]["model"] == str(model)
    assert warehouse.table("scores", run_ids=[run.run_id]).num_rows > 0
    missing = tmp_path / ("gone-" + "n" * 245)
    (failed,) = avss_dist.score_all([str(missing)], warehouse=warehouse_folder, **SMALL)
    assert failed.status == "failed"
    assert len(failed.run_id) == 80 + 17 + 11


def test_documents_without_a_token_that_counts_are_shards_without_statistics(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"layout": "padded", "skip_first_tokens": 3, "sequences_per_shard": 1, "max_sequences": None}
    long = [{"text": "In the beginning was the word."}, {"text": "And the word was with a cat."}]
    all_documents = [long[0], {"text": "a"}, long[1]]
    measured = []
    for documents in (long, all_documents):
        file = tmp_path / f"{len(documents)}.jsonl"
        write_json_lines(file, documents)
        run = score(tiny_llama, tmp_path / file.stem, corpus=str(file), **options)
        assert run.num_shards == len(documents)
        warehouse = Warehouse(run.warehouse)
        measured.append(warehouse.read_layer_stats(run.run_id))
    of_long, of_all = measured
    assert_equal_stats(of_all, of_long)


class Interfering(LocalExecutor):
    """An executor whose results are real, and arrive in an unusual way."""

    def __init__(self, interference: str) -> None:
        super().__init__(Settings())
        self.interference = interference
        self.asked: list[int] = []

    def run(self, runs: Submissions[RunShards]) -> Iterator[Outcome]:  # type: ignore[override]
        for run in runs:
            self.asked = [shard.shard_id for shard in run.shards]
            results = list(super().run(Submissions.of([run])))
            if self.interference == "backwards":
                yield from reversed(results)
            elif self.interference == "twice":
                for result in results:
                    yield result
                    yield results[0]
                    yield result
            elif self.interference == "crash":
                yield from results[1:4]
                raise RuntimeError("the machine is on fire")
            elif self.interference == "interrupt":
                yield from results[2:5]
                raise KeyboardInterrupt
            else:
                yield from results


class Failing(LocalExecutor):
    """An executor that fails to measure any run."""

    def run(self, runs: Submissions[RunShards]) -> Iterator[Outcome]:  # type: ignore[override]
        for run in runs:
            yield run, RunFailed("No memory.", "Close other programs.")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avss_dist.runs.scoring.open_executor", lambda *_: Failing(Settings()))


def score_twice(model: Path, out: Path, **changes: Any) -> list[avss_dist.Run]:
    """Score a model and a copy of it, which is the same run."""
    copy = shutil.copytree(model, out / "copy" / model.name)
    return avss_dist.score_all([str(model), str(copy)], warehouse=out / "w", **{**SMALL, **changes})


@pytest.mark.usefixtures("failing")
def test_a_repeat_of_a_run_that_fails_fails_with_the_same_error(tiny_llama: Path, tmp_path: Path) -> None:
    runs = score_twice(tiny_llama, tmp_path)
    assert len(runs) == 2
    for run in runs:
        assert run.status == "failed"
        assert run.error == "No memory.\nClose other programs."


@pytest.mark.usefixtures("failing")
def test_a_repeat_of_a_run_that_fails_adds_no_row(tiny_llama: Path, tmp_path: Path) -> None:
    first, second = score_twice(tiny_llama, tmp_path)
    assert first.run_id == second.run_id
    assert Warehouse(tmp_path / "w").runs()["run_id"].to_pylist() == [first.run_id]


def test_a_repeat_of_a_run_that_fails_has_an_error_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    specs = [run_spec(tiny_llama, **SMALL) for _ in range(2)]
    with closing(Failing(Settings())) as executor:
        driver = Driver(Store(tmp_path), executor, ignore)
        (_, first), (_, second) = driver.run(specs)
    assert isinstance(first, AvssError)
    first.add_note("a note")
    assert not hasattr(second, "__notes__")


@pytest.mark.usefixtures("failing")
def test_a_score_that_fails_leaves_no_thread(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as failed:
        score(tiny_llama, tmp_path)
    assert failed.value.run_id is not None
    assert threads_of_drivers() == []


def test_a_repeat_of_a_run_that_is_done_is_skipped(tiny_llama: Path, tmp_path: Path) -> None:
    first, second = score_twice(tiny_llama, tmp_path, max_sequences=4)
    assert first.status == "done"
    assert second.status == "skipped"


# Rows of old failures that are damaged


def damage_row(out: Path, run_id: str) -> None:
    (file,) = (out / "runs" / f"run_id={run_id}").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.nightly
@pytest.mark.parametrize("fresh", [False, True])
def test_a_damaged_row_of_a_failure_is_replaced_by_that_of_the_next_attempt(
    fresh: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avss_dist.runs.scoring.open_executor", lambda *_: Failing(Settings()))
        (failed, _) = score_twice(tiny_llama, tmp_path)
    warehouse = tmp_path / "w"
    damage_row(warehouse, failed.run_id)
    run = score(tiny_llama, warehouse, fresh=fresh)
    assert run.run_id == failed.run_id
    assert run.status == "done"
    assert Warehouse(warehouse).runs()["status"].to_pylist() == ["done"]


@pytest.mark.nightly
@pytest.mark.parametrize("fresh", [True, False])
def test_a_damaged_row_of_a_failure_stops_no_other_run(fresh: bool, tiny_llama: Path, tmp_path: Path) -> None:
    models = [str(tmp_path / "gone"), str(tiny_llama)]
    out = tmp_path / "w"
    sizes = {**SMALL, "max_sequences": 4}
    failed, _ = avss_dist.score_all(models, warehouse=out, **sizes)
    damage_row(out, failed.run_id)
    runs = avss_dist.score_all(models, warehouse=out, **sizes, fresh=fresh)
    assert [run.status for run in runs] == ["failed", "done" if fresh else "skipped"]
    assert sorted(Warehouse(out).runs()["status"].to_pylist()) == ["done", "failed"]


@pytest.mark.nightly
def test_a_damaged_row_of_a_done_run_is_made_again_from_its_shards(tiny_llama: Path, tmp_path: Path) -> None:
    done = score(tiny_llama, tmp_path)
    damage_row(tmp_path, done.run_id)
    again = score(tiny_llama, tmp_path)
    assert again.status == "done"
    assert again.resumed_shards == done.num_shards


@pytest.mark.parametrize("interference", ["backwards", *nightly("twice")])
def test_order_and_duplicates_do_not_matter(
    interference: str, tiny_llama: Path, undisturbed: Path, tmp_path: Path
) -> None:
    events: list[RunEvent] = []
    drive(tiny_llama, tmp_path, Interfering(interference), events.append)
    assert_same_tables(tmp_path, undisturbed)
    assert sum(isinstance(event, ShardMeasured) for event in events) == 6


@pytest.mark.parametrize(
    ("interference", "error", "missing"), [("crash", RunFailed, [0, 4, 5]), ("interrupt", KeyboardInterrupt, [0, 1, 5])]
)
def test_a_broken_run_goes_on_where_it_stopped(
    interference: str,
    error: type[BaseException],
    missing: list[int],
    tiny_llama: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error):
        drive(tiny_llama, tmp_path, Interfering(interference))
    rows = run_rows(tmp_path) if interference == "crash" else []
    assert [row["status"] for row in rows] == (["failed"] if interference == "crash" else [])
    assert all("on fire" in row["error"] for row in rows)
    executor = Interfering("plain")
    run = drive(tiny_llama, tmp_path, executor)
    assert run.resumed_shards == 3
    assert executor.asked == missing
    assert_same_tables(tmp_path, undisturbed)
    assert [row["status"] for row in run_rows(tmp_path)] == ["done"]


def test_a_done_run_is_not_repeated(tiny_llama: Path, undisturbed: Path) -> None:
    before = measured_files(undisturbed)
    executor = Interfering("plain")
    assert drive(tiny_llama, undisturbed, executor).status == "skipped"
    assert executor.asked == []
    assert measured_files(undisturbed) == before


def test_all_measured_but_not_committed_needs_no_model(
    tiny_llama: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that died after the last shard: the partials alone make the run."""
    score(tiny_llama, tmp_path)
    for name in ("runs", "scores", "layer_stats"):
        next((tmp_path / name).rglob("*.parquet")).unlink()
    monkeypatch.setattr(work, "open_replica", lambda *_: pytest.fail("the model was opened"))
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
    usual = plan(tiny_llama, tmp_path, **SMALL)
    changed = plan(tiny_llama, tmp_path, **{**SMALL, **change})
    assert usual.run_id != changed.run_id


def test_what_cannot_change_a_number_is_the_same_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama.parent)

    def id_with(model: Path = tiny_llama, **changes: Any) -> str:
        return plan(model, tmp_path, **SMALL | changes).run_id

    usual = id_with()
    assert id_with(dtype="float32", device="cpu") == usual
    assert id_with(replicas=1, executor="auto") == usual
    assert id_with(partition="streaming") == usual
    assert id_with(Path(tiny_llama.name)) == usual
    first = tmp_path / "one.txt"
    first.write_text("In the beginning was the word. " * 200)
    copy = tmp_path / "two.txt"
    shutil.copy(first, copy)
    of_text = id_with(corpus=str(first))
    assert id_with(corpus=str(copy)) == of_text
    assert of_text != usual


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (Placement(), "46c166172082926a7381409fde6766fe9832e677dfaf843a7559c9e7d80c0537"),
        (
            Placement(partition="tensor_parallel", ranks=2),
            "bb4c7c1faa89180cea00570fa6aa729c3f85896fb79a84c2ebd88932510dc6fc",
        ),
    ],
)
def test_a_run_has_the_fingerprint_that_warehouses_know(placement: Placement, expected: str) -> None:
    """A value that changes renames every run: all of them would be measured again."""
    assert planner.run_fingerprint(CHECKPOINT, LlamaConfig(), CORPUS, PINNED, placement) == expected


def test_runs_whose_sublayers_were_measured_elsewhere_have_another_fingerprint() -> None:
    """Before a norm, by earlier versions."""
    assert fingerprint_of(LlamaConfig(), PINNED) != fingerprint_of(Gemma2Config(), PINNED)


def fingerprint_of(config: PretrainedConfig, settings: Settings) -> str:
    return planner.run_fingerprint(CHECKPOINT, config, CORPUS, settings, Placement())


def test_runs_without_sublayers_keep_their_fingerprint() -> None:
    settings = replace(PINNED, sites=("block", "update"))
    assert fingerprint_of(LlamaConfig(), settings) == fingerprint_of(Gemma2Config(), settings)


def test_an_evaluation_has_the_id_that_warehouses_know() -> None:
    """A value that changes renames every evaluation: all of them would be measured again."""
    task = Task(name="t", parts=(KeyedMeasure(),))
    planned = PlannedTask(checkpoint=CHECKPOINT, settings=PINNED, task=task, placement=Placement())
    assert planned.run_id() == "org-tiny-6c4a4b1dbf"


@pytest.mark.nightly
def test_shards_are_merged_in_blocks_when_there_are_many(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More shards than blocks: the totals stay, only the units of intervals are coarser."""
    fine_folder = tmp_path / "fine"
    score(tiny_llama, fine_folder, sequences_per_shard=1)
    monkeypatch.setattr("avss_dist.runs.merging.BOOTSTRAP_BLOCKS", 4)
    coarse_folder = tmp_path / "coarse"
    score(tiny_llama, coarse_folder, sequences_per_shard=1)
    fine = Warehouse(fine_folder).scores()
    coarse = Warehouse(coarse_folder).scores()
    for name in ("count", "rank"):
        assert fine[name].equals(coarse[name])
    for name in ("near_zero_count", "variance", "avss_smoothed"):
        expected = coarse[name].to_numpy().astype(float)
        np.testing.assert_allclose(fine[name].to_numpy().astype(float), expected, rtol=1e-12)
    assert not fine["avss_low"].equals(coarse["avss_low"])


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
    assert row["versions"]["avss_dist"] == avss_dist.__version__
    assert row["versions"]["torch"]
    assert row["tokens_per_second"] > 0
    assert row["peak_memory_bytes"] > 1e8
    assert row["threads"] >= 1
    assert row["fingerprint"].startswith(row["run_id"][-10:])


def test_a_mistake_that_concerns_all_models_stops_at_once(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    options = SMALL | {"corpus": "nothing.txt", "warehouse": tmp_path / "w"}
    with pytest.raises(AvssError, match="no such file"):
        avss_dist.score_all([str(tiny_llama), str(tiny_bert)], **options)
    with pytest.raises(ConfigError, match="max_sequences"):
        avss_dist.score(tiny_llama, warehouse=tmp_path, corpus="builtin:pydoc", max_sequence=3)


# The seeded tiny Llama in float32 at |x| < 0.1: pooled variance, near-zero count, smoothed AVSS.
GOLDEN = [(1.245596e-04, 11264, 0.714326), (1.558122e-04, 11264, 0.893554), (2.426562e-04, 11258, 1.392329)]


def test_golden_scores(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i * i % 1009}" for i in range(400)), encoding="utf-8")
    warehouse = tmp_path / "w"
    score(tiny_llama, warehouse, corpus=str(text))
    rows = Warehouse(warehouse).sql(
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


OPTIONS: dict[str, Any] = {"corpus": "builtin:pydoc", "sequence_length": 64, "batch_size": 2, "partition": "single"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("length", [256, 2048])
@pytest.mark.parametrize("billions", [0.1, 0.5, 1.5, 8, 70])
def test_a_shard_is_about_a_minute_of_a_usual_device(billions: float, length: int, device: str) -> None:
    """It is a batch if that is longer, and has hidden states of at most four GiB."""
    settings = Settings(sequence_length=length, device=device)
    size = llama_like(billions)
    rows = rows_per_shard(size, settings, 1 << 30)
    speed = (FLOPS_OF_A_GPU if device == "cuda" else FLOPS_OF_A_THREAD)[2]
    seconds = size.forward_flops(rows, length) / speed
    assert rows / 8 in [2**k for k in range(20)]
    assert seconds <= MOST_SECONDS or rows == 8
    assert seconds > MOST_SECONDS / 2 or size.hidden_bytes(2 * rows, length) > 4 << 30
    assert rows_per_shard(replace(size, dtype="float32"), settings, 1 << 30) in (rows // 16, rows // 8, rows // 2, 8)


@pytest.mark.parametrize("batch_size", [1, 6, 8, 64])
@pytest.mark.parametrize("num_sequences", [1, 5, 15, 16, 17, 63, 160, 1000, 4096, 100_000])
def test_a_text_gives_enough_shards_for_intervals(num_sequences: int, batch_size: int) -> None:
    for size in (None, llama_like(0.1), llama_like(70)):
        rows = rows_per_shard(size, Settings(batch_size=batch_size, device="cpu"), num_sequences)
        assert rows >= 1
        assert -(-num_sequences // rows) >= min(num_sequences, FEWEST_SHARDS)
        assert rows < batch_size or rows % batch_size == 0
        assert rows >= min(batch_size, num_sequences // FEWEST_SHARDS)


def test_a_run_keeps_its_shards_however_it_is_made(tiny_llama: Path, tmp_path: Path) -> None:
    """The partition does not matter, nor whether the size is given."""
    options = {**OPTIONS, "max_sequences": 100}
    planned = plan(tiny_llama, tmp_path, **options)
    assert planned.result.num_shards == 25
    assert planned.replica_spec.settings.sequences_per_shard == 4
    for changes in ({"partition": "streaming"}, {"sequences_per_shard": 4}, {"partition": "auto"}):
        assert plan(tiny_llama, tmp_path, **{**options, **changes}).run_id == planned.run_id
    other = plan(tiny_llama, tmp_path, **options, sequences_per_shard=32).result
    assert other.num_shards == 4
    assert other.run_id != planned.run_id


def test_models_of_one_tokenizer_share_the_tokens_and_not_the_shards(
    tiny_llama: Path, save_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = save_checkpoint(llama(hidden_size=64, intermediate_size=512), tmp_path / "wide")
    small = Settings(sequence_length=64, batch_size=2, device="cpu")
    flops = footprint(checkpoint_at(tiny_llama), small).forward_flops(9, 64)
    monkeypatch.setattr(planner, "FLOPS_OF_A_THREAD", {4: flops / MOST_SECONDS})  # nine rows of the small model
    read: list[str] = []
    tokenize = planner.tokenize_corpus

    def spy(source: str, *arguments: Any) -> Any:
        read.append(source)
        return tokenize(source, *arguments)

    monkeypatch.setattr(planner, "tokenize_corpus", spy)
    planning = planner.Planner(LocalExecutor(small), Store(tmp_path))
    specs = [run_spec(model, **OPTIONS, max_sequences=320) for model in (tiny_llama, wide)]
    assert [planning.prepare(spec).result.num_shards for spec in specs] == [40, 160]
    assert read == ["builtin:pydoc"]


def test_the_log_of_runs_has_a_line_for_each_step_and_one_in_half_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = SimpleNamespace(now=100.0)
    run = Run(run_id="r", model="m", warehouse="w", status="done")
    seen: list[events.RunEvent] = []
    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: clock.now))
    placement: Any = SimpleNamespace(partition="streaming", why="it does not fit")
    tell = events.both(seen.append, events.LogRuns())
    with caplog.at_level("INFO", "avss_dist"):
        tell(events.RunReading("m"))
        tell(events.RunStarted("m", 10, 1, placement))
        for clock.now, tokens in ((129.0, 2), (130.0, 3), (159.0, 1), (160.0, 1)):
            tell(events.ShardMeasured("m", tokens))
        tell(events.RunEnded("n", run, "m"))
        tell(events.RunEnded("m", replace(run, status="failed", error="no memory")))
    lines = ["m: streaming; it does not fit."]
    lines += ["m: 60% of 10 tokens, 10 tokens/min, 24 s left", "m: 80% of 10 tokens, 7 tokens/min, 17 s left"]
    lines += ["n: the same model, text and settings as m; measured once.", "n done", "m failed: no memory"]
    assert [record.getMessage() for record in caplog.records] == lines
    assert len(seen) == 8


RUN = RunIdentity(run_id="r", model="m", revision="main", family="llama")
NUMBER = 5
HASHES = {i: f"hash{i}" for i in range(NUMBER)}


def layer_names(i: int) -> tuple[str, ...]:
    return tuple(f"layers.{layer} of {i}" for layer in range(len(SCALES)))


def shard(i: int) -> ShardResult:
    model = {"family": "llama", "notes": [f"note {i // 2}"], "last": i}
    (stats_of_shard,) = stats_of(activations(i, shards=1))
    return ShardResult(
        shard_id=i,
        content_hash=HASHES[i],
        layers=layer_names(i),
        strata={(*key, ""): stats for key, stats in stats_of_shard.items()},
        seconds=1.5,
        device=f"device {i}",
        model=model,
        peak_memory_bytes=[10, 50, 20, 40, 30][i],
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Five partials, in blocks of two."""
    monkeypatch.setattr(merging, "BOOTSTRAP_BLOCKS", 3)
    empty_store = Store(tmp_path / "w")
    for i in range(NUMBER):
        write_shard(empty_store, RUN, shard(i))
    return empty_store


def assert_whole(merged: Merged, summary: ShardSummary) -> None:
    expected = merge_blocks([shard(i) for i in range(NUMBER)], 3)
    assert len(merged.blocks) == 3
    assert len(expected.blocks) == 3
    assert_equal_stats(merged.stats, expected.stats)
    for block, wanted in zip(merged.blocks, expected.blocks, strict=True):
        assert_equal_stats(block, wanted)
    assert summary == ShardSummary(
        layers=layer_names(4),
        model={"family": "llama", "notes": ["note 0", "note 1", "note 2"], "last": 4},
        device="device 4",
        peak_memory_bytes=50,
        seconds=7.5,
    )


class Elsewhere:
    """Applies pickled functions to pickled items, as workers do; those that do not see the warehouse return None."""

    def __init__(self, blind: Sequence[int] = ()) -> None:
        self.blind = blind
        self.items = 0
        self.merged = 0

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        for i, item in enumerate(items):
            self.items += 1
            sent, place = pickle.loads(pickle.dumps((function, item)))
            result = None if i in self.blind else sent(place)
            self.merged += result is not None
            yield pickle.loads(pickle.dumps(result))


def test_partials_are_merged_in_blocks(store: Store) -> None:
    assert_whole(*merge_partials(store, "r", HASHES, share(store, "r"), map))
    first = ShardSummary()
    first.add(shard(1))
    assert first.seconds == 1.5
    assert first.peak_memory_bytes == 50


@pytest.mark.parametrize("blind", [(), (1,), (0, 2)])
def test_who_merges_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, blind: Sequence[int]) -> None:
    """Where a worker does not find the warehouse, its block is merged here."""
    monkeypatch.setattr(merging, "MERGED_HERE", NUMBER - 1)
    apply = Elsewhere(blind)
    assert_whole(*merge_partials(store, "r", HASHES, share(store, "r"), apply))
    assert apply.items == 3
    assert apply.merged == 3 - len(blind)


def test_blocks_are_merged_here_where_workers_see_no_warehouse_or_shards_are_few(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers may see another file, or none, where the driver has written the plan of the run."""
    other = share(store, "r")
    gone = share(store, "x")
    seen = share(store, "r")
    store.delete_unfinished_run("x")
    for place, few, number in ((other, 0, 3), (gone, 0, 3), (seen, NUMBER, 0)):
        monkeypatch.setattr(merging, "MERGED_HERE", few)
        apply = Elsewhere()
        assert_whole(*merge_partials(store, "r", HASHES, place, apply))
        assert apply.items == number
        assert apply.merged == 0


@pytest.mark.parametrize("gone", range(NUMBER))
def test_a_partial_that_is_gone_or_of_other_text_is_named(store: Store, tmp_path: Path, gone: int) -> None:
    message = f"The partial of shard {gone} is damaged or missing"
    with pytest.raises(RunFailed, match=message):
        merge_partials(store, "r", {**HASHES, gone: "of other text"}, share(store, "r"), map)
    (file,) = (tmp_path / "w").rglob(f"shard-0000{gone}.parquet")
    file.unlink()
    with pytest.raises(RunFailed, match=message):
        merge_partials(store, "r", HASHES, share(store, "r"), map)


def test_a_stored_run_is_read_without_torch() -> None:
    code = "import avss_dist, sys; avss_dist.Run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
