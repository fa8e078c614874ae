"""Tiny seeded checkpoints, and their tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from avss_dist.core.settings import Settings

VOCABULARY = 320


LAYERS = 3


def save_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer of 320 tokens that ends in ``<eos>``, trained on Python's help topics."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:20]], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """This process and those that it starts compute with one thread, as the laws ask: same threads, same bytes."""
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def llama(seed: int = 0, **changes: Any) -> Any:
    """A seeded random Llama of 3 layers and 32 units."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def host_limit(folder: object, weights: int, *, head: bool = True, **settings: Any) -> int:
    """Return the limit of host memory of a replica that leaves so many bytes for weights and waiting hidden states."""
    from avss_dist.models.size import footprint
    from avss_dist.partition.choose import bytes_beside_weights

    names = {field.name for field in fields(Settings)}
    chosen = Settings(**{name: value for name, value in settings.items() if name in names})
    return weights + bytes_beside_weights(footprint(str(folder), chosen), chosen, "cpu", head=head)
