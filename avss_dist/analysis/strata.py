"""Contrasts of merged strata: what needs no single answers, and so any recipe and any threshold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np

from avss_dist.core.errors import QueryError, require_known
from avss_dist.core.names import AFTER_ANOTHER, INCORRECT, TRUTHFUL
from avss_dist.core.settings import BOOTSTRAP_SEED
from avss_dist.stats import contrast as of
from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS, bootstrap_weights, left_out_weights
from avss_dist.stats.layer_stats import Float64, LayerStats, StratumKey
from avss_dist.stats.merging import merge_stats, split_into_blocks
from avss_dist.stats.scores import Parts, SiteTable, Threshold
from avss_dist.warehouse.reader import Warehouse

HALLUCINATED_NAMES = (INCORRECT, "hallucinated", "hallucination", "false", "wrong")
"""Labels, in lower case, that say of themselves that they are of hallucinated answers."""


@dataclass(frozen=True)
class Strata:
    """The strata of one site of a run.

    Attributes:
        labels: of the hallucinated and of the truthful answers.
        layers: those that have the site.
        merged: LayerStats by layer, of the answers after their own prompts, by label.
        blocks: the same by block of consecutive shards, of every stratum.
    """

    labels: tuple[str, str]
    layers: tuple[int, ...]
    merged: Mapping[str, list[LayerStats]]
    blocks: Mapping[str, list[list[LayerStats]]]

    @staticmethod
    def of(
        warehouse: Warehouse,
        run: Mapping[str, Any],
        site: str,
        hallucinated: str | None = None,
        truthful: str | None = None,
    ) -> Strata:
        """Those of a row of ``runs``.

        Raises:
            QueryError: its text is not paired, or has not those labels or that site.
        """
        require_known("site", site, run["sites"], QueryError)
        merged = {key: stats for key, stats in warehouse.read_stratum_stats(run["run_id"]).items() if key[1] == site}
        if not merged:
            raise not_paired(run["run_id"])
        labels = which_labels({stratum for _, _, stratum in merged}, hallucinated, truthful)
        layers = tuple(sorted({layer for layer, _, _ in merged}))
        zero = LayerStats.zero(next(iter(merged.values())).thresholds)

        def by_layer(stats: Mapping[StratumKey, LayerStats], stratum: str) -> list[LayerStats]:
            return [stats.get((layer, site, stratum), zero) for layer in layers]

        strata = [label + after for label in labels for after in ("", AFTER_ANOTHER)]
        partials = [shard.strata for shard in warehouse.read_partials(run)]
        parts = split_into_blocks(len(partials), BOOTSTRAP_BLOCKS)
        blocks = [merge_stats([partials[i] for i in part]) for part in parts] or [merged]
        return Strata(
            labels,
            layers,
            {label: by_layer(merged, label) for label in labels},
            {stratum: [by_layer(block, stratum) for block in blocks] for stratum in strata},
        )

    @property
    def num_blocks(self) -> int:
        """Of shards; they hold whole pairs, and are what is resampled and exchanged."""
        return len(self.blocks[self.labels[0]])

    def both_sides(
        self,
        recipe: str,
        threshold: Threshold,
        weights: Float64 | None = None,
        exchanged: Float64 | None = None,
        after: str = "",
    ) -> tuple[Parts, Parts]:
        """What AVSS of hallucinated and of truthful answers is made of, float64[n, layers] each.

        Args:
            threshold: a relative one is a multiple of the RMS of both strata together.
            weights: float64[n, blocks], how often each block counts; once by default.
            exchanged: float64[n, blocks], 1 where the labels of a block are exchanged; nowhere by default.
            after: `AFTER_ANOTHER`, or nothing.
        """
        swapped = np.zeros((1, self.num_blocks)) if exchanged is None else exchanged
        weights = np.ones_like(swapped) if weights is None else weights
        ours, theirs = weights * (1 - swapped), weights * swapped
        first, second = (self.blocks[label + after] for label in self.labels)
        return _both([*first, *second], recipe, threshold, np.hstack([ours, theirs]), np.hstack([theirs, ours]))

    def halves(self, recipe: str, threshold: Threshold, first: Float64) -> tuple[Parts, Parts]:
        """The same of two parts of the truthful answers: ``first`` is float64[n, blocks], 1 or 0."""
        return _both(self.blocks[self.labels[1]], recipe, threshold, first, 1 - first)


def _both(
    blocks: Sequence[Sequence[LayerStats]], recipe: str, threshold: Threshold, first: Float64, second: Float64
) -> tuple[Parts, Parts]:
    """What AVSS of blocks is made of, with each of two weights, float64[n, blocks]."""
    merged = [reduce(LayerStats.merge, of_layer) for of_layer in zip(*blocks, strict=True)]
    table = SiteTable(merged, blocks, [threshold], np.vstack([first, second]))
    if recipe not in table.recipes():
        raise QueryError(f"The site has no statistics for the recipe '{recipe}'.", "Use block or update.")
    found = table.weighted_parts(recipe, threshold)
    assert found is not None  # the table has weights
    (a, b, c), (x, y, z) = ([part[side] for part in found] for side in (slice(len(first)), slice(len(first), None)))
    return (a, b, c), (x, y, z)


def stratum_columns(strata: Strata, recipe: str, threshold: Threshold) -> dict[str, Any]:
    """Scores of layers, their intervals, and those controls that need no single answers.

    Blocks of shards are resampled, left out, and exchange their labels, in place of pairs.

    Raises:
        QueryError: there are fewer than two, or the site has no statistics by unit.
    """
    n, layers = strata.num_blocks, len(strata.layers)
    if n < 2:
        raise QueryError(
            "The run has one shard, and shards exchange their labels.", "Make `sequences_per_shard` smaller."
        )
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    own = partial(strata.both_sides, recipe, threshold)
    other = partial(own, after=AFTER_ANOTHER)
    left_out = left_out_weights(n)
    columns: dict[str, Any] = {"layer": np.array(strata.layers)}
    (hallucinated, truthful), without = own(), own(left_out)
    columns |= of.contrast_columns((_row(hallucinated), _row(truthful)), own(bootstrap_weights(n)), without)
    exchanged = rng.integers(0, 2, (of.num_permutations(layers), n)).astype(np.float64)
    p = of.p_values(columns["deviation"], _deviation(own(exchanged=exchanged)))
    halves = rng.permuted(np.tile(np.arange(n) < n // 2, (of.PERMUTATIONS, 1)), axis=1).astype(np.float64)
    columns |= {"p": p, "p_holm": of.holm(p)}
    columns["noise_floor"] = of.floor_of(_deviation(strata.halves(recipe, threshold, halves)))
    (columns["after_another"],) = _deviation(other())
    columns |= of.change_columns(
        columns["deviation"], columns["after_another"], _deviation(without) - _deviation(other(left_out))
    )
    return columns


def _deviation(sides: tuple[Parts, Parts]) -> Float64:
    return of.from_median(of.contrast(*sides))


def _row(parts: Parts) -> Parts:
    """The first row."""
    variance, near_zero, count = parts
    return variance[0], near_zero[0], count[0]


def which_labels(strata: Collection[str], hallucinated: str | None, truthful: str | None) -> tuple[str, str]:
    """The labels of hallucinated and of truthful answers: those that were named, else those that say so themselves.

    Raises:
        QueryError: there is none such, or several.
    """
    known = sorted(stratum for stratum in strata if not stratum.endswith(AFTER_ANOTHER))
    for label in filter(None, (hallucinated, truthful)):
        require_known("label", label, known, QueryError)
    hallucinated = hallucinated or _only([label for label in known if label.lower() in HALLUCINATED_NAMES])
    truthful = truthful or _truthful([label for label in known if label != hallucinated])
    if not hallucinated or not truthful or hallucinated == truthful:
        raise QueryError(
            f"Which answers are hallucinated, and which truthful? Labels: {', '.join(known)}.",
            "Name one label as `hallucinated` and another as `truthful`.",
        )
    return hallucinated, truthful


def not_paired(run_id: str) -> QueryError:
    """That a run has no labelled answers."""
    return QueryError(
        f"The text of run '{run_id}' is not paired.",
        "Score on prompts with labelled answers: avss score --corpus file.jsonl:prompt+answer --label-field LABEL.",
    )


def _truthful(labels: list[str]) -> str | None:
    return TRUTHFUL if TRUTHFUL in labels else _only(labels)


def _only(labels: list[str]) -> str | None:
    return labels[0] if len(labels) == 1 else None
