"""The record of a distillation: a small file beside the weights of a distilled checkpoint, and lines of its card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from avss_dist.core.errors import explain_damaged_record
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_rows, escape_markdown
from avss_dist.core.validation import Count, Positive, RedactedText, checked
from avss_dist.core.values import TableRow
from avss_dist.corpus.seen import DISTILLATION, SELF, SeenText
from avss_dist.distillation.curve import CurvePoint, Number
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.plans.seen import read_seen
from avss_dist.pruning.repair.registry import read_repairs

FILE = "avss_distill.json"
_EVALUATED = re.compile(r"^- Evaluated: (.*)\n", re.MULTILINE)  # of the card of the student
CARD_END = "\nWritten by avss_dist.\n"


@checked
class RecordedText:
    """A text of a distillation.

    Attributes:
        corpus: the corpus, as the user named it, without keys; or self for text that the teacher wrote.
        label: name of the text in the curve.
        fingerprint: fingerprint of its content.
        weight: weight in the mix; 0 for a text that was only measured.
        trained_rows: rows that were trained on, after the held-out ones.
        held_out_rows: rows that were measured and never trained on.
        teacher_perplexity: perplexity of the teacher on the held-out rows.
    """

    corpus: RedactedText
    label: RedactedText
    fingerprint: str
    weight: Number
    trained_rows: Count
    held_out_rows: Count
    teacher_perplexity: Number

    def describe_trained(self, skipped: int) -> str:
        """Return the text, the rows that were trained on, and the weight in words.

        Args:
            skipped: number of rows before those that were read.
        """
        before = self.held_out_rows + self._skipped(skipped)
        return f"{self.corpus} ({describe_rows(before, self.trained_rows)}, weight {self.weight:g})"

    def describe_held_out(self, skipped: int) -> str:
        """Return the text and its held-out rows in words.

        Args:
            skipped: number of rows before those that were read.
        """
        others = "" if self.trained_rows else ", nor any of this text"
        rows = describe_rows(self._skipped(skipped), self.held_out_rows)
        return f"{self.corpus} ({rows}, not trained on{others})"

    def _skipped(self, skipped: int) -> int:
        return 0 if self.corpus == SELF else skipped  # all of the text that the teacher wrote is read


@checked
class DistillRecord:
    """A distillation of a checkpoint: models, texts, settings and results.

    Attributes:
        train: weights that were trained.
        batch_size: rows in a training step.
        tokens: tokens that were requested.
        steps: steps of the written checkpoint.
        ended: reason why training ended.
        reading: settings with which the texts were read.
        computed: dtype of the passes; weights were float32.
        curve: evaluations in order. The last one is that of the written checkpoint, in its dtype.
    """

    student: str
    student_revision: str
    teacher: str
    teacher_revision: str
    train: str
    lora_rank: Positive | None
    learning_rate: Number
    warmup: Count
    batch_size: Positive
    tokens: Number
    steps: Count
    ended: str
    seed: Count
    reading: TableRow
    held_out: Positive
    computed: str
    texts: Annotated[tuple[RecordedText, ...], Field(strict=False)]
    curve: Annotated[tuple[CurvePoint, ...], Field(strict=False)]

    @property
    def settings(self) -> Settings:
        """Settings that read the same texts again."""
        return Settings.from_stored(self.reading)

    @property
    def before(self) -> CurvePoint:
        """The evaluation of the student before training."""
        return self.curve[0]

    @property
    def after(self) -> CurvePoint:
        """The evaluation of the written checkpoint."""
        return self.curve[-1]

    def seen(self, name: str) -> list[SeenText]:
        """Return the texts that were trained on, without that of the teacher.

        Args:
            name: name of the distilled checkpoint.
        """
        return [self._seen_text(text, name) for text in self.texts if text.trained_rows and text.corpus != SELF]

    def _seen_text(self, text: RecordedText, name: str) -> SeenText:
        """Return the rows of a text that were trained on."""
        options = self.settings.text_options()
        options["skip_sequences"] = self.settings.skip_sequences + text.held_out_rows
        options["max_sequences"] = text.trained_rows
        return SeenText(
            use=DISTILLATION,
            by=name,
            corpus=text.corpus,
            corpus_fingerprint=text.fingerprint,
            **options,
        )

    def describe(self) -> list[str]:
        """Return lines for people."""
        skipped = self.settings.skip_sequences
        trained = ", ".join(text.describe_trained(skipped) for text in self.texts if text.trained_rows)
        length = f"{self.after.tokens:,} tokens"
        if self.after.tokens < self.tokens:
            length += f" of {self.tokens:,.0f}, after which held-out loss was lowest"
        lines = [
            f"Distilled from {self.teacher}: {length}, weights trained: {self.train}, "
            f"on {trained}; evaluate on other rows or text."
        ]
        for text in self.texts:
            before = self.before.kept[text.label]
            after = self.after.kept[text.label]
            lines.append(
                f"Perplexity kept of the teacher's {text.teacher_perplexity:.4g} on {text.describe_held_out(skipped)}: "
                f"{before:.1%} before, {after:.1%} after."
            )
        return lines


_REMOVED = ("others", "missed", "teacher_top", "text_loss", "hidden_loss")  # fields of version 0.2


def write_record(folder: Path, record: DistillRecord) -> None:
    """Write the record of a checkpoint."""
    (folder / FILE).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> DistillRecord | None:
    """Return the record of a distilled checkpoint, or None for any other checkpoint.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    with explain_damaged_record(file, "is no record of a distillation", "Copy the checkpoint again."):
        values = json.loads(file.read_text(encoding="utf-8"))
        for part in (values, *values["texts"], *values["curve"]):
            for name in _REMOVED:
                part.pop(name, None)
        if "skip_sequences" in values:  # where earlier versions had it
            values["reading"]["skip_sequences"] = values.pop("skip_sequences")
        return DistillRecord(**values)


def write_card(student: Path, folder: Path, record: DistillRecord, evaluated: Sequence[str] = ()) -> None:
    """Write the model card of a distilled checkpoint: that of the student, if it has one, and what was done to it.

    Args:
        evaluated: lines on evaluations of the distilled checkpoint, which replace those of the student.
    """
    card = student / "README.md"
    text = f"# {escape_markdown(student.name)}\n"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
    if evaluated:
        text = _EVALUATED.sub("", text)
    else:
        text = _EVALUATED.sub(r"- Evaluated before distillation: \1\n", text)
    text = f"{text.removesuffix(CARD_END)}\n## Distilled\n\n"
    for line in (*record.describe(), *evaluated):
        text += f"- {escape_markdown(line)}\n"
    (folder / "README.md").write_text(text + CARD_END, encoding="utf-8")


def seen_by_checkpoint(checkpoint: Checkpoint) -> list[SeenText]:
    """Return the texts that were read on the way to a checkpoint: for its plans, its repairs and its distillation.

    Raises:
        ModelError: a record is damaged.
    """
    seen = [*read_seen(checkpoint.folder)]
    for repair in read_repairs(checkpoint.folder):
        seen += repair.seen(checkpoint.name)
    record = read_record(checkpoint.folder)
    if record is not None:
        seen += record.seen(checkpoint.name)
    return seen
