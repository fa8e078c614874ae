"""Methods that an experiment compares: scores and controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from avss_dist.core.errors import ConfigError, require_known
from avss_dist.core.names import CONTRAST
from avss_dist.core.registry import FROM_ACTIVATIONS, GREEDY, MEASURED, RECIPES
from avss_dist.core.settings import EVERY_SITE
from avss_dist.core.text import describe_threshold, parse_threshold
from avss_dist.core.validation import Check, Count, Positive, Share, checked
from avss_dist.pruning.repair.registry import NO_REPAIR, OptionalRepairName
from avss_dist.pruning.selection import LAST, PUBLISHED, RANDOM, Choice, Reading, reading_of

LEAVE_ONE_OUT = "loss"
REVERSED, ENDS_KEPT = "reversed", "ends kept"
EVERY_READING = "avss:all"


def _known_score(text: str) -> str:
    if text != EVERY_READING:
        parse_score(text)
    return text


Score = Annotated[str, Check(_known_score)]


@checked
class Experiment:
    """Request of an experiment with every run of a job.

    Raises:
        ConfigError: values out of their range, or that name no score.
    """

    tasks: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Tasks to evaluate, as for avss evaluate --tasks."""
    scores: Annotated[tuple[Score, ...], Field(strict=False, min_length=1)] = FROM_ACTIVATIONS
    """Scores that layers are chosen by: a score of the run; another reading of AVSS, such as avss:update:unit:0.1rms
    (site, recipe, threshold) or avss:all; a measurement of avss ablate, if the warehouse has it; greedy, which searches
    by the loss on the text of the run; on paired text also contrast or contrast:update:unit:0.1rms, which drops the
    highest first."""
    shares: Annotated[tuple[Share, ...], Field(strict=False, min_length=1)] = (0.25,)
    """Shares of the layers to drop."""
    random: Count = 5
    """Number of random choices for each share."""
    reversed: bool = True
    """Also drop the layers with the highest scores, as a control."""
    keep_ends: Count = 1
    """Choose again with this many layers at each end protected; 0 does not."""
    last: bool = True
    """Drop the last layers before the final one too (arXiv 2411.15558)."""
    leave_one_out: bool = True
    """Choose by the loss without each layer, on the text of the run."""
    search_max_sequences: Positive | None = None
    """Maximum number of rows of the run's text on which greedy measures the loss."""
    repairs: Annotated[tuple[OptionalRepairName, ...], Field(strict=False, min_length=1)] = (NO_REPAIR,)
    """Repairs of the pruned models; every choice is evaluated with each."""
    repair_corpora: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Texts that repairs are fitted on, with equal weight whatever their length, or a weight each: CORPUS=0.5."""
    repair_max_sequences: Positive | None = None
    """Maximum number of rows of each text that repairs are fitted on."""
    repair_skip_sequences: Count = 0
    """Skip this many rows at the start of each text."""
    max_sequences: Positive | None = None
    """Maximum number of rows of each evaluation text."""
    skip_sequences: Count = 0
    """Skip this many rows at the start of each text."""
    skip_questions: Count = 0
    """Skip this many questions at the start of TruthfulQA."""
    limit: Positive | None = None
    """Maximum number of questions per task."""
    num_fewshot: Count | None = None
    """Examples before each question of a harness task."""
    allow_many: bool = False
    """Allow more than 10,000 evaluations."""

    def __post_init__(self) -> None:
        if self.fitted and not self.repair_corpora:
            message = f"`repairs` {self.fitted[0]} needs text to be fitted on."
            raise ConfigError(message, "Name it with `repair_corpora`.")

    @property
    def fitted(self) -> Sequence[str]:
        """Repairs that are fitted, each once."""
        return [repair for repair in dict.fromkeys(self.repairs) if repair != NO_REPAIR]

    def count_choices(self, readings: int) -> int:
        """Return the maximum number of choices of layers for a model.

        Args:
            readings: number of readings of AVSS that ``avss:all`` stands for.
        """
        controls = self.reversed + bool(self.keep_ends)
        several = EVERY_READING in self.scores
        scores = len(self.scores) - several + self.leave_one_out
        methods = scores * (1 + controls) + several * (readings + controls)
        methods += self.random * (1 + bool(self.keep_ends))
        return (methods + self.last) * len(self.shares)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to choose layers.

    Attributes:
        score: one of ``registry.SCORES``, or ``contrast``.
        reading: reading of AVSS or the contrast.
        control: `REVERSED`, `ENDS_KEPT` or None.
        seed: seed of ``random``.
        ends: number of layers at each end that are protected.
    """

    score: str
    reading: Reading | None = None
    control: str | None = None
    seed: int | None = None
    ends: int = 0

    @property
    def label(self) -> str:
        """Name for people."""
        name = "leave one out" if self.score == LEAVE_ONE_OUT else self.score.replace("_", " ")
        if self.reading not in (None, PUBLISHED):
            site, recipe, threshold, kind = self.reading
            name += f" ({site}, {recipe}, {describe_threshold(threshold, kind)})"
        if self.seed is not None:
            name += f" {self.seed}"
        if self.score == GREEDY:
            name += " search"
        return f"{name}, {self.control}" if self.control else name

    def choice(self, share: float) -> Choice:
        """Return the choice that drops a share of the layers."""
        return Choice(
            by=self.score,
            reading=self.reading,
            share=share,
            first=self.ends,
            last=self.ends,
            highest=self.control == REVERSED,
            seed=self.seed or 0,
        )


