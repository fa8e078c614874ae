"""Paired text: answers with several labels to the same prompts, read from the records of a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from avss_dist.core.errors import CorpusError, nearest
from avss_dist.core.names import AFTER_ANOTHER, BEST, INCORRECT, TRUTHFUL
from avss_dist.core.text import describe_bytes

MAX_LINE_BYTES = 16 << 20  # maximum of a line; a text may have as many characters
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

Records = Iterable[tuple[Mapping[str, Any], str]]
"""JSON objects, each with its file and line."""


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
        before, text, kind = (field_text(record, name, where) for name in (prompt, answer, label))
        yield _answer(before, text, kind, where)


def truthfulqa_answers(records: Records, seed: int) -> Iterator[Answer]:
    """Yield two answers to each question of TruthfulQA: the best, and one of the incorrect ones.

    The incorrect answer depends only on the seed and the question, not on its place in the file.

    Raises:
        CorpusError: as `labelled_answers`.
    """
    for record, where in records:
        question, best = (field_text(record, name, where) for name in ("question", "best_answer"))
        wrong = field_texts(record, "incorrect_answers", where)
        drawn = int.from_bytes(hashlib.sha256(f"{seed}:{question}".encode()).digest()[:8], "big")
        prompt = question_prompt(question)
        yield _answer(prompt, best, TRUTHFUL, where)
        yield _answer(prompt, wrong[drawn % len(wrong)], INCORRECT, where)


def truthfulqa_choices(records: Records) -> list[list[Answer]]:
    """Return all answers to each question of TruthfulQA: the best, the other correct ones, the incorrect ones.

    Raises:
        CorpusError: as `labelled_answers`, or the file holds no question.
    """
    questions = []
    for record, where in records:
        question, best = (field_text(record, name, where) for name in ("question", "best_answer"))
        correct, wrong = (field_texts(record, f"{name}_answers", where) for name in ("correct", "incorrect"))
        answers = [(best, BEST), *((text, TRUTHFUL) for text in correct if text != best)]
        answers += [(text, INCORRECT) for text in wrong]
        questions.append([_answer(question_prompt(question), text, label, where) for text, label in answers])
    if not questions:
        raise CorpusError("The file holds no question.", "Name one of TruthfulQA.")
    return questions


def question_prompt(question: str) -> str:
    """Return the prompt of a question of TruthfulQA."""
    return f"Q: {question}\nA:"


def with_space(prompt: str, text: str) -> str:
    """Return an answer with a space before it if neither the answer nor its prompt has one."""
    return text if text[:1].isspace() or prompt[-1:].isspace() or not prompt else f" {text}"


def _answer(prompt: str, text: str, label: str, where: str) -> Answer:
    if not text.strip():
        raise CorpusError(f"{where}: the answer is empty.", "Write one, or leave the line out.")
    kind = label.strip()
    if not kind or kind.endswith(AFTER_ANOTHER):
        raise CorpusError(f"{where}: invalid label '{label}'.", "Expected a word, such as hallucinated or truthful.")
    return Answer(prompt, with_space(prompt, text), kind, where)


def group_by_prompt(answers: Iterable[Answer], source: str) -> list[list[Answer]]:
    """Return answers grouped by prompt, in the order in which prompts first occur. A repeated answer counts once.

    Raises:
        CorpusError: there are no answers, all answers, or all answers to one prompt, have the same label, or one answer
            to a prompt has two labels.
    """
    pairs: dict[str, list[Answer]] = {}
    first: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        same = first.setdefault((answer.prompt, answer.text), answer)
        if same.label != answer.label:
            raise CorpusError(
                f"{answer.where}: this answer is labelled '{answer.label}', and '{same.label}' at {same.where}.",
                "Give different answers to the labels of a prompt, or leave both lines out.",
            )
        if same is answer:
            pairs.setdefault(answer.prompt, []).append(answer)
    if not pairs:
        raise CorpusError(f"{source} holds no text (documents read: 0).", "Name one that holds some.")
    labels = sorted({answer.label for pair in pairs.values() for answer in pair})
    if len(labels) == 1:
        message = f"Every answer of {source} is labelled '{labels[0]}'."
        raise CorpusError(message, "A contrast takes two labels: give both kinds of answers, or name another field.")
    for pair in pairs.values():
        if len({answer.label for answer in pair}) == 1:
            raise CorpusError(
                f"{pair[0].where}: the answers to this prompt are all labelled '{pair[0].label}'.",
                "Give each prompt answers of two labels, or leave it out.",
            )
    return list(pairs.values())


def field_text(record: Mapping[str, Any], field: str, where: str) -> str:
    """Return the text of a field.

    Raises:
        CorpusError: the field is missing or not text. The message names the place.
    """
    if field not in record:
        raise CorpusError(f"{where}: no field '{field}'.", nearest(field, record))
    return _text(record[field], field, where)


def field_texts(record: Mapping[str, Any], field: str, where: str) -> list[str]:
    """Return the texts of a field that is a list of at least one text.

    Raises:
        CorpusError: as `field_text`.
    """
    values = record.get(field)
    if not isinstance(values, list) or not values:
        field_text({} if values is None else record, field, where)
        raise CorpusError(f"{where}: '{field}' must be a list of texts.", "Fix the line.")
    return [_text(value, field, where) for value in values]


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or _HALF_CHARACTER.search(value):
        raise CorpusError(f"{where}: '{field}' is not text but {value!r:.60}.", "Fix the line, or name another field.")
    if len(value) > MAX_LINE_BYTES:
        raise too_long(where)
    return value


def too_long(where: str) -> CorpusError:
    """Return the error for a text that is too long to be read."""
    maximum = describe_bytes(MAX_LINE_BYTES)
    return CorpusError(f"{where}: a text or line is longer than {maximum}.", "Split it into several documents.")
