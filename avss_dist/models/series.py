"""Checkpoints of one training: when each was saved, by its name, and which of a hub's revisions a pattern means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from avss_dist.errors import ModelError
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
class Saved:
    """When in its training a checkpoint was saved, as its name tells.

    Attributes:
        series: what its training is called: the name, with ``*`` for what tells its checkpoints apart.
        step: the optimizer's step; None where the name has none.
        tokens: that were read until then; None where the name has none.
    """

    series: str
    step: int | None
    tokens: int | None


def when_saved(checkpoint: Checkpoint) -> Saved:
    """``org/name@step3000-tokens12B`` is step 3,000 after 12e9 tokens of ``org/name@step*-tokens*``; so are folders."""
    where, name = checkpoint.name, checkpoint.revision_name
    if checkpoint.source != "hub":
        where, _, name = checkpoint.path.rpartition("/")
    step = _STEP.search(name)
    tokens = next(filter(None, (pattern.search(name) for pattern in _TOKENS)), None)
    found = [match for match in (step, tokens) if match]
    if not found:
        return Saved(checkpoint.name, None, None)
    for match in sorted(found, key=lambda match: match.start(), reverse=True):
        name = f"{name[: match.start('number')]}*{name[match.end('unit') :]}"
    return Saved(f"{where}{'@' if checkpoint.source == 'hub' else '/'}{name}", _number(step), _number(tokens))


def _number(found: re.Match[str] | None) -> int | None:
    return round(float(found["number"]) * _THOUSANDS[found["unit"].lower()]) if found else None


def matching_revisions(name: str, pattern: str) -> list[str]:
    """The branches and tags of a hub id that a pattern such as ``stage1-step*`` means, in the order of their numbers.

    Raises:
        ModelError: none does, there is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with explain_hub_errors(name):
        refs = HfApi().list_repo_refs(name)
    known = [ref.name for ref in (*refs.branches, *refs.tags)]
    found = [revision for revision in dict.fromkeys(known) if fnmatchcase(revision, pattern)]
    if not found:
        some = sorted(known, key=in_order)
        more = f" and {len(some) - MAX_NAMED:,} more" if len(some) > MAX_NAMED else ""
        raise ModelError(
            f"No revision of '{name}' matches '{pattern}'.", f"There are: {', '.join(some[:MAX_NAMED])}{more}."
        )
    return sorted(found, key=in_order)


def in_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which numbers in names count as numbers: step9 is before step10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
