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

    def variance_and_sparsity(self, times: Sequence[float], recipe: str) -> tuple[Float64, Float64]:
        """Return variance and smoothed sparsity of the activations by layer, each answer repeated."""
        variance, near_zero, count = self.parts(times, recipe)
        return variance, (near_zero + 0.5) / (count + 1)

    def deviation(self, times: Sequence[float], labels: Float64, recipe: str) -> Float64:
        """log(AVSS of hallucinated / AVSS of truthful answers), less its median over layers."""
        scores = []
        for side in (labels, 1 - labels):
            variance, sparsity = self.variance_and_sparsity(np.asarray(times) * side, recipe)
            sparsity_share = sparsity / sparsity.sum()
            scores.append(variance / variance.sum() / sparsity_share)
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


def test_parts_of_both_sides_are_those_of_the_repeated_activations(recipe: str) -> None:
    sample = Sample()
    weights = np.random.default_rng(1).integers(0, 4, (1, len(sample.pair))).astype(np.float64)
    hallucinated = sample.hallucinated.astype(np.float64)
    sides = contrast_stats.both_sides(sample.answers(), weights, hallucinated, recipe)
    for side, labels in zip(sides, (hallucinated, 1 - hallucinated), strict=True):
        parts_of_side = sample.parts(weights[0] * labels, recipe)
        for part, expected in zip(side, parts_of_side, strict=True):
            assert part[0] == pytest.approx(expected, rel=1e-12)


def test_an_answer_of_one_element_counts() -> None:
    stats_of_answers = {
        "count": np.array([[1.0], [3.0], [0.0]]),
        "mean": np.array([[5.0], [2.0], [np.nan]]),
        "m2": np.array([[0.0], [2.0], [0.0]]),
        "pooled_variance": np.zeros((3, 1)),
        "near_zero": np.zeros((3, 1)),
    }
    numbers = np.arange(3)
    answers = Answers(pair=numbers, tokens=numbers, stats=stats_of_answers, hallucinated=np.zeros(3, dtype=bool))
    variance, _, _ = contrast_stats.parts(answers, np.ones((1, 3)), "element")
    assert variance == pytest.approx(np.var([5.0, 1.0, 2.0, 3.0]), rel=1e-12)


def test_deviations_are_log_ratios_of_avss_less_the_median(recipe: str) -> None:
    sample = Sample()
    labels = sample.hallucinated.astype(np.float64)
    ones = np.ones(len(sample.pair))
    expected = sample.deviation(ones, labels, recipe)
    assert contrast_stats.observed(sample.answers(), recipe) == pytest.approx(expected, rel=1e-9)


def test_deviations_of_drawn_pairs_are_those_of_their_answers(recipe: str) -> None:
    sample = Sample()
    answers = sample.answers()
    labels = sample.hallucinated.astype(np.float64)
    assert answers.pairs.tolist() == [*range(0, 80, 10)]
    drawn = bootstrap_weights(8)[:, sample.pair // 10]
    sides = contrast_stats.both_sides(answers, drawn, labels, recipe)
    deviations = contrast_stats.deviation(*sides)
    for i in (0, 7, 500):
        assert deviations[i] == pytest.approx(sample.deviation(drawn[i], labels, recipe), rel=1e-9)


def test_what_is_not_defined_is_not_a_number(recwarn: pytest.WarningsRecorder) -> None:
    side = (np.array([1.0, 2.0, 3.0]), np.array([5.0, 6.0, 7.0]), np.full(3, 100.0))
    flat = (np.array([1.0, 0.0, 3.0]), *side[1:])
    for sides in ((side, flat), (flat, side)):
        _, of_flat_layer, _ = contrast_stats.contrast(*sides)
        assert np.isnan(of_flat_layer)
    (less,) = contrast_stats.from_median(np.array([[1.0, np.nan, 5.0, 2.0]]))
    np.testing.assert_array_equal(less, [-1, np.nan, 3, 0])
    assert not recwarn.list


def test_labels_are_exchanged_inside_pairs() -> None:
    answers = Sample().answers()
    labels = contrast_stats.permuted_labels(answers, 2000)
    assert labels.shape == (2000, len(answers.pair))
    assert set(np.unique(labels)) == {0.0, 1.0}
    for pair in answers.pairs:
        is_inside = answers.pair == pair
        inside = labels[:, is_inside]
        hallucinated = answers.hallucinated[is_inside].sum()
        assert set(inside.sum(axis=1)) == {hallucinated}
        assert inside.mean(axis=0) == pytest.approx(inside.mean(), abs=0.05)


def test_exchanged_labels_are_sorted_by_random_keys_inside_pairs() -> None:
    answers = Sample().answers()
    keys_of_draws = np.random.default_rng(5).random((3, len(answers.pair)))
    for labels, keys in zip(contrast_stats.permuted_labels(answers, 3, 5), keys_of_draws, strict=True):
        order = np.lexsort((keys, answers.pair))
        assert labels.tolist() == answers.hallucinated[order].tolist()


def test_labels_are_exchanged_inside_pairs_whose_rows_are_apart() -> None:
    answers = Sample().answers()
    order = np.random.default_rng(3).permutation(len(answers.pair))
    shuffled = answers.where(order)
    labels = contrast_stats.permuted_labels(shuffled, 200)
    for pair in answers.pairs:
        is_inside = shuffled.pair == pair
        hallucinated = shuffled.hallucinated[is_inside].sum()
        assert set(labels[:, is_inside].sum(axis=1)) == {hallucinated}


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
    drawn = contrast_stats.permuted_labels(sample.answers(), 1000, 5)
    distinct, times = np.unique(drawn, axis=0, return_counts=True)
    ones = np.ones(len(sample.pair))
    null = np.array([sample.deviation(ones, labels, recipe) for labels in distinct])
    observed = sample.deviation(ones, sample.hallucinated.astype(np.float64), recipe)
    is_as_far_away = np.abs(null) >= np.abs(observed) * (1 - 1e-9)
    expected = (1 + times @ is_as_far_away) / 1001
    assert contrast_stats.permutation_p(sample.answers(), recipe, 5) == pytest.approx(expected, abs=1e-9)


def test_holms_correction() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.005, 0.5, 0.9])
    expected = np.full(7, np.nan)
    largest = 0.0
    ascending = [4, 0, 3, 2, 5, 6]
    for rank, i in enumerate(ascending):
        largest = max(largest, p[i] * (6 - rank))
        expected[i] = min(largest, 1.0)
    assert contrast_stats.holm(p) == pytest.approx(expected, nan_ok=True)
    assert contrast_stats.holm(np.array([0.7, 0.8])).tolist() == [1, 1]


