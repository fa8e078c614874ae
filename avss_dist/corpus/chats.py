"""Conversations: columns of messages, rendered to text with the tokenizer's chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from avss_dist.core.errors import CorpusError, first_line
from avss_dist.corpus.answers import MAX_LINE_BYTES, field_text, too_long

TODAY = datetime(2024, 7, 26)
"""Date in every template that has one. It is fixed, so that the same text always has the same tokens."""
_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")


class ChatTokenizer(Protocol):
    """The used part of a transformers tokenizer that has a chat template."""

    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: messages in order; each has a ``role``, and mostly a ``content``.
        where: file and line.
    """

    messages: Sequence[Mapping[str, Any]]
    where: str


Document = str | Chat


def field_document(record: Mapping[str, Any], field: str, where: str) -> Document:
    """Return the text of a field, or its conversation: a list of messages that have a role.

    Raises:
        CorpusError: the field is neither. The message names the place.
    """
    value = record.get(field)
    if isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        return Chat(value, where)
    return field_text(record, field, where)


def chat_template(tokenizer: ChatTokenizer) -> str:
    """Return the SHA-256, in hex, of a tokenizer's chat template.

    Raises:
        CorpusError: the tokenizer has none.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise CorpusError(
            f"The tokenizer of {name} has no chat template of its own.",
            "Leave `chat_template` out, or name a model that was tuned to chat.",
        ) from error
    return hashlib.sha256(template.encode()).hexdigest()


def without_today(template: str) -> str:
    """Return a template with its date fixed to `TODAY`."""
    return _NOW.sub(lambda call: json.dumps(TODAY.strftime(call["format"])), template)


def no_text(chat: Chat) -> CorpusError:
    """Return the error for a conversation that is read without `chat_template`."""
    return CorpusError(
        f"{chat.where} is a conversation, and no text.",
        "Set `chat_template` to put it in the tokenizer's chat template, or name a column of text.",
    )


def render(chat: Chat, tokenizer: ChatTokenizer) -> str:
    """Render a conversation with the tokenizer's chat template, special tokens included.

    Raises:
        CorpusError: the template refuses the conversation, or the text is too long. The message names the place.
    """
    from jinja2 import TemplateError

    template = without_today(tokenizer.get_chat_template())
    try:
        text = tokenizer.apply_chat_template(list(chat.messages), chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise CorpusError(
            f"{chat.where}: the chat template does not take this conversation: {first_line(error)}",
            "Fix the messages: a role and a content each, in the order that the model knows.",
        ) from error
    if len(text) > MAX_LINE_BYTES:
        raise too_long(chat.where)
    return str(text)
