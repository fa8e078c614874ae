"""Held-out text: whether what is evaluated on is what the scores of a plan, or a repair, have seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from avss_dist.corpus.shards import Ids, Shard, plan
from avss_dist.errors import AvssError, ConfigError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer
from avss_dist.pruning.repair.record import read_repairs
from avss_dist.settings import SEARCH, Settings
from avss_dist.tasks.base import Task, TextLoss
from avss_dist.tasks.truthfulqa import TruthfulChoices
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse

WINDOW = 32  # tokens that two texts have in common, in a row, before they are the same text
OTHER_QUESTIONS = "Use other text there, or other questions."
MOST_SHARED = 0.03  # of the windows of a text; what other rows of one text repeat is less


def refuse_overlap(
    task: Task,
    run_id: str,
    store: Warehouse,
    checkpoint: Checkpoint,
    *,
    corpus: str = "",
    skips: str = "skip_sequences",
) -> None:
    """Refuse a task on text that a run's scores were measured on; tasks without a corpus pass.

    Args:
        corpus: the text of the run, with the keys that reading it takes; by default as its row names it, without.
        skips: the field that says which rows of the task's text are not read.

    Raises:
        ConfigError: they share text, or the run's text cannot be read again.
    """
    run = store.run(run_id)
    if not _shards(task) or run is None:
        return
    settings = Settings(**settings_of(run))
    shared = _shared(task, checkpoint, corpus or run["corpus"], settings, 0, f"run {run_id}", "layers may be chosen on")
    if shared > MOST_SHARED:
        raise ConfigError(
            f"{shared:.0%} of {task.name} is text that the scores of {run_id} were measured on ({run['corpus']}).",
            f"Use other text: another corpus, or `{skips}` {run['num_sequences']}.",
        )


def refuse_questions(task: Task, run_id: str, store: Warehouse, checkpoint: Checkpoint, *, corpus: str = "") -> None:
    """Refuse multiple choice on questions whose answers a run's scores were measured on.

    Args:
        corpus: as for `refuse_overlap`.

    Raises:
        ConfigError: there are some, or the run's text cannot be read again.
    """
    run = store.run(run_id)
    if not _choices(task) or run is None:
        return
    read, of = corpus or run["corpus"], f"run {run_id}"
    seen = _read_again(checkpoint, read, Settings(**settings_of(run)), 0, of, "layers may be chosen on")
    number = len(_prompts(seen))
    hint = f"Ask others: with `skip_questions` {number}, where the run is of the first questions of the file."
    _refuse_prompts(task, seen, f"the scores of {run_id} were measured on", hint)


def _refuse_prompts(task: Task, seen: Iterable[Shard], use: str, hint: str) -> None:
    questions = _prompts(_choices(task))
    if shared := len(_prompts(seen) & questions):
        raise ConfigError(f"{shared} of the {len(questions)} questions of {task.name} are prompts that {use}.", hint)


def refuse_text(task: Task, text: Task, what: str, skip_sequences: int) -> None:
    """Refuse a task on text or questions that ``what`` is fitted on; tasks of lm-evaluation-harness pass.

    Args:
        text: that text, as a task.
        skip_sequences: rows before it.

    Raises:
        ConfigError: they share text.
    """
    _refuse_prompts(task, _shards(text), f"{what} is fitted on ({text.name})", OTHER_QUESTIONS)
    shared = shared_text(_shards(text), _shards(task)) if _shards(task) else 0.0
    if shared > MOST_SHARED:
        rows = sum(shard.num_sequences for shard in _shards(text))
        raise ConfigError(
            f"{shared:.0%} of {task.name} is text that {what} is fitted on ({text.name}).",
            f"Use other text: another corpus, or `skip_sequences` {skip_sequences + rows}.",
        )


def refuse_search_text(task: Task, evaluation: str, store: Warehouse, checkpoint: Checkpoint) -> None:
    """Refuse a task on text that a set of layers was searched on; tasks without a corpus pass.

    Args:
        evaluation: of the search.

    Raises:
        ConfigError: they share text, or the search's text cannot be read again.
    """
    rows = store.table("evaluations", run_ids=[evaluation]).to_pylist() if _shards(task) else []
    if not rows:
        return
    options, corpus = settings_of(rows[0]), rows[0]["task"].removeprefix(SEARCH)
    skip, of = options.pop("skip_sequences"), "the search of a plan"
    shared = _shared(task, checkpoint, corpus, Settings(**options), skip, of, "layers may be chosen for")
    if shared > MOST_SHARED:
        raise ConfigError(
            f"{shared:.0%} of {task.name} is text that the layers of a plan were searched on.",
            f"Use other text: another corpus, or `skip_sequences` {skip + rows[0]['num_samples']}.",
        )


def refuse_repair_text(task: Task, checkpoint: Checkpoint) -> None:
    """Refuse a task on text or questions that a checkpoint's repair was fitted on; tasks of lm-evaluation-harness pass.

    Raises:
        ConfigError: they share text, or the repair's text cannot be read again.
        ModelError: the record of the repair is damaged.
    """
    for repair in read_repairs(checkpoint.folder) if _shards(task) or _choices(task) else ():
        of, skip = f"the repair of '{checkpoint.name}'", repair.skip_sequences
        for text in repair.texts:
            seen = _read_again(checkpoint, text.corpus, repair.reading(), skip, of, "it may be fitted to")
            _refuse_prompts(task, seen, f"{of} was fitted on ({text.corpus})", OTHER_QUESTIONS)
            shared = shared_text(seen, _shards(task))
            if shared > MOST_SHARED:
                raise ConfigError(
                    f"{shared:.0%} of {task.name} is text that {of} was fitted on ({text.corpus}).",
                    f"Use other text: another corpus, or `skip_sequences` {skip + text.rows}.",
                )


def _choices(task: Task) -> list[Shard]:
    return [part.shard for part in task.parts if isinstance(part, TruthfulChoices)]


def _shards(task: Task) -> list[Shard]:
    return [part.shard for part in task.parts if isinstance(part, TextLoss)]


def _shared(
    task: Task, checkpoint: Checkpoint, corpus: str, settings: Settings, skip_sequences: int, of: str, risk: str
) -> float:
    """The share of a task's text that is in the text ``of`` something, which is read again."""
    return shared_text(_read_again(checkpoint, corpus, settings, skip_sequences, of, risk), _shards(task))


