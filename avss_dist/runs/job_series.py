"""Series of checkpoints in job files: numbered revisions, evenly spaced or so on a log scale, and seeds."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from avss_dist.core.errors import ConfigError, first_names
from avss_dist.core.validation import check
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.training import TrainingPoint, compile_names, matches_names, training_point

MAX_REVISIONS = 10_000
MAX_SEEDS = 1000
MAX_NUMBER = 10**18  # of a revision, below the largest of a column
MOST_NAMED = 12  # points that a note names
ROUNDING = 1e-9  # of a number of points
SPACINGS = ("step", "factor", "per_decade")
"""Keys of a range that say how far its points are apart."""
_SEED_NUMBER = re.compile(r"\d{1,18}")
_SEED_RANGE = re.compile(r"(?P<first>\d{1,18})\.\.(?P<last>\d{1,18})")


class Section(BaseModel):
    """A mapping of a job file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RevisionRange(Section):
    """Numbered revisions: ``{prefix: step, from: 0, to: 2000, step: 1000}`` is step0, step1000, step2000.

    With ``factor`` or ``per_decade``, the points are evenly spaced on a log scale, and each is the nearest revision
    that exists: ``{prefix: step, from: 1, to: 143000, factor: 2}``.
    """

    prefix: str = ""
    """Text before the number."""
    first: Annotated[int, Field(alias="from", ge=0, le=MAX_NUMBER)]
    """The first number."""
    last: Annotated[int, Field(alias="to", ge=0, le=MAX_NUMBER)]
    """Upper bound of the numbers, inclusive."""
    step: Annotated[int, Field(ge=1)] | None = None
    """Difference of consecutive numbers; 1 by default."""
    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Instead of step: ratio of consecutive points, each the nearest revision that exists."""
    per_decade: Annotated[int, Field(ge=1)] | None = None
    """Instead of step: points from a number to ten times it, each the nearest revision that exists."""

    @property
    def is_logarithmic(self) -> bool:
        """Whether the points are evenly spaced on a log scale."""
        return self.factor is not None or self.per_decade is not None

    @property
    def spacing(self) -> str:
        """Distance of the points on a log scale, in words."""
        if self.factor is not None:
            return f"by factor {self.factor:g}"
        return f"{self.per_decade} per decade"

    def count(self) -> int:
        """Return the number of points, before they are rounded."""
        if not self.is_logarithmic:
            return (self.last - self.first) // (self.step or 1) + 1
        return math.floor(math.log(self.last / self.first) / self._log_ratio() + ROUNDING) + 1

    def points(self) -> list[int]:
        """Return the wanted numbers in ascending order, each once. On a log scale, they are rounded."""
        if not self.is_logarithmic:
            return list(range(self.first, self.last + 1, self.step or 1))
        points = [round(self.first * math.exp(place * self._log_ratio())) for place in range(self.count())]
        return list(dict.fromkeys(points))

    def _log_ratio(self) -> float:
        """Return the logarithm of the ratio of consecutive points."""
        if self.factor is not None:
            return math.log(self.factor)
        assert self.per_decade is not None
        return math.log(10) / self.per_decade


def require_range(revisions: RevisionRange) -> RevisionRange:
    """Return a range.

    Raises:
        ConfigError: it is empty or too long, or is spaced in two ways.
    """
    spacings = [name for name in SPACINGS if getattr(revisions, name) is not None]
    if len(spacings) > 1:
        raise ConfigError(f"`{spacings[0]}` and `{spacings[1]}` exclude each other.", "Give one of them.")
    if revisions.first > revisions.last:
        raise ConfigError(f"invalid range: 'from' {revisions.first} is larger than 'to' {revisions.last}.")
    if revisions.is_logarithmic and revisions.first < 1:
        raise ConfigError(
            f"'from' must be at least 1 with `{spacings[0]}`: 0 has no place on a log scale.",
            f"Name that revision beside the range: [{revisions.prefix}0, {{from: 1, ...}}].",
        )
    if revisions.count() > MAX_REVISIONS:
        raise ConfigError(f"invalid range: expected 'from' up to 'to' in at most {MAX_REVISIONS:,} steps.")
    return revisions


@dataclass(frozen=True, kw_only=True)
class NearestRevisions:
    """Revisions nearest to the points of a range.

    Attributes:
        names: the revisions, in the order of their numbers.
        note: the points that have another revision, or none of their own, in a sentence; empty without such points.
    """

    names: list[str]
    note: str


def nearest_revisions(wanted: RevisionRange, existing: Sequence[str]) -> NearestRevisions:
    """Return the revisions that are nearest to the points of a range on a log scale.

    No revision is taken twice: of several points with the same nearest one, the closest has it, and the others have
    none.

    Args:
        existing: names of all revisions of the model.

    Raises:
        ConfigError: no revision has the prefix and a number in the range, or several have the same number.
    """
    names = _numbered(wanted, existing)
    numbers = sorted(names)
    if not numbers:
        raise ConfigError(
            f"No revision is '{wanted.prefix}' and a number from {wanted.first:,} to {wanted.last:,}.",
            f"There are: {first_names(list(existing), 5) or 'none'}.",
        )
    point_of_number: dict[int, int] = {}
    points = wanted.points()
    for point in points:
        number = _nearest(numbers, point)
        other = point_of_number.get(number)
        if other is None or _distance(number, point) < _distance(number, other):
            point_of_number[number] = point
    chosen = sorted(point_of_number)
    for number in chosen:
        if len(names[number]) > 1:
            raise ConfigError(
                f"Several revisions have the number {number:,}: {first_names(names[number], 3)}.",
                "Write more of their name in `prefix`, or name the revisions one by one.",
            )
    return NearestRevisions(
        names=[names[number][0] for number in chosen], note=_describe_points(wanted, points, point_of_number)
    )


def _numbered(wanted: RevisionRange, existing: Sequence[str]) -> dict[int, list[str]]:
    """Return the names of revisions with a prefix and a number in a range, by that number.

    Of several with one number, ``step1000`` and ``step1000-ema``, the plain one counts.
    """
    pattern = re.compile(re.escape(wanted.prefix) + r"(?P<number>\d{1,18})(?P<thousands>[kK]?)(?![A-Za-z\d])")
    names: dict[int, list[str]] = {}
    for name in existing:
        match = pattern.match(name)
        if match is None:
            continue
        number = int(match["number"])
        if match["thousands"]:
            number *= 1000
        if wanted.first <= number <= wanted.last:
            names.setdefault(number, []).append(name)
    for number, same in names.items():
        plain = f"{wanted.prefix}{number}"
        if plain in same:
            names[number] = [plain]
    return names


def _nearest(numbers: Sequence[int], point: int) -> int:
    """Return the number that is nearest to a point on a log scale; of two that are equally near, the lower."""
    place = bisect_left(numbers, point)
    beside = numbers[max(0, place - 1) : place + 1]
    return min(beside, key=lambda number: _distance(number, point))


def _distance(number: int, point: int) -> float:
    """Return the distance of two numbers on a log scale."""
    return abs(math.log(number / point))


def _describe_points(wanted: RevisionRange, points: Sequence[int], point_of_number: dict[int, int]) -> str:
    """Return the points that have another revision, or none of their own, in a sentence."""
    others = []
    for number in sorted(point_of_number):
        point = point_of_number[number]
        if number != point:
            others.append(f"{number:,} for {point:,}")
    taken = set(point_of_number.values())
    without = [f"{point:,}" for point in points if point not in taken]
    if not others and not without:
        return ""
    sentence = f"{len(taken)} revisions for {len(points)} points {wanted.spacing}"
    if others:
        sentence += f"; the nearest that exists is {first_names(others, MOST_NAMED)}"
    if without:
        sentence += f"; no revision of their own have {first_names(without, MOST_NAMED)}"
    return f"{sentence}."


def _require_one_place(model: str) -> str:
    """Return a name with ``{}`` in place of a seed."""
    if model.count("{}") != 1:
        raise ConfigError(f"'{model}' must have {{}} in one place, where the seed is.", "Write org/name-seed{}.")
    compile_names(seed_pattern(model))
    return model


def _seed_values(value: object) -> tuple[str, ...]:
    """Return seeds from a range such as ``1..9``, or from a list. They are written as there: ``01`` is not ``1``."""
    match = None
    if isinstance(value, str):
        match = _SEED_RANGE.fullmatch(value.strip())
    if match is not None:
        first = int(match["first"])
        last = int(match["last"])
        if first > last:
            raise ConfigError(f"the first of the seeds '{value}' is larger than the last.", f"Write {last}..{first}.")
        if last - first >= MAX_SEEDS:
            raise ConfigError(f"'{value}' are more than {MAX_SEEDS:,} seeds.", "Split them into several entries.")
        digits = len(match["first"])
        return tuple(f"{seed:0{digits}d}" for seed in range(first, last + 1))
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"expected seeds as a range (1..9) or a list ([1, 2, 5]), not '{value}'.")
    seeds: dict[int, str] = {}
    for item in value:
        text = str(item).strip()
        if not _SEED_NUMBER.fullmatch(text):
            raise ConfigError(f"'{text}' is not a seed: expected a whole number of at least 0.")
        if int(text) in seeds:
            raise ConfigError(f"the seed {int(text)} is there twice.", "Leave one out.")
        seeds[int(text)] = text
    return tuple(seeds.values())


class SeedGroup(Section):
    """Trainings that differ in the seed alone: ``{model: "org/name-seed{}", values: 1..9}``."""

    model: Annotated[str, check(_require_one_place)]
    """Hub id, folder or glob of folders, with {} in place of the seed."""
    values: Annotated[
        tuple[str, ...],
        check(_seed_values, before=True),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "pattern": r"^\d+\.\.\d+$"},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                ],
                "examples": ["1..9", [1, 2, 5]],
            }
        ),
    ]
    """Seeds: a range 1..9, or a list."""

    def models(self) -> list[str]:
        """Return the name of each seed's training."""
        return [self.model.replace("{}", value) for value in self.values]


