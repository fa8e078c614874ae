"""Text that a model writes itself."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.corpus.tokens import special_tokens_around
from avss_dist.distillation.teacher_text import sample
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer

pytestmark = pytest.mark.nightly


def test_tokens_are_drawn_as_the_model_predicts_them(tiny_llama: Path, tmp_path: Path) -> None:
    """All of them, whatever its generation_config.json says: as often as softmax of the logits, but for chance."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "greedy"
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "temperature": 0.01}')
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = load_tokenizer(resolve(str(tiny_llama)))
    start = special_tokens_around(tokenizer).prefix.tolist() or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    with torch.no_grad():
        expected = model(torch.tensor([start])).logits[0, -1].softmax(-1)
    words = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(expected))]
    one = Settings(sequence_length=1, batch_size=1000, device="cpu")
    count = 4000
    seen = Counter(chain.from_iterable(sample(resolve(str(folder)), one, count=count)))
    share = {word: sum(float(p) for p, w in zip(expected, words, strict=True) if w == word) for word in set(words)}
    for word, wanted in share.items():
        if word.strip():
            assert abs(seen[word] / count - wanted) < 5 * (wanted / count) ** 0.5 + 1e-3
    assert len(seen) > 20


def test_an_encoder_writes_nothing(tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="predicts no next token"):
        next(sample(resolve(str(tiny_bert)), Settings(device="cpu", sequence_length=4), count=1))
