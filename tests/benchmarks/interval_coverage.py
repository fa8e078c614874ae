"""Coverage of 95% intervals: how often they hold the value of the population that shards, rows or pairs come from.

    python tests/benchmarks/interval_coverage.py [--draws 400] [--sizes 2 4 8 16 32] [--population NAME]
        [--no-bootstrap] [--warehouse FOLDER --run RUN_ID]

Each population is a table of 4,000 units, or the shards of a run; its value is the statistic of all of them. Units are
drawn from it with replacement, and the intervals of several methods are compared with that value. The package's method
is `skewed t`: the jackknife's standard error and skewness, Student's t and Hall's transformation. The others: the
percentile bootstrap, BCa (Efron 1987), the percentile interval widened to Student's t (Hesterberg 2014), the
bootstrap's standard error with Student's t, the jackknife's with Student's t, and the bootstrap t with jackknife
standard errors (up to 16 units). Printed by population, number of units and method: coverage, and the median width over
the population's value (of differences, the width itself).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from avss_dist.core.settings import PUBLISHED_THRESHOLD
from avss_dist.stats import intervals
from avss_dist.stats.intervals import SCALES, jackknife_interval
from avss_dist.stats.scores import MINIMUM_NEAR_ZERO, avss
from avss_dist.warehouse.reader import Warehouse

Array = NDArray[np.float64]
Ends = tuple[Array, Array]
Statistic = Callable[[Sequence[Array], Array], Array]
"""The statistic of units, weighted: arrays [units, ...] and weights [n, units] give [n, values]."""
RESAMPLES, NESTED, UNITS, LAYERS = 1000, 100, 4000, 12
STUDENTIZED_UP_TO = 16
METHODS = ("percentile", "BCa", "widened", "bootstrap SE, t", "bootstrap t", "jackknife t", "skewed t")


@dataclass(frozen=True, kw_only=True)
class Population:
    """Units, and the statistic whose interval is wanted on a scale of `jackknife_interval`."""

    name: str
    units: Sequence[Array]
    statistic: Statistic
    scale: str = "log"

    @property
    def value(self) -> Array:
        """The statistic of all units."""
        number = len(self.units[0])
        return self.statistic(self.units, np.ones((1, number)))[0]


def populations(rng: np.random.Generator) -> Iterator[Population]:
    """Yield the simulated populations."""
    shapes: dict[str, Callable[..., Array]] = {
        "normal": lambda *size: np.maximum(1 + 0.3 * rng.normal(size=size), 0.05)
    }
    for sigma in (0.5, 1.0):
        shapes[f"lognormal {sigma:g}"] = lambda *size, sigma=sigma: np.exp(sigma * rng.normal(size=size) / 2**0.5)
    base, near_zero = np.exp(rng.normal(size=LAYERS)), np.exp(rng.normal(5, 0.5, LAYERS))
    for name, draw in shapes.items():  # half of the variance is common to the layers of a shard
        counts = rng.poisson(near_zero * draw(UNITS, 1) * draw(UNITS, LAYERS)).astype(float)
        units = [base * draw(UNITS, 1) * draw(UNITS, LAYERS), counts, np.full((UNITS, LAYERS), 1e6)]
        yield Population(name=f"AVSS, {name}", units=units, statistic=avss_of)
    before = rng.normal(3, 0.4, UNITS)
    for name, rise in {
        "normal": rng.normal(0.3, 0.15, UNITS),
        "lognormal 0.5": 0.2 * rng.lognormal(sigma=0.5, size=UNITS),
        "lognormal 1": 0.2 * rng.lognormal(sigma=1, size=UNITS),
    }.items():
        yield Population(name=f"perplexity kept, {name}", units=[before, before + rise], statistic=perplexity_kept)
    right = (rng.random(UNITS) < 0.8).astype(float)
    still = np.where(right == 1, rng.random(UNITS) < 0.85, rng.random(UNITS) < 0.1).astype(float)
    yield Population(name="accuracy kept", units=[right, still], statistic=accuracy_kept)
    difference = rng.normal(size=(UNITS, LAYERS)) + 0.5 * rng.normal(size=(UNITS, 1))
    yield Population(name="from the median layer", units=[difference], statistic=from_median, scale="linear")
    score = rng.normal(size=UNITS)
    lower = rng.normal(size=UNITS) - 1 + 0.5 * score
    yield Population(name="AUROC", units=[score, lower], statistic=auroc, scale="logit")


def avss_of(units: Sequence[Array], weights: Array) -> Array:
    variance, near_zero, count = units
    return avss(weights @ variance / weights.sum(1, keepdims=True), weights @ near_zero, weights @ count, smoothed=True)


def perplexity_kept(units: Sequence[Array], weights: Array) -> Array:
    before, after = units
    return np.exp(weights @ (before - after) / weights.sum(1))[:, None]


def accuracy_kept(units: Sequence[Array], weights: Array) -> Array:
    before, after = units
    return (weights @ after / (weights @ before))[:, None]


def from_median(units: Sequence[Array], weights: Array) -> Array:
    means = weights @ units[0] / weights.sum(1, keepdims=True)
    return means - np.median(means, axis=1, keepdims=True)


def auroc(units: Sequence[Array], weights: Array) -> Array:
    positive, negative = units
    order = np.argsort(negative)
    below = np.hstack([np.zeros((len(weights), 1)), np.cumsum(weights[:, order], axis=1)])
    wins = below[:, np.searchsorted(negative[order], positive)]
    return ((weights * wins).sum(1) / weights.sum(1) ** 2)[:, None]


def shards_of(folder: Path, run_id: str) -> Population:
    """Return the shards of a run as a population: AVSS at the published site, recipe and threshold."""
    warehouse = Warehouse(folder)
    run = warehouse.run(run_id)
    assert run is not None, f"no run '{run_id}'"
    shards = [shard.stats for shard in warehouse.read_partials(run)]
    keys = sorted(key for key in shards[0] if key[1] == "block")
    at = list(run["thresholds"]).index(PUBLISHED_THRESHOLD)
    fields: list[Callable[..., float]] = [
        lambda s: s.pooled_variance_sum / s.sequence_count,
        lambda s: s.near_zero[at],
        lambda s: s.count,
    ]
    units = [np.array([[field(shard[key]) for key in keys] for shard in shards], float) for field in fields]
    return Population(name=f"AVSS, {len(shards)} real shards", units=units, statistic=avss_of)


def ends_of(
    population: Population, units: Sequence[Array], rng: np.random.Generator, bootstrap: bool = True
) -> dict[str, Ends]:
    """Return the ends of every method's interval."""
    number, statistic = len(units[0]), population.statistic
    value, left_out = statistic(units, np.ones((1, number)))[0], statistic(units, 1 - np.eye(number))
    multiple = t.ppf(0.975, number - 1)
    transform, invert = SCALES[population.scale]
    center = transform(value)
    ends = {
        "jackknife t": _jackknife(center, transform(left_out), multiple, invert),
        "skewed t": _skewed(value, left_out, population.scale),
    }
    if not bootstrap:
        return ends
    weights = rng.multinomial(number, np.full(number, 1 / number), RESAMPLES).astype(float)
    resampled = statistic(units, weights)
    on_scale = transform(resampled)
    tail = norm.cdf(-multiple * np.sqrt(number / (number - 1)))
    error = multiple * np.sqrt(number / (number - 1)) * np.nanstd(np.where(np.isfinite(on_scale), on_scale, np.nan), 0)
    ends |= {
        "percentile": _quantiles(resampled, 0.025, 0.975),
        "BCa": _bca(value, resampled, left_out),
        "widened": _quantiles(resampled, tail, 1 - tail),
        "bootstrap SE, t": (invert(center - error), invert(center + error)),
    }
    if number <= STUDENTIZED_UP_TO:
        ends["bootstrap t"] = _studentized(population, units, weights[:NESTED], center, on_scale[:NESTED], left_out)
    return ends


