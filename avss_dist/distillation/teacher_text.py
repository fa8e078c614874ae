"""Text that the teacher writes, sampled from its predictions once and kept in the user's cache."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings, fingerprint
from avss_dist.distillation.events import OnEvent, Preparing
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.sampling import sample
from avss_dist.system.folders import cache_folder
from avss_dist.system.journal import Journal
from avss_dist.system.progress_bar import ProgressCallback, progress_to
from avss_dist.system.staging import staged_file

ROWS = 32  # texts that are sampled at once


def teacher_text(
    teacher: Checkpoint, settings: Settings, *, count: int, seed: int, work: Path, on_event: OnEvent
) -> Path:
    """Return a file of ``count`` texts of the teacher, JSON lines with a field ``text``.

    Texts of the same teacher, settings and seed are sampled once. Sampling resumes after an interruption.

    Args:
        settings: dtype, device and length of the texts.
        work: folder for unfinished texts.

    Raises:
        ModelError: the teacher has no start token or predicts no next token.
        ConfigError: it wrote no text.
    """
    settings = Settings(
        sequence_length=settings.sequence_length,
        batch_size=ROWS,
        dtype=settings.dtype,
        device=settings.device,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
    )
    identity = {"teacher": teacher.revision, "count": count, "seed": seed, **settings.as_dict()}
    file = cache_folder("teacher_texts", f"{fingerprint(**identity)[:32]}.jsonl")
    if file.is_file():
        return file
    with Journal(work / "self.part", identity) as journal, progress_to(_reported(on_event)):
        for batch in sample(teacher, settings, count=count, seed=seed, first=len(journal.batches)):
            journal.add(batch)
        texts = list(chain.from_iterable(journal.batches))
        if not texts:
            raise ConfigError(f"'{teacher.name}' wrote no text.", "Set `self_texts` 0, and name text with `corpus`.")
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        with staged_file(file) as staged:
            staged.write_text("".join(lines), encoding="utf-8")
        journal.remove()
    return file


def _reported(on_event: OnEvent) -> ProgressCallback:
    """Return a progress callback that passes events on."""
    return lambda _what, share: on_event(Preparing("the teacher writes text", share))
