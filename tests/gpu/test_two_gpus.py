"""Replicas of two GPUs, which talk over NCCL, and streaming on one GPU measure what one resident model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.checkpoints import llama, save_tokenizer

import avss_dist

SIZES: dict[str, Any] = {"max_sequences": 32, "sequence_length": 128, "batch_size": 4, "sequences_per_shard": 8}
TOLERANCE = {"streaming": 0.0, "fsdp": 0.0, "zero3": 0.0, "device_map": 0.0, "tensor_parallel": 1e-3}
"""Tensor parallel adds up in another order."""


@pytest.mark.gpu
@pytest.mark.parametrize("partition", TOLERANCE)
def test_gpus_measure_what_one_resident_model_does(partition: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 1 + (partition != "streaming"):
        pytest.skip("needs more CUDA devices")
    model = save_tokenizer(tmp_path / "model")
    llama(hidden_size=256, intermediate_size=512, num_hidden_layers=4).save_pretrained(model)
    halves = {"device_map": {"gpus_per_replica": 2, "max_memory": {"0": "4MB"}}, "streaming": {}}
    one = scores(model, tmp_path / "one", partition="single")
    two = scores(model, tmp_path / "two", partition=partition, **halves.get(partition, {"ranks": 2}))
    for column in ("layer", "variance", "sparsity", "block_influence"):
        np.testing.assert_allclose(
            two[column], one[column], rtol=TOLERANCE[partition], atol=1e-2 * TOLERANCE[partition]
        )


def scores(model: Path, warehouse: Path, **how: Any) -> pa.Table:
    run = avss_dist.score(
        model, corpus="builtin:pydoc", warehouse=warehouse, device="cuda", executor="ray", replicas=1, **SIZES, **how
    )
    return run.table().sort_by("layer")