def _quantiles(resampled: Array, low: float, high: float) -> Ends:
    ends = np.nanquantile(resampled, [low, high], axis=0)
    return ends[0], ends[1]


def _jackknife(center: Array, left_out: Array, multiple: float, invert: Callable[[Array], Array]) -> Ends:
    number = len(left_out)
    half = multiple * np.sqrt((number - 1) / number * np.square(left_out - left_out.mean(0)).sum(0))
    return invert(center - half), invert(center + half)


def _skewed(value: Array, left_out: Array, scale: str) -> Ends:
    minimum, intervals.MINIMUM_UNITS = intervals.MINIMUM_UNITS, 2  # to see why the package gives none below
    try:
        ends = jackknife_interval(value, left_out, scale=scale)
    finally:
        intervals.MINIMUM_UNITS = minimum
    return ends[0], ends[1]


def _bca(value: Array, resampled: Array, left_out: Array) -> Ends:
    bias = norm.ppf(np.clip((resampled < value).mean(0), 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    spread = left_out.mean(0) - left_out
    skew = (spread**3).sum(0) / (6 * np.maximum(np.square(spread).sum(0), 1e-300) ** 1.5)
    ends = []
    for z in norm.ppf([0.025, 0.975]):
        share = norm.cdf(bias + (bias + z) / (1 - skew * (bias + z)))
        columns = zip(resampled.T, np.nan_to_num(share, nan=0.5), strict=True)
        ends.append(np.array([np.nanquantile(column, one) for column, one in columns]))
    return ends[0], ends[1]


def _studentized(
    population: Population, units: Sequence[Array], weights: Array, center: Array, resampled: Array, left_out: Array
) -> Ends:
    number = weights.shape[1]
    transform, invert = SCALES[population.scale]
    own = transform(left_out)
    error = np.sqrt((number - 1) / number * np.square(own - own.mean(0)).sum(0))
    drawn = weights[:, :, None] > 0
    nested = np.where(drawn, weights[:, None, :] - np.eye(number), weights[:, None, :]).reshape(-1, number)
    values = transform(population.statistic(units, nested)).reshape(len(weights), number, -1)
    times = weights[:, :, None]
    middle = (times * values).sum(1, keepdims=True) / number
    errors = np.sqrt((number - 1) / number * (times * np.square(values - middle)).sum(1))
    studentized = (resampled - center) / errors
    low, high = _quantiles(np.where(np.isfinite(studentized), studentized, np.nan), 0.025, 0.975)
    return invert(center - high * error), invert(center - low * error)


def coverage(population: Population, number: int, draws: int, bootstrap: bool = True) -> dict[str, tuple[float, float]]:
    """Return the coverage and the median relative width of each method. Draws without an interval are left out."""
    rng = np.random.default_rng(number)
    value = population.value
    scale = np.ones_like(value) if population.scale == "linear" else np.abs(value)
    held: dict[str, list[Array]] = {}
    widths: dict[str, list[Array]] = {}
    for _ in range(draws):
        chosen = rng.integers(0, len(population.units[0]), number)
        units = [one[chosen] for one in population.units]
        if population.statistic is accuracy_kept and np.count_nonzero(units[0] != units[1]) < min(8, number):
            continue  # the package gives no interval
        for method, (low, high) in ends_of(population, units, rng, bootstrap).items():
            known = np.isfinite(low) & np.isfinite(high)
            if population.statistic is avss_of:  # the package gives no interval for fewer
                known &= units[1].sum(axis=0) >= MINIMUM_NEAR_ZERO
            held.setdefault(method, []).append(((low <= value) & (value <= high))[known])
            widths.setdefault(method, []).append((high - low)[known] / scale[known])
    return {m: (np.concatenate(held[m]).mean(), np.median(np.concatenate(widths[m]))) for m in METHODS if m in held}


def lowest_calibration(population: Population, number: int, draws: int) -> Iterator[tuple[str, float]]:
    """Yield ranges of `lowest_set_probability`, and how often the layers in them are in the population's lowest 25%."""
    rng, size = np.random.default_rng(number), round(len(population.value) / 4)
    lowest = np.argsort(np.argsort(population.value)) < size
    shares, truths = [], []
    for _ in range(draws):
        units = [one[rng.integers(0, len(one), number)] for one in (np.arange(len(population.units[0])),)]
        drawn = [one[units[0]] for one in population.units]
        weights = rng.multinomial(number, np.full(number, 1 / number), RESAMPLES).astype(float)
        ranks = np.argsort(np.argsort(population.statistic(drawn, weights), axis=1), axis=1)
        shares.append((ranks < size).mean(0))
        truths.append(lowest)
    share, truth = np.concatenate(shares), np.concatenate(truths)
    for low, high in ((0.05, 0.35), (0.35, 0.65), (0.65, 0.95), (0.95, 1.01)):
        inside = (share >= low) & (share < high)
        yield f"{low:.2f} to {min(high, 1):.2f}", float(truth[inside].mean()) if inside.any() else float("nan")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--population", default="", help="only those whose name contains this")
    parser.add_argument("--bootstrap", action=argparse.BooleanOptionalAction, default=True, help="40 times as slow")
    parser.add_argument("--warehouse", type=Path)
    parser.add_argument("--run")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # two units give no studentized interval
    every = list(populations(np.random.default_rng(0)))
    if options.warehouse:
        every.append(shards_of(options.warehouse, options.run))
    every = [one for one in every if options.population in one.name]
    print(f"| population | units | {' | '.join(METHODS)} |\n|---|---:|{'---:|' * len(METHODS)}")
    for population in every:
        factor = 16 if population.statistic is accuracy_kept else 1  # of most samples, nothing changes
        draws = options.draws * (1 if len(population.value) > 1 else LAYERS)
        for number in (factor * size for size in options.sizes):
            found = coverage(population, number, draws, options.bootstrap)
            cells = [f"{100 * found[m][0]:.1f} ({found[m][1]:.2g})" if m in found else "-" for m in METHODS]
            print(f"| {population.name} | {number} | {' | '.join(cells)} |", flush=True)
    if not options.bootstrap:
        return
    print("\n| population | shards | lowest_set_probability | in the lowest 25% |\n|---|---:|---:|---:|")
    for population in (one for one in every if one.statistic is avss_of):
        for number in (size for size in options.sizes if size >= intervals.MINIMUM_UNITS):
            for share, truth in lowest_calibration(population, number, options.draws):
                print(f"| {population.name} | {number} | {share} | {truth:.2f} |", flush=True)


if __name__ == "__main__":
    main()
