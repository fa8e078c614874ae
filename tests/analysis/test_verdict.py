"""What experiments say in words: of which rows, beside which others, and where the claim begins and ends to hold."""

from __future__ import annotations

from math import exp, log, nan
from typing import Any

import pytest

from avss_dist.analysis.verdict import (
    claim_in_short,
    judgement,
    kept_by_guess,
    primary_metric,
    shown_method,
    shown_value,
    verdicts,
)

Rows = list[dict[str, Any]]
LABELS = {
    "reversed": "The reverse, the highest AVSS, keeps 30.0%.",
    "ends kept": "AVSS with the ends kept keeps 96.0%.",
    "block_influence": "Block influence keeps 98.0%.",
    "loss": "Leaving out by the loss without each layer keeps 99.0%.",
    "last": "Leaving out the last before the final one keeps 70.0%.",
}


PLACE = {"task": "t", "metric": "acc", "share": 0.25, "drop": [1, 2], "drop_parts": [], "value": 0.5}


def row(score: str | None, retention: float, *, control: str | None = None, **more: Any) -> dict[str, Any]:
    """A row of `experiments`; its interval is 3 points to either side."""
    columns: dict[str, Any] = dict(PLACE)
    columns["method"] = str(score)
    columns["score"] = score
    columns["control"] = control
    columns["retention"] = retention
    columns["retention_low"] = retention - 0.03
    columns["retention_high"] = retention + 0.03
    columns |= more
    return columns


def whole(value: float = 0.8, **more: Any) -> dict[str, Any]:
    return row(None, 1.0, share=0.0, drop=[], value=value, **more)


def everything(**more: Any) -> Rows:
    rows = [row("avss", 0.95, **more)]
    rows.append(row("random", 0.95, **more))
    rows.append(row("random", 0.6, **more))
    rows.append(row("avss", 0.3, control="reversed", **more))
    rows.append(row("avss", 0.96, control="ends kept", **more))
    rows.append(row("block_influence", 0.98, **more))
    rows.append(row("loss", 0.99, **more))
    rows.append(row("last", 0.7, **more))
    return rows


START = "t: without the 2 layers of the lowest AVSS (25%)"
OTHERS = " ".join(LABELS.values())


def test_a_paragraph_has_the_claim_then_chance_then_the_rivals() -> None:
    (text,) = verdicts([whole(), *everything()])
    assert text == (
        f"{START}, 95.0% (92.0% to 98.0%) is kept (acc 0.800, then 0.500): the claim holds. "
        f"Of 2 random choices of as many layers, 1 keeps as much or more (the best 95.0%). {OTHERS}"
    )


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
def test_what_was_not_tried_is_not_told(label: str) -> None:
    (text,) = verdicts([whole(), *everything()])
    others = [row for row in everything() if f"keeps {row['retention']:.1%}." not in label]
    assert verdicts([whole(), *others]) == [text.replace(f" {label}", "")]


def test_every_task_is_told_apart() -> None:
    """Were its rows mixed with those of another task, the first that fits would speak for both."""
    rows = [row("avss", 0.5, value=0.4), row("random", 0.2), row("loss", 0.6)]
    whole_of_other = whole(0.9, task="u")
    others = [row("avss", 0.97, value=0.8, task="u"), row("random", 0.1, task="u")]
    first, second = verdicts([*others, *rows, whole_of_other])
    assert first == (
        "u: without the 2 layers of the lowest AVSS (25%), 97.0% (94.0% to 100.0%) is kept (acc 0.900, then 0.800): "
        "the claim holds. A random choice of as many layers keeps 10.0%."
    )
    assert second == (
        f"{START}, 50.0% (47.0% to 53.0%) is kept: the claim does not hold. "
        "A random choice of as many layers keeps 20.0%. Leaving out by the loss without each layer keeps 60.0%."
    )
    assert claim_in_short([whole_of_other, *others, *rows]) == [
        "u: 97.0% by the lowest AVSS: the claim holds.",
        "t: 50.0% by the lowest AVSS: the claim does not hold.",
    ]


def test_only_random_choices_without_a_control_are_chance() -> None:
    rows = [whole(), row("avss", 0.95), row("loss", 0.99)]
    rows.append(row("random", 0.99, control="ends kept"))
    (text,) = verdicts(rows)
    assert "random" not in text
    rows.append(row("random", 0.5))
    (text,) = verdicts(rows)
    assert "A random choice of as many layers keeps 50.0%." in text