def parse_score(text: str) -> tuple[str, Reading | None]:
    """Return score and reading from ``block_influence``, ``avss``, or ``avss:SITE:RECIPE:THRESHOLD``.

    Raises:
        ConfigError: the text names no score.
    """
    name, *parts = text.split(":")
    require_known("score", name, (*FROM_ACTIVATIONS, *MEASURED, GREEDY, CONTRAST))
    if name not in ("avss", CONTRAST):
        if parts:
            raise ConfigError(f"'{text}': only avss and {CONTRAST} are read in several ways.", f"Write {name}.")
        return name, None
    if not parts:
        return name, PUBLISHED
    if len(parts) != 3:
        raise ConfigError(f"'{text}' is not a reading of AVSS.", f"Write {name}:SITE:RECIPE:THRESHOLD, or avss:all.")
    require_known("site", parts[0], EVERY_SITE)
    require_known("recipe", parts[1], RECIPES)
    return name, (parts[0], parts[1], *parse_threshold(parts[2]))


def methods(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> Iterator[Method]:
    """Yield the methods of an experiment for a run with these rows of ``scores``, without scores that it lacks."""
    for score, reading in _scored(experiment, rows):
        yield Method(score=score, reading=reading)
        if reading in (None, PUBLISHED):
            if experiment.reversed and score != GREEDY:
                yield Method(score=score, reading=reading, control=REVERSED)
            if experiment.keep_ends:
                yield Method(score=score, reading=reading, control=ENDS_KEPT, ends=experiment.keep_ends)
    if experiment.last:
        yield Method(score=LAST)
    for seed in range(experiment.random):
        yield Method(score=RANDOM, seed=seed)
        if experiment.keep_ends:
            yield Method(score=RANDOM, seed=seed, control=ENDS_KEPT, ends=experiment.keep_ends)


def _scored(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Reading | None]]:
    """Return the scores of an experiment that a run has, each once, with the reading of AVSS."""
    scored = dict.fromkeys(reading_of(row) for row in rows)
    names: dict[tuple[str, Reading | None], None] = {}
    for text in experiment.scores:
        if text == EVERY_READING:
            names |= dict.fromkeys(("avss", reading) for reading in scored)
        else:
            names[parse_score(text)] = None
    if experiment.leave_one_out:
        names[LEAVE_ONE_OUT, None] = None
    return [(score, reading) for score, reading in names if reading is None or reading in scored]
