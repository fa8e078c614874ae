"""Many checkpoints over one pool of Ray workers give the tables of one after the other."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from support.checkpoints import llama
from support.processes import wait_until
from support.tables import assert_same_tables

import avss_dist
from avss_dist.core.errors import ModelError
from avss_dist.executors.ray.executor import RayExecutor
from avss_dist.executors.ray.pool import Prefetcher
from avss_dist.executors.ray.worker import resolve_on_node
from avss_dist.runs.api import run_job
from avss_dist.runs.events import RunEnded, RunEvent, RunReading
from avss_dist.runs.job_file import read_job
from avss_dist.system.devices import devices_here
from avss_dist.warehouse.reader import Warehouse

SETTINGS = {"max_sequences": 48, "sequence_length": 64, "batch_size": 2, "sequences_per_shard": 8}


@pytest.fixture(scope="module")
def cluster(warm_workers: None) -> Iterator[None]:
    """One private Ray whose CPUs one replica can fill."""
    cpus = devices_here("cpu").cpus
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def models(
    tiny_bert: Path, save_checkpoint: Callable[[Any, Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Three checkpoints of one training, and a model of another family."""
    folder = tmp_path_factory.mktemp("training")
    return [*(save_checkpoint(llama(seed), folder / f"step-{seed}") for seed in (1, 2, 3)), tiny_bert]


@pytest.fixture(scope="module")
def alone(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `avss score` makes of each, one after the other in one process."""
    out = tmp_path_factory.mktemp("alone")
    for model in models:
        avss_dist.score(model, corpus="builtin:pydoc", warehouse=out, executor="local", **SETTINGS)
    return out


def job_file(folder: Path, models: list[Any]) -> Path:
    """A job of these models with two replicas."""
    file = folder / "job.yaml"
    lines = [f"warehouse: {folder}/w", "corpora: [builtin:pydoc]", "models:", *(f"- {model}" for model in models)]
    lines += ["settings:", *(f"  {name}: {value}" for name, value in SETTINGS.items())]
    lines += ["execution: {executor: ray, replicas: 2}"]
    file.write_text("\n".join(lines))
    return file


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
def test_a_sweep_gives_the_tables_of_one_by_one_with_two_processes(
    models: list[Path], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not exist and one that cannot be opened are recorded; the workers outlive them."""
    broken = shutil.copytree(models[0], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-400])
    hired: list[Any] = []
    hire = RayExecutor._new_gang
    monkeypatch.setattr(RayExecutor, "_new_gang", lambda *args: hired.append(args) or hire(*args))
    events: list[RunEvent] = []
    every = [models[0], tmp_path / "absent", models[1], broken, *models[2:]]
    runs = run_job(read_job(job_file(tmp_path, every)), on_event=events.append)
    assert [run.status for run in runs] == ["done", "failed", "done", "failed", "done", "done"]
    assert [run.model for run in runs] == [str(model) for model in every]
    assert_same_tables(tmp_path / "w", alone)
    assert len(hired) == 2
    failed = Warehouse(tmp_path / "w").sql("SELECT model, error FROM runs WHERE status = 'failed'").to_pylist()
    errors = {Path(row["model"]).name: row["error"] for row in failed}
    assert "There is no folder" in errors["absent"] and "are damaged" in errors["broken"]
    order = [(type(event), event.name) for event in events if isinstance(event, (RunReading, RunEnded))]
    assert order.index((RunReading, str(models[1]))) < order.index((RunEnded, str(models[0])))
    again = run_job(read_job(job_file(tmp_path, models)))
    assert [run.status for run in again] == ["skipped"] * 4


def test_prefetcher_prepares_one_item_while_another_is_used() -> None:
    ahead: list[int] = []
    requested = 0

    def items() -> Iterator[int]:
        for number in range(5):
            ahead.append(number - requested)
            yield number
        raise KeyError("the end")

    prefetcher = Prefetcher(items())
    for number in range(5):
        requested += 1
        assert prefetcher.next(wait=True) == number
        if number == 0:
            wait_until(lambda: len(ahead) == 2)
    assert max(ahead) == 0  # the next one alone is prepared
    with pytest.raises(KeyError, match="the end"):
        prefetcher.next(wait=True)
    assert prefetcher.exhausted and prefetcher.next(wait=True) is None


def test_a_node_fetches_what_only_the_head_has(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub checkpoint is found in the node's own cache; a folder must be on a disk that the node sees."""
    from huggingface_hub import constants

    from avss_dist.models.checkpoints import Checkpoint

    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--org--tiny" / "snapshots" / revision
    shutil.copytree(tiny_llama, cached)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    of_the_head = Checkpoint(name="org/tiny", source="hub", path="/head/cache/org--tiny", revision=revision)
    here = resolve_on_node(of_the_head)
    assert (here.path, here.revision) == (str(cached), revision)
    assert resolve_on_node(here) is here
    with pytest.raises(ModelError, match=r"'/head/tiny' does not exist on the worker node"):
        resolve_on_node(Checkpoint(name="tiny", source="folder", path="/head/tiny", revision="0"))
