"""Jobs over checkpoints of one shape: one module takes the weights of all, and tables are those of fresh workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import weights_in
from support.planning import run_spec
from support.tables import assert_same_tables

import avss_dist
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint import loading, locate
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.runs.local import LocalExecutor
from avss_dist.runs.planner import Planner
from avss_dist.warehouse.store import Store

OPTIONS: dict[str, Any] = {
    "corpus": "builtin:pydoc",
    "max_sequences": 8,
    "sequence_length": 32,
    "batch_size": 2,
    "sequences_per_shard": 4,
    "device": "cpu",
    "partition": "single",
}


def scaled(source: Path, folder: Path, factor: float, dtype: torch.dtype | None = None) -> Path:
    """Write a checkpoint of the same shape, whose weights are those of another one times a factor."""
    shutil.copytree(source, folder)
    weights = {name: (tensor * factor).to(dtype or tensor.dtype) for name, tensor in weights_in(source).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def training(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of one shape, the last of them stored in another dtype."""
    folder = tmp_path_factory.mktemp("training")
    return [
        scaled(tiny_llama, folder / "step1", 1.0),
        scaled(tiny_llama, folder / "step2", 1.1),
        scaled(tiny_llama, folder / "step3", 1.3, torch.bfloat16),
    ]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints that transformers has loaded."""
    names: list[str] = []
    load_model = loading.load_model

    def note(checkpoint: Checkpoint, *args: Any, **options: Any) -> Any:
        names.append(Path(checkpoint.name).name)
        return load_model(checkpoint, *args, **options)

    monkeypatch.setattr(loading, "load_model", note)
    return names


def score_all(models: list[Path], warehouse: Path, **changes: Any) -> list[Any]:
    return avss_dist.score_all(models, warehouse=warehouse, **{**OPTIONS, "executor": "local", **changes})


def score_alone(models: list[Path], warehouse: Path, **changes: Any) -> None:
    """Score each model by a worker of its own."""
    for model in models:
        score_all([model], warehouse, **changes)


def test_tables_of_one_module_are_those_of_fresh_workers(
    training: list[Path], tmp_path: Path, loaded: list[str]
) -> None:
    score_all(training, tmp_path / "together")
    assert loaded == ["step1"]
    score_alone(training, tmp_path / "alone")
    assert_same_tables(tmp_path / "together", tmp_path / "alone")


@pytest.mark.nightly
def test_a_checkpoint_of_another_shape_in_between_is_loaded_anew(
    training: list[Path], tiny_bert: Path, tmp_path: Path, loaded: list[str]
) -> None:
    models = [training[0], tiny_bert, training[1], training[2]]
    score_all(models, tmp_path / "together")
    assert loaded == ["step1", tiny_bert.name, "step2"]
    score_alone(models, tmp_path / "alone")
    assert_same_tables(tmp_path / "together", tmp_path / "alone")


@pytest.mark.nightly
def test_the_run_after_one_that_cannot_be_read_has_a_new_module(
    training: list[Path], tmp_path: Path, loaded: list[str]
) -> None:
    """The weights of the first layers were read when the file with the others turns out to be too short."""
    broken = scaled(training[0], tmp_path / "broken", 2.0)
    file = broken / "model.safetensors"
    weights = weights_in(broken)
    names = sorted(weights)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    index = {}
    for part, names_of_part in parts.items():
        save_file({name: weights[name] for name in names_of_part}, broken / part, {"format": "pt"})
        index |= dict.fromkeys(names_of_part, part)
    file.unlink()
    (broken / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (broken / "b.safetensors").write_bytes((broken / "b.safetensors").read_bytes()[:-8])
    runs = score_all([training[0], broken, training[1]], tmp_path / "together")
    assert [run.status for run in runs] == ["done", "failed", "done"]
    assert loaded == ["step1", "broken", "step2"]
    score_alone(training[:2], tmp_path / "alone")
    assert_same_tables(tmp_path / "together", tmp_path / "alone")


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_a_worker_on_ray_keeps_the_module(training: list[Path], tmp_path: Path) -> None:
    score_all(training, tmp_path / "together", executor="ray", replicas=1)
    score_alone(training, tmp_path / "alone")
    assert_same_tables(tmp_path / "together", tmp_path / "alone")


@pytest.mark.nightly
def test_tables_are_those_of_separate_processes(
    training: list[Path], tmp_path: Path, run_avss: Callable[..., Any]
) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    score_all(training, tmp_path / "together")
    for model in training:
        done = run_avss("score", model, "-w", tmp_path / "alone", "--executor=local", *options)
        assert done.returncode == 0, done.stderr
    assert_same_tables(tmp_path / "together", tmp_path / "alone")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the folders of weight files that were read for their hash."""
    names: list[str] = []
    digest = locate.hashlib.file_digest

    def note(stream: Any, *args: Any) -> Any:
        if stream.name.endswith(".safetensors"):
            names.append(Path(stream.name).parent.name)
        return digest(stream, *args)

    monkeypatch.setattr(locate, "CACHED_FROM", 0)
    monkeypatch.setattr(locate.hashlib, "file_digest", note)
    yield names


def test_weights_that_were_read_ahead_are_not_read_again_to_be_planned(
    training: list[Path], tmp_path: Path, hashed: list[str]
) -> None:
    own = scaled(training[0], tmp_path / "own", 1.7)
    planner = Planner(LocalExecutor(Settings()), Store(tmp_path / "w"))
    planner.read_ahead(run_spec(own, **OPTIONS))
    assert hashed == ["own"]
    planner.prepare(run_spec(own, **OPTIONS))
    assert hashed == ["own"]


def test_a_checkpoint_that_cannot_be_read_ahead_raises_nothing(tmp_path: Path) -> None:
    planner = Planner(LocalExecutor(Settings()), Store(tmp_path / "w"))
    planner.read_ahead(run_spec(tmp_path / "absent", **OPTIONS))
