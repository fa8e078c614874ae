"""Contrasts of answers: against the activations themselves, and against definitions written down as loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from avss_dist.stats import contrast as contrast_stats
from avss_dist.stats.contrast import Answers
from avss_dist.stats.intervals import bootstrap_weights, left_out_weights

LAYERS = 5
UNITS = 6
THRESHOLD = 0.3
Float64 = np.ndarray


class Sample:
    """Activations of answers of different lengths, x[row][layer] of [tokens, units]; two or three rows are a pair.

    The last layer of row 3 has no finite element.
    """

    def __init__(self, pairs: int = 8, offset: float = 0.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        pair_of_row: list[int] = []
        hallucinated: list[bool] = []
        for pair in range(pairs):
            rows = 3 if pair % 3 == 1 else 2
            pair_of_row += [10 * pair] * rows
            hallucinated += [False, True, True][:rows]
        self.pair = np.array(pair_of_row)
        self.hallucinated = np.array(hallucinated)
        self.tokens = rng.integers(3, 9, len(self.pair))
        self.x: list[list[Float64]] = []
        for tokens, is_hallucinated in zip(self.tokens, self.hallucinated, strict=True):
            scales = 1 + np.arange(LAYERS) + is_hallucinated
            self.x.append([offset + scale * rng.normal(size=(tokens, UNITS)) for scale in scales])
        self.x[3][-1] = np.zeros((0, UNITS))

    def answers(self) -> Answers:
        shape = (len(self.x), LAYERS)
        stats = {
            "pooled_variance": np.full(shape, np.nan),
            "count": np.zeros(shape),
            "mean": np.full(shape, np.nan),
            "m2": np.zeros(shape),
            "near_zero": np.zeros(shape),
        }
        for row, layers in enumerate(self.x):
            for layer, values in enumerate(layers):
                if not values.size:
                    continue
                stats["pooled_variance"][row, layer] = values.mean(axis=0).var(ddof=1)
                stats["count"][row, layer] = values.size
                stats["mean"][row, layer] = values.mean()
                stats["m2"][row, layer] = values.size * values.var()
                stats["near_zero"][row, layer] = (np.abs(values) < THRESHOLD).sum()
        return Answers(pair=self.pair, hallucinated=self.hallucinated, tokens=self.tokens, stats=stats)

    def parts(self, times: Sequence[float], recipe: str) -> tuple[Float64, Float64, Float64]:
        """Return variance, number near zero and number of the activations by layer, each answer repeated."""
        drawn: list[list[Float64]] = []
        for row, repeats in zip(self.x, times, strict=True):
            drawn += [row] * int(repeats)
        variance = []
        near_zero = []
        count = []
        for layer in range(LAYERS):
            answers = [row[layer] for row in drawn if row[layer].size]
            elements = np.concatenate(answers)
            if recipe == "pooled":
                variance.append(np.mean([answer.mean(axis=0).var(ddof=1) for answer in answers]))
            else:
                variance.append(elements.var())
            near_zero.append((np.abs(elements) < THRESHOLD).sum())
            count.append(elements.size)
        return np.array(variance), np.array(near_zero), np.array(count)

    def deviation(self, times: Sequence[float], labels: Float64, recipe: str) -> Float64:
        """log(AVSS of hallucinated / AVSS of truthful answers), less its median over layers."""
        scores = []
        for side in (labels, 1 - labels):
            variance, near_zero, count = self.parts(np.asarray(times) * side, recipe)
            sparsity = (near_zero + 0.5) / (count + 1)
            scores.append(variance / variance.sum() / (sparsity / sparsity.sum()))
        log_ratios = np.log(scores[0] / scores[1])
        return log_ratios - np.median(log_ratios)


@pytest.fixture(params=["pooled", "element"])
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_parts_are_those_of_the_repeated_activations(recipe: str, offset: float) -> None:
    sample = Sample(offset=offset)
    weights = np.random.default_rng(1).integers(0, 4, (3, len(sample.pair))).astype(np.float64)
    parts_by_weights = contrast_stats.parts(sample.answers(), weights, recipe)
    tolerance = 1e-6 if offset else 1e-12
    for i, times in enumerate(weights):
        for part, expected in zip(parts_by_weights, sample.parts(times, recipe), strict=True):
            assert part[i] == pytest.approx(expected, rel=tolerance)
    sides = contrast_stats.both_sides(sample.answers(), weights, sample.hallucinated.astype(np.float64), recipe)
    for side, labels in zip(sides, (sample.hallucinated, ~sample.hallucinated), strict=True):
        parts_of_side = sample.parts(weights[0] * labels, recipe)
        for part, expected in zip(side, parts_of_side, strict=True):
            assert part[0] == pytest.approx(expected, rel=tolerance)


def test_an_answer_of_one_element_counts() -> None:
    stats_of_answers = {
        "count": np.array([[1.0], [3.0], [0.0]]),
        "mean": np.array([[5.0], [2.0], [np.nan]]),
        "m2": np.array([[0.0], [2.0], [0.0]]),
        "pooled_variance": np.zeros((3, 1)),
        "near_zero": np.zeros((3, 1)),
    }
    answers = Answers(
        pair=np.arange(3), tokens=np.arange(3), stats=stats_of_answers, hallucinated=np.zeros(3, dtype=bool)
    )
    variance = contrast_stats.parts(answers, np.ones((1, 3)), "element")[0]
    assert variance == pytest.approx(np.var([5.0, 1.0, 2.0, 3.0]), rel=1e-12)


def test_deviations_are_log_ratios_of_avss_less_the_median(recipe: str) -> None:
    sample = Sample()
    labels = sample.hallucinated.astype(np.float64)
    ones = np.ones(len(sample.pair))
    expected = sample.deviation(ones, labels, recipe)
    assert contrast_stats.observed(sample.answers(), recipe) == pytest.approx(expected, rel=1e-9)
    pairs = sample.answers().pairs
    assert pairs.tolist() == [10 * p for p in range(8)]
    weights = bootstrap_weights(8)
    drawn = weights[:, sample.pair // 10]
    sides = contrast_stats.both_sides(sample.answers(), drawn, labels, recipe)
    deviations = contrast_stats.deviation(*sides)
    for i in (0, 7, 500):
        assert deviations[i] == pytest.approx(sample.deviation(drawn[i], labels, recipe), rel=1e-9)


def test_what_is_not_defined_is_not_a_number(recwarn: pytest.WarningsRecorder) -> None:
    side = (np.array([1.0, 2.0, 3.0]), np.array([5.0, 6.0, 7.0]), np.full(3, 100.0))
    flat = (np.array([1.0, 0.0, 3.0]), *side[1:])
    for sides in ((side, flat), (flat, side)):
        assert np.isnan(contrast_stats.contrast(*sides)).tolist() == [False, True, False]
    (less,) = contrast_stats.from_median(np.array([[1.0, np.nan, 5.0, 2.0]]))
    np.testing.assert_array_equal(less, [-1, np.nan, 3, 0])
    assert not recwarn.list


def test_labels_are_exchanged_inside_pairs() -> None:
    a = Sample().answers()
    labels = contrast_stats.permuted_labels(a, 2000)
    assert labels.shape == (2000, len(a.pair))
    assert set(np.unique(labels)) == {0.0, 1.0}
    for pair in a.pairs:
        inside = labels[:, a.pair == pair]
        assert (inside.sum(axis=1) == a.hallucinated[a.pair == pair].sum()).all()
        assert inside.mean(axis=0) == pytest.approx(np.full(inside.shape[1], inside.mean()), abs=0.05)
    drawn = np.random.default_rng(5).random((3, len(a.pair)))
    for row, keys in zip(contrast_stats.permuted_labels(a, 3, 5), drawn, strict=True):
        assert row.tolist() == a.hallucinated[np.lexsort((keys, a.pair))].tolist()
    order = np.random.default_rng(3).permutation(len(a.pair))
    shuffled = contrast_stats.permuted_labels(a.where(order), 200)
    for pair in a.pairs:
        own = a.pair[order] == pair
        assert (shuffled[:, own].sum(axis=1) == a.hallucinated[order][own].sum()).all()


def test_p_values_count_what_is_as_far_away() -> None:
    observed = np.array([1.0, -2.0, 0.5, np.nan])
    nearly_two = 2.0 * (1 + 1e-14)
    null = np.array([[1.0, 2.0, 0.1, 1.0], [-3.0, -nearly_two, 0.2, 1.0], [0.5, 1.9, -0.6, 1.0]])
    p = contrast_stats.p_values(observed, null)
    assert p.tolist() == pytest.approx([3 / 4, 3 / 4, 2 / 4, np.nan], nan_ok=True)


@pytest.mark.parametrize(("layers", "number"), [(1, 1000), (25, 1000), (26, 1040), (80, 3200)])
def test_many_layers_take_more_permutations(layers: int, number: int) -> None:
    assert contrast_stats.num_permutations(layers) == number


def test_the_permutation_test_is_over_exchanged_labels(recipe: str) -> None:
    sample = Sample(pairs=4)
    labels = contrast_stats.permuted_labels(sample.answers(), 1000, 5)
    ones = np.ones(len(sample.pair))
    observed = sample.deviation(ones, sample.hallucinated.astype(np.float64), recipe)
    null = np.array([sample.deviation(ones, row, recipe) for row in np.unique(labels, axis=0)])
    often = np.unique(labels, axis=0, return_counts=True)[1]
    as_far_away = np.abs(null) >= np.abs(observed) * (1 - 1e-9)
    times_as_far_away = (as_far_away * often[:, None]).sum(axis=0)
    expected = (1 + times_as_far_away) / 1001
    assert contrast_stats.permutation_p(sample.answers(), recipe, 5) == pytest.approx(expected, abs=1e-9)


def test_holms_correction() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.005, 0.5, 0.9])
    expected = {}
    largest = 0.0
    ascending = [4, 0, 3, 2, 5, 6]
    for rank, i in enumerate(ascending):
        largest = max(largest, p[i] * (6 - rank))
        expected[i] = min(largest, 1.0)
    assert contrast_stats.holm(p).tolist() == pytest.approx([expected.get(i, np.nan) for i in range(7)], nan_ok=True)
    assert contrast_stats.holm(np.array([0.7, 0.8])).tolist() == [1, 1]


def test_the_noise_floor_is_of_random_halves_of_the_truthful_answers(recipe: str) -> None:
    sample = Sample(pairs=7)
    rows = np.flatnonzero(~sample.hallucinated)
    rng = np.random.default_rng(0)
    halves = rng.permuted(np.tile(np.arange(7) < 3, (1000, 1)), axis=1)
    ones = np.zeros(len(sample.pair))
    far = []
    ones[rows] = 1
    distinct, which = np.unique(halves, axis=0, return_inverse=True)
    for half in distinct:
        labels = np.zeros(len(sample.pair))
        labels[rows] = half
        far.append(np.abs(sample.deviation(ones, labels, recipe)))
    expected = np.quantile(np.array(far)[which.ravel()], 0.95, axis=0)
    assert contrast_stats.noise_floor(sample.answers(), recipe) == pytest.approx(expected, rel=1e-9)


def test_pairs_of_about_the_same_length() -> None:
    a = Sample().answers()
    tokens_of_pairs = (
        [8, 10],
        [10, 8, 11],
        [8, 11],
        [5, 5],
        [3, 9, 3],
        [3, 9],
        [16, 21],
        [3, 9, 3],
    )
    other = replace(a, tokens=np.concatenate(tokens_of_pairs))
    matched = contrast_stats.length_matched(other, 0.25)
    assert matched.pairs.tolist() == [0, 30]
    assert matched.tokens.tolist() == [8, 10, 5, 5]
    near_zero = a.stats["near_zero"][np.isin(a.pair, [0, 30])]
    assert matched.stats["near_zero"].tolist() == near_zero.tolist()


def test_the_prone_layers_are_the_highest_quarter() -> None:
    resamples = np.array([np.arange(8.0), -np.arange(8.0), np.arange(8.0), np.arange(8.0)])
    assert contrast_stats.prone_probability(resamples).tolist() == [0.25, 0.25, 0, 0, 0, 0, 0.75, 0.75]


def test_columns_of_layers(recipe: str) -> None:
    sample = Sample()
    labels = sample.hallucinated.astype(np.float64)
    ones = np.ones(len(sample.pair))
    answers = sample.answers()
    number_of_pair = sample.pair // 10
    whole = contrast_stats.both_sides(answers, ones, labels, recipe)
    drawn = bootstrap_weights(8)[:, number_of_pair]
    again = contrast_stats.both_sides(answers, drawn, labels, recipe)
    left_out = left_out_weights(8)[:, number_of_pair]
    without = contrast_stats.both_sides(answers, left_out, labels, recipe)
    columns = contrast_stats.contrast_columns(whole, again, without)
    hsav, near_zero, count = sample.parts(labels, recipe)
    variance, truthful_near_zero, truthful_count = sample.parts(1 - labels, recipe)
    hss = (near_zero + 0.5) / (count + 1)
    other = (truthful_near_zero + 0.5) / (truthful_count + 1)
    hsav_share = hsav / hsav.sum()
    hss_share = hss / hss.sum()
    ratio = hsav_share / hss_share
    truthful_ratio = variance / variance.sum() / (other / other.sum())
    contrast = np.log(ratio / truthful_ratio)
    expected = {
        "eavss_contrast": contrast,
        "eavss_ratio": ratio,
        "hsav": hsav,
        "hss": hss,
        "hsav_share": hsav_share,
        "hss_share": hss_share,
        "hsav_difference": hsav - variance,
        "hss_difference": hss - other,
        "deviation": sample.deviation(ones, labels, recipe),
        "rank": LAYERS + 1 - stats.rankdata(contrast),
        "prone_probability": contrast_stats.prone_probability(contrast_stats.contrast(*again)),
    }
    for name, values in expected.items():
        assert columns[name] == pytest.approx(values, rel=1e-9), name


def concordance(scores: Float64, positive: Float64, weights: Float64) -> float:
    """Over all pairs of a positive and a negative."""
    up = 0.0
    all_ = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            weight = weights[i] * weights[j]
            up += weight * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
            all_ += weight
    return up / all_ if all_ else math.nan


def test_auroc_is_the_share_of_concordant_pairs() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 20).astype(np.float64)
    positive = rng.random(20) < 0.4
    weights = rng.integers(0, 3, (5, 20)).astype(np.float64)
    weights[4] = ~positive
    expected = [concordance(scores, positive, row) for row in weights]
    assert contrast_stats.auroc(scores, positive, weights).tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("pairs", [2, 3, 8, 12])
def test_a_classifier_says_of_a_fold_what_it_learned_on_the_others(pairs: int, alone: bool) -> None:
    """Nothing where they have one label: the hallucinated answers are in the first fold alone."""
    sample = Sample(pairs)
    a = sample.answers()
    values = np.random.default_rng(2).normal(2.0, 3.0, len(sample.pair)) + sample.hallucinated
    folds = dict(zip(a.pairs, np.random.default_rng(0).permutation(pairs) % 5, strict=True))
    if alone:
        a = replace(a, hallucinated=np.array([folds[pair] == 0 for pair in a.pair]))
    expected = []
    for pair, value in zip(a.pair, values, strict=True):
        train = np.array([folds[p] != folds[pair] for p in a.pair])
        share = concordance(values[train], a.hallucinated[train], np.ones(train.sum()))
        side = 0.0 if np.isnan(share) else np.sign(share - 0.5)
        expected.append(side * (value - values[train].mean()) / values[train].std())
    assert contrast_stats.out_of_fold(a, values).tolist() == pytest.approx(expected)


def test_nothing_can_be_learned_of_one_label_or_of_a_constant() -> None:
    a = Sample().answers()
    values = np.random.default_rng(2).normal(size=len(a.pair))
    for labels in (np.zeros_like(a.hallucinated), np.ones_like(a.hallucinated)):
        assert contrast_stats.out_of_fold(Answers(**{**vars(a), "hallucinated": labels}), values).tolist() == [0] * len(
            a.pair
        )
    odd = np.where(a.pair == 20, 5.0, 1.0)
    scores = contrast_stats.out_of_fold(a, odd)
    assert np.isfinite(scores).all()
    assert (scores[a.pair == 20] == 0).all()
