"""Tasks refuse options of partitions that they would not honour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avss_dist.errors import ConfigError
from avss_dist.evaluation.ablate import ablate
from avss_dist.evaluation.evaluate import evaluate
from avss_dist.evaluation.experiment import run_experiment
from avss_dist.registry import PARTITIONS
from avss_dist.runs.job_file import read_job
from avss_dist.settings import Execution
from avss_dist.tasks.base import require_whole_model

JOB = """
corpora: [builtin:pydoc]
warehouse: {folder}
models: [{model}]
execution: {{partition: streaming}}
experiment: {{tasks: [perplexity:builtin:pydoc], shares: [0.5]}}
"""
Verb = Callable[..., Any]


@pytest.mark.parametrize("partition", ["auto", *PARTITIONS])
def test_partitions_that_evaluate_are_taken_and_others_refused(partition: str) -> None:
    if partition == "auto" or PARTITIONS[partition].evaluates:
        return require_whole_model(Execution(partition=partition))
    with pytest.raises(ConfigError, match=f"`partition` {partition} gives hidden states alone"):
        require_whole_model(Execution(partition=partition))
    return None


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"partition": "streaming"}, "`partition` streaming gives hidden states alone"),
        ({"partition": "zero3", "ranks": 2}, "`partition` zero3 gives hidden states alone"),
        ({"max_memory": {"cpu": 10**9}}, "`max_memory` has no effect"),
        ({"offload_folder": "x"}, "`offload_folder` has no effect"),
        ({"gpus_per_replica": 2}, "`gpus_per_replica` has no effect"),
    ],
)
def test_no_verb_ignores_them(option: dict[str, Any], says: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        evaluate([str(tiny_llama)], tasks=["perplexity:builtin:pydoc"], warehouse=tmp_path, **option)
    with pytest.raises(ConfigError, match=says):
        ablate(tiny_llama, corpus="builtin:pydoc", warehouse=tmp_path, **option)
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_says_so_before_it_scores(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.format(folder=tmp_path / "warehouse", model=tiny_llama))
    with pytest.raises(ConfigError, match="`partition` streaming gives hidden states alone"):
        run_experiment(read_job(str(tmp_path / "job.yaml")))
    assert not (tmp_path / "warehouse").exists()
