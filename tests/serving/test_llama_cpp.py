"""`avss verify` against llama.cpp's own library, where there is a wheel of it (`pip install llama-cpp-py-sync`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import VOCABULARY
from support.inference_servers import serving

import avss_dist

pytestmark = pytest.mark.nightly

WINDOW = 16
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.fixture
def verified(
    tmp_path: Path, tokenizer_folder: Path, save_checkpoint: Callable[[Any, Path], Path]
) -> Callable[[list[str]], avss_dist.Verified]:
    """Compare a seeded Gemma 3 with layers of some kinds with llama.cpp."""
    pytest.importorskip("llama_cpp_py_sync")
    from support.ggufs import write_gguf
    from support.llama_cpp_library import LlamaCppLibrary
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    def verify(kinds: list[str]) -> avss_dist.Verified:
        torch.manual_seed(3)
        config = Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=len(kinds),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
            max_position_embeddings=256,
            sliding_window=WINDOW,
            layer_types=kinds,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = Gemma3ForCausalLM(config).eval()
        folder = save_checkpoint(model, tmp_path / "checkpoint")
        file = write_gguf(model, tmp_path / "checkpoint.gguf", architecture="gemma3")
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        with serving(LlamaCppLibrary(file, 256, tokenizer)) as server:
            return avss_dist.verify(folder, server=server.url, max_sequences=3, sequence_length=40, device="cpu")

    return verify


def test_a_model_that_follows_the_rule_is_the_same(verified: Callable[[list[str]], avss_dist.Verified]) -> None:
    done = verified([SLIDING] * 5 + [FULL])

    assert done.outcome == "same", done.sentences


def test_a_model_that_breaks_the_rule_is_read_differently(
    verified: Callable[[list[str]], avss_dist.Verified],
) -> None:
    done = verified([SLIDING] * 3 + [FULL, SLIDING])

    assert done.outcome == "different"


def test_the_rule_is_named(verified: Callable[[list[str]], avss_dist.Verified]) -> None:
    done = verified([SLIDING] * 3 + [FULL, SLIDING])

    assert "every 6th layer" in " ".join(done.sentences)
