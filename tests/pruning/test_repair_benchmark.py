"""The benchmark of repairs at its smallest size, and what its baselines compute, by plain transformers and numpy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.repair import BASELINES, applied, fit_baseline, hadamard, main, perplexity
from support.checkpoints import llama, one_thread
from support.families import lively

from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer
from avss_dist.partition.single import SingleReplica
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.projection import captured
from avss_dist.pruning.repair.registry import REPAIRS

pytestmark = pytest.mark.nightly

Save = Callable[[Any, Path], Path]
TEXT = "builtin:pydoc"
SETTINGS = Settings(sequence_length=32, batch_size=4, dtype="float32", device="cpu", max_sequences=120)
DROP, AFTER = (1, 4), (0, 3)


def test_the_benchmark_prints_a_row_for_every_repair(
    tmp_path: Path, save_checkpoint: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its perplexity, its cost and its meaning; a fitted matrix recovers some of the perplexity."""
    folder = save_checkpoint(lively(llama(num_hidden_layers=6)), tmp_path / "whole")
    with one_thread():
        main([str(folder), TEXT, "--drop", "1,4", "--rows", "60", "--held-out", "4", "--sequence-length", "32"])
    first, *rows = capsys.readouterr().out.splitlines()
    assert "without 2 of 6 layers, fitted on 60 rows" in first
    values = {row[:14].strip(): float(row.split("perplexity")[1].split(",")[0]) for row in rows}
    assert [*values] == ["whole model", "without them", *REPAIRS, *BASELINES]
    assert all("passes: " in row for row in rows[2:])
    assert all(value > 1 for value in values.values())
    assert max(values[name] for name in ("map", "refit", "refit_all", "replace_me")) < values["without them"]


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_is_its_formula_at_each_cut(baseline: str, tmp_path: Path, save_checkpoint: Save) -> None:
    """As plain transformers computes it with hooks; the second cut sees the first one's matrix."""
    model = lively(llama(num_hidden_layers=6)).eval()
    checkpoint = resolve(str(save_checkpoint(model, tmp_path / "whole")))
    text = tokenize_corpus(TEXT, load_tokenizer(checkpoint), SETTINGS)
    ids = torch.from_numpy(np.concatenate([shard.input_ids for shard in text.shards])).long()
    plan = Plan(model="m", num_layers=6, layers="layers", drop=DROP)
    with one_thread(), closing(SingleReplica(checkpoint, SETTINGS, head=True)) as replica:
        opened = replica.language_model
        assert opened is not None
        matrices = fit_baseline(baseline, opened, plan, text, SETTINGS.batch_size)
        with applied(matrices):
            evaluated = perplexity(opened, text, DROP)
        assert perplexity(opened, text, DROP) != evaluated
    layers = model.model.layers
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    wanted = [states[layer + 1][:108, 1:].flatten(0, 1).double() for layer in DROP]  # a tenth of 120 rows is held back
    for layer in DROP:
        layers[layer].register_forward_hook(lambda _module, args, _output: args[0].clone())
    for after, target, matrix in zip(AFTER, wanted, matrices.values(), strict=True):
        modules = {"hidden": layers[after], "mlp": layers[after].mlp}
        with captured(modules) as calls, torch.no_grad():
            model(ids, use_cache=False)
        hidden, mlp = (calls[name].output[:108, 1:].flatten(0, 1).double() for name in modules)
        expected = formula(baseline, hidden.numpy(), mlp.numpy(), target.numpy())
        np.testing.assert_allclose(matrix.numpy(), expected, rtol=2e-3, atol=2e-4)
        changed = modules["mlp" if baseline == "replace_me" else "hidden"]
        changed.register_forward_hook(lambda _m, _a, output, matrix=matrix: (output.double() @ matrix).float())
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert evaluated == pytest.approx(float(loss.exp()), rel=1e-4)


def formula(baseline: str, hidden: Any, mlp: Any, wanted: Any) -> Any:
    """The matrix of a baseline, as its paper has it, by numpy."""
    units = np.eye(hidden.shape[1])
    if baseline == "replace_me":
        return np.linalg.lstsq(mlp, wanted - (hidden - mlp))[0]
    if baseline == "prune_comp":
        return units * np.linalg.norm(wanted, axis=1).mean() / np.linalg.norm(hidden, axis=1).mean()
    turn = walsh(len(units))
    return turn @ np.diag(np.abs(wanted @ turn).mean(0) / np.abs(hidden @ turn).mean(0)) @ turn.T


def walsh(size: int) -> Any:
    """Sylvester's matrix by its signs: the parity of the bits that row and column share."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / np.sqrt(size)


@pytest.mark.parametrize(("width", "block"), [(8, 8), (12, 4), (5, 1), (1, 1)])
def test_rotations_are_blocks_of_hadamard_matrices(width: int, block: int) -> None:
    expected = np.kron(np.eye(width // block), walsh(block))
    np.testing.assert_allclose(hadamard(width).numpy(), expected)
