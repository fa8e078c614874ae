"""Rows of a text that are compared: usual ones, and one that is longer than every window of the model's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from avss_dist.core.errors import ConfigError, NoRows
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import Settings
from avss_dist.corpus.documents import Tokenizer
from avss_dist.corpus.shards import CorpusPlan, tokenize_corpus
from avss_dist.corpus.tokens import Ids
from avss_dist.serving.server import Row

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BEYOND = 128
"""Tokens of the long row that are beyond the longest window."""
LEAST_BEYOND = 16
"""Fewer of them say too little."""
TEXTS = 4
"""Rows whose texts are read by both tokenizers."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """Rows to compare.

    Attributes:
        rows: the rows, the longest first.
        windows: number of tokens of each window of the model's attention, ascending.
        fingerprint: hash of the tokens.
        notes: sentences on what could not be compared.
    """

    rows: tuple[Row, ...]
    windows: tuple[int, ...]
    fingerprint: str
    notes: tuple[str, ...]


def attention_windows(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return how many tokens layers see that do not see all before, ascending. Empty if all layers see all.

    Args:
        config: configuration of transformers.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    windows = set()
    is_sliding = "sliding_attention" in kinds or (not kinds and getattr(text, "use_sliding_window", True))
    if is_sliding:
        windows.add(getattr(text, "sliding_window", None))
    if "chunked_attention" in kinds:
        windows.add(getattr(text, "attention_chunk_size", None))
    return tuple(sorted(window for window in windows if isinstance(window, int) and window > 0))


def read_rows(
    corpus: str, tokenizer: Tokenizer, settings: Settings, config: PreTrainedConfig, limit: int | None
) -> Rows:
    """Read the rows to compare: the long one from the start of the text, and the others behind it.

    Args:
        settings: their ``max_sequences`` is the number of rows.
        config: configuration of the model.
        limit: most tokens of a prompt and its continuation on the server, or None if it is not known.

    Raises:
        CorpusError: the text is too short for the usual rows.
        ConfigError: these are longer than the server takes.
    """
    windows = attention_windows(config)
    usual = settings.sequence_length
    room = _room(config, limit)
    if room is not None and usual > room:
        raise ConfigError(
            f"`sequence_length` {usual} is more than the model and its server take: {room} tokens of a row.",
            f"Set it to {room} or less, or give the server a longer context.",
        )
    notes: list[str] = []
    plans: list[CorpusPlan] = []
    rows: list[Row] = []
    skipped = 0
    if windows:
        length = max(windows[-1] + BEYOND, usual)
        if room is not None:
            length = min(length, room)
        if length < windows[-1] + LEAST_BEYOND:
            notes.append(
                f"No row reaches beyond the window of {windows[-1]:,} tokens of the model's attention, as the server "
                f"or the model takes {room:,} tokens: what lies beyond was not compared."
            )
        elif length > usual:
            plan = _long_row(corpus, tokenizer, settings, length)
            if plan is None:
                notes.append(
                    f"{corpus} is too short for a row of {length:,} tokens: what lies beyond the window of "
                    f"{windows[-1]:,} tokens of the model's attention was not compared."
                )
            else:
                plans.append(plan)
                rows.append(Row(ids=_unpadded(plan)[0], positions=range(windows[-1] + 1, length)))
                skipped = -(-length // usual)
    number = settings.max_sequences
    assert number is not None
    number = max(1, number - len(rows))
    plan = tokenize_corpus(
        corpus,
        tokenizer,
        replace(settings, max_sequences=number, skip_sequences=settings.skip_sequences + skipped),
    )
    plans.append(plan)
    for ids in _unpadded(plan):
        if len(ids) > 1:
            rows.append(Row(ids=ids, positions=range(1, len(ids))))
    return Rows(
        rows=tuple(rows),
        windows=windows,
        fingerprint=fingerprint(rows=[plan.tokens_fingerprint for plan in plans]),
        notes=tuple(notes),
    )


def _room(config: PreTrainedConfig, limit: int | None) -> int | None:
    """Return the most tokens of a row that both a model and its server take. The server writes one more."""
    rooms = []
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and longest > 0:
        rooms.append(longest)
    if limit is not None:
        rooms.append(limit - 1)
    return min(rooms, default=None)


def _long_row(corpus: str, tokenizer: Tokenizer, settings: Settings, length: int) -> CorpusPlan | None:
    """Return one row of a length, or None if the text is too short."""
    settings = replace(settings, sequence_length=length, max_sequences=1, skip_sequences=0, layout="packed")
    try:
        return tokenize_corpus(corpus, tokenizer, settings)
    except NoRows:
        return None


def _unpadded(plan: CorpusPlan) -> list[Ids]:
    """Return the tokens of each row of a text."""
    rows: list[Ids] = []
    for shard in plan.shards:
        for ids, length in zip(shard.input_ids, shard.lengths, strict=True):
            rows.append(np.array(ids[:length]))
    return rows
