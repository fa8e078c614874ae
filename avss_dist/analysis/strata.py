"""Contrasts of merged strata, for any recipe and threshold, including those without statistics of single answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np

from avss_dist.core.errors import QueryError, require_known
from avss_dist.core.names import AFTER_ANOTHER, INCORRECT, TRUTHFUL
from avss_dist.stats import contrast as contrast_stats
from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS, BOOTSTRAP_SEED, bootstrap_weights, left_out_weights
from avss_dist.stats.layer_stats import Float64, LayerStats, StratumKey
from avss_dist.stats.merging import merge_stats, split_into_blocks
from avss_dist.stats.scores import Parts, SiteTable, Threshold
from avss_dist.warehouse.reader import Warehouse

HALLUCINATED_NAMES = (INCORRECT, "hallucinated", "hallucination", "false", "wrong")
"""Lower-case labels that are recognized as those of hallucinated answers."""


@dataclass(frozen=True)
class Strata:
    """Statistics of one site of a run, by stratum.

    Attributes:
        labels: labels of the hallucinated and of the truthful answers.
        layers: indices of the layers that have the site.
        merged: LayerStats by label and layer, of the answers after their own prompts.
        blocks: LayerStats by stratum, block of consecutive shards, and layer.
    """

    labels: tuple[str, str]
    layers: tuple[int, ...]
    merged: Mapping[str, list[LayerStats]]
    blocks: Mapping[str, list[list[LayerStats]]]

    @staticmethod
    def of_run(
        warehouse: Warehouse,
        run: Mapping[str, Any],
        site: str,
        hallucinated: str | None = None,
        truthful: str | None = None,
    ) -> Strata:
        """Read the strata of a row of ``runs``.

        Raises:
            QueryError: if its text is not paired, or it lacks a label or the site.
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
        """Number of shard blocks. A block holds whole pairs and is the unit of resampling."""
        return len(self.blocks[self.labels[0]])

    def both_sides(
        self,
        recipe: str,
        threshold: Threshold,
        weights: Float64 | None = None,
        exchanged: Float64 | None = None,
        after: str = "",
    ) -> tuple[Parts, Parts]:
        """Return the parts of AVSS of hallucinated and of truthful answers, float64[n, layers] each.

        Args:
            threshold: near-zero threshold. A relative one is a multiple of the RMS of both strata together.
            weights: float64[n, blocks], the weight of each block, 1 by default.
            exchanged: float64[n, blocks], 1 if the labels of a block are exchanged, 0 by default.
            after: `AFTER_ANOTHER` for answers after another prompt, or empty for answers after their own.
        """
        swapped = np.zeros((1, self.num_blocks)) if exchanged is None else exchanged
        weights = np.ones_like(swapped) if weights is None else weights
        ours, theirs = weights * (1 - swapped), weights * swapped
        first, second = (self.blocks[label + after] for label in self.labels)
        return _both([*first, *second], recipe, threshold, np.hstack([ours, theirs]), np.hstack([theirs, ours]))

    def halves(self, recipe: str, threshold: Threshold, first: Float64) -> tuple[Parts, Parts]:
        """Return the parts of AVSS of two groups of truthful answers, float64[n, layers] each.

        Args:
            first: float64[n, blocks], 1 for blocks of the first group, 0 for those of the second.
        """
        return _both(self.blocks[self.labels[1]], recipe, threshold, first, 1 - first)


def _both(
    blocks: Sequence[Sequence[LayerStats]], recipe: str, threshold: Threshold, first: Float64, second: Float64
) -> tuple[Parts, Parts]:
    """Return the parts of AVSS of blocks under each of two weights, float64[n, blocks].

    Raises:
        QueryError: if the site has no statistics for the recipe.
    """
    merged = [reduce(LayerStats.merge, of_layer) for of_layer in zip(*blocks, strict=True)]
    table = SiteTable(merged, blocks, [threshold], np.vstack([first, second]))
    if recipe not in table.recipes():
        raise QueryError(f"The site has no statistics for the recipe '{recipe}'.", "Use block or update.")
    parts = table.weighted_parts(recipe, threshold)
    assert parts is not None  # the table has weights
    (a, b, c), (x, y, z) = ([part[side] for part in parts] for side in (slice(len(first)), slice(len(first), None)))
    return (a, b, c), (x, y, z)


def stratum_columns(strata: Strata, recipe: str, threshold: Threshold) -> dict[str, Any]:
    """Return the scores of layers, their intervals, and the controls that need no single answers.

    Instead of pairs, blocks of shards are resampled, left out, and exchange their labels.

    Raises:
        QueryError: if there are fewer than two blocks, or the site has no statistics for the recipe.
    """
    n, layers = strata.num_blocks, len(strata.layers)
    if n < 2:
        raise QueryError(
            "The run has one shard, and shards exchange their labels.", "Make `sequences_per_shard` smaller."
        )
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    own_prompt = partial(strata.both_sides, recipe, threshold)
    other_prompt = partial(own_prompt, after=AFTER_ANOTHER)
    left_out = left_out_weights(n)
    columns: dict[str, Any] = {"layer": np.array(strata.layers)}
    (hallucinated, truthful), without = own_prompt(), own_prompt(left_out)
    columns |= contrast_stats.contrast_columns(
        (_row(hallucinated), _row(truthful)), own_prompt(bootstrap_weights(n)), without
    )
    exchanged = rng.integers(0, 2, (contrast_stats.num_permutations(layers), n)).astype(np.float64)
    p = contrast_stats.p_values(columns["deviation"], _deviation(own_prompt(exchanged=exchanged)))
    halves = rng.permuted(np.tile(np.arange(n) < n // 2, (contrast_stats.PERMUTATIONS, 1)), axis=1).astype(np.float64)
    columns |= {"p": p, "p_holm": contrast_stats.holm(p)}
    columns["noise_floor"] = contrast_stats.floor_of(_deviation(strata.halves(recipe, threshold, halves)))
    (columns["after_another"],) = _deviation(other_prompt())
    columns |= contrast_stats.change_columns(
        columns["deviation"], columns["after_another"], _deviation(without) - _deviation(other_prompt(left_out))
    )
    return columns


def _deviation(sides: tuple[Parts, Parts]) -> Float64:
    return contrast_stats.from_median(contrast_stats.contrast(*sides))


def _row(parts: Parts) -> Parts:
    """Return the first row of each part."""
    variance, near_zero, count = parts
    return variance[0], near_zero[0], count[0]


def which_labels(strata: Collection[str], hallucinated: str | None, truthful: str | None) -> tuple[str, str]:
    """Return the labels of hallucinated and of truthful answers. Labels that were not given are recognized by name.

    Raises:
        QueryError: if a given label is unknown, or a missing one is not recognized unambiguously.
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
    """Return the error for a run whose text has no labelled answers."""
    return QueryError(
        f"The text of run '{run_id}' is not paired.",
        "Score on prompts with labelled answers: avss score --corpus file.jsonl:prompt+answer:LABEL.",
    )


def _truthful(labels: list[str]) -> str | None:
    return TRUTHFUL if TRUTHFUL in labels else _only(labels)


def _only(labels: list[str]) -> str | None:
    return labels[0] if len(labels) == 1 else None
