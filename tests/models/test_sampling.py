"""Text that a model writes itself."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import avss
from transformers import LlamaForCausalLM

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer
from avss_dist.models.sampling import sample

pytestmark = pytest.mark.nightly

SHORT = ["--sequence-length", 12, "--batch-size", 4, "--device", "cpu"]


def test_tokens_are_drawn_as_the_model_predicts_them(tiny_llama: Path, tmp_path: Path) -> None:
    """All of them, whatever its generation_config.json says: as often as softmax of the logits, but for chance."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "greedy"
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "temperature": 0.01}')
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = load_tokenizer(resolve(str(tiny_llama)))
    start = tokenizer("the", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([start])).logits[0, -1].softmax(-1)
    words = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(expected))]
    one = Settings(sequence_length=1, batch_size=1000, device="cpu")
    count = 4000
    seen = Counter(chain.from_iterable(sample(resolve(str(folder)), one, count=count, prompt="the")))
    share = {word: sum(float(p) for p, w in zip(expected, words, strict=True) if w == word) for word in set(words)}
    for word, wanted in share.items():
        if word.strip():
            assert abs(seen[word] / count - wanted) < 5 * (wanted / count) ** 0.5 + 1e-3
    assert len(seen) > 20


def test_the_command(tiny_llama: Path, tmp_path: Path) -> None:
    """The same text for the same seed, other text for another; a corpus like others; no file is overwritten."""
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for file, seed in zip(files, (3, 3, 4), strict=True):
        done = avss("sample", tiny_llama, "-o", file, "--count", 6, "--seed", seed, *SHORT)
        assert done.exit_code == 0, done.stderr
        assert f"{file}:text" in done.stdout.replace("\n", "")
    one, same, other = (file.read_bytes() for file in files)
    assert one == same != other
    lines = [json.loads(line)["text"] for line in one.decode().splitlines()]
    assert len(set(lines)) > 1 and all(text.strip() for text in lines)
    again = avss("sample", tiny_llama, "-o", files[0], *SHORT)
    assert again.exit_code == 2 and "exists" in again.stderr and files[0].read_bytes() == one
    scored = avss("score", tiny_llama, "--corpus", f"{files[0]}:text", "-w", tmp_path / "w", "--sequence-length", 8)
    assert scored.exit_code == 0, scored.stderr


def test_a_command_that_was_stopped_goes_on(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was cut off in the middle of a line is drawn again; of other options, what is kept is not touched."""
    whole, output, kept = tmp_path / "whole.jsonl", tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    assert avss("sample", tiny_llama, "-o", whole, "--count", 12, *SHORT).exit_code == 0
    drawn, draw = [], LlamaForCausalLM.generate

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", stopped)
    assert avss("sample", tiny_llama, "-o", output, "--count", 12, *SHORT).exit_code == 130
    assert not output.exists()
    left = kept.read_bytes()
    other = avss("sample", tiny_llama, "-o", output, "--count", 12, "--seed", 1, *SHORT)
    assert other.exit_code == 2 and "was begun with another model or other options" in other.stderr
    assert kept.read_bytes() == left
    kept.write_bytes(left[:-3])
    done = avss("sample", tiny_llama, "-o", output, "--count", 12, *SHORT)
    assert done.exit_code == 0 and "Continuing after" in done.stderr and len(drawn) == 5
    assert output.read_bytes() == whole.read_bytes() and not kept.exists()


def test_an_encoder_writes_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="predicts no next token"):
        next(sample(resolve(str(tiny_bert)), Settings(device="cpu", sequence_length=4), count=1))
    assert avss("sample", tiny_bert, "-o", tmp_path / "a.jsonl", *SHORT).exit_code == 2
    assert not list(tmp_path.iterdir())