def test_the_noise_floor_is_of_random_halves_of_the_truthful_answers(recipe: str) -> None:
    sample = Sample(pairs=7)
    is_truthful = ~sample.hallucinated
    truthful = is_truthful.astype(np.float64)
    in_first_half = np.tile(np.arange(7) < 3, (1000, 1))
    halves = np.random.default_rng(0).permuted(in_first_half, axis=1)
    distinct, which = np.unique(halves, axis=0, return_inverse=True)
    distances = []
    for half in distinct:
        labels = np.zeros(len(sample.pair))
        labels[is_truthful] = half
        distances.append(np.abs(sample.deviation(truthful, labels, recipe)))
    expected = np.quantile(np.array(distances)[which.ravel()], 0.95, axis=0)
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
    is_matched = np.isin(a.pair, [0, 30])
    assert matched.stats["near_zero"].tolist() == a.stats["near_zero"][is_matched].tolist()


def test_the_prone_layers_are_the_highest_quarter() -> None:
    rising = np.arange(8.0)
    resamples = np.array([rising, -rising, rising, rising])
    assert contrast_stats.prone_probability(resamples).tolist() == [0.25, 0.25, 0, 0, 0, 0, 0.75, 0.75]


def test_columns_of_layers(recipe: str) -> None:
    sample = Sample()
    labels = sample.hallucinated.astype(np.float64)
    ones = np.ones(len(sample.pair))
    answers = sample.answers()
    number_of_pair = sample.pair // 10
    drawn = bootstrap_weights(8)[:, number_of_pair]
    left_out = left_out_weights(8)[:, number_of_pair]
    whole = contrast_stats.both_sides(answers, ones, labels, recipe)
    again = contrast_stats.both_sides(answers, drawn, labels, recipe)
    without = contrast_stats.both_sides(answers, left_out, labels, recipe)
    columns = contrast_stats.contrast_columns(whole, again, without)
    hsav, hss = sample.variance_and_sparsity(labels, recipe)
    variance, sparsity = sample.variance_and_sparsity(1 - labels, recipe)
    hsav_share = hsav / hsav.sum()
    hss_share = hss / hss.sum()
    ratio = hsav_share / hss_share
    truthful_variance_share = variance / variance.sum()
    truthful_sparsity_share = sparsity / sparsity.sum()
    contrast = np.log(ratio * truthful_sparsity_share / truthful_variance_share)
    expected = {
        "eavss_contrast": contrast,
        "eavss_ratio": ratio,
        "hsav": hsav,
        "hss": hss,
        "hsav_share": hsav_share,
        "hss_share": hss_share,
        "hsav_difference": hsav - variance,
        "hss_difference": hss - sparsity,
        "deviation": sample.deviation(ones, labels, recipe),
        "rank": LAYERS + 1 - stats.rankdata(contrast),
        "prone_probability": contrast_stats.prone_probability(contrast_stats.contrast(*again)),
    }
    for name, values in expected.items():
        assert columns[name] == pytest.approx(values, rel=1e-9), name


def concordance(scores: Float64, positive: Float64, weights: Float64) -> float:
    """Over all pairs of a positive and a negative."""
    concordant = 0.0
    total = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            weight = weights[i] * weights[j]
            total += weight
            if scores[i] > scores[j]:
                concordant += weight
            if scores[i] == scores[j]:
                concordant += weight / 2
    if total == 0:
        return math.nan
    return concordant / total


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
    answers = sample.answers()
    noise = np.random.default_rng(2).normal(2.0, 3.0, len(sample.pair))
    values = noise + sample.hallucinated
    fold_of_pair = np.random.default_rng(0).permutation(pairs) % 5
    fold = fold_of_pair[answers.pair // 10]
    if alone:
        answers = replace(answers, hallucinated=fold == 0)
    expected = []
    for i, value in enumerate(values):
        is_learned = fold != fold[i]
        learned = values[is_learned]
        share = concordance(learned, answers.hallucinated[is_learned], np.ones(len(learned)))
        side = 0.0 if np.isnan(share) else np.sign(share - 0.5)
        expected.append(side * (value - learned.mean()) / learned.std())
    assert contrast_stats.out_of_fold(answers, values).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("label", [False, True])
def test_nothing_can_be_learned_of_one_label(label: bool) -> None:
    answers = Sample().answers()
    of_one_label = replace(answers, hallucinated=np.full_like(answers.hallucinated, label))
    values = np.random.default_rng(2).normal(size=len(answers.pair))
    assert not contrast_stats.out_of_fold(of_one_label, values).any()


def test_nothing_can_be_learned_of_a_constant() -> None:
    answers = Sample().answers()
    is_odd = answers.pair == 20
    scores = contrast_stats.out_of_fold(answers, np.where(is_odd, 5.0, 1.0))
    assert np.isfinite(scores).all()
    assert not scores[is_odd].any()
