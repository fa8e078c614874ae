"""Request of an experiment, and the choices of layers that it compares: by scores and by controls.

It stands beside the verdict on its results, below the job files that hold it and `studies.experiment`, which runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Annotated

from pydantic import Field

from avss_dist.core.errors import ConfigError, require_known
from avss_dist.core.sites import EVERY_SITE
from avss_dist.core.thresholds import describe_threshold, parse_threshold
from avss_dist.core.validation import Count, Positive, Share, check, checked
from avss_dist.core.values import NewRow, TableRow
from avss_dist.plans.choice import Choice
from avss_dist.plans.criteria import LEAVE_ONE_OUT, PUBLISHED, Reading, reading_of
from avss_dist.pruning.repair.registry import NO_REPAIR, OptionalRepairName
from avss_dist.stats.catalog import CONTRAST, FROM_ACTIVATIONS, GREEDY, LAST, MEASURED, RANDOM, RECIPES

REVERSED = "reversed"
ENDS_KEPT = "ends kept"
EVERY_READING = "avss:all"


def _known_score(text: str) -> str:
    if text != EVERY_READING:
        parse_score(text)
    return text


Score = Annotated[str, check(_known_score)]


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
    """Texts that repairs are fitted on, with equal weight whatever their length, or a weight each: CORPUS=0.5.
    self is text that the model writes itself."""
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
    keep_pattern: bool = False
    """Drop only layers after which llama.cpp and others read the rest as it is. Choices and controls that there are not
    are left out."""
    allow_many: bool = False
    """Allow more than 10,000 evaluations."""

    def __post_init__(self) -> None:
        if self.fitted and not self.repair_corpora:
            raise ConfigError(
                f"`repairs` {self.fitted[0]} needs text to be fitted on.", "Name it with `repair_corpora`."
            )

    @property
    def fitted(self) -> Sequence[str]:
        """Repairs that are fitted, each once."""
        return [repair for repair in dict.fromkeys(self.repairs) if repair != NO_REPAIR]

    def count_choices(self, readings: int) -> int:
        """Return the maximum number of choices of layers for a model.

        Args:
            readings: number of readings of AVSS that ``avss:all`` stands for.
        """
        ends = 1 if self.keep_ends else 0
        controls = ends
        if self.reversed:
            controls += 1
        scores = len(self.scores)
        if self.leave_one_out:
            scores += 1
        methods = 0
        if EVERY_READING in self.scores:
            scores -= 1
            methods += readings + controls  # Controls are made of one reading alone.
        methods += scores * (1 + controls)
        methods += self.random * (1 + ends)
        if self.last:
            methods += 1
        return methods * len(self.shares)


def control_name(choice: Choice) -> str | None:
    """Return the name of the control that a choice of an experiment is, or None."""
    if choice.highest:
        return REVERSED
    if choice.first:
        return ENDS_KEPT
    return None


def describe_method(choice: Choice) -> str:
    """Return the name of the method of a choice for people."""
    if choice.by == LEAVE_ONE_OUT:
        name = "leave one out"
    else:
        name = choice.by.replace("_", " ")
    if choice.reading not in (None, PUBLISHED):
        site, recipe, threshold, kind = choice.reading
        name += f" ({site}, {recipe}, {describe_threshold(threshold, kind)})"
    if choice.by == RANDOM:
        name += f" {choice.seed}"
    if choice.by == GREEDY:
        name += " search"
    if control := control_name(choice):
        name += f", {control}"
    return name


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
    site, recipe, threshold = parts
    require_known("site", site, EVERY_SITE)
    require_known("recipe", recipe, RECIPES)
    return name, (site, recipe, *parse_threshold(threshold))


def choices(experiment: Experiment, rows: Sequence[TableRow]) -> list[Choice]:
    """Return the choices of an experiment for a run with these rows of ``scores``, by method and share.

    Scores that the run lacks are left out.
    """
    methods: list[NewRow] = []
    for score, reading in _scores_to_compare(experiment, rows):
        methods += _score_methods(experiment, score, reading)
    if experiment.last:
        methods.append({"by": LAST})
    for seed in range(experiment.random):
        methods.append({"by": RANDOM, "seed": seed})
        if experiment.keep_ends:
            methods.append({"by": RANDOM, "seed": seed, **_protected_ends(experiment)})
    every_choice = []
    for method, share in product(methods, experiment.shares):
        every_choice.append(Choice(**method, share=share, keep_pattern=experiment.keep_pattern))
    return every_choice


def _scores_to_compare(experiment: Experiment, rows: Sequence[TableRow]) -> Iterator[tuple[str, Reading | None]]:
    """Yield the name and the reading of each score that a run has, once each, in the order of the request.

    Args:
        rows: rows of ``scores`` of the run.
    """
    readings = list(dict.fromkeys(reading_of(row) for row in rows))
    texts = list(experiment.scores)
    if experiment.leave_one_out:
        texts.append(LEAVE_ONE_OUT)
    scores: list[tuple[str, Reading | None]] = []
    for text in texts:
        if text == EVERY_READING:
            scores += [("avss", reading) for reading in readings]
        else:
            scores.append(parse_score(text))
    for score, reading in dict.fromkeys(scores):
        if reading is None or reading in readings:
            yield score, reading


def _score_methods(experiment: Experiment, score: str, reading: Reading | None) -> list[NewRow]:
    """Return the fields of the choices by a score: by itself, and its controls unless it is another reading of AVSS."""
    method: dict[str, object] = {"by": score, "reading": reading}
    methods = [method]
    if reading not in (None, PUBLISHED):
        return methods
    # A search is among sets of layers, of which none is the highest.
    if experiment.reversed and score != GREEDY:
        methods.append({**method, "highest": True})
    if experiment.keep_ends:
        methods.append({**method, **_protected_ends(experiment)})
    return methods


def _protected_ends(experiment: Experiment) -> dict[str, int]:
    """Return the fields of a choice that protect the layers at both ends."""
    return {"first": experiment.keep_ends, "last": experiment.keep_ends}
