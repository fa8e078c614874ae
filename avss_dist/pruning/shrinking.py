"""Options of shrinking a model: share of the layers, score, repair and tasks."""

from __future__ import annotations

from typing import Annotated

from avss_dist.core.errors import ConfigError
from avss_dist.core.registry import INTERACTIONS, SCORES
from avss_dist.core.text import RedactedURI
from avss_dist.core.validation import Count, OneOf, Positive, Share, Text, Texts, checked
from avss_dist.options import Option
from avss_dist.pruning.repair.record import split_weight
from avss_dist.pruning.repair.registry import DEFAULT_REPAIR, NO_REPAIR, OptionalRepairName, searched_repair

GREEDY = "greedy"  # of ``registry.SEARCHES``, with every set repaired
CHOSEN_BY = tuple(name for name, score in SCORES.items() if not score.of_sets)  # scores of single layers
POOL = 2  # candidates of the greedy search, in multiples of the number of layers to drop


@checked
class Shrinking:
    """Options of shrinking a model.

    Raises:
        ConfigError: values out of their range, or that exclude each other.
    """

    corpus: Text
    """Text to score the layers on."""
    share: Share | None = None
    """Drop this share of the layers; 0.25 by default."""
    keep: Share | None = None
    """Drop as many layers as possible while every task keeps this share, such as 0.9."""
    by: Annotated[str, OneOf((*CHOSEN_BY, INTERACTIONS, GREEDY))] = "damage"
    """Criterion to choose the layers: a measurement of avss ablate, a score, random, or greedy (the repaired loss)."""
    repair: OptionalRepairName = DEFAULT_REPAIR
    """Repair to fit at each cut to make up for the removed layers."""
    repair_corpora: Annotated[Texts, Option(names=("--repair-corpus",))] = ()
    """Text to fit the repair on instead of the corpus: CORPUS or CORPUS=WEIGHT."""
    tasks: Annotated[Texts, Option(names=("--task",))] = ()
    """Tasks, as for avss evaluate. By default, part of every text."""
    first: Count = 0
    """Layers at the start that are never dropped."""
    last: Count = 0
    """Layers at the end that are never dropped."""
    limit: Positive | None = None
    """Maximum number of questions per task."""
    num_fewshot: Count | None = None
    """Examples before each question of a harness task."""
    allow_overlap: bool = False
    """Allow evaluation on text that scores or repairs were made on."""

    def __post_init__(self) -> None:
        if self.share is not None and self.keep is not None:
            raise ConfigError("`share` and `keep` are mutually exclusive.", "Keep one of them.")
        if self.repair == NO_REPAIR and self.repair_corpora:
            raise ConfigError("`repair_corpora` has no effect without a repair.", "Leave it out, or name a `repair`.")

    @property
    def ranked_by(self) -> str:
        """Score that orders the layers, or from which a search begins."""
        return "damage" if self.by == GREEDY else self.by

    @property
    def searched_repair(self) -> str:
        """Repair that is fitted to each set of a search: map in place of a repair with many unknowns."""
        return searched_repair(self.repair)

    @property
    def repair_texts(self) -> list[RedactedURI]:
        """Texts that a repair is fitted on, without their weights."""
        return [split_weight(text)[0] for text in self.repair_corpora] or [RedactedURI(self.corpus)]

    @property
    def texts(self) -> list[RedactedURI]:
        """All texts, each once."""
        return list(dict.fromkeys([RedactedURI(self.corpus), *self.repair_texts]))
