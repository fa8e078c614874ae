"""Rows of paired text and statistics of experts: equality sees every field, and merging adds every sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from avss_dist.stats.layer_stats import EXPERT_FIELDS, ROW_FIELDS, AnswerRows, ExpertStats, RowStats, merge_experts


def row_stats(seed: int = 0) -> RowStats:
    rng = np.random.default_rng(seed)
    values = {name: rng.integers(0, 99, 3) if name in ("count", "near_zero") else rng.random(3) for name in ROW_FIELDS}
    values["norm"][1] = np.nan
    return RowStats(**values)


def answers() -> AnswerRows:
    numbers = {name: np.arange(3) + i for i, name in enumerate(("row", "pair", "prompt_tokens", "answer_tokens"))}
    stats = {(0, "mlp"): row_stats(0), (1, "mlp"): row_stats(1)}
    return AnswerRows(**numbers, strata=("good", "bad", "good"), stats=stats)


def test_rows_are_equal_where_every_field_is() -> None:
    rows = answers()
    assert rows.equals(answers()) and answers().equals(rows)
    for name in ("row", "pair", "prompt_tokens", "answer_tokens"):
        assert not rows.equals(replace(rows, **{name: getattr(rows, name) + 1})), name
    assert not rows.equals(replace(rows, strata=("good", "bad", "bad")))
    assert not rows.equals(replace(rows, stats={(0, "mlp"): row_stats(0)}))
    assert not replace(rows, stats={(0, "mlp"): row_stats(0)}).equals(rows)
    assert not rows.equals(replace(rows, stats={(0, "mlp"): row_stats(0), (2, "mlp"): row_stats(1)}))
    for name in ROW_FIELDS:
        for key, stats in rows.stats.items():
            changed = replace(stats, **{name: getattr(stats, name) + 1})
            assert not rows.equals(replace(rows, stats={**rows.stats, key: changed})), name


def expert_stats(seed: int) -> ExpertStats:
    rng = np.random.default_rng(seed)
    return ExpertStats(**{name: rng.integers(1, 99, 4) for name in EXPERT_FIELDS})


def test_experts_are_merged_by_layer_and_sorted() -> None:
    parts = [{2: expert_stats(0)}, {0: expert_stats(1), 2: expert_stats(2)}, {}, {2: expert_stats(3)}]
    merged = merge_experts(parts)
    assert list(merged) == [0, 2]
    for name in EXPERT_FIELDS:
        assert getattr(merged[0], name).tolist() == getattr(expert_stats(1), name).tolist()
        total = sum(getattr(expert_stats(seed), name) for seed in (0, 2, 3))
        assert getattr(merged[2], name).tolist() == total.tolist()
