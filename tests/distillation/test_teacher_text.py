"""Text that a model writes itself: as it predicts, as many rows at once as memory allows, the same after a stop."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from avss_dist.distillation.teacher_text import ROWS, has_own_text, rows_at_once, sample, teacher_text, with_own_text
from support.checkpoints import checkpoint_at
from transformers import AutoModelForCausalLM

import avss_dist
from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.streams import progress_to
from avss_dist.corpus.tokens import special_tokens_around
from avss_dist.distillation import teacher_text as module
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.plans.plan import Plan

SETTINGS = Settings(sequence_length=16, dtype="float32", device="cpu")


@pytest.mark.parametrize(("free", "rows"), [(1 << 30, ROWS[0]), (1 << 20, ROWS[-1])])
def test_rows_follow_the_memory(free: int, rows: int, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda _: free)
    assert rows_at_once(checkpoint_at(teacher), SETTINGS) == rows


def test_progress_is_told_after_each_token_and_each_batch(teacher: Path) -> None:
    shares: list[float] = []
    with progress_to(lambda _, share: shares.append(share)):
        (first, second) = sample(checkpoint_at(teacher), replace(SETTINGS, batch_size=8), count=16)
        assert LanguageModel.each(Any, len, ["a", "bc"]) == [1, 2]  # type: ignore[arg-type, list-item]
    assert len(first) + len(second) == 16
    assert len(shares) > 20
    assert shares[:-2] == sorted(shares[:-2])
    assert shares[-2:] == [0.0, 0.5]


def test_what_was_begun_goes_on_in_batches_of_the_same_size(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less memory than before changes neither the texts nor their file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "free_memory", lambda _: 1 << 30)
    options: dict[str, Any] = {"count": 300, "seed": 0, "work": tmp_path, "on_event": lambda _: None}
    sampled = module.sample

    def stopped(*arguments: Any, **more: Any) -> Any:
        for number, batch in enumerate(sampled(*arguments, **more)):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(module, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        teacher_text(checkpoint_at(teacher), SETTINGS, **options)
    monkeypatch.setattr(module, "sample", sampled)
    monkeypatch.setattr(module, "free_memory", lambda _: 1 << 20)
    file = teacher_text(checkpoint_at(teacher), SETTINGS, **options)
    assert teacher_text(checkpoint_at(teacher), SETTINGS, **options) == file
    assert not [*tmp_path.glob("*.part")]
    whole_folder = tmp_path / "whole"
    whole_folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(module, "free_memory", lambda _: 1 << 30)
    whole = teacher_text(checkpoint_at(teacher), SETTINGS, **options | {"work": whole_folder})
    assert whole.read_bytes() == file.read_bytes()


def test_a_repair_is_fitted_on_text_of_the_model(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its weight, once for all repairs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = with_own_text([str(corpus), "self=0.5"], checkpoint_at(teacher), SETTINGS)
    first, own = texts
    assert first == str(corpus)
    assert own.endswith(".jsonl:text=0.5")
    assert has_own_text(texts)
    assert not has_own_text([str(corpus)])
    plan = Plan(model=str(teacher), num_layers=4, layers="layers", drop=(2,))
    monkeypatch.delattr(module, "sample")
    options: dict[str, Any] = {"sequence_length": 16, "dtype": "float32", "device": "cpu", "repair": "channel"}
    done = avss_dist.prune(teacher, plan, output=tmp_path / "out", repair_corpora=["self"], **options)
    (fitted,) = done.repair.texts
    assert fitted.corpus == own.removesuffix("=0.5")
    assert fitted.rows > 100


@pytest.mark.nightly
def test_tokens_are_drawn_as_the_model_predicts_them(tiny_llama: Path, tmp_path: Path) -> None:
    """All of them, whatever its generation_config.json says: as often as softmax of the logits, but for chance."""
    folder = tmp_path / "greedy"
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "temperature": 0.01}')
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = load_tokenizer(checkpoint_at(tiny_llama))
    start = special_tokens_around(tokenizer).prefix.tolist()
    if not start:
        start = [tokenizer.bos_token_id or tokenizer.eos_token_id]
    with torch.no_grad():
        expected = model(torch.tensor([start])).logits[0, -1].softmax(-1)
    share: Counter[str] = Counter()
    for token, probability in enumerate(expected.tolist()):
        word = tokenizer.decode([token], skip_special_tokens=True)
        share[word] += probability
    one = Settings(sequence_length=1, batch_size=1000, device="cpu")
    count = 4000
    seen: Counter[str] = Counter()
    for batch in sample(checkpoint_at(folder), one, count=count):
        seen.update(batch)
    for word, wanted in share.items():
        if word.strip():
            difference = abs(seen[word] / count - wanted)
            assert difference < 5 * (wanted / count) ** 0.5 + 1e-3
    assert len(seen) > 20


@pytest.mark.nightly
def test_an_encoder_writes_nothing(tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="predicts no next token"):
        settings = Settings(device="cpu", sequence_length=4)
        next(sample(checkpoint_at(tiny_bert), settings, count=1))