def _read_again(
    checkpoint: Checkpoint, corpus: str, settings: Settings, skip_sequences: int, of: str, risk: str
) -> Sequence[Shard]:
    try:
        return plan(corpus, load_tokenizer(checkpoint), settings, skip_sequences=skip_sequences).shards
    except AvssError as error:
        raise ConfigError(
            f"The text of {of} cannot be read again: {error.message}",
            f"Put it back, or set `allow_overlap` and know that {risk} this very text.",
        ) from error


def _prompts(shards: Iterable[Shard]) -> set[bytes]:
    """The tokens of prompts of paired text, each once."""
    return {
        shard.input_ids[row, : shard.pairing.starts[row]].tobytes()
        for shard in shards
        if shard.pairing
        for row in range(shard.num_sequences)
    }


def shared_text(seen: Iterable[Shard], read: Iterable[Shard]) -> float:
    """The share of the windows of ``WINDOW`` tokens in ``read`` that ``seen`` has too, wherever they begin."""
    known = _windows(seen)
    windows = _windows(read)
    return float(np.isin(windows, known).mean()) if len(windows) else 0.0


def _windows(shards: Iterable[Shard]) -> NDArray[np.uint64]:
    """A hash of every window of tokens, of all rows."""
    powers = np.random.default_rng(0).integers(1, 1 << 63, WINDOW, np.uint64) | np.uint64(1)
    found = [
        _row_windows(shard.input_ids[row, : shard.lengths[row]], powers)
        for shard in shards
        for row in range(shard.num_sequences)
    ]
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def _row_windows(ids: Ids, powers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    if len(ids) < WINDOW:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64) + np.uint64(1), WINDOW)
    hashes: NDArray[np.uint64] = windows @ powers
    return hashes
