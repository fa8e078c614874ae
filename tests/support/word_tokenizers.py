"""Tokenizers whose tokens are whole words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def word_tokenizer(
    words: Sequence[str], *, unknown: str, added: str = "$A", markers: Sequence[str] = (), **options: Any
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words that are divided by blanks; the id of a word is its place.

    Args:
        words: all words, special tokens among them.
        unknown: the word that every other word is read as.
        added: what is put around a text, with ``$A`` in its place.
        markers: words of ``added``.
        options: of the tokenizer of transformers, such as ``eos_token``.
    """
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if markers:
        special = [(marker, vocabulary[marker]) for marker in markers]
        inner.post_processor = processors.TemplateProcessing(single=added, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)
