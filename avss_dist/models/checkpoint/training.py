"""Points of trainings: step, tokens and seed of a checkpoint, from its name.

These names are understood, wherever they stand in the last part of a name, with ``-``, ``_``, ``=`` or nothing before
the number:

========================================  ======================================================
name                                      written by
========================================  ======================================================
``step3000``                              Pythia, OLMo-core
``stage1-step3000-tokens12B``             OLMo, Apertus
``checkpoint-500``                        the Trainer of transformers, and axolotl, which uses it
``checkpoint_500``, ``step_500``          accelerate
``iter_0001000``, ``global_step1000``     Megatron-LM, GPT-NeoX, DeepSpeed
``ckpt_358``                              LLM360
``ep0-ba1000``                            MosaicML's composer
``seed3``, ``run-seed3/checkpoint-500``   whoever trains several seeds
========================================  ======================================================

An epoch is not a step. Other names are understood by a pattern, such as ``run-{seed}/at-{step}-*``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from avss_dist.core.errors import ConfigError, nearest
from avss_dist.models.checkpoint.locate import Checkpoint

Span = tuple[int, int]
"""Start and end of a part of a text."""

_NUMBER = r"(?P<number>\d{1,18})"  # has room in a column
_STEP = re.compile(
    rf"(?<![a-z])((global|train|training)?[-_]?(steps?|checkpoint|ckpt|iter|iteration)[-_=]?|ba)(?P<value>{_NUMBER}k?)"
    r"(?![a-z\d])",
    re.IGNORECASE,
)
_TOKENS = (
    re.compile(r"(?<![a-z])tokens?[-_=]?(?P<value>\d{1,18}(\.\d+)?[kmbt]?)(?![a-z\d])", re.IGNORECASE),
    re.compile(r"(?<![a-z\d.])(?P<value>\d{1,18}(\.\d+)?[kmbt])[-_]?tok", re.IGNORECASE),
)
_SEED = re.compile(rf"(?<![a-z])seed[-_=]?(?P<value>{_NUMBER})(?![a-z\d])(?!\.\d)", re.IGNORECASE)
_EPOCH = re.compile(r"(?<![a-z])(epochs?|ep)[-_=]?(?P<value>\d+)(?![a-z\d])", re.IGNORECASE)
_THOUSANDS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

FIELDS = {
    "step": r"\d{1,18}[kK]?",
    "tokens": r"\d{1,18}(?:\.\d+)?[kKmMbBtT]?",
    "seed": r"\d{1,18}",
}
"""Fields of a pattern of names, each with the regular expression of its value."""
_PIECE = re.compile(r"\{(?P<field>[^{}]*)\}|(?P<any>\*+)|(?P<character>\?)|(?P<text>[^*?{]+|\{)")


@dataclass(frozen=True)
class TrainingPoint:
    """A point of a training.

    Attributes:
        series: name of the training, with ``*`` for what tells its checkpoints apart.
        step: the optimizer's step, or None.
        tokens: number of tokens trained on, or None.
        seed: seed of the training, or None.
        seed_group: name of all trainings that differ in the seed alone: ``series`` with ``*`` for the seed, or None.
    """

    series: str
    step: int | None = None
    tokens: int | None = None
    seed: int | None = None
    seed_group: str | None = None


@cache
def compile_names(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern of names.

    ``{step}``, ``{tokens}`` and ``{seed}`` stand for numbers, ``*`` for any text, ``**`` for any folders, ``?`` for a
    character. The expression finds names that end with the pattern, or have only a revision behind it, and in which it
    begins a part: after ``/`` or ``@``.

    Raises:
        ConfigError: the pattern has no field, an unknown one, or one twice.
    """
    fields: list[str] = []
    expression = ""
    for number, piece in enumerate(_PIECE.finditer(pattern)):
        field = piece["field"]
        if field is not None:
            if field not in FIELDS:
                raise ConfigError(f"'{pattern}' has an unknown field {{{field}}}.", nearest(field, FIELDS))
            if field in fields:
                raise ConfigError(f"'{pattern}' has {{{field}}} twice.", "Write * for one of them.")
            fields.append(field)
            expression += f"(?P<{field}>{FIELDS[field]})"
        elif piece["any"]:
            text = r"[^/@]*" if piece["any"] == "*" else ".*"
            expression += f"(?P<any{number}>{text})"
        elif piece["character"]:
            expression += f"(?P<any{number}>[^/@])"
        else:
            expression += re.escape(piece["text"])
    if not fields:
        raise ConfigError(
            f"'{pattern}' has none of {{step}}, {{tokens}} and {{seed}}.",
            "Write one in place of the number: run-{step}.",
        )
    return re.compile(rf"(?:^|[/@]){expression}(?:@.*)?$")


def matches_names(checkpoint: Checkpoint, pattern: str) -> bool:
    """Whether the name of a checkpoint has a pattern."""
    return any(compile_names(pattern).search(name) for name in _names(checkpoint))


