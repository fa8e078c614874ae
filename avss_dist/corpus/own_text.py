"""Text that a model writes itself, read like other text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from avss_dist.core.errors import NoRows
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import Settings
from avss_dist.corpus.documents import Tokenizer
from avss_dist.corpus.seen import SELF
from avss_dist.corpus.shards import CorpusPlan, tokenize_source
from avss_dist.corpus.sources import Source


@dataclass(frozen=True)
class OwnText:
    """Texts that a model has written.

    Attributes:
        texts: the texts in order, without empty ones.
    """

    texts: tuple[str, ...] = field(repr=False)

    @property
    def source(self) -> Source:
        """The texts as a source of documents."""
        return Source(
            documents=lambda: iter(self.texts),
            fingerprint=lambda: fingerprint(kind=SELF, documents=self.texts),
        )

    def read(self, tokenizer: Tokenizer, settings: Settings) -> CorpusPlan:
        """Return rows of the texts, which are no conversations and in no random order.

        Raises:
            NoRows: the texts are too short.
        """
        settings = replace(settings, chat_template=False, shuffle_seed=None)
        return tokenize_source(SELF, self.source, tokenizer, settings)

    def count_rows(self, tokenizer: Tokenizer, settings: Settings) -> int:
        """Return the number of rows of all texts."""
        try:
            return self.read(tokenizer, replace(settings, max_sequences=None, skip_sequences=0)).num_sequences
        except NoRows:
            return 0
