"""Check that the corpora of runs can be read, before anything is opened for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from avss_dist.core.errors import AvssError, ConfigError
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.chats import Chat, Document, no_text
from avss_dist.corpus.sources import documents


def corpus_problems(corpora: Sequence[str], chat_templates: set[bool]) -> Iterator[tuple[int | None, AvssError]]:
    """Read the first document of each corpus, and yield problems with the index of the corpus; None for all of them.

    Args:
        chat_templates: values of the setting ``chat_template`` among the runs.
    """
    first: list[Document | None] = []
    for index, corpus in enumerate(corpora):
        try:
            first.append(next(documents(corpus), None))
        except AvssError as error:
            yield index, error
        else:
            if isinstance(first[-1], Chat) and chat_templates == {False}:
                yield index, no_text(first[-1])
    if chat_templates == {True} and first and not any(isinstance(document, Chat) for document in first):
        names = " and ".join(map(RedactedURI, corpora))
        yield (
            None,
            ConfigError(
                f"`chat_template` has no effect: there are no conversations in {names}.",
                "Leave it out, or name a column of messages: file.jsonl:messages.",
            ),
        )
