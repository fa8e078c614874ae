"""Texts that were read on the way to a plan or a checkpoint, so that they are not held out from it.

Whatever reads a text to choose, repair or train records it here: its name without keys, the options that make the same
rows again, and hashes that tell whether it has changed. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from avss_dist.core.settings import Settings, TextOptions
from avss_dist.core.validation import OneOf, Positive, RedactedText, checked
from avss_dist.core.values import NewObject

if TYPE_CHECKING:
    from avss_dist.corpus.shards import CorpusPlan


SELF = "self"
"""Name of the text that a model writes itself. It is held out from nothing, as the model may know any text by heart."""


def describe_corpus(corpus: str) -> str:
    """Return the name of a text for people."""
    return "text that the whole model wrote" if corpus == SELF else corpus


@dataclass(frozen=True)
class Use:
    """A way of reading a text.

    Attributes:
        reader: noun for people. It may have a place, ``{}``, for the name of the reader.
        sentence: end of a sentence that begins with the text, with the same place.
    """

    reader: str
    sentence: str


SCORES = "scores"
ABLATION = "ablation"
SEARCH = "search"
SPARSITY = "sparsity"
PRECISION = "precision"
REPAIR = "repair"
DISTILLATION = "distillation"
USES: Mapping[str, Use] = {
    SCORES: Use("run {}", "the scores of {} were measured on"),
    ABLATION: Use("the ablation {}", "the ablation {} was measured on"),
    SEARCH: Use("the search of a plan", "a plan was searched on"),
    SPARSITY: Use("the allocation of sparsity", "the sparsities of a plan were chosen on"),
    PRECISION: Use("the prediction of rounded weights", "number formats of a plan were predicted on"),
    REPAIR: Use("the repair of '{}'", "the repair of '{}' was fitted on"),
    DISTILLATION: Use("the distillation of '{}'", "'{}' was distilled on"),
}
"""Ways of reading a text, by name."""
TRAINED_ON = (REPAIR, DISTILLATION)
"""Uses that change weights."""


@checked
class SeenText(TextOptions):
    """A text that was read, with the options that make the same rows again."""

    use: Annotated[str, OneOf(tuple(USES))]
    """Purpose of the reading."""
    by: str = ""
    """Run, evaluation or model that has read it."""
    corpus: Annotated[RedactedText, Field(min_length=1)]
    """The corpus, as the user named it, without keys."""
    max_sequences: Positive | None = None
    """Number of rows that were read after the skipped ones; all by default."""
    sequences_per_shard: Positive | None = None
    """Rows of a shard, on which `tokens_fingerprint` depends; 32 by default."""
    corpus_fingerprint: str = ""
    """Hash of its content."""
    tokens_fingerprint: str = ""
    """Hash of its rows of tokens."""

    @property
    def settings(self) -> Settings:
        """Settings that read the same rows again."""
        return Settings(**self.text_options(), sequences_per_shard=self.sequences_per_shard)

    @property
    def reader(self) -> str:
        """Noun for people for whatever has read it."""
        return USES[self.use].reader.format(self.by)

    @property
    def rows_end(self) -> int | None:
        """Index after its last row, or None if all rows were read."""
        return None if self.max_sequences is None else self.skip_sequences + self.max_sequences

    def describe(self) -> str:
        """Return the end of a sentence that begins with a text: ``the scores of RUN were measured on (FILE)``."""
        return f"{USES[self.use].sentence.format(self.by)} ({describe_corpus(self.corpus)})"

    def is_of(self, text: CorpusPlan) -> bool:
        """Whether a text that was read with the same options is unchanged, as far as is known."""
        known = {self.corpus_fingerprint, self.tokens_fingerprint} - {""}
        if not known:
            return True
        return not known.isdisjoint({text.corpus_fingerprint, text.tokens_fingerprint})

    def values(self) -> NewObject:
        """Return the fields that have a value as plain values, as files have them."""
        fields = asdict(self)
        in_order: NewObject = {}
        for name in ("use", "by", "corpus"):
            in_order[name] = fields.pop(name)
        in_order.update(fields)
        return {name: value for name, value in in_order.items() if _has_value(value)}


def _has_value(value: object) -> bool:
    """Whether a field is to be written: 0 is a value, and an empty text, None and False are not."""
    return value not in ("", None) and value is not False


SeenTexts = Annotated[tuple[SeenText, ...], Field(strict=False)]
"""Type of a checked field of texts, which may be given as mappings."""


def seen_text(text: CorpusPlan, settings: Settings, use: str, by: str = "") -> SeenText:
    """Return the record of a text that was read.

    Args:
        settings: settings with which it was read.
        use, by: see `SeenText`.
    """
    options = settings.text_options() | {"max_sequences": text.num_sequences}
    if text.source == SELF:
        options["skip_sequences"] = 0
    return SeenText(
        use=use,
        by=by,
        corpus=text.source,
        sequences_per_shard=settings.sequences_per_shard,
        corpus_fingerprint=text.corpus_fingerprint,
        tokens_fingerprint=text.tokens_fingerprint,
        **options,
    )


def distinct(texts: Iterable[SeenText]) -> tuple[SeenText, ...]:
    """Return texts without those whose rows an earlier one has, whatever they were read for."""
    by_rows: dict[tuple[object, ...], SeenText] = {}
    for text in texts:
        rows = (text.corpus, text.corpus_fingerprint, *text.text_options().values())
        by_rows.setdefault(rows, text)
    return tuple(by_rows.values())
