"""Language models with a vision tower, read as text: evaluated as transformers does, and pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import VOCABULARY
from support.command_line import avss
from support.families import LAYERS, tiny_batch, tiny_model

from avss_dist.corpus.shards import Batch
from avss_dist.models.checkpoints import resolve
from avss_dist.partition.base import Placement
from avss_dist.partition.open import open_replica
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.plan import Plan
from avss_dist.settings import Settings

FAMILIES = ("gemma3", "gemma4", "qwen2_5_vl", "smolvlm")  # whose files and modules differ in their names
Save = Callable[[Any, Path], Path]


def own_losses(model: Any, ids: torch.Tensor) -> np.ndarray:
    """The summed loss of each row, by transformers alone."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    chosen = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None])
    losses: np.ndarray = -chosen.sum(dim=(1, 2)).numpy()
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_tower_is_evaluated_and_pruned(family: str, save_checkpoint: Save, tmp_path: Path) -> None:
    model = tiny_model("image-text", family)
    folder, less = save_checkpoint(model, tmp_path / family), tmp_path / "less"
    ids = tiny_batch()
    real = np.ones(ids.shape, bool)
    batch = Batch(input_ids=ids.numpy().astype(np.int32), attention_mask=real, observed=real)
    replica = open_replica(resolve(str(folder)), Settings(device="cpu"), Placement(), head=True)
    assert replica.language_model is not None
    whole, without = replica.language_model.losses_without([batch], [(), (1,)])
    np.testing.assert_allclose(whole, own_losses(model, ids), rtol=1e-5)
    layers = replica.layers[0].name.rpartition(".")[0]
    replica.close()

    done = prune(str(folder), Plan(model=str(folder), num_layers=LAYERS, layers=layers, drop=(1,)), less)
    assert done["difference"] == 0
    pruned = open_replica(resolve(str(less)), Settings(device="cpu"), Placement(), head=True)
    assert pruned.language_model is not None and len(pruned.layers) == LAYERS - 1
    np.testing.assert_allclose(pruned.language_model.losses_without([batch], [()])[0], without, rtol=1e-6)
    pruned.close()
    before, after = load_file(folder / "model.safetensors"), load_file(less / "model.safetensors")
    kept = {name for name in before if "vision" in name or "project" in name or "connector" in name or "visual" in name}
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_from_scores_to_a_pruned_checkpoint(save_checkpoint: Save, tmp_path: Path) -> None:
    model = tiny_model("image-text", "gemma3")
    model.resize_token_embeddings(VOCABULARY)
    folder = save_checkpoint(model, tmp_path / "gemma3")
    warehouse, plan = tmp_path / "warehouse", tmp_path / "plan.yaml"
    small = ("--sequence-length", "32", "--max-sequences", "2", "--executor", "local")
    done = avss("score", folder, "--corpus", "builtin:pydoc", "-w", warehouse, *small)
    assert done.exit_code == 0, done.stderr
    assert avss("plan", "-w", warehouse, "--by", "block_influence", "--count", "1", "-o", plan).exit_code == 0
    text = tmp_path / "held_out.txt"
    text.write_text("Layers of a language model that reads images, too. " * 40)
    done = avss("evaluate", plan, "--task", f"perplexity:{text}", "--warehouse", warehouse, *small)
    assert done.exit_code == 0, done.stderr
    done = avss("prune", folder, plan, "-o", tmp_path / "less")
    assert done.exit_code == 0 and "(largest difference 0)" in done.stdout, done.stderr
