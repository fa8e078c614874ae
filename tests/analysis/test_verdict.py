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


def row(score: str | None, retention: float, *, control: str | None = None, **more: Any) -> dict[str, Any]:
    """A row of `experiments`; its interval is 3 points to either side."""
    bounds = {"retention_low": retention - 0.03, "retention_high": retention + 0.03}
    place = {
        "task": "t",
        "metric": "acc",
        "share": 0.25,
        "drop": [1, 2],
        "drop_parts": [],
        "value": 0.5,
        "method": str(score),
    }
    return {**place, "score": score, "control": control, "retention": retention, **bounds, **more}


def whole(value: float = 0.8, **more: Any) -> dict[str, Any]:
    return row(None, 1.0, share=0.0, drop=[], value=value, **more)


def everything(**more: Any) -> Rows:
    others = [
        row("avss", 0.3, control="reversed", **more),
        row("avss", 0.96, control="ends kept", **more),
        row("block_influence", 0.98, **more),
        row("loss", 0.99, **more),
        row("last", 0.7, **more),
    ]
    return [row("avss", 0.95, **more), row("random", 0.95, **more), row("random", 0.6, **more), *others]


START = "t: without the 2 layers of the lowest AVSS (25%)"
OTHERS = " ".join(LABELS.values())


def test_a_paragraph_has_the_claim_then_chance_then_the_rivals() -> None:
    (text,) = verdicts([whole(), *everything()])
    assert text == (
        f"{START}, 95.0% (92.0% to 98.0%) is kept (acc 0.800, then 0.500): the claim holds. "
        f"Of 2 random choices of as many layers, 1 keeps as much or more (the best 95.0%). {OTHERS}"
    )
    for label in LABELS.values():
        rows = [r for r in everything() if f"keeps {r['retention']:.1%}." not in label]
        assert verdicts([whole(), *rows]) == [text.replace(f" {label}", "")]


def test_every_task_is_told_apart() -> None:
    """Were its rows mixed with those of another task, the first that fits would speak for both."""
    rows = [row("avss", 0.5, value=0.4), row("random", 0.2), row("loss", 0.6)]
    others = [{**r, "task": "u"} for r in [whole(0.9), row("avss", 0.97, value=0.8), row("random", 0.1)]]
    first, second = verdicts([*others[1:], *rows, others[0]])
    assert first == (
        "u: without the 2 layers of the lowest AVSS (25%), 97.0% (94.0% to 100.0%) is kept (acc 0.900, then 0.800): "
        "the claim holds. A random choice of as many layers keeps 10.0%."
    )
    assert second == (
        f"{START}, 50.0% (47.0% to 53.0%) is kept: the claim does not hold. "
        "A random choice of as many layers keeps 20.0%. Leaving out by the loss without each layer keeps 60.0%."
    )
    assert claim_in_short([*others, *rows]) == [
        "u: 97.0% by the lowest AVSS: the claim holds.",
        "t: 50.0% by the lowest AVSS: the claim does not hold.",
    ]


def test_only_random_choices_without_a_control_are_chance() -> None:
    rows = [whole(), row("avss", 0.95), row("random", 0.99, control="ends kept"), row("loss", 0.99)]
    assert "random" not in verdicts(rows)[0]
    assert "A random choice of as many layers keeps 50.0%." in verdicts([*rows, row("random", 0.5)])[0]


def test_random_choices_that_keep_as_much_are_counted() -> None:
    (text,) = verdicts([whole(), row("avss", 0.95), *(row("random", chance) for chance in (0.2, 0.96, 0.97))])
    assert "Of 3 random choices of as many layers, 2 keep as much or more (the best 97.0%)." in text


def test_each_repair_has_its_own_paragraph_and_its_own_rivals() -> None:
    plain = [row("avss", 0.5), row("random", 0.4)]
    repaired = [row("avss", 0.92, repair="refit", patch="p"), row("random", 0.45, repair="refit", patch="p")]
    first, second = verdicts([whole(), *plain, *repaired])
    assert first == (
        f"{START}, 50.0% (47.0% to 53.0%) is kept (acc 0.800, then 0.500): the claim does not hold. "
        "A random choice of as many layers keeps 40.0%."
    )
    assert second == (
        f"{START}, repaired by refit, 92.0% (89.0% to 95.0%) is kept (acc 0.800, then 0.500): "
        "the claim is undecided, for want of data. A random choice of as many layers, repaired by refit, keeps 45.0%."
    )
    assert verdicts([whole(), *repaired, *plain]) == [second, first]
    assert claim_in_short([whole(), *repaired, *plain]) == ["t: 50.0% by the lowest AVSS: the claim does not hold."]
    assert claim_in_short([whole(), *repaired]) == []
    unpatched = [{**r, "patch": None} for r in repaired] + [row("random", 0.47, repair="refit")]
    (text,) = verdicts([whole(), *unpatched])
    assert f"{START}, repaired by refit (nothing: no layer stands before them), 92.0%" in text
    assert "Of 2 random choices of as many layers, repaired by refit, none keep" in text


