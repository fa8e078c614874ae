"""Parts of texts: documents, conversations and labelled answers, read from the records of a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal, Protocol

from avss_dist.core.errors import CorpusError, first_line, nearest
from avss_dist.core.text import describe_bytes, docs_page
from avss_dist.core.values import JsonObject
from avss_dist.corpus.labels import AFTER_ANOTHER, BEST, INCORRECT, TRUTHFUL

if TYPE_CHECKING:
    import torch

MAX_LINE_BYTES = 16 << 20  # maximum of a line; a text may have as many characters
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

Record = tuple[JsonObject, str]
"""JSON object, or row of another file, with its file and line."""
Records = Iterable[Record]


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        text: text that follows the prompt, whitespace included.
        label: kind of answer, its stratum.
        where: file and line.
    """

    prompt: str
    text: str
    label: str
    where: str


def labelled_answers(records: Records, prompt: str, answer: str, label: str) -> Iterator[Answer]:
    """Yield an answer for each record, from its fields of these names.

    Raises:
        CorpusError: a field is missing or not text, or an answer is empty. The message names file and line.
    """
    for record, where in records:
        yield _answer(
            prompt=field_text(record, prompt, where),
            text=field_text(record, answer, where),
            label=field_text(record, label, where),
            where=where,
        )


def truthfulqa_answers(records: Records, seed: int) -> Iterator[Answer]:
    """Yield two answers to each question of TruthfulQA: the best, and one of the incorrect ones.

    The incorrect answer depends only on the seed and the question, not on its place in the file.

    Raises:
        CorpusError: as `labelled_answers`.
    """
    for record, where in records:
        question = field_text(record, "question", where)
        best = field_text(record, "best_answer", where)
        incorrect = field_texts(record, "incorrect_answers", where)
        prompt = question_prompt(question)
        yield _answer(prompt, best, TRUTHFUL, where)
        drawn = _random_number(seed, question) % len(incorrect)
        yield _answer(prompt, incorrect[drawn], INCORRECT, where)


def truthfulqa_choices(records: Records) -> list[list[Answer]]:
    """Return all answers to each question of TruthfulQA: the best, the other correct ones, the incorrect ones.

    Raises:
        CorpusError: as `labelled_answers`, or the file holds no question.
    """
    questions = []
    for record, where in records:
        question = field_text(record, "question", where)
        best = field_text(record, "best_answer", where)
        correct = field_texts(record, "correct_answers", where)
        incorrect = field_texts(record, "incorrect_answers", where)
        prompt = question_prompt(question)
        answers = [_answer(prompt, best, BEST, where)]
        answers += [_answer(prompt, text, TRUTHFUL, where) for text in correct if text != best]
        answers += [_answer(prompt, text, INCORRECT, where) for text in incorrect]
        questions.append(answers)
    if not questions:
        raise CorpusError("The file holds no question.", "Name one of TruthfulQA.")
    return questions