def training_point(checkpoint: Checkpoint, patterns: Sequence[str] = ()) -> TrainingPoint:
    """Return the point of a training at which a checkpoint was saved, from its revision or the name of its folder.

    ``org/name@step3000-tokens12B`` is step 3,000 after 12e9 tokens of the series ``org/name@step*-tokens*``.

    Args:
        patterns: patterns of names (`compile_names`). What they do not tell is looked for by the words of the field.
    """
    name = _name_with(checkpoint, patterns)
    told: dict[str, Span] = {}
    varying: set[Span] = set()
    for pattern in patterns:
        match = compile_names(pattern).search(name)
        if match is None:
            continue
        spans = {group: match.span(group) for group in match.groupdict()}
        for field in FIELDS.keys() & spans.keys():
            told.setdefault(field, spans[field])
        if "step" in spans or "tokens" in spans:
            varying.update(span for group, span in spans.items() if group not in FIELDS)
    last_part = _start_of_last_part(checkpoint, name)
    if last_part is not None:
        _add_span(told, "step", [*_STEP.finditer(name, last_part)][:1], varying)
        for expression in _TOKENS:
            _add_span(told, "tokens", [*expression.finditer(name, last_part)][:1], varying)
    seeds = [*_SEED.finditer(name, _start_of_run(checkpoint, name))]
    if len(seeds) == 1:  # of several, no one is the seed of the training
        _add_span(told, "seed", seeds, varying)
    has_place = "step" in told or "tokens" in told
    if has_place:
        varying |= {told[field] for field in ("step", "tokens") if field in told}
        epochs = [match.span("value") for match in _EPOCH.finditer(name, last_part or 0)]
        varying.update(span for span in epochs if not _overlaps(span, varying))
        series = _with_stars(name, varying)
    else:
        series = checkpoint.name
    seed = _value(name, told.get("seed"))
    group = None
    if "seed" in told:
        group = _with_stars(name, varying | {told["seed"]})
    return TrainingPoint(series, _value(name, told.get("step")), _value(name, told.get("tokens")), seed, group)


def explain_no_step(name: str) -> str:
    """Return the reason why the name of a checkpoint tells no step, as part of a sentence; empty if it is not plain.

    Args:
        name: the revision, or the name of the folder.
    """
    epoch = _EPOCH.search(name)
    if epoch is None or _STEP.search(name):
        return ""
    return f"'{name}' names an epoch, which is not a step"


def _names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of a checkpoint: a hub id with its revision, or paths without links and as named."""
    if checkpoint.source == "hub":
        if checkpoint.revision_name:
            return [f"{checkpoint.name}@{checkpoint.revision_name}"]
        return [checkpoint.name]
    named = os.path.abspath(os.path.expanduser(checkpoint.name))
    return list(dict.fromkeys([checkpoint.named_path, named]))


def _name_with(checkpoint: Checkpoint, patterns: Sequence[str]) -> str:
    """Return the name of a checkpoint that has all patterns, or else the first one."""
    names = _names(checkpoint)
    for name in names:
        if all(compile_names(pattern).search(name) for pattern in patterns):
            return name
    return names[0]


def _start_of_last_part(checkpoint: Checkpoint, name: str) -> int | None:
    """Return where the revision, or the name of the folder, begins. None for a hub id without a revision."""
    if checkpoint.source != "hub":
        return name.rfind("/") + 1
    if not checkpoint.revision_name:
        return None
    return len(checkpoint.name) + 1


def _start_of_run(checkpoint: Checkpoint, name: str) -> int:
    """Return where the part of a name begins that may tell the seed: behind the organization, or the last two parts."""
    if checkpoint.source == "hub":
        return name.find("/") + 1
    return name.rfind("/", 0, max(0, name.rfind("/"))) + 1


def _add_span(told: dict[str, Span], field: str, matches: Sequence[re.Match[str]], varying: Iterable[Span]) -> None:
    """Add the place of a field's value, unless the field is told already, or something else is told there.

    Args:
        varying: places of text that a pattern has a star for.
    """
    for match in matches:
        span = match.span("value")
        if field not in told and not _overlaps(span, [*told.values(), *varying]):
            told[field] = span


def _overlaps(span: Span, others: Iterable[Span]) -> bool:
    """Whether a span overlaps one of others."""
    return any(span[0] < end and start < span[1] for start, end in others)


def _with_stars(name: str, spans: set[Span]) -> str:
    """Return a name with ``*`` in place of spans, which do not overlap."""
    # From the end, so that the places of earlier spans stay.
    for start, end in sorted(spans, reverse=True):
        name = f"{name[:start]}*{name[end:]}"
    return name


def _value(name: str, span: Span | None) -> int | None:
    """Return the number at a span of a name: ``3000``, ``20k``, ``1.5T``."""
    if span is None:
        return None
    text = name[span[0] : span[1]].lower()
    factor = _THOUSANDS.get(text[-1], 1)
    digits = text.rstrip("kmbt")
    if factor == 1 and digits.isdecimal():
        return int(digits)
    return round(float(digits) * factor)
