"""Text that a model writes itself, in batches that are cells: written once, and read from the warehouse after that.

The text of a model is one sequence of texts, of which every use reads as many as it needs from the start. It depends on
the revision of the model, the length of a row, dtype, kind of device and seed, which the ids of its cells hash.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from avss_dist.core.errors import ConfigError, CorpusError, ModelError
from avss_dist.core.files import cache_folder
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_seconds
from avss_dist.corpus.documents import Tokenizer
from avss_dist.corpus.own_text import OwnText
from avss_dist.corpus.seen import SELF
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.corpus.tokens import special_tokens_around
from avss_dist.evaluation.events import Remark
from avss_dist.evaluation.pace import writing_speed
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.partition.catalog import PARTITIONS, SEVERAL_GPUS, WHOLE
from avss_dist.pruning.repair.registry import names_own_text
from avss_dist.tasks.own_text import WriteTexts
from avss_dist.tasks.task import Task
from avss_dist.warehouse.names import OWN_TEXT
from avss_dist.warehouse.store import Store

TEXTS_OF_BATCH = {"cpu": 32, "cuda": 128}
"""Texts of a batch by kind of device: more at once are hardly faster. A batch is what a kill loses at most."""
ROWS_ALONE = 256
"""Rows that are read of own text where there is no other text to go by, and no limit."""
MOST_TEXTS_PER_ROW = 8
"""Texts that are written for each row, at most, where the model ends them early."""


class OwnTextWriter:
    """Writes text of a model in a session, as much as is asked for, and reads what the warehouse has.

    Args:
        session: measures the batches, and stores them in its warehouse.
        model: the whole model. Its settings say how rows are read.
        seed: seed of the texts.
        skipped: rows at the start that `read_rows` leaves out, as something else is measured on them.
    """

    def __init__(self, session: EvaluationSession, model: PlacedModel, *, seed: int = 0, skipped: int = 0) -> None:
        self._session = session
        self._model = model
        self._seed = seed
        self._skipped = skipped

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._model.checkpoint)

    @cached_property
    def _texts_at_once(self) -> int:
        return TEXTS_OF_BATCH[self._session.executor.devices.kind]

    def read_rows(self, count: int, settings: Settings) -> CorpusPlan:
        """Return so many rows of text, or fewer where the model ends its texts early.

        Args:
            settings: settings with which they are read.

        Raises:
            AvssError: see `write_rows`.
        """
        own = self.write_rows(self._skipped + count)
        reading = replace(settings, max_sequences=count, skip_sequences=self._skipped)
        return own.read(self._tokenizer, reading)

    def write_rows(self, count: int) -> OwnText:
        """Return texts that have so many rows together.

        Raises:
            CorpusError: the texts are so short that they have no row.
            AvssError: a failure of workers or of the warehouse; or the model writes no text.
        """
        wanted = count
        most = MOST_TEXTS_PER_ROW * count
        own = self.write_texts(wanted)
        rows = own.count_rows(self._tokenizer, self._model.settings)
        while rows < count and wanted < most:
            if rows:
                wanted = min(most, math.ceil(count * wanted / rows))
            else:
                wanted = most
            own = self.write_texts(wanted)
            rows = own.count_rows(self._tokenizer, self._model.settings)
        if not rows:
            raise CorpusError(
                f"The {wanted:,} texts that '{self._model.checkpoint.name}' wrote have no row of "
                f"{self._model.settings.sequence_length} tokens together.",
                f"Name other text, and leave `{SELF}` out; or lower `sequence_length`.",
            )
        return own

    def write_texts(self, count: int) -> OwnText:
        """Return the first so many texts, without empty ones. Batches that the warehouse has are not written again.

        Raises:
            AvssError: a failure of workers or of the warehouse; or the model writes no text.
        """
        batches = self.batches(count)
        cells = []
        for batch in batches:
            cells += batch.cells()
        missing = [cell for cell in cells if not self._session.is_known(cell)]
        if missing:
            self._session.on_event(Remark(self._describe(len(missing))))
            self._session.run(cells)
        texts: list[str] = []
        for batch in batches:
            texts += self._texts(batch)
        return OwnText(tuple(text for text in texts[:count] if text.strip()))

    def batches(self, count: int) -> list[PlannedTask]:
        """Return the tasks of writing the first so many texts, one for each batch.

        Raises:
            ModelError: the tokenizer has no token to begin a text with.
        """
        start = start_tokens(self._tokenizer)
        if not start:
            raise ModelError(_no_start(self._model), "Name other text.")
        devices = self._session.executor.devices
        is_alone = devices.kind == "cpu" and not devices.cpus_of_nodes
        model = self._model.reading(batch_size=self._texts_at_once)
        batches = []
        for number in range(math.ceil(count / self._texts_at_once)):
            measure = WriteTexts(
                start=tuple(start),
                padding=_first_id(self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, start[0]),
                first=number * self._texts_at_once,
                count=self._texts_at_once,
                seed=self._seed,
                all_cores=is_alone,
            )
            batches.append(model.plan(Task(name=OWN_TEXT, parts=(measure,))))
        return batches

    def _texts(self, batch: PlannedTask) -> Sequence[str]:
        """Return the texts of a batch that was written, empty ones included."""
        tokens: defaultdict[int, list[int]] = defaultdict(list)
        for row in self._session.known_rows(batch.run_id()):
            for token, number in zip(row["samples"], row["weights"], strict=True):
                tokens[int(number)].append(int(token))
        (measure,) = batch.task.parts
        assert isinstance(measure, WriteTexts)
        ids = [tokens[number] for number in range(measure.first, measure.first + measure.count)]
        texts: list[str] = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    def _describe(self, batches: int) -> str:
        """Return what writing so many batches means and takes, in a sentence."""
        texts = batches * self._texts_at_once
        length = self._model.settings.sequence_length
        line = f"{self._model.checkpoint.name} writes {texts:,} texts of up to {length:,} tokens itself"
        speed = writing_speed(self._session, self._model)
        if speed is None:
            return f"{line} first."
        replicas = self._session.executor.replicas(self._model.placement)
        seconds = texts * length / speed.tokens_per_second / replicas
        return f"{line} first, in about {describe_seconds(seconds)}."


def writing_obstacle(model: PlacedModel) -> str | None:
    """Return why a model cannot write text where it is placed, or None if it can, as far as is known."""
    partition = model.placement.partition
    info = PARTITIONS[partition]
    if info.layerwise or info.gang:
        return f"`partition` {partition} never has the whole model in one process, which writing text takes"
    if not start_tokens(load_tokenizer(model.checkpoint)):
        return _no_start(model).removesuffix(".")
    return None


def require_writable(model: PlacedModel, corpora: Sequence[str]) -> None:
    """Refuse text of a model that cannot write it where it is placed.

    Args:
        corpora: texts that are named, with their weights.

    Raises:
        ConfigError: see `writing_obstacle`.
    """
    if not names_own_text(corpora):
        return
    obstacle = writing_obstacle(model)
    if obstacle is not None:
        raise ConfigError(
            f"`repair_corpora` {SELF}: {obstacle}.", f"Name other text, or set `partition` {WHOLE} or {SEVERAL_GPUS}."
        )


def _no_start(model: PlacedModel) -> str:
    return f"The tokenizer of '{model.checkpoint.name}' has no token to begin a text with."


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens before a text. EOS stands between the texts of models without BOS."""
    prefix: list[int] = special_tokens_around(tokenizer).prefix.tolist()
    if prefix:
        return prefix
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    return []


def _first_id(*candidates: int | None) -> int:
    """Return the first token id that a tokenizer has, of which the last one is there."""
    return next(token for token in candidates if token is not None)


def cache_of_own_text() -> Path:
    """Return the warehouse in the user's cache that keeps own text for work without a warehouse."""
    return cache_folder("own_texts")


def keeping_in_cache(session: EvaluationSession) -> EvaluationSession:
    """Return a session on the same executor that keeps what it measures in `cache_of_own_text`."""
    store = Store(cache_of_own_text())
    store.storage.create()
    return EvaluationSession(store, session.executor, session.execution, session.on_event, session.settings)


def rows_of_own_text(others: Sequence[CorpusPlan], maximum: int | None) -> int:
    """Return the number of rows to read of own text beside others: as many as the longest one has."""
    if others:
        return max(text.num_sequences for text in others)
    return maximum or ROWS_ALONE
