"""Tiny seeded checkpoints, and their tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from avss_dist.core.settings import Settings
from support.json_files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from avss_dist.models.checkpoint.locate import Checkpoint

VOCABULARY = 320


LAYERS = 3


MERGES = """
Ġ a  Ġ t  Ġ Ġ  h e  i n  o n  Ġt he  t e  o r  m e  r e  i s  * *  i on  s s  Ġ "  Ġ s  a l  Ġ c  Ġ o  _ _
n t  d e  a t  r i  l e  ĠĠ ĠĠ  Ġ b  c t  e r  Ġ f  c e  Ġa n  i t  in g  = =  Ġ in  Ġ is  a n  Ġ e  Ċ ĠĠ  a r
me nt  s t  Ġ n  l a  s e  ** **  Ġt o  Ġ de  Ġ p  Ġ w  Ġo f  Ġan d  Ġ m  o t  la ss  a me  u te  e d  e ct
"""
"""Pairs of tokens to join, the first ones first: those that are frequent in the help topics of Python 3.11."""


def save_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer of 320 tokens that ends in ``<eos>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<bos>", "<eos>")
    words = MERGES.split()
    merges = list(zip(words[::2], words[1::2], strict=True))
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.add_special_tokens([*special])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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


def checkpoint_at(path: object) -> Checkpoint:
    """Return the checkpoint in a folder, or in a GGUF file."""
    from avss_dist.models.checkpoint.locate import resolve

    return resolve(str(path))


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that has one file of weights, by name."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def config_in(folder: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint, as its file has it."""
    config: dict[str, Any] = read_json(folder / "config.json")
    return config


def host_limit(folder: object, weights: int, *, head: bool = True, **settings: Any) -> int:
    """Return the limit of host memory of a replica that leaves so many bytes for weights and waiting hidden states."""
    from avss_dist.models.checkpoint.size import footprint
    from avss_dist.partition.choose import bytes_beside_weights

    names = {field.name for field in fields(Settings)}
    chosen = Settings(**{name: value for name, value in settings.items() if name in names})
    return weights + bytes_beside_weights(footprint(str(folder), chosen), chosen, "cpu", head=head)
