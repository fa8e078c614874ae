"""Reading of the texts of a distillation: those to train on, the teacher's own, and those that are only watched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avss_dist.core.errors import AvssError, ConfigError
from avss_dist.corpus.shards import Shard, tokenize_corpus
from avss_dist.distillation.events import OnEvent, Preparing
from avss_dist.distillation.pair import ModelPair
from avss_dist.distillation.record import SELF
from avss_dist.distillation.teacher_text import teacher_text
from avss_dist.distillation.texts import (
    DistillText,
    read_trained,
    read_watched,
    refuse_seen_text,
    with_labels,
)
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer
from avss_dist.pruning.repair.record import read_repairs, split_weight
from avss_dist.system.devices import pick_device

if TYPE_CHECKING:
    from avss_dist.requests import DistillRequest


def read_texts(request: DistillRequest, models: ModelPair, work: Path, on_event: OnEvent) -> list[DistillText]:
    """Read all texts: those to train on, the teacher's own, and those to watch."""
    on_event(Preparing("reading"))
    code = request.settings.trust_remote_code
    tokenizer = load_tokenizer(models.student, trust_remote_code=code)
    named = [split_weight(corpus) for corpus in request.corpora]
    weights = {str(corpus): weight for corpus, weight in named}
    if len(weights) < len(named):
        raise ConfigError("`corpora` names a text twice.", "Name it once, with a weight: CORPUS=2.")
    how = (tokenizer, models.settings, request.held_out)
    corpora = [(corpus.full, str(corpus), weight) for corpus, weight in named if corpus != SELF]
    texts = [read_trained(*corpus, *how) for corpus in corpora]
    watched = [read_watched(corpus, *how) for corpus in request.watch]
    if request.self_texts:
        options: dict[str, Any] = {
            "count": request.self_texts,
            "seed": request.seed,
            "work": work,
            "on_event": on_event,
        }
        here = replace(models.teacher_settings, device=pick_device(request.settings.device).type)
        file = teacher_text(models.teacher, here, **options)
        plain = replace(models.settings, chat_template=False, max_sequences=None, skip_sequences=0)
        texts.append(read_trained(f"{file}:text", SELF, weights.get(SELF, 1.0), tokenizer, plain, request.held_out))
    if not texts:
        raise ConfigError("There is no text to train on.", "Name some with `corpora`, or set `self_texts` above 0.")
    texts = with_labels([*texts, *watched])
    if not request.allow_overlap:
        trained = [  # without those of the teacher, which may know any text by heart
            (f"is trained on ({text.name})", text.trained.shards)
            for text in texts
            if text.trained and text.name != SELF
        ]
        refuse_seen_text(texts, [*trained, *_repaired_text(models.student, tokenizer)], tokenizer)
    return texts


def _repaired_text(student: Checkpoint, tokenizer: Any) -> Iterator[tuple[str, Sequence[Shard]]]:
    """Yield the rows that repairs of the student were fitted on."""
    for repair in read_repairs(student.folder):
        for text in repair.texts:
            try:
                rows = tokenize_corpus(text.corpus, tokenizer, repair.reading())
            except AvssError as error:
                raise ConfigError(
                    f"The text that the repair of '{student.name}' was fitted on cannot be read again: {error.message}",
                    "Put it back, or set `allow_overlap` and know that held-out text may be part of it.",
                ) from error
            yield f"the repair of the student was fitted on ({text.corpus})", rows.shards
