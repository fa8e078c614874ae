"""The error of hidden states behind each cut, against plain autograd, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import llama
from transformers import AutoModelForCausalLM

import avss_dist
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.distillation.hidden_states import CutStates, matching_layers

pytestmark = pytest.mark.nightly

SMALL: dict[str, Any] = {
    "sequence_length": 32,
    "tokens": 4 * 4 * 32,
    "self_texts": 0,
    "held_out": 4,
    "learning_rate": 3e-3,
    "evaluations": 1,
    "device": "cpu",
    "dtype": "float32",  # with auto, processors that compute fast in bfloat16 do
}


@pytest.mark.parametrize(
    ("removed", "pairs"),
    [
        ((2,), [(1, 2)]),
        ((3, 4, 5, 9), [(2, 5), (5, 9)]),
        ((0, 1), []),
        ((0, 1, 3), [(0, 3)]),
        ((6, 7), [(5, 7)]),
    ],
)
def test_each_cut_pairs_the_layer_before_it_with_the_last_removed_one(
    removed: tuple[int, ...], pairs: list[tuple[int, int]]
) -> None:
    assert [*matching_layers(removed)] == pairs


def test_value_and_gradient_are_those_of_autograd(student: Path, teacher: Path) -> None:
    """The teacher lacks layer 2 in the student, whose layer 1 is before the cut."""
    small, whole = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student, teacher))
    ids = torch.arange(1, 25).reshape(2, 12)
    counted = torch.rand(24, generator=torch.Generator().manual_seed(0)) < 0.6
    with torch.no_grad():
        expected = whole(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[3].flatten(0, 1)
    actual = small(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[2].flatten(0, 1)
    ratios = [(actual[t] - expected[t]).square().mean() / expected[t].square().mean() for t in counted.nonzero()]
    reference = torch.stack(ratios).sum()
    weight = small.model.layers[1].mlp.down_proj.weight
    (gradient,) = torch.autograd.grad(reference, weight)
    states = CutStates(small, whole, (2,), Settings())
    with torch.no_grad():
        whole(input_ids=ids, use_cache=False)
    small(input_ids=ids, use_cache=False)
    error = states.error(counted)
    assert error.item() == pytest.approx(reference.item(), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(error, weight)[0], gradient, atol=1e-6)


def test_further_losses_change_the_training_and_not_its_progress(
    student: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    given = {"student": student, "teacher": teacher, "corpora": [corpus], **SMALL}
    records = {
        name: avss_dist.distill(**given, output=tmp_path / name, **options).record
        for name, options in {
            "plain": {},
            "text": {"text_loss": 0.5},
            "hidden": {"hidden_loss": 0.5},
            "lora": {"hidden_loss": 0.5, "train": "lora", "lora_rank": 2},
        }.items()
    }
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in records}
    for name in ("text", "hidden"):
        assert any(not torch.equal(weights["plain"][key], weights[name][key]) for key in weights["plain"])
        assert records[name].after.loss == pytest.approx(records["plain"].after.loss, rel=0.2)
        assert records[name].curve[1].train_loss == pytest.approx(records["plain"].curve[1].train_loss, rel=0.2)
    assert records["text"].text_loss == 0.5 and records["hidden"].hidden_loss == 0.5
    assert records["lora"].after.loss < records["lora"].before.loss
    assert "text_loss" not in (tmp_path / "plain" / "avss_distill.json").read_text()


def test_a_student_that_is_not_the_teacher_without_layers_is_refused(
    student: Path, teacher: Path, corpus: Path, save_checkpoint: Callable[[Any, Path], Path], tmp_path: Path
) -> None:
    other = save_checkpoint(llama(seed=6, num_hidden_layers=4, tie_word_embeddings=True), tmp_path / "other")
    for names in ({"student": student, "teacher": other}, {"student": other, "teacher": teacher}):
        with pytest.raises(ConfigError, match="`hidden_loss` compares hidden states behind each cut, and nothing says"):
            avss_dist.distill(**names, corpora=[corpus], output=tmp_path / "out", hidden_loss=1.0, **SMALL)
    assert not (tmp_path / "out.part").exists()
