"""Tell when the rankings of the layers of trainings settle, what seeds share, and what follows the measured loss.

    python tests/benchmarks/settling.py WAREHOUSE

The warehouse holds runs of trainings that differ in the seed alone, with the loss without each layer: those of a job
with an experiment over the checkpoints of ``training.py``, as in ``docs/results/training.md``. Three tables are
printed as Markdown:

- the step from which on the lowest quarter of the layers is that of the last checkpoint, and the step from which on
  Spearman's correlation with the last checkpoint is 0.9 or more, for each seed;
- the mean of Spearman's correlation over all pairs of seeds, at each step;
- the mean over seeds of Spearman's correlation with the loss without the layer, at each step.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa

import avss_dist
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import count_lowest, rank_lowest, spearman

SETTLED = 0.9  # correlation with the last checkpoint from which on an order is said to be the last one
LOSS = "loss without the layer"
SCORES = {
    "block influence": {"score": "block_influence"},
    "angular distance": {"score": "angular_distance"},
    "relative magnitude": {"score": "relative_magnitude"},
    "ratio of variances of update and input": {"score": "update_variance_ratio"},
    "AVSS as published (1e-5)": {"score": "avss", "threshold": 1e-5},
    "AVSS, 0.1 of the root mean square": {"score": "avss", "threshold": "0.1rms"},
}
LOSSES = """
    SELECT r.seed, r.training_step AS step, without.drop[1] AS layer, without.value - whole.value AS score
    FROM evaluations AS without
    JOIN evaluations AS whole USING (run_id, metric)
    JOIN runs AS r ON r.revision = without.revision
    WHERE without.task LIKE 'ablation:%' AND metric = 'loss' AND len(without.drop) = 1 AND len(whole.drop) = 0
"""


@dataclass(frozen=True)
class Trainings:
    """Scores of the layers of trainings that differ in the seed alone.

    Attributes:
        steps: steps of the checkpoints, in order.
        values: scores by seed, float64[steps, layers].
    """

    steps: Sequence[int]
    values: Mapping[int, Float64]


def trainings_of(rows: pa.Table) -> Trainings:
    """Return the scores of a table with the columns seed, step, layer and score, at the steps that all seeds have."""
    scores: dict[int, dict[int, dict[int, float]]] = {}
    for row in rows.to_pylist():
        scores.setdefault(row["seed"], {}).setdefault(row["step"], {})[row["layer"]] = row["score"]
    steps = sorted(set.intersection(*[set(by_step) for by_step in scores.values()]))
    values = {}
    for seed in sorted(scores):
        rows_of_seed = []
        for step in steps:
            by_layer = scores[seed][step]
            rows_of_seed.append([by_layer[layer] for layer in sorted(by_layer)])
        values[seed] = np.array(rows_of_seed)
    return Trainings(steps, values)


def read_scores(warehouse: str, options: Mapping[str, str | float]) -> Trainings:
    """Return a score of the layers of all trainings of a warehouse."""
    curves = avss_dist.compare(warehouse=warehouse, along="step", **options)
    table = curves.table()
    columns = {"seed": "seed", "value": "step", "layer": "layer", "score": "score"}
    return trainings_of(table.select([*columns]).rename_columns([*columns.values()]))


def first_to_stay(holds: Sequence[bool], steps: Sequence[int]) -> str:
    """Return the step from which on something holds; "end" if that is the last one alone."""
    first = len(holds) - 1
    while first > 0 and holds[first - 1]:
        first -= 1
    return "end" if first == len(holds) - 1 else f"{steps[first]:,.0f}"


def lowest_stay(values: Float64, steps: Sequence[int]) -> str:
    """Return the step from which on the lowest quarter of the layers is the last one.

    Args:
        values: scores, float64[steps, layers].
    """
    number = count_lowest(values.shape[1], 0.25)
    is_lowest = rank_lowest(values) <= number
    return first_to_stay([np.array_equal(row, is_lowest[-1]) for row in is_lowest], steps)


def order_stays(values: Float64, steps: Sequence[int]) -> str:
    """Return the step from which on the order of the layers is nearly the last one.

    Args:
        values: scores, float64[steps, layers].
    """
    return first_to_stay([spearman(row, values[-1]) >= SETTLED for row in values], steps)


def agreement_of_seeds(trainings: Trainings, point: int) -> float:
    """Return the mean correlation over pairs of seeds at a point."""
    pairs = combinations(trainings.values.values(), 2)
    return float(np.mean([spearman(first[point], second[point]) for first, second in pairs]))


def agreement_with_loss(trainings: Trainings, losses: Trainings, step: int) -> float:
    """Return the mean over seeds of the correlation with the measured loss at a step."""
    correlations = []
    for seed, values in trainings.values.items():
        of_score = values[trainings.steps.index(step)]
        of_loss = losses.values[seed][losses.steps.index(step)]
        correlations.append(spearman(of_score, of_loss))
    return float(np.mean(correlations))


def print_rows(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Print a table as Markdown."""
    print(f"\n| score | {' | '.join(columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("warehouse")
    warehouse = parser.parse_args().warehouse
    losses = trainings_of(avss_dist.Warehouse(warehouse).sql(LOSSES))
    scores = {LOSS: losses}
    for name, options in SCORES.items():
        scores[name] = read_scores(warehouse, options)

    settled: dict[str, list[str]] = {}
    agreement: dict[str, list[str]] = {}
    with_loss: dict[str, list[str]] = {}
    for name, trainings in scores.items():
        lowest = [lowest_stay(values, trainings.steps) for values in trainings.values.values()]
        order = [order_stays(values, trainings.steps) for values in trainings.values.values()]
        settled[name] = [", ".join(lowest), ", ".join(order)]
        agreement[name] = [f"{agreement_of_seeds(trainings, point):.2f}" for point in range(len(trainings.steps))]
        if name != LOSS:
            with_loss[name] = [f"{agreement_with_loss(trainings, losses, step):.2f}" for step in losses.steps]
    steps = [f"{step:,.0f}" for step in losses.steps]
    print_rows(["the lowest quarter stays", "the order stays"], settled)
    print_rows([f"seeds: step {steps[0]}", *steps[1:]], agreement)
    print_rows([f"loss: step {steps[0]}", *steps[1:]], with_loss)


if __name__ == "__main__":
    main()
