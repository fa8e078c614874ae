"""Quantized weights that compute as stored on a GPU: the run records the modules and kernels that did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import llama, save_tokenizer
from support.quantized import block_fp8

import avss_dist

BLOCK = 128  # of FP8, for which there are kernels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("partition", ["single", "device_map"])
def test_a_run_records_what_computed(partition: str, tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path / "model")
    llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2).save_pretrained(model)
    warehouse = tmp_path / "w"
    run = avss_dist.score(
        block_fp8(model, tmp_path / "fp8", BLOCK),
        corpus="builtin:pydoc",
        warehouse=warehouse,
        device="cuda",
        partition=partition,
        max_sequences=8,
    )
    row = avss_dist.Warehouse(warehouse).run(run.run_id)
    assert row is not None
    assert row["quantized_modules"].startswith("FP8Linear x 14 of transformers.integrations.finegrained_fp8; kernels: ")
