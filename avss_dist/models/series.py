"""Series of checkpoints of one training: step and tokens from their names, and revisions by a pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from avss_dist.core.errors import ModelError
from avss_dist.models.checkpoints import Checkpoint, explain_hub_errors

_WORDS = r"(?<![a-z])(global|train|training)?[-_]?(steps?|checkpoint|ckpt|iter|iteration)[-_]?"
_STEP = re.compile(rf"{_WORDS}(?P<number>\d+)(?P<unit>k?)(?![a-z\d])", re.IGNORECASE)
_TOKENS = (
    re.compile(r"(?<![a-z])tokens?[-_]?(?P<number>\d+(\.\d+)?)(?P<unit>[kmbt]?)(?![a-z\d])", re.IGNORECASE),
    re.compile(r"(?<![a-z\d.])(?P<number>\d+(\.\d+)?)(?P<unit>[kmbt])[-_]?tok", re.IGNORECASE),
)
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
MAX_NAMED = 5  # revisions in a message


@dataclass(frozen=True)
class TrainingPoint:
    """Point of a training at which a checkpoint was saved, from its name.

    Attributes:
        series: name of the training: the checkpoint's name with ``*`` in place of step and tokens.
        step: the optimizer's step; None if the name has none.
        tokens: number of tokens trained on so far; None if the name has none.
    """

    series: str
    step: int | None
    tokens: int | None


def training_point(checkpoint: Checkpoint) -> TrainingPoint:
    """Return the point of training in a checkpoint's name, its revision on the hub or the name of its folder.

    ``org/name@step3000-tokens12B`` is step 3,000 after 12e9 tokens of the series ``org/name@step*-tokens*``.
    """
    prefix, name = checkpoint.name, checkpoint.revision_name
    if checkpoint.source != "hub":
        prefix, _, name = checkpoint.path.rpartition("/")
    step = _STEP.search(name)
    tokens = next(filter(None, (pattern.search(name) for pattern in _TOKENS)), None)
    matches = [match for match in (step, tokens) if match]
    if not matches:
        return TrainingPoint(checkpoint.name, None, None)
    for match in sorted(matches, key=lambda match: match.start(), reverse=True):
        name = f"{name[: match.start('number')]}*{name[match.end('unit') :]}"
    return TrainingPoint(f"{prefix}{'@' if checkpoint.source == 'hub' else '/'}{name}", _number(step), _number(tokens))


def _number(match: re.Match[str] | None) -> int | None:
    return round(float(match["number"]) * _THOUSANDS[match["unit"].lower()]) if match else None


def matching_revisions(name: str, pattern: str) -> list[str]:
    """Return the branches and tags of a hub id that match a pattern such as ``stage1-step*``, in natural order.

    Raises:
        ModelError: no revision matches, there is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with explain_hub_errors(name):
        refs = HfApi().list_repo_refs(name)
    known = [ref.name for ref in (*refs.branches, *refs.tags)]
    matches = [revision for revision in dict.fromkeys(known) if fnmatchcase(revision, pattern)]
    if not matches:
        names = sorted(known, key=natural_key)
        more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
        raise ModelError(
            f"No revision of '{name}' matches '{pattern}'.", f"There are: {', '.join(names[:MAX_NAMED])}{more}."
        )
    return sorted(matches, key=natural_key)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers in names as numbers: step9 is before step10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
