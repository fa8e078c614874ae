"""The methods that an experiment compares: scores, and the controls that make an answer believable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avss_dist.errors import ConfigError, require_known
from avss_dist.pruning.selection import PUBLISHED, RANDOM, Choice, Reading, reading_of
from avss_dist.settings import GROUND_TRUTH, RECIPES, SCORES, SITES
from avss_dist.text import describe_threshold, parse_threshold

LEAVE_ONE_OUT = "loss"
REVERSED, ENDS_KEPT = "reversed", "ends kept"
EVERY_READING = "avss:all"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is asked of every run of a job.

    Attributes:
        tasks: as `avss evaluate --task` takes them.
        scores: what layers are chosen by: ``config.SCORES``; AVSS as it is read elsewhere, such as
            ``avss:update:unit:0.1rms`` (site, recipe, threshold), or ``avss:all``; ``taylor`` and ``shapley`` where
            `avss ablate` has measured them.
        shares: shares of the layers to drop.
        random: how many random choices of each share.
        reversed: drop the highest too.
        keep_ends: choose once more with so many layers at each end kept; 0 does not.
        leave_one_out: choose by the loss without each layer, on the text of the run.
        max_sequences, skip_sequences: rows of each text that is evaluated on, and those before them.
        limit, num_fewshot: of the harness: questions of a task at most, and examples before each.

    Raises:
        ConfigError: a value is out of its range, or names no score.
    """

    tasks: tuple[str, ...]
    scores: tuple[str, ...] = SCORES
    shares: tuple[float, ...] = (0.25,)
    random: int = 5
    reversed: bool = True
    keep_ends: int = 1
    leave_one_out: bool = True
    max_sequences: int | None = None
    skip_sequences: int = 0
    limit: int | None = None
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "scores", "shares"):
            if not getattr(self, name):
                raise ConfigError(f"{name} are none.", "Name one at least.")
        for share in self.shares:
            if not 0 < share < 1:
                raise ConfigError(f"A share of the layers is between 0 and 1, not {share:g}.")
        for name, least in (("random", 0), ("keep_ends", 0), ("skip_sequences", 0), ("limit", 1), ("max_sequences", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}.")
        for score in self.scores:
            if score != EVERY_READING:
                parse_score(score)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to choose layers.

    Attributes:
        score: one of ``config.SCORES`` or ``config.GROUND_TRUTH``, or ``random``.
        reading: of AVSS.
        control: `REVERSED`, `ENDS_KEPT` or None.
        seed: of ``random``.
        ends: layers at each end that are kept.
    """

    score: str
    reading: Reading | None = None
    control: str | None = None
    seed: int | None = None
    ends: int = 0

    @property
    def label(self) -> str:
        """What people call it."""
        name = "leave one out" if self.score == LEAVE_ONE_OUT else self.score.replace("_", " ")
        if self.reading not in (None, PUBLISHED):
            site, recipe, threshold, kind = self.reading
            name += f" ({site}, {recipe}, {describe_threshold(threshold, kind)})"
        if self.seed is not None:
            name += f" {self.seed}"
        return f"{name}, {self.control}" if self.control else name

    def choice(self, share: float) -> Choice:
        """What it drops of a share of the layers."""
        return Choice(
            by=self.score,
            reading=self.reading,
            fraction=share,
            first=self.ends,
            last=self.ends,
            highest=self.control == REVERSED,
            seed=self.seed or 0,
        )


def parse_score(text: str) -> tuple[str, Reading | None]:
    """Read ``block_influence``, ``avss``, or ``avss:SITE:RECIPE:THRESHOLD``.

    Raises:
        ConfigError: it names no score.
    """
    name, *parts = text.split(":")
    require_known("score", name, (*SCORES, *GROUND_TRUTH))
    if name != "avss":
        if parts:
            raise ConfigError(f"'{text}': only avss is read in several ways.", f"Write {name}.")
        return name, None
    if not parts:
        return name, PUBLISHED
    if len(parts) != 3:
        raise ConfigError(f"'{text}' is no reading of AVSS.", "Write avss:SITE:RECIPE:THRESHOLD, or avss:all.")
    require_known("site", parts[0], SITES)
    require_known("recipe", parts[1], RECIPES)
    return name, (parts[0], parts[1], *parse_threshold(parts[2]))


def methods(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> Iterator[Method]:
    """The methods of an experiment for a run with these rows of ``scores``; what was not scored is left out."""
    scored = dict.fromkeys(reading_of(row) for row in rows)
    names: dict[tuple[str, Reading | None], None] = {}
    for text in experiment.scores:
        if text == EVERY_READING:
            names |= dict.fromkeys(("avss", reading) for reading in scored)
        else:
            names[parse_score(text)] = None
    if experiment.leave_one_out:
        names[LEAVE_ONE_OUT, None] = None
    for score, reading in names:
        if reading is not None and reading not in scored:
            continue
        yield Method(score=score, reading=reading)
        if reading in (None, PUBLISHED):
            if experiment.reversed:
                yield Method(score=score, reading=reading, control=REVERSED)
            if experiment.keep_ends:
                yield Method(score=score, reading=reading, control=ENDS_KEPT, ends=experiment.keep_ends)
    for seed in range(experiment.random):
        yield Method(score=RANDOM, seed=seed)
        if experiment.keep_ends:
            yield Method(score=RANDOM, seed=seed, control=ENDS_KEPT, ends=experiment.keep_ends)
