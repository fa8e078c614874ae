"""The head in pieces: the numbers of plain transformers, and never more logits at once than is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.causal_lm import opened, random_shard
from support.families import tiny_model
from support.questions import COMPOSED, answers, assert_same, write_questions
from support.tiers import all_of, nightly
from torch.utils._python_dispatch import TorchDispatchMode

from avss_dist.core.errors import ModelError
from avss_dist.models import causal_lm
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.predictions import predicted
from avss_dist.tasks.harness import harness_task
from avss_dist.tasks.text_loss import TextLoss

Save = Callable[[Any, Path], Path]
VOCABULARY = 997  # which no other axis has
TOKENS = 7  # at a time
DIFFERENT: dict[str, dict[str, Any]] = {  # what families do to logits
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.25},
    "falcon_h1": {"lm_head_multiplier": 4.0},
    "gpt2": {},
}


class Logits(TorchDispatchMode):
    """Sees how many tokens have logits in one tensor."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self._weight = model.module.get_output_embeddings().weight.data_ptr()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or tensor.shape[-1] != VOCABULARY:
                continue
            if tensor.data_ptr() != self._weight:
                self.most = max(self.most, tensor.numel() // VOCABULARY)
        return output


def model_of(family: str, save_checkpoint: Save, folder: Path) -> LanguageModel:
    model: Any = tiny_model("causal", family)
    for name, value in DIFFERENT[family].items():
        assert hasattr(model.config, name)
        setattr(model.config, name, value)
    model.resize_token_embeddings(VOCABULARY)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits that differ
    return opened(save_checkpoint(model, folder), dtype="float32")


@pytest.mark.parametrize("family", all_of(DIFFERENT, ["gpt2"]))
def test_pieces_give_what_the_whole_gives(
    family: str, save_checkpoint: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every question of one family, and of the others the losses and gradients that their logits change."""
    model = model_of(family, save_checkpoint, tmp_path / family)
    shard = random_shard()
    assert model.head.body is not None
    others = () if family == "gemma2" else ("sublayers", "propagated", "rounded", "gradients of")
    skip = ("shapley", "leave", *COMPOSED, *others)
    whole = answers(model, skip)
    monkeypatch.setattr(causal_lm, "LOGIT_BYTES", TOKENS * 4 * VOCABULARY)
    with Logits(model) as logits:
        in_pieces = answers(model, skip)
    assert logits.most == TOKENS
    for name, rows in whole.items():
        if name.startswith("loss"):
            rtol = 1e-6
        elif "rounded weights" in name:
            rtol = 1e-3
        else:
            # Gradients are sums of float32 that nearly cancel, here also over a sequence.
            rtol = 1e-4
        assert_same({name: in_pieces[name]}, {name: rows}, rtol=rtol)
    (row,) = TextLoss(shard)(model)
    (batch,) = shard.batches(5)
    with torch.no_grad():
        ids = torch.from_numpy(batch.input_ids).long()
        mask = torch.from_numpy(batch.attention_mask).long()
        likely = model.module(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(dim=-1)
    log_likelihoods = likely[:, :-1].gather(2, ids[:, 1:, None])[..., 0].double().numpy()
    expected = -np.where(predicted(batch), log_likelihoods, 0).sum(axis=1)
    assert row.samples == pytest.approx(expected, rel=1e-6)


def test_the_harness_is_asked_in_pieces(save_checkpoint: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head runs after the tokens of continuations alone."""
    model = model_of("gemma2", save_checkpoint, tmp_path / "model")
    (measure,) = harness_task(write_questions(tmp_path)).parts
    whole = measure(model)
    monkeypatch.setattr(causal_lm, "LOGIT_BYTES", 3 * 4 * VOCABULARY)
    with Logits(model) as logits:
        in_pieces = measure(model)
    assert logits.most == 3
    assert_same({"": in_pieces}, {"": whole}, rtol=1e-6)


@pytest.mark.parametrize(("kind", "family"), [("causal", "xlnet"), *nightly(("image-text", "paligemma"))])
def test_a_model_that_sees_the_next_token_is_refused(
    kind: str, family: str, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_model(kind, family), tmp_path / "model")
    with pytest.raises(ModelError, match=r"sees the tokens that it would predict: each token attends to later ones\."):
        opened(folder, dtype="float32")