def test_other_shares_scaled_layers_and_other_metrics_are_not_of_the_claim() -> None:
    rows = [whole(), row("avss", 0.4, share=0.5), row("avss", 0.99, factor=0.5)]
    assert verdicts(rows) == claim_in_short(rows) == []
    others = [row("random", 0.1, share=0.5), row("random", 0.2, factor=0.5)]
    others += [whole(0.7, metric="f1"), row("avss", 0.1, metric="f1")]
    (text,) = verdicts([*others, *rows, row("avss", 0.95)])
    assert text == f"{START}, 95.0% (92.0% to 98.0%) is kept (acc 0.800, then 0.500): the claim holds."
    assert claim_in_short([*others, *rows, row("avss", 0.95)]) == ["t: 95.0% by the lowest AVSS: the claim holds."]


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
    assert expected in judgement({"retention": 0.92, "retention_low": low, "retention_high": high})
    (text,) = verdicts([whole(), row("avss", 0.95, retention_low=low, retention_high=high)])
    assert (f"{START}, 95.0% is kept (acc" in text) == ("no interval" in expected)


@pytest.mark.parametrize("guess", [0.009, 0.01, 0.5, 0.9, 0.91])
def test_a_guess_is_told_where_it_keeps_something_and_less_than_is_claimed(guess: float) -> None:
    rows = [whole(0.5), whole(guess / 2, metric="chance"), row("avss", 0.95)]
    (text,) = verdicts(rows)
    assert (f"A guess keeps {guess:.1%}." in text) == (0.01 <= guess <= 0.9)
    assert ("this task cannot tell, for a guess keeps 91.0%" in text) == (guess > 0.9)
    assert ("cannot tell" in claim_in_short(rows)[0]) == (guess > 0.9)


def test_a_guess_is_known_of_accuracies_and_losses_alone() -> None:
    def guess(metric: str, value: float, chance: float, own: str = "chance") -> float | None:
        rows = [whole(value, metric=metric), whole(chance, metric=own), row("avss", 0.9, metric=metric, value=0.1)]
        return kept_by_guess([*rows, row("avss", 0.9, metric=own, value=0.3)], metric)

    for metric in ("acc", "acc_norm", "mc2"):
        assert guess(metric, 0.8, 0.2) == 0.25
    assert guess("loss", log(10), log(100)) == pytest.approx(0.1)
    assert guess("loss", 2000.0, 1.0) == exp(700)
    assert guess("g/acc", 0.8, 0.2, "g/chance") == 0.25
    assert guess("g/acc", 0.8, 0.2) is None
    assert guess("f1", 0.8, 0.2) is None
    assert guess("acc", 0.0, 0.2) is None
    assert guess("acc", 0.8, 0.0) is None


def test_avss_counts_as_it_is_published() -> None:
    published = {"site": "block", "recipe": "pooled", "threshold": 1e-5, "threshold_kind": "absolute"}
    for name, other in (("site", "mlp"), ("recipe", "unit"), ("threshold", 1e-2), ("threshold_kind", "rms")):
        assert not verdicts([row("avss", 0.95, **{**published, name: other})])
        assert not verdicts([row("avss", 0.95, **{**published, name: None}, method="avss (mlp)")])
        assert verdicts([row("avss", 0.95, **{**published, name: None})])
    assert verdicts([row("avss", 0.95, **published, method="avss (mlp)")])


def test_values_and_methods_as_people_read_them() -> None:
    assert shown_value({"metric": "loss", "value": log(1234.56)}) == "1,235"
    assert shown_value({"metric": "loss", "value": 900.0}) == f"{exp(700):,.4g}"
    assert shown_value({"metric": "acc", "value": 0.12345}) == "0.123"
    assert shown_method({"method": "avss"}) == "avss"
    assert shown_method({"method": "avss", "repair": "refit"}) == "avss + refit"
    rows = [whole(log(20.0), metric="loss"), row("avss", 0.001, metric="loss", value=log(20000.0))]
    (text,) = verdicts(rows)
    assert text.startswith(f"{START}, 0.1% (under 0.1% to 3.1%) is kept (perplexity 20, then 2e+04)")
