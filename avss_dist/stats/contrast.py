"""Contrasts of layers between hallucinated and truthful answers, with their noise. Pure numpy.

EAVSS (arXiv 2411.10069) names HSAV and HSS, a layer's variance and sparsity on hallucinated text; its equations are not
public. This module implements a reading of it in the form of AVSS: see ``docs/guides/hallucination.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avss_dist.stats.intervals import BOOTSTRAP_SEED, INTERVAL, MINIMUM_UNITS, jackknife_interval
from avss_dist.stats.layer_stats import Float64, Int64
from avss_dist.stats.rankings import count_lowest, rank_lowest
from avss_dist.stats.scores import Parts, avss, share

PERMUTATIONS = 1000  # at least; with many layers more, so that a corrected p-value can be small
PER_LAYER = 40
FOLDS = 5
ROUNDING = 1e-12  # relative difference of equal deviations
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class Answers:
    """Statistics of answers at one site, row by row.

    Attributes:
        pair: int64[rows], the index of each answer's prompt.
        hallucinated: bool[rows], true for hallucinated and false for truthful answers.
        tokens: int64[rows], the number of tokens of each answer.
        stats: float64[rows, layers] by name: `RowStats`, with ``near_zero`` at one threshold.
    """

    pair: Int64
    hallucinated: Bools
    tokens: Int64
    stats: Mapping[str, Float64]

    @property
    def pairs(self) -> Int64:
        """Distinct pairs, ascending."""
        return np.unique(self.pair)

    def where(self, rows: Bools) -> Answers:
        """Return the answers that a mask, bool[rows], selects."""
        return Answers(
            pair=self.pair[rows],
            hallucinated=self.hallucinated[rows],
            tokens=self.tokens[rows],
            stats={name: values[rows] for name, values in self.stats.items()},
        )

    def of_pairs(self, pairs: Int64) -> Answers:
        """Return the answers of the given pairs."""
        return self.where(np.isin(self.pair, pairs))


def parts(answers: Answers, weights: Float64, recipe: str) -> Parts:
    """Return the parts of AVSS (variance, near-zero elements, elements) of weighted answers.

    Args:
        weights: float64[..., rows], the weight of each answer.
        recipe: ``pooled`` or ``element``.
    """
    if recipe == "pooled":
        variance = _pooled_variance(answers, weights)
    else:
        variance = _element_variance(answers, weights)
    near_zero = weights @ answers.stats["near_zero"]
    total = weights @ answers.stats["count"]
    return Parts(variance, near_zero, total)


def _pooled_variance(answers: Answers, weights: Float64) -> Float64:
    """Return the weighted mean of the answers' pooled variances, float64[..., layers]."""
    pooled = answers.stats["pooled_variance"]
    is_finite = np.isfinite(pooled)
    total = weights @ np.where(is_finite, pooled, 0)
    number = weights @ is_finite.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Float64 = total / number
    return mean


def _element_variance(answers: Answers, weights: Float64) -> Float64:
    """Return the weighted variance over elements, float64[..., layers].

    Moments are taken about the mean of all answers, which avoids cancellation.
    """
    counts = answers.stats["count"]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(counts > 0, answers.stats["mean"], 0)
        mean_of_all = (counts * mean).sum(axis=0) / counts.sum(axis=0)
        shifted = mean - mean_of_all
        count = weights @ counts
        first = (weights @ (counts * shifted)) / count
        second = (weights @ (answers.stats["m2"] + counts * shifted**2)) / count
        variance: Float64 = second - first**2
    return variance


def both_sides(answers: Answers, weights: Float64, hallucinated: Float64, recipe: str) -> tuple[Parts, Parts]:
    """Return the `parts` of hallucinated and of truthful answers.

    Args:
        weights: float64[..., rows], the weight of each answer.
        hallucinated: float64[..., rows], 1 for hallucinated and 0 for truthful answers.
    """
    return parts(answers, weights * hallucinated, recipe), parts(answers, weights * (1 - hallucinated), recipe)


