"""What shrinking a model takes: how much of it goes, chosen by what, repaired how, evaluated on what."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from avss_dist.errors import ConfigError
from avss_dist.pruning.repair.weighted import weighted
from avss_dist.registry import BLOCK_DISTANCE, SCORES
from avss_dist.settings import DEFAULT_REPAIR, NO_REPAIR, REPAIRS, OneOf, checked
from avss_dist.text import RedactedURI

GREEDY = "greedy"  # of ``settings.SEARCHES``, with every set repaired
CHOSEN_BY = (*(name for name in SCORES if name != BLOCK_DISTANCE), GREEDY)  # that one is of neighbours alone
FEW_UNKNOWNS = ("scale", "channel", "rotated")
POOL = 2  # so many times as many layers as go are searched among
Texts = Annotated[tuple[str, ...], Field(strict=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Ends = Annotated[int, Field(ge=0)]


@checked
class Shrinking:
    """How a model is made smaller.

    Raises:
        ConfigError: values out of their range, or that exclude each other.
    """

    corpus: str
    """The text that layers are scored on."""
    share: Share | None = None
    """Drop this share of the layers; a quarter by default."""
    keep: Share | None = None
    """Drop as many layers as can go while every task keeps this share of the whole model's, in place of a share."""
    by: Annotated[str, OneOf(CHOSEN_BY)] = "damage"
    """What layers are chosen by; greedy: by the loss that is left after the repair, set by set, of those that damage
    calls the least important, twice as many as go."""
    repair: Annotated[str, OneOf((NO_REPAIR, *REPAIRS))] = DEFAULT_REPAIR
    """What is fitted at each cut. refit gives back the most, on text of other domains too, and wants the most text."""
    repair_corpora: Texts = ()
    """The texts that the repair is fitted on, each alike or by a weight (CORPUS=0.5); by default the corpus."""
    tasks: Texts = ()
    """What is evaluated, as avss evaluate --task takes it; by default the perplexity of a part of every text."""
    first: Ends = 0
    """Layers at the start that are never dropped."""
    last: Ends = 0
    """Layers at the end that are never dropped."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """The most questions per task."""
    num_fewshot: Ends | None = None
    """Examples before each question of a harness task."""
    allow_overlap: bool = False
    """Evaluate on text that layers were scored on, or that was repaired on, too."""

    def __post_init__(self) -> None:
        if self.share is not None and self.keep is not None:
            raise ConfigError("`share` and `keep` both say how many layers go.", "Keep one of them.")
        if self.repair == NO_REPAIR and self.repair_corpora:
            raise ConfigError("`repair_corpora` has no effect without a repair.", "Leave it out, or name a `repair`.")

    @property
    def ranked_by(self) -> str:
        """The score by which layers go, or by which a search begins."""
        return "damage" if self.by == GREEDY else self.by

    @property
    def searched_repair(self) -> str:
        """What is fitted to each set that is searched: map, where the repair has many unknowns."""
        return self.repair if self.repair in (NO_REPAIR, *FEW_UNKNOWNS) else "map"

    @property
    def repair_texts(self) -> list[RedactedURI]:
        """What a repair is fitted on, without weights."""
        return [weighted(text)[0] for text in self.repair_corpora] or [RedactedURI(self.corpus)]

    @property
    def texts(self) -> list[RedactedURI]:
        """Every text, once."""
        return list(dict.fromkeys([RedactedURI(self.corpus), *self.repair_texts]))
