"""Catalog of scores: of layers, of routed experts, and scores that people bring.

A new score from activations is a row of `SCORES`, and its computation in `stats.scores`: Parquet, charts, plans and
comparisons take it from here. It imports nothing of the package, so that the command line lists the names without
loading anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

RECIPES = ("pooled", "element", "unit")
"""Samples that the variance and sparsity of AVSS are computed from: token means, elements, or unit means."""
READING = ("site", "recipe", "threshold", "threshold_kind")
"""Columns that tell readings of AVSS apart."""
LOWEST_SHARE = 0.25
"""Default share of the layers, those with the lowest score, that plans drop and comparisons compare."""
CONTRAST = "contrast"
"""Score of an experiment: contrast of hallucinated and truthful answers by AVSS."""
# Controls.
LAST = "last"
RANDOM = "random"
# Scores of sets of layers.
BLOCK_DISTANCE = "block_distance"
GREEDY = "greedy"
DAMAGE_TASK = "damage:"
_DAMAGE = {"leave_one_out": False, "damage": True}


@dataclass(frozen=True, kw_only=True)
class ScoreInfo:
    """A score of layers. Low is unimportant for every score but the controls: one that is not is stored as ``1 - x``.

    Attributes:
        title: its name in tables and charts.
        meaning: a noun phrase, for lists of scores.
        column: column of the table ``scores`` of a score that is computed from activations; else empty.
        definition: formula, for the description of that column.
        unit: unit of that column.
        caption: the caption of its chart on the page of a report.
        task: prefix of the task that measures it, before a corpus; empty if none does.
        ground_truth: whether it is the loss without layers itself, or its linearization; else an estimate.
        lookahead: how many layers later hidden states are compared, for a metric of `tasks.damage.Damage`.
        mean_rank_of: other scores whose mean rank it is.
        of_sets: whether it is defined for sets of layers only.
        ablate: options of `ablate` that measure it alone.
    """

    title: str
    meaning: str
    column: str = ""
    definition: str = ""
    unit: str = ""
    caption: str = ""
    task: str = ""
    ground_truth: bool = False
    lookahead: int | None = None
    mean_rank_of: tuple[str, ...] = ()
    of_sets: bool = False
    ablate: Mapping[str, object] = field(default_factory=dict)


SCORES = {
    "loss": ScoreInfo(
        title="loss",
        meaning="rise of the loss without the layer, measured",
        task="ablation:",
        ground_truth=True,
    ),
    "shapley": ScoreInfo(
        title="shapley",
        meaning="mean rise of the loss over sampled sets of other removed layers",
        task="shapley:",
        ground_truth=True,
        ablate={"leave_one_out": False, "shapley": 32},
    ),
    "taylor": ScoreInfo(
        title="taylor",
        meaning="rise of the loss, estimated from gradients to first order",
        task="gradients:",
        ground_truth=True,
        ablate={"leave_one_out": False, "gradients": True},
    ),
    "damage": ScoreInfo(
        title="damage",
        meaning="a layer's mean rank by predicted and by propagated",
        task=DAMAGE_TASK,
        mean_rank_of=("propagated", "predicted"),
        ablate=_DAMAGE,
    ),
    "predicted": ScoreInfo(
        title="predicted",
        meaning="rise of the loss, predicted from gradients and from hidden states three layers later",
        task=DAMAGE_TASK,
        lookahead=3,
        ablate=_DAMAGE,
    ),
    "propagated": ScoreInfo(
        title="propagated",
        meaning="relative distance of the hidden states two layers later",
        task=DAMAGE_TASK,
        lookahead=2,
        ablate=_DAMAGE,
    ),
    BLOCK_DISTANCE: ScoreInfo(
        title="block distance",
        meaning="mean angle between hidden states before and after a run of neighbours",
        task=DAMAGE_TASK,
        of_sets=True,
        ablate=_DAMAGE,
    ),
    GREEDY: ScoreInfo(
        title="greedy search",
        meaning="a search: removes the layer without which the loss is least, again and again",
        of_sets=True,
    ),
    "avss": ScoreInfo(
        title="smoothed AVSS",
        meaning="variance of the activations over their sparsity, smoothed",
        column="avss_smoothed",
        definition="as avss, with sparsity (near_zero_count + 0.5) / (count + 1); rank is of it",
        caption="Activation variance over sparsity, each as a share of its sum over layers; low is unimportant. The "
        "band is the 95% interval over shards, from eight shards and five elements near zero on. Triangles mark the "
        "25% of layers with the lowest score of each chart.",
    ),
    "block_influence": ScoreInfo(
        title="block influence",
        meaning="1 - mean cosine of the layer's input and output",
        column="block_influence",
        definition="1 - mean cosine of the block's input and output (ShortGPT)",
        caption="1 minus the cosine between a layer's input and output.",
    ),
    "angular_distance": ScoreInfo(
        title="angular distance",
        meaning="mean angle between the layer's input and output",
        column="angular_distance",
        definition="mean angle of block input and output (Gromov et al.)",
        unit="pi radians",
        caption="The angle between input and output, as a share of a half turn.",
    ),
    "relative_magnitude": ScoreInfo(
        title="relative magnitude",
        meaning="mean size of the layer's update, over the size of its input",
        column="relative_magnitude",
        definition="mean |output - input| / |input|",
        caption="The length of a layer's update, relative to its input.",
    ),
    "update_variance_ratio": ScoreInfo(
        title="update / input variance",
        meaning="variance of the layer's update, over the variance of its input",
        column="update_variance_ratio",
        definition="variance of the update / variance of the block's input",
        caption="The variance of a layer's update, relative to its input's.",
    ),
    LAST: ScoreInfo(
        title="place from the end (a control)", meaning="position from the end, except for the final layer, a control"
    ),
    RANDOM: ScoreInfo(title="random", meaning="random order, a control"),
}
"""Scores by the name of the option `by`."""
FROM_ACTIVATIONS = tuple(name for name, info in SCORES.items() if info.column)
"""Scores that every run has: AVSS, then `BASELINES`."""
BASELINES = FROM_ACTIVATIONS[1:]
"""Scores that AVSS is compared with; each has the name of its column."""
GROUND_TRUTH = tuple(name for name, info in SCORES.items() if info.ground_truth)
"""Scores that say what leaving out a layer does to the loss."""
MEASURED = tuple(name for name, info in SCORES.items() if info.task and not info.of_sets)
"""Scores of every layer that `ablate` measures: `GROUND_TRUTH`, and estimates by a few passes."""


EXPERT_SCORES = {
    "reap": "mean of gate * |output| over the tokens of the expert (REAP, arXiv 2510.13999)",
    "tokens": "share of the routed tokens that the expert gets",
    "gate": "mean gate over the tokens of the expert",
    RANDOM: SCORES[RANDOM].meaning,
}
"""Scores of routed experts by the name of the option `by`, with their meaning. Low is unimportant."""


def metrics_of(score: str) -> tuple[str, ...]:
    """Return the metrics of the table ``evaluations`` that hold a measured score, or the scores that it averages."""
    info = SCORES[score]
    if info.mean_rank_of:
        metrics: list[str] = []
        for part in info.mean_rank_of:
            metrics += metrics_of(part)
        return tuple(metrics)
    if info.lookahead is None:
        return (score,)
    return (f"{score}_{info.lookahead}",)


SCORE_GROUP = "avss_dist.scores"
"""Group of entry points of functions that score the layers of a run. See `analysis.scorecard.own_score`."""
OWN_VALUES = "values:"
OWN_FILES = (".csv", ".parquet")
"""Endings of the files that have scores of people's own."""


def score_functions() -> dict[str, EntryPoint]:
    """Return the functions of installed packages that score layers, by the name of their entry point."""
    from importlib.metadata import entry_points  # takes a tenth of the time of a help

    return {point.name: point for point in entry_points(group=SCORE_GROUP)}


def is_own(name: str) -> bool:
    """Whether a name is that of a score that people bring: ``FILE:COLUMN``, or an entry point.

    A file without a column counts. Where it is read, the error has its columns.
    """
    return ":" in name or name.endswith(OWN_FILES) or name in score_functions()


def name_values(value: object) -> object:
    """Return a name that holds the values of a mapping from layer to value, and any other value unchanged."""
    if not isinstance(value, Mapping):
        return value
    return OWN_VALUES + json.dumps({str(int(layer)): float(number) for layer, number in value.items()})
