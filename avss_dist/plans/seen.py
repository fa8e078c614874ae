"""Texts that runs, evaluations and checkpoints have read, from rows of a warehouse and a file beside the weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from avss_dist.core.errors import ConfigError, ModelError, WarehouseError
from avss_dist.core.settings import TextOptions
from avss_dist.core.validation import checked
from avss_dist.core.values import TableRow
from avss_dist.core.yaml_files import YamlKind, read_yaml, to_yaml
from avss_dist.corpus.seen import ABLATION, PRECISION, SCORES, SEARCH, SPARSITY, SeenText, SeenTexts, distinct
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.names import MEASURED_ONLY, ROUNDED_LOSS, ROUNDING_TASK, SPARSITY_TASK
from avss_dist.warehouse.names import SEARCH as SEARCH_TASK

SEEN_FILE = "avss_seen.yaml"
"""Name of the file. A checkpoint's revision is the hash of files with other suffixes."""
READ_TEXTS = "read"
"""Key of the texts among the settings of an evaluation."""
_USES = {SEARCH_TASK: SEARCH, ROUNDING_TASK: PRECISION, ROUNDED_LOSS: PRECISION, SPARSITY_TASK: SPARSITY}
"""Uses by the start of a task's name. All other tasks that plans go by are ablations."""


def seen_by_run(run: TableRow) -> tuple[SeenText, ...]:
    """Return the text that the scores of a run were measured on, or nothing if there is none or it is not known.

    Args:
        run: a row of ``runs``.
    """
    if run.get("status") == MEASURED_ONLY or not run.get("corpus"):
        return ()
    settings = settings_of(run)
    options = TextOptions.from_stored(settings).text_options()
    if run["num_sequences"]:
        options["max_sequences"] = run["num_sequences"]
    text = SeenText(
        use=SCORES,
        by=run["run_id"],
        corpus=run["corpus"],
        sequences_per_shard=settings.get("sequences_per_shard"),
        corpus_fingerprint=run["corpus_fingerprint"] or "",
        tokens_fingerprint=run["tokens_fingerprint"] or "",
        **options,
    )
    return (text,)


def seen_by_evaluation(row: TableRow) -> tuple[SeenText, ...]:
    """Return the texts that an evaluation has read. One of an earlier version tells its name and options alone.

    Args:
        row: a row of ``evaluations``.

    Raises:
        WarehouseError: the row is damaged.
    """
    settings = settings_of(row)
    if READ_TEXTS in settings:
        try:
            return tuple(SeenText(**(values | {"by": row["run_id"]})) for values in settings[READ_TEXTS])
        except (TypeError, ConfigError) as error:
            raise WarehouseError(f"The texts of the evaluation '{row['run_id']}' are damaged: {error}") from error
    prefix, _, corpus = row["task"].partition(":")
    use = _USES.get(f"{prefix}:", ABLATION)
    if f"{prefix}:" in (ROUNDED_LOSS, SPARSITY_TASK):
        corpus = corpus.partition(":")[2]  # The corpus stands after a number format, or a method.
    if not corpus:
        return ()
    options = TextOptions.from_stored(settings).text_options()
    return (SeenText(use=use, by=row["run_id"], corpus=corpus, **options),)


@checked
class SeenFile:
    """Content of the file beside the weights."""

    seen: SeenTexts
    """Texts that were read on the way to the checkpoint."""


def write_seen(folder: Path, texts: Iterable[SeenText]) -> None:
    """Write the texts of a checkpoint, in place of those that are there. Without texts, write nothing."""
    values = [text.values() for text in distinct(texts)]
    if values:
        (folder / SEEN_FILE).write_text(to_yaml({"seen": values}, flow=True), encoding="utf-8")


def read_seen(folder: Path) -> tuple[SeenText, ...]:
    """Return the texts that plans of a checkpoint were made from. Empty if it has no such file.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / SEEN_FILE
    if not file.is_file():
        return ()
    document = read_yaml(file, YamlKind(noun="record", hint="Copy the checkpoint again.", error=ModelError))
    return document.require_valid(document.parse(SeenFile, document.value)).seen