def test_random_choices_that_keep_as_much_are_counted() -> None:
    randoms = [row("random", 0.2), row("random", 0.96), row("random", 0.97)]
    (text,) = verdicts([whole(), row("avss", 0.95), *randoms])
    assert "Of 3 random choices of as many layers, 2 keep as much or more (the best 97.0%)." in text


PLAIN = [row("avss", 0.5), row("random", 0.4)]
REPAIRED = [row("avss", 0.92, repair="refit", patch="p"), row("random", 0.45, repair="refit", patch="p")]


def test_each_repair_has_its_own_paragraph_and_its_own_rivals() -> None:
    first, second = verdicts([whole(), *PLAIN, *REPAIRED])
    assert first == (
        f"{START}, 50.0% (47.0% to 53.0%) is kept (acc 0.800, then 0.500): the claim does not hold. "
        "A random choice of as many layers keeps 40.0%."
    )
    assert second == (
        f"{START}, repaired by refit, 92.0% (89.0% to 95.0%) is kept (acc 0.800, then 0.500): "
        "the claim is undecided, for want of data. A random choice of as many layers, repaired by refit, keeps 45.0%."
    )
    assert verdicts([whole(), *REPAIRED, *PLAIN]) == [second, first]


def test_the_claim_in_short_is_of_the_model_without_repair() -> None:
    in_short = claim_in_short([whole(), *REPAIRED, *PLAIN])
    assert in_short == ["t: 50.0% by the lowest AVSS: the claim does not hold."]
    assert claim_in_short([whole(), *REPAIRED]) == []


def test_a_repair_that_changed_nothing_says_why() -> None:
    rows = [whole(), row("avss", 0.92, repair="refit", patch=None)]
    rows.append(row("random", 0.45, repair="refit", patch=None))
    rows.append(row("random", 0.47, repair="refit"))
    (text,) = verdicts(rows)
    assert f"{START}, repaired by refit (nothing: no layer stands before them), 92.0%" in text
    assert "Of 2 random choices of as many layers, repaired by refit, none keep" in text


def test_other_shares_scaled_layers_and_other_metrics_are_not_of_the_claim() -> None:
    rows = [whole(), row("avss", 0.4, share=0.5), row("avss", 0.99, factor=0.5)]
    assert verdicts(rows) == []
    assert claim_in_short(rows) == []
    others = [row("random", 0.1, share=0.5), row("random", 0.2, factor=0.5)]
    others += [whole(0.7, metric="f1"), row("avss", 0.1, metric="f1")]
    with_claim = [*others, *rows, row("avss", 0.95)]
    assert verdicts(with_claim) == [
        f"{START}, 95.0% (92.0% to 98.0%) is kept (acc 0.800, then 0.500): the claim holds."
    ]
    assert claim_in_short(with_claim) == ["t: 95.0% by the lowest AVSS: the claim holds."]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["acc", "loss", "mc2"], "loss"),
        (["f1", "exact_match", "acc", "acc_norm"], "acc_norm"),
        (["g/f1", "g/acc", "acc,none"], "g/acc"),
        (["brier_score", "ter"], "brier_score"),
    ],
)
def test_the_first_known_metric_speaks_for_a_task(names: list[str], expected: str) -> None:
    assert primary_metric([{"metric": name} for name in names]) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.9, 0.95, "undecided"),
        (0.91, 0.95, "the claim holds"),
        (0.8, 0.9, "undecided"),
        (0.8, 0.89, "the claim does not hold"),
        (nan, 0.5, "undecided, for there is no interval"),
        (0.5, nan, "undecided, for there is no interval"),
        (None, 0.5, "undecided, for there is no interval"),
        (0.5, None, "undecided, for there is no interval"),
    ],
)
def test_the_claim_is_judged_by_both_ends_of_the_interval(low: float | None, high: float | None, expected: str) -> None:
    bounds = {"retention_low": low, "retention_high": high}
    assert expected in judgement({"retention": 0.92, **bounds})
    (text,) = verdicts([whole(), row("avss", 0.95, **bounds)])
    assert (f"{START}, 95.0% is kept (acc" in text) == ("no interval" in expected)


