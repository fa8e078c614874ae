"""Logit lens, shapes of hidden states and spectra of weights, against plain transformers, numpy and scipy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.checkpoints import llama
from support.command_line import avss
from support.families import lively, tiny_model

import avss_dist
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer
from avss_dist.partition.single import SingleReplica
from avss_dist.stats.power_law import ks_exponent
from avss_dist.tasks.lens import GAIN, KURTOSIS, LARGEST, LARGEST_FIRST, RANK, SETTLES, Lens
from avss_dist.tasks.spectra import ALPHA, Spectra

pytestmark = pytest.mark.nightly

SETTINGS = Settings(sequence_length=24, batch_size=4, dtype="float32", device="cpu", max_sequences=6)
Save = Callable[[Any, Path], Path]


def rows_of(folder: Path, measure: Any = None) -> dict[tuple[str, int], Any]:
    checkpoint = resolve(str(folder))
    (shard,) = tokenize_corpus("builtin:pydoc", load_tokenizer(checkpoint), SETTINGS).shards
    with closing(SingleReplica(checkpoint, SETTINGS, head=True)) as replica:
        assert replica.language_model is not None
        rows = (measure or Lens(shard))(replica.language_model)
    return {(row.metric, row.layer): row for row in rows}


def value(row: Any) -> float:
    return float(row.samples.sum() / row.weights.sum())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_lens_is_norm_and_head_on_the_output_of_each_layer(
    family: str, tmp_path: Path, save_checkpoint: Save
) -> None:
    model = lively(tiny_model("causal", family)).eval()
    folder = save_checkpoint(model, tmp_path / "model")
    rows = rows_of(folder)
    (shard,) = tokenize_corpus("builtin:pydoc", load_tokenizer(resolve(str(folder))), SETTINGS).shards
    ids = torch.from_numpy(shard.input_ids).long()
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states  # the last is after the norm
        logits = [*(model.lm_head(final_norm(model)(x)) for x in states[:-1]), model.lm_head(states[-1])]
        logits = [capped(model, one) for one in logits]
        losses = [
            torch.nn.functional.cross_entropy(one[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() for one in logits
        ]
    gains = [value(rows[GAIN, layer]) for layer in range(layers)]
    assert gains == pytest.approx([losses[i] - losses[i + 1] for i in range(layers)], abs=2e-4)
    tops = torch.stack([one[:, :-1].argmax(-1) for one in logits])
    agree = (tops == tops[-1]).numpy()
    settled = np.logical_and.accumulate(agree[::-1], axis=0)[::-1]  # from this point on
    expected = [float((settled[i + 1] & ~settled[i]).mean()) for i in range(layers)]
    assert [value(rows[SETTLES, layer]) for layer in range(layers)] == pytest.approx(expected, abs=1e-9)
    assert sum(expected) == pytest.approx(1 - settled[0].mean())


def final_norm(model: Any) -> Any:
    return getattr(model.base_model, "norm", None) or model.base_model.ln_f


def capped(model: Any, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if not cap else cap * torch.tanh(logits / cap)


def test_shapes_are_those_of_scipy_and_numpy(tmp_path: Path, save_checkpoint: Save) -> None:
    model = lively(llama()).eval()
    folder = save_checkpoint(model, tmp_path / "model")
    rows = rows_of(folder)
    (shard,) = tokenize_corpus("builtin:pydoc", load_tokenizer(resolve(str(folder))), SETTINGS).shards
    with torch.no_grad():
        states = model(torch.from_numpy(shard.input_ids).long(), output_hidden_states=True).hidden_states
    for layer, hidden in enumerate(states[:-1]):
        x = hidden.double().numpy()
        assert value(rows[KURTOSIS, layer]) == pytest.approx(stats.kurtosis(x, axis=2, fisher=False).mean(), rel=1e-4)
        largest = np.abs(x).max(axis=2) / np.sqrt((x**2).mean(axis=2))
        assert value(rows[LARGEST, layer]) == pytest.approx(largest.mean(), rel=1e-4)
        assert value(rows[LARGEST_FIRST, layer]) == pytest.approx(largest[:, 0].mean(), rel=1e-4)
        singular = np.linalg.svd(x - x.mean(axis=1, keepdims=True), compute_uv=False)
        ranks = np.exp(stats.entropy(singular, axis=1))
        assert rows[RANK, layer].samples == pytest.approx(ranks, rel=1e-3)


def test_spectral_alpha_is_the_mean_exponent_of_the_matrices(tmp_path: Path, save_checkpoint: Save) -> None:
    model = llama()
    rows = rows_of(save_checkpoint(model, tmp_path / "model"), Spectra())
    for layer, module in enumerate(model.model.layers):
        matrices = [p.detach().double().numpy() for p in module.parameters() if p.dim() == 2]
        exponents = [ks_exponent(np.linalg.eigvalsh(w.T @ w if w.shape[0] > w.shape[1] else w @ w.T)) for w in matrices]
        assert value(rows[ALPHA, layer]) == pytest.approx(1 - np.mean(exponents), rel=1e-3)


def test_a_planted_useless_layer_gains_nothing(tmp_path: Path, save_checkpoint: Save) -> None:
    model = lively(llama(num_hidden_layers=4))
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        torch.nn.init.zeros_(linear.weight)
    rows = rows_of(save_checkpoint(model, tmp_path / "model"))
    assert value(rows[GAIN, 2]) == 0 and value(rows[SETTLES, 2]) == 0
    assert all(value(rows[GAIN, layer]) != 0 for layer in (0, 1, 3))


def test_the_command_stores_scores_that_plans_and_score_cards_use(tiny_llama: Path, tmp_path: Path) -> None:
    warehouse = tmp_path / "w"
    sizes = ["--corpus", "builtin:pydoc", "--max-sequences", 8, "--sequence-length", 32, "--executor", "local"]
    assert avss("score", tiny_llama, *sizes, "-w", warehouse).exit_code == 0
    done = avss("ablate", tiny_llama, *sizes, "-w", warehouse, "--lens", "--spectra")
    assert done.exit_code == 0 and "lens gain" in done.stdout and "spectral alpha" in done.stdout
    plan = avss("plan", "-w", warehouse, "--by", "lens_gain", "--count", 1, "-o", tmp_path / "plan.yaml")
    assert plan.exit_code == 0, plan.stderr
    cards = avss("scorecard", "-w", warehouse, "--format", "csv").stdout
    scored = ("lens_gain", "lens_settles", "effective_rank", "kurtosis", "largest_unit", "spectral_alpha")
    assert all(name in cards for name in scored)
    again = avss_dist.ablate(
        tiny_llama, corpus="builtin:pydoc", warehouse=warehouse, max_sequences=8, sequence_length=32, executor="local",
        leave_one_out=False, lens=True,
    )  # fmt: skip
    assert again.table()["lens_gain"].null_count == 0


def test_partitions_that_do_not_hold_all_layers_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    done = avss("ablate", tiny_llama, "--corpus", "builtin:pydoc", "-w", tmp_path, "--lens", "--partition", "streaming")
    assert done.exit_code == 2 and "which the logit lens needs" in done.stderr and "single" in done.stderr