def seed_pattern(model: str) -> str:
    """Return the pattern of names (`training.compile_names`) that finds the seed of a group in the names of its models.

    Args:
        model: name with ``{}`` in place of the seed. Folders before that are left out.
    """
    start = model.rfind("/", 0, model.index("{}")) + 1
    return model[start:].rstrip("/").replace("{}", "{seed}")


def require_names(pattern: str) -> str:
    """Return a pattern of names.

    Raises:
        ConfigError: see `training.compile_names`.
    """
    compile_names(pattern)
    return pattern


def place_in_training(model: str, patterns: Sequence[str]) -> TrainingPoint:
    """Return the point of a training of a model of a job, which is not opened.

    Args:
        patterns: see `training.training_point`.
    """
    return training_point(_named_checkpoint(model), patterns)


def has_pattern(model: str, pattern: str) -> bool:
    """Whether the name of a model of a job has a pattern."""
    return matches_names(_named_checkpoint(model), pattern)


def is_same_place(model: str, other: str) -> bool:
    """Whether two models of a job are the same hub id, or the same folder, to which one may be a link."""
    if model == other:
        return True
    path = os.path.expanduser(model)
    return os.path.exists(path) and os.path.realpath(path) == os.path.realpath(os.path.expanduser(other))


def _named_checkpoint(model: str) -> Checkpoint:
    """Return a checkpoint by its name alone."""
    path = os.path.expanduser(model)
    if os.path.exists(path):
        return Checkpoint(name=model, source="folder", path=os.path.realpath(path), revision="")
    name, _, revision = model.partition("@")
    return Checkpoint(name=name, source="hub", path="", revision="", revision_name=revision)


def missing_points(points: Sequence[TrainingPoint]) -> Iterator[tuple[str, str]]:
    """Yield groups of seeds, each with a sentence about a seed that lacks steps which others have."""
    steps_of_group: dict[str, dict[int, set[int]]] = {}
    for point in points:
        place = point.step if point.step is not None else point.tokens
        if point.seed_group is not None and point.seed is not None and place is not None:
            steps_of_group.setdefault(point.seed_group, {}).setdefault(point.seed, set()).add(place)
    for group, steps_of_seed in steps_of_group.items():
        every_step = set().union(*steps_of_seed.values())
        for seed, steps in sorted(steps_of_seed.items()):
            missing = [f"{step:,}" for step in sorted(every_step - steps)]
            if missing:
                yield group, f"seed {seed} lacks {first_names(missing, MOST_NAMED)}, which other seeds have."


def describe_notes(models_of_note: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield notes on models of a job, each with the models that it is about.

    Args:
        models_of_note: models by note.
    """
    for note, models in models_of_note.items():
        yield f"{first_names(models, 2)}: {note}"