def rows_with_guess(guess: float) -> Rows:
    """Return rows of a task of which a guess keeps this share."""
    return [whole(0.5), whole(guess / 2, metric="chance"), row("avss", 0.95)]


@pytest.mark.parametrize(("guess", "is_told"), [(0.009, False), (0.01, True), (0.5, True), (0.9, True), (0.91, False)])
def test_a_guess_is_told_where_it_keeps_something_and_less_than_is_claimed(guess: float, is_told: bool) -> None:
    (text,) = verdicts(rows_with_guess(guess))
    assert (f"A guess keeps {guess:.1%}." in text) == is_told


@pytest.mark.parametrize(("guess", "tells"), [(0.009, True), (0.01, True), (0.5, True), (0.9, True), (0.91, False)])
def test_a_task_cannot_tell_where_a_guess_keeps_more_than_is_claimed(guess: float, tells: bool) -> None:
    rows = rows_with_guess(guess)
    (text,) = verdicts(rows)
    (in_short,) = claim_in_short(rows)
    assert ("this task cannot tell, for a guess keeps 91.0%" not in text) == tells
    assert ("cannot tell" not in in_short) == tells


def guess_keeps(metric: str, value: float, chance: float, chance_metric: str = "chance") -> float | None:
    """Return the share that a guess keeps of a value, by rows of a metric and of its chance."""
    rows = [whole(value, metric=metric), row("avss", 0.9, metric=metric, value=0.1)]
    rows += [whole(chance, metric=chance_metric), row("avss", 0.9, metric=chance_metric, value=0.3)]
    return kept_by_guess(rows, metric)


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "mc2"])
def test_a_guess_is_known_of_accuracies(metric: str) -> None:
    assert guess_keeps(metric, 0.8, 0.2) == 0.25


def test_a_guess_is_known_of_losses() -> None:
    assert guess_keeps("loss", log(10), log(100)) == pytest.approx(0.1)
    assert guess_keeps("loss", 2000.0, 1.0) == exp(700)


def test_a_guess_of_a_group_is_read_of_the_group() -> None:
    assert guess_keeps("g/acc", 0.8, 0.2, "g/chance") == 0.25
    assert guess_keeps("g/acc", 0.8, 0.2) is None


def test_a_guess_is_not_known_of_other_metrics_and_of_zeros() -> None:
    assert guess_keeps("f1", 0.8, 0.2) is None
    assert guess_keeps("acc", 0.0, 0.2) is None
    assert guess_keeps("acc", 0.8, 0.0) is None


PUBLISHED = {"site": "block", "recipe": "pooled", "threshold": 1e-5, "threshold_kind": "absolute"}


@pytest.mark.parametrize(
    ("name", "other"), [("site", "mlp"), ("recipe", "unit"), ("threshold", 1e-2), ("threshold_kind", "rms")]
)
def test_avss_counts_as_it_is_published(name: str, other: object) -> None:
    assert not verdicts([row("avss", 0.95, **{**PUBLISHED, name: other})])
    unknown = {**PUBLISHED, name: None}
    assert not verdicts([row("avss", 0.95, **unknown, method="avss (mlp)")])
    assert verdicts([row("avss", 0.95, **unknown)])


def test_avss_as_it_is_published_counts_by_any_name() -> None:
    assert verdicts([row("avss", 0.95, **PUBLISHED, method="avss (mlp)")])


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [("loss", log(1234.56), "1,235"), ("loss", 900.0, f"{exp(700):,.4g}"), ("acc", 0.12345, "0.123")],
)
def test_values_as_people_read_them(metric: str, value: float, shown: str) -> None:
    assert shown_value({"metric": metric, "value": value}) == shown


def test_methods_as_people_read_them() -> None:
    assert shown_method({"method": "avss"}) == "avss"
    assert shown_method({"method": "avss", "repair": "refit"}) == "avss + refit"


def test_perplexities_and_small_shares_in_a_paragraph() -> None:
    pruned = row("avss", 0.001, metric="loss", value=log(20000.0))
    (text,) = verdicts([whole(log(20.0), metric="loss"), pruned])
    assert text.startswith(f"{START}, 0.1% (under 0.1% to 3.1%) is kept (perplexity 20, then 2e+04)")