def _random_number(seed: int, text: str) -> int:
    """Return a number of 64 bits that depends on the seed and the text alone."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def question_prompt(question: str) -> str:
    """Return the prompt of a question of TruthfulQA."""
    return f"Q: {question}\nA:"


def _answer(prompt: str, text: str, label: str, where: str) -> Answer:
    """Return an answer, with a space between it and its prompt if neither has one."""
    if not text.strip():
        raise CorpusError(f"{where}: the answer is empty.", "Write one, or leave the line out.")
    stratum = label.strip()
    if not stratum or stratum.endswith(AFTER_ANOTHER):
        raise CorpusError(f"{where}: invalid label '{label}'.", "Expected a word, such as hallucinated or truthful.")
    is_apart = not prompt or prompt[-1].isspace() or text[0].isspace()
    if not is_apart:
        text = f" {text}"
    return Answer(prompt, text, stratum, where)


def field_text(record: JsonObject, field: str, where: str) -> str:
    """Return the text of a field.

    Raises:
        CorpusError: the field is missing or not text. The message names the place.
    """
    if field not in record:
        raise CorpusError(f"{where}: no field '{field}'.", nearest(field, record))
    return _text(record[field], field, where)


def field_texts(record: JsonObject, field: str, where: str) -> list[str]:
    """Return the texts of a field that is a list of at least one text.

    Raises:
        CorpusError: as `field_text`.
    """
    values = record.get(field)
    if isinstance(values, list) and values:
        return [_text(value, field, where) for value in values]
    if values is None:
        raise CorpusError(f"{where}: no field '{field}'.", nearest(field, {}))
    _text(values, field, where)  # has a message of its own for other values than texts
    raise CorpusError(f"{where}: '{field}' must be a list of texts.", "Fix the line.")


def _text(value: object, field: str, where: str) -> str:
    """Return a value that is a text, or raise the error that says what it is."""
    if _are_token_ids(value):
        hint = f"Decode token ids into text first: {docs_page('reference/inputs')} has the lines."
        raise CorpusError(f"{where}: '{field}' has numbers, and a corpus is text.", hint)
    if not isinstance(value, str) or _HALF_CHARACTER.search(value):
        raise CorpusError(f"{where}: '{field}' is not text but {value!r:.60}.", "Fix the line, or name another field.")
    if len(value) > MAX_LINE_BYTES:
        raise too_long(where)
    return value


def _are_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(token, int) for token in value)


def too_long(where: str) -> CorpusError:
    """Return the error for a text that is too long to be read."""
    return CorpusError(
        f"{where}: a text or line is longer than {describe_bytes(MAX_LINE_BYTES)}.", "Split it into several documents."
    )


TODAY = datetime(2024, 7, 26)
"""Date in every template that has one. It is fixed, so that the same text always has the same tokens."""
_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")


class Tokenizer(Protocol):
    """A tokenizer, as those of transformers are: what of it is used. Special tokens that it lacks are None."""

    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool,
        truncation: bool,
        padding: bool,
        verbose: bool,
        return_attention_mask: bool,
        return_token_type_ids: bool,
    ) -> Mapping[str, list[list[int]]]:
        """Return the tokens of texts as ``input_ids``."""

    def __len__(self) -> int:
        """Return the number of tokens in the vocabulary."""

    def get_vocab(self) -> Mapping[str, int]:
        """Return the number of each token."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str:
        """Return the text of tokens."""

    def batch_decode(
        self,
        sequences: list[list[int]] | torch.Tensor,
        *,
        skip_special_tokens: bool = ...,
        clean_up_tokenization_spaces: bool = ...,
    ) -> list[str]:
        """Return the text of each sequence of tokens."""

    def get_chat_template(self) -> str:
        """Return the template of conversations, and raise ValueError without one."""

    def apply_chat_template(
        self, conversation: list[JsonObject], *, chat_template: str, tokenize: Literal[False]
    ) -> str:
        """Return the text of a conversation in a template."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: messages in order; each has a ``role``, and mostly a ``content``.
        where: file and line.
    """

    messages: Sequence[JsonObject]
    where: str


Document = str | Chat


def field_document(record: JsonObject, field: str, where: str) -> Document:
    """Return the text of a field, or its conversation: a list of messages that have a role.

    Raises:
        CorpusError: the field is neither. The message names the place.
    """
    value = record.get(field)
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return Chat(value, where)
    return field_text(record, field, where)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def chat_template(tokenizer: Tokenizer) -> str:
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


def render(document: Document, tokenizer: Tokenizer | None, *, chats: bool) -> str:
    """Return a text as it is, and a conversation in the tokenizer's chat template, special tokens included.

    Args:
        tokenizer: None will do unless conversations are read.
        chats: whether conversations are read.

    Raises:
        CorpusError: conversations are not read, the template refuses this one, or the text is too long. The
            message names the place.
    """
    if isinstance(document, str):
        return document
    if not chats:
        raise CorpusError(
            f"{document.where} is a conversation, and no text.",
            "Set `chat_template` to put it in the tokenizer's chat template, or name a column of text.",
        )
    from jinja2 import TemplateError

    assert tokenizer is not None
    template = without_today(tokenizer.get_chat_template())
    try:
        text = tokenizer.apply_chat_template(list(document.messages), chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise CorpusError(
            f"{document.where}: the chat template does not take this conversation: {first_line(error)}",
            "Fix the messages: a role and a content each, in the order that the model knows.",
        ) from error
    if len(text) > MAX_LINE_BYTES:
        raise too_long(document.where)
    return str(text)
