"""Changes between checkpoints of simulated trainings, and differences between their seeds.

How often one is found where none is, and where one is planted.

    python tests/benchmarks/changes.py [changes seeds] [--series 200] [--units 8 12 16 32 64] [--points 6]
        [--layers 12] [--seeds 3]

A unit (shard) s of the text has at point t and layer l the score mu_l + a_{s,l} + e_{t,s,l}, and all of it the mean
over units. The text's own part a has a standard deviation of 2, the noise e one of 1, and is drawn anew at each point:

- normal;
- skewed: an exponential distribution about its mean, whose skewness is 2;
- skewed at every other point, and normal at the others: differences of neighbours are then skewed, too;
- neighbours alike: normal, and that of neighbouring units correlates by 0.5.

A planted change moves one layer from one point on. Its size is in standard errors of a change, sqrt(2 / units). The
distance of two layers that exchange places is in those of the difference of two layers at a point, sqrt(10 / units).

Seeds have the same text, and noise of their own at each point. A planted difference is that of one layer of the last
seed at one point. Its size is in standard errors of the difference of two seeds, sqrt(2 / units).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from avss_dist.stats import changes
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.layer_stats import Float64

SPREAD_OF_TEXT = 2.0
CORRELATION = 0.5
SIZES = (3.0, 4.0, 5.0, 6.0, 8.0)
DRIFT = 0.3  # standard deviation of the true change of each layer, where rank correlations are simulated
Values = Callable[[Float64, Float64], Float64]
Noise = Callable[[np.random.Generator, tuple[int, int, int]], Float64]


def normal(random: np.random.Generator, shape: tuple[int, int, int]) -> Float64:
    """Return e of shape [points, units, layers]."""
    return random.normal(size=shape)


def skewed(random: np.random.Generator, shape: tuple[int, int, int]) -> Float64:
    """Return e of an exponential distribution about its mean."""
    return random.exponential(size=shape) - 1


def unlike(random: np.random.Generator, shape: tuple[int, int, int]) -> Float64:
    """Return e that is skewed at every other point."""
    noise = normal(random, shape)
    noise[1::2] = skewed(random, shape)[1::2]
    return noise


def neighbours_alike(random: np.random.Generator, shape: tuple[int, int, int]) -> Float64:
    """Return e that is an autoregressive process over units."""
    noise = normal(random, shape)
    for unit in range(1, shape[1]):
        new = np.sqrt(1 - CORRELATION**2) * noise[:, unit]
        noise[:, unit] = CORRELATION * noise[:, unit - 1] + new
    return noise


NOISES: dict[str, Noise] = {
    "normal": normal,
    "skewed": skewed,
    "skewed at every other point": unlike,
    "neighbours alike": neighbours_alike,
}


def scores(random: np.random.Generator, noise: Noise, mu: Float64, units: int) -> Float64:
    """Return scores by unit, float64[units, points, layers].

    Args:
        mu: float64[points, layers].
    """
    points, layers = mu.shape
    text = SPREAD_OF_TEXT * random.normal(size=(units, layers))
    by_unit = mu[:, None] + text + noise(random, (points, units, layers))
    return by_unit.swapaxes(0, 1)


def in_blocks(by_unit: Float64, size: int) -> Float64:
    """Return means over blocks of neighbouring units, float64[blocks, points, layers]."""
    block = changes.block_of_units(len(by_unit), size)
    return np.array([by_unit[block == number].mean(axis=0) for number in range(block[-1] + 1)])


def left_out(by_unit: Float64) -> Float64:
    """Return the means without each unit, float64[units, points, layers]."""
    units = len(by_unit)
    return (by_unit.sum(axis=0) - by_unit) / (units - 1)


def tested(by_unit: Float64, *, blocks: bool = True, values: Values = changes.change_values) -> Float64 | None:
    """Return adjusted p-values, float64[points - 1, layers] of changes. None if nothing is claimed.

    Args:
        blocks: whether units are taken in blocks where they correlate.
        values: returns the pseudo-values of what is tested.
    """
    if blocks:
        pseudo = values(by_unit.mean(axis=0), left_out(by_unit))
        size = changes.independent_block_size(pseudo)
        if size is None:
            return None
        if size > 1:
            by_unit = in_blocks(by_unit, size)
    return changes.adjusted_p(values(by_unit.mean(axis=0), left_out(by_unit)))


def values_of_seeds(seeds: int) -> Values:
    """Return a function of the pseudo-values of differences between seeds, whose points are in one axis."""

    def values(theta: Float64, without_unit: Float64) -> Float64:
        layers = theta.shape[-1]
        by_seed = theta.reshape(seeds, -1, layers)
        return changes.seed_values(by_seed, without_unit.reshape(len(without_unit), *by_seed.shape))

    return values


def print_without_change(options: argparse.Namespace) -> None:
    """Print in how many series without a change there is a finding."""
    print(f"Findings in {options.series} series without a change; in brackets, without blocks; refused")
    print_findings(options, options.points, changes.change_values)


def print_seeds_alike(options: argparse.Namespace) -> None:
    """Print in how many groups of equal seeds there is a finding."""
    print(f"Findings in {options.series} groups of {options.seeds} equal seeds; in brackets, without blocks; refused")
    print_findings(options, options.seeds * options.points, values_of_seeds(options.seeds))


def print_findings(options: argparse.Namespace, points: int, values: Values) -> None:
    """Print in how many series there is a finding, for checkpoints that are the same but for noise.

    Args:
        points: number of checkpoints.
        values: returns the pseudo-values of what is tested.
    """
    for name, noise in NOISES.items():
        for units in options.units:
            random = np.random.default_rng(units)
            found = 0
            found_without_blocks = 0
            refused = 0
            for _ in range(options.series):
                mu = np.tile(random.normal(size=options.layers), (points, 1))
                by_unit = scores(random, noise, mu, units)
                p = tested(by_unit, values=values)
                plain = tested(by_unit, blocks=False, values=values)
                assert plain is not None
                found_without_blocks += bool((plain <= changes.LEVEL).any())
                if p is None:
                    refused += 1
                else:
                    found += bool((p <= changes.LEVEL).any())
            print(f"{name:30}{units:5} units {found:4} ({found_without_blocks:3}){refused:5} refused", flush=True)


def print_planted(options: argparse.Namespace) -> None:
    """Print how often a planted change is found, how close its size is, and what else is found."""
    print(f"Of {options.series} series with one planted change: found, error of its size, findings elsewhere")
    middle = options.points // 2
    for name in ("normal", "skewed"):
        for units in options.units:
            for size in SIZES:
                random = np.random.default_rng(units)
                error = np.sqrt(2 / units)
                found = 0
                other_layers = 0
                other_points = 0
                estimates = []
                for _ in range(options.series):
                    mu = np.tile(random.normal(size=options.layers), (options.points, 1))
                    mu[middle:, 0] += size * error
                    by_unit = scores(random, NOISES[name], mu, units)
                    p = tested(by_unit)
                    if p is None:
                        continue
                    is_changed = p <= changes.LEVEL
                    found += bool(is_changed[middle - 1, 0])
                    other_layers += bool(is_changed[middle - 1, 1:].any())
                    other_points += bool(np.delete(is_changed, middle - 1, axis=0).any())
                    true = size * error * (1 - 1 / options.layers)
                    estimates.append(changes.differences(by_unit.mean(axis=0))[middle - 1, 0] / true - 1)
                deviation = float(np.sqrt(np.square(estimates).mean())) if estimates else np.nan
                print(
                    f"{name:10}{units:5} units{size:5.0f} standard errors: {found / options.series:5.0%}"
                    f"{deviation:7.0%}{other_layers:5} other layers{other_points:5} other points",
                    flush=True,
                )


def print_seeds_planted(options: argparse.Namespace) -> None:
    """Print how often a planted difference of the last seed is found from all others, and what else is found."""
    print(
        f"Of {options.series} groups of {options.seeds} seeds, of which the last differs: found from one other seed, "
        "from all others; findings between the others, at other points"
    )
    values = values_of_seeds(options.seeds)
    middle = options.points // 2
    _, second = changes.seed_pairs(options.seeds)
    has_last = second == options.seeds - 1
    for units in options.units:
        for size in SIZES:
            random = np.random.default_rng(units)
            from_one = 0
            from_all = 0
            between_others = 0
            other_points = 0
            for _ in range(options.series):
                mu = np.tile(random.normal(size=options.layers), (options.seeds, options.points, 1))
                mu[-1, middle, 0] += size * np.sqrt(2 / units)
                p = tested(scores(random, normal, mu.reshape(-1, options.layers), units), values=values)
                if p is None:
                    continue
                differs = p <= changes.LEVEL
                from_one += bool(differs[has_last, middle, 0].any())
                from_all += bool(differs[has_last, middle, 0].all())
                between_others += bool(differs[~has_last].any())
                other_points += bool(np.delete(differs, middle, axis=1).any())
            print(
                f"{units:5} units{size:5.0f} standard errors: {from_one / options.series:5.0%}"
                f"{from_all / options.series:6.0%}{between_others:5} between others{other_points:5} other points",
                flush=True,
            )


def print_ranks(options: argparse.Namespace) -> None:
    """Print how often the ranks of two layers that exchange their scores are marked, and of layers that do not."""
    print(f"Of {options.series} series: marked ranks of two layers that exchange places; of one that leaves its equal")
    middle = options.points // 2
    for units in options.units:
        for size in SIZES:
            random = np.random.default_rng(units)
            distance = size * np.sqrt(2 * (SPREAD_OF_TEXT**2 + 1) / units)
            exchanged = 0
            wrong = 0
            for _ in range(options.series):
                # The other layers are far from the two.
                mu = np.tile(100 * np.arange(options.layers, dtype=float), (options.points, 1))
                mu[:, 1] = mu[:, 0]
                leaving = mu.copy()
                leaving[middle:, 0] += distance
                mu[:middle, 0] += distance
                mu[middle:, 1] += distance
                exchanged += bool(marked_ranks(scores(random, normal, mu, units))[middle - 1, :2].all())
                wrong += bool(marked_ranks(scores(random, normal, leaving, units)).any())
            print(
                f"{units:5} units, distance of {size:2.0f} standard errors: {exchanged / options.series:5.0%}"
                f"{wrong:5} wrong",
                flush=True,
            )


def marked_ranks(by_unit: Float64) -> changes.Bools:
    """Return the ranks that moved, bool[points - 1, layers], without blocks, which independent units do not need."""
    p = tested(by_unit, blocks=False)
    assert p is not None
    return changes.moved_ranks(by_unit.mean(axis=0), left_out(by_unit), p <= changes.LEVEL)


def print_correlations(options: argparse.Namespace) -> None:
    """Print how often the interval of the rank correlation of neighbours covers the true one."""
    print("Intervals of the rank correlation of neighbours: covers, too high, too low, none")
    for units in options.units:
        random = np.random.default_rng(units)
        covered = 0
        above = 0
        below = 0
        none = 0
        for _ in range(options.series):
            first = random.normal(size=options.layers)
            mu = np.stack([first, first + DRIFT * random.normal(size=options.layers)])
            by_unit = scores(random, normal, mu, units)
            true = changes.spearman_rows(mu[:1], mu[1:])[0]
            _, low, high = changes.neighbour_agreement(by_unit.mean(axis=0), left_out(by_unit))[:, 0]
            if np.isnan(low):
                none += 1
            elif true < low:
                above += 1
            elif true > high:
                below += 1
            else:
                covered += 1
        print(f"{units:5} units {covered:5}{above:5}{below:5}{none:5}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["changes", "seeds"], help="what is simulated: changes, seeds")
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--units", type=int, nargs="+", default=[MINIMUM_UNITS, 12, 16, 32, 64])
    parser.add_argument("--points", type=int, default=6)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if "changes" in options.parts:
        print_without_change(options)
        print_planted(options)
        print_ranks(options)
        print_correlations(options)
    if "seeds" in options.parts:
        print_seeds_alike(options)
        print_seeds_planted(options)


if __name__ == "__main__":
    main()