def contrast(hallucinated: Parts, truthful: Parts) -> Float64:
    """Return log(AVSS on hallucinated / AVSS on truthful answers), float64[..., layers]. Undefined values are NaN."""
    hallucinated_scores = avss(*hallucinated, smoothed=True)
    truthful_scores = avss(*truthful, smoothed=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        contrasts = np.log(hallucinated_scores / truthful_scores)
    return np.where(np.isfinite(contrasts), contrasts, np.nan)


def from_median(contrasts: Float64) -> Float64:
    """Return the contrasts minus that of the median layer, float64[..., layers]. Tests use these deviations.

    AVSS divides shares over layers, so that a difference in one layer moves the contrasts of all others alike.
    """
    with np.errstate(invalid="ignore"):
        middle = np.nanmedian(contrasts, axis=-1, keepdims=True)
    return contrasts - middle


def deviation(hallucinated: Parts, truthful: Parts) -> Float64:
    """Return the `contrast` minus that of the median layer, float64[..., layers]."""
    return from_median(contrast(hallucinated, truthful))


def observed(answers: Answers, recipe: str) -> Float64:
    """Return the `deviation` of the unweighted answers with their own labels, float64[layers]."""
    labels = answers.hallucinated.astype(np.float64)
    return deviation(*both_sides(answers, np.ones(len(answers.pair)), labels, recipe))


def permuted_labels(answers: Answers, times: int, seed: int = BOOTSTRAP_SEED) -> Float64:
    """Return labels that are exchanged at random inside each pair, float64[times, rows]."""
    number = len(answers.pair)
    random = np.random.default_rng(seed)
    by_pair = np.argsort(answers.pair, kind="stable")
    # A fraction is added to each pair's index, so that only the rows of a pair change places.
    permuted = np.argsort(answers.pair + random.random((times, number)), axis=1)
    labels = np.empty((times, number))
    labels[:, by_pair] = answers.hallucinated[permuted]
    return labels


def permutation_p(answers: Answers, recipe: str, seed: int = BOOTSTRAP_SEED) -> Float64:
    """Return two-sided p-values of `observed` under exchange of labels inside pairs, float64[layers].

    The p-value of an undefined deviation is NaN.
    """
    deviations = observed(answers, recipe)
    labels = permuted_labels(answers, num_permutations(len(deviations)), seed)
    permuted_sides = both_sides(answers, np.ones(len(answers.pair)), labels, recipe)
    return p_values(deviations, deviation(*permuted_sides))


def num_permutations(layers: int) -> int:
    """Return the number of permutations of labels to draw for a number of layers."""
    return max(PERMUTATIONS, PER_LAYER * layers)


def p_values(deviations: Float64, null: Float64) -> Float64:
    """Return two-sided p-values of deviations, float64[layers]. NaN stays NaN.

    Args:
        deviations: float64[layers], the observed deviations.
        null: float64[permutations, layers], the deviations under permuted labels.
    """
    smallest = np.abs(deviations) * (1 - ROUNDING)
    at_least = (np.abs(null) >= smallest).sum(axis=0)
    p = (1 + at_least) / (1 + len(null))
    return np.where(np.isnan(deviations), np.nan, p)


def holm(p: Float64) -> Float64:
    """Return p-values corrected for their number (Holm, 1979). NaN stays NaN."""
    defined = np.flatnonzero(np.isfinite(p))
    order = defined[np.argsort(p[defined], kind="stable")]
    # The smallest p-value is multiplied by the number of all, the next one by one less, and so on.
    factors = len(order) - np.arange(len(order))
    steps = np.maximum.accumulate(p[order] * factors)
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(steps, 1)
    return corrected


def noise_floor(answers: Answers, recipe: str) -> Float64:
    """Return the 95% quantile of |deviation| over random splits of the truthful answers, float64[layers]."""
    truthful = answers.where(~answers.hallucinated)
    number = len(truthful.pair)
    random = np.random.default_rng(BOOTSTRAP_SEED)
    is_in_first_half = np.arange(number) < number // 2
    splits = np.tile(is_in_first_half, (PERMUTATIONS, 1))
    halves = random.permuted(splits, axis=1).astype(np.float64)
    first_half, second_half = both_sides(truthful, np.ones(number), halves, recipe)
    return floor_of(deviation(first_half, second_half))


def floor_of(deviations: Float64) -> Float64:
    """Return the 95% quantile of |deviations|, float64[splits, layers], by layer: float64[layers]."""
    return np.quantile(np.abs(deviations), INTERVAL, axis=0)


def length_matched(answers: Answers, slack: float) -> Answers:
    """Return the answers of pairs whose longest answer has at most ``1 + slack`` times the tokens of the shortest."""
    matched = []
    for pair in answers.pairs:
        tokens = answers.tokens[answers.pair == pair]
        if np.ptp(tokens) <= slack * tokens.min():
            matched.append(pair)
    return answers.of_pairs(np.array(matched, np.int64))


def prone_probability(resamples: Float64) -> Float64:
    """Return the share of resamples in which each layer's contrast is among the highest 25%, float64[layers]."""
    number = count_lowest(resamples.shape[1])
    is_highest = rank_lowest(-resamples) <= number
    return is_highest.mean(axis=0)


def contrast_columns(
    sides: tuple[Parts, Parts], resampled: tuple[Parts, Parts], left_out: tuple[Parts, Parts]
) -> dict[str, Float64]:
    """Return the scores of layers, float64[layers] each, and their intervals: see ``docs/guides/hallucination.md``.

    Args:
        sides: parts of AVSS of hallucinated and of truthful answers, float64[layers] each.
        resampled: parts over resampled pairs or blocks, float64[resamples, layers] each.
        left_out: parts without each pair or block, float64[groups, layers] each.
    """
    scores = _contrasted(*sides)
    left_out_scores = _contrasted(*left_out)
    hallucinated, _ = sides
    left_out_hallucinated, _ = left_out
    hss = _smoothed_sparsity(hallucinated)
    prone = np.full(len(hss), np.nan)
    if len(left_out_hallucinated.variance) >= MINIMUM_UNITS:
        prone = prone_probability(contrast(*resampled))
    columns = dict(scores)
    columns["hsav"] = hallucinated.variance
    columns["hss"] = hss
    columns["hsav_share"] = share(hallucinated.variance)
    columns["hss_share"] = share(hss)
    columns["deviation"] = from_median(scores["eavss_contrast"])
    columns["rank"] = rank_lowest(-scores["eavss_contrast"])
    columns["prone_probability"] = prone
    for name, values in left_out_scores.items():
        scale = "log" if name == "eavss_ratio" else "linear"
        low, high = jackknife_interval(scores[name], values, scale=scale)
        columns[f"{name}_low"] = low
        columns[f"{name}_high"] = high
    return columns


def _contrasted(hallucinated: Parts, truthful: Parts) -> dict[str, Float64]:
    """Return the scores that get intervals, float64[..., layers] each, by name."""
    return {
        "eavss_contrast": contrast(hallucinated, truthful),
        "eavss_ratio": avss(*hallucinated, smoothed=True),
        "hsav_difference": hallucinated.variance - truthful.variance,
        "hss_difference": _smoothed_sparsity(hallucinated) - _smoothed_sparsity(truthful),
    }


def _smoothed_sparsity(side: Parts) -> Float64:
    return (side.near_zero + 0.5) / (side.total + 1)


def out_of_fold(answers: Answers, values: Float64) -> Float64:
    """Return the output of a one-dimensional classifier that was fitted on the other folds, float64[rows].

    The output is the standardized value, with the sign that makes it larger for hallucinated answers in those folds.
    """
    # Answers of a pair are in the same fold.
    order_of_pairs = np.random.default_rng(BOOTSTRAP_SEED).permutation(len(answers.pairs))
    fold = order_of_pairs[np.searchsorted(answers.pairs, answers.pair)] % FOLDS
    scores = np.zeros(len(values))
    for number in range(FOLDS):
        is_held_out = fold == number
        fitted = values[~is_held_out]
        labels = answers.hallucinated[~is_held_out]
        if labels.all() or not labels.any():
            continue
        area = auroc(fitted, labels, np.ones((1, len(labels))))[0]
        sign = np.sign(area - 0.5)
        spread = fitted.std() or 1.0
        scores[is_held_out] = sign * (values[is_held_out] - fitted.mean()) / spread
    return scores


def auroc(scores: Float64, positive: Bools, weights: Float64) -> Float64:
    """Return the area under the ROC curve for each row of weights, float64[resamples]. Ties count by half.

    Args:
        scores: float64[rows].
        positive: bool[rows].
        weights: float64[resamples, rows].
    """
    order = np.argsort(scores, kind="stable")
    _, starts = np.unique(scores[order], return_index=True)
    positives = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
    negatives = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    negatives_below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs_in_order = (positives * negatives_below).sum(axis=1)
    all_pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        area: Float64 = pairs_in_order / all_pairs
    return area
