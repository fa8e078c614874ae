"""Trainings that differ in the seed alone: what they share, and differences that are beyond the choice of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avss_dist.analysis.changes import MAX_LINES, ShardScores, limits_of_test, paired_scores
from avss_dist.analysis.comparison import CONDITIONS, condition
from avss_dist.analysis.curve import Curve
from avss_dist.core.errors import QueryError, first_names
from avss_dist.core.text import count_of, describe_count, describe_layers
from avss_dist.core.values import NewRow, TableRow
from avss_dist.read_requests import AXES
from avss_dist.stats import changes as change_stats
from avss_dist.stats.layer_stats import Float64, Int64
from avss_dist.stats.rankings import average_ranks, count_lowest, rank_lowest
from avss_dist.warehouse.reader import grouped

MINIMUM_SEEDS = 3  # from which on something is claimed about seeds
SHARED = (
    0.95  # share of resamples in which a layer is among the lowest of all seeds, from which on that is told as sure
)
MOST_NAMED = 5  # points that a message names
CAVEAT = (
    "Seeds that differ do so as these trained models, beyond the choice of text. What another seed would give is known "
    "only from how much these vary."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SeedDifferences:
    """Differences between seeds of a training at the same points, tested against the choice of text.

    ``differs`` holds with a probability of 95% for all layers, points and pairs of seeds together, for one score and
    one reading.

    Attributes:
        seeds: the seeds, in ascending order.
        layers: numbers of the layers.
        units: number of units that are left out and resampled: shards, or blocks of neighbouring shards.
        difference: score of the second seed of a pair minus that of the first, of AVSS of logarithms, each relative to
            the mean layer, float64[pairs, points, layers]. The pairs are in the order of `changes.seed_pairs`.
        p: its p-value, adjusted for the number of layers, points and pairs, float64[pairs, points, layers].
        differs: whether the score differs beyond the choice of text, bool[pairs, points, layers].
        lowest_in_all: whether a layer is among the lowest 25% of every seed, bool[points, layers].
        lowest_share: share of the joint resamples in which it is, float64[points, layers].
        notes: sentences about the limits of the test.
    """

    seeds: tuple[int, ...]
    layers: tuple[int, ...]
    units: int
    difference: Float64
    p: Float64
    differs: change_stats.Bools
    lowest_in_all: change_stats.Bools
    lowest_share: Float64
    notes: tuple[str, ...]

    @property
    def differing_seeds(self) -> Int64:
        """Number of other seeds from which the score of a layer differs, int64[seeds, points, layers]."""
        numbers = np.zeros((len(self.seeds), *self.differs.shape[1:]), np.int64)
        first, second = change_stats.seed_pairs(len(self.seeds))
        np.add.at(numbers, first, self.differs)
        np.add.at(numbers, second, self.differs)
        return numbers

    def sentences(self, points: Sequence[str]) -> list[str]:
        """Return what all seeds share and where they differ, and the notes, in sentences.

        Args:
            points: name of each point.
        """
        tested = f"{count_of(self.units, 'part')} of the text, 5% for all layers, points and pairs of seeds together"
        places = np.flatnonzero(self.differs.any(axis=(0, 2))).tolist()
        if not places:
            difference = (
                f"No two seeds differ beyond the choice of text ({tested}): the smallest adjusted p is "
                f"{self.p.min():.2g}."
            )
            return [self._shared(points[-1]), difference, *self.notes]
        sentences = [self._shared(points[-1]), f"Seeds differ beyond the choice of text ({tested}):"]
        for place in places[-MAX_LINES:]:
            sentences.append(f"{points[place]}: {self._describe(place)}.")
        if len(places) > MAX_LINES:
            sentences.append(f"So they do at {count_of(len(places) - MAX_LINES, 'earlier point')}: see the table.")
        return [*sentences, *self.notes]

    def _shared(self, point: str) -> str:
        """Return which layers are among the lowest 25% of all seeds at the last point, in a sentence."""
        shared = np.flatnonzero(self.lowest_in_all[-1])
        if not shared.size:
            return f"No layer is among the lowest 25% of all {len(self.seeds)} seeds at {point}."
        surely = shared[self.lowest_share[-1, shared] >= SHARED]
        of_resamples = f"in {SHARED:.0%} of the joint resamples of the text: {self._names(surely) or 'none'}"
        return f"Among the lowest 25% of all {len(self.seeds)} seeds at {point}: {self._names(shared)}; {of_resamples}."

    def _describe(self, place: int) -> str:
        """Return the layers in which seeds differ at a point, and the largest difference among them."""
        differs = self.differs[:, place]
        sizes = np.where(differs, np.abs(self.difference[:, place]), 0.0)
        pair, column = np.unravel_index(int(np.argmax(sizes)), sizes.shape)
        first, second = change_stats.seed_pairs(len(self.seeds))
        seeds = f"seeds {self.seeds[first[pair]]} and {self.seeds[second[pair]]}"
        value = self.difference[pair, place, column]
        p = self.p[pair, place, column]
        layers = self._names(np.flatnonzero(differs.any(axis=0)))
        return f"layers {layers}; most {seeds} in layer {self.layers[column]} ({value:+.2f}, p {p:.2g})"

    def _names(self, columns: Int64) -> str:
        return describe_layers([self.layers[column] for column in columns])


@dataclass(frozen=True, kw_only=True, eq=False)
class SeedCurves:
    """Curves of trainings that differ in the seed alone, at the points that all of them have.

    Attributes:
        along: name of the axis, of `AXES`.
        name: name of the group, and the conditions of its runs.
        curves: curve of each seed, in ascending order of the seeds.
        places: places of the common points on the axis, in ascending order.
        differences: differences between seeds that are beyond the choice of text; None if nothing is claimed.
        no_claim: the reason why nothing is claimed; empty if it is.
        notes: sentences about points that a seed lacks.
    """

    along: str
    name: str
    curves: Sequence[Curve]
    places: Sequence[int]
    differences: SeedDifferences | None = None
    no_claim: str = ""
    notes: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """The seeds, in ascending order."""
        return [curve.seeds[0] for curve in self.curves]

    @property
    def points(self) -> list[str]:
        """Name of each common point, such as ``1,000``."""
        return [describe_count(place) for place in self.places]

    @property
    def layers(self) -> Sequence[int]:
        """Numbers of the layers."""
        return self.curves[0].layers

    def runs(self) -> list[TableRow]:
        """Return the rows of ``runs`` at the common points, seed by seed."""
        runs: list[TableRow] = []
        for curve in self.curves:
            runs += [curve.runs[place] for place in self._places_in(curve)]
        return runs

    @property
    def values(self) -> Float64:
        """The score at the common points, float64[seeds, points, layers]."""
        return np.array([curve.values[self._places_in(curve)] for curve in self.curves])

    @property
    def ranks(self) -> Float64:
        """Ranks of the layers, float64[seeds, points, layers]: 1 for the lowest, tied ones get their mean."""
        return average_ranks(self.values)

    @property
    def mean_rank(self) -> Float64:
        """Mean over seeds of the rank, float64[points, layers]."""
        mean: Float64 = self.ranks.mean(axis=0)
        return mean

    @property
    def rank_spread(self) -> Float64:
        """Standard deviation over seeds of the rank, float64[points, layers]."""
        spread: Float64 = self.ranks.std(axis=0, ddof=1)
        return spread

    @property
    def share_lowest(self) -> Float64:
        """Share of the seeds in which a layer is among the lowest 25%, float64[points, layers]."""
        is_lowest = rank_lowest(self.values) <= count_lowest(len(self.layers))
        share: Float64 = is_lowest.mean(axis=0)
        return share

    def columns(self) -> dict[tuple[str, int], NewRow]:
        """Return the columns of `curve.SCHEMA` about seeds, by run id and layer."""
        mean_rank = self.mean_rank.tolist()
        spread = self.rank_spread.tolist()
        share = self.share_lowest.tolist()
        differing = self._differing_seeds()
        columns: dict[tuple[str, int], NewRow] = {}
        for seed, curve in zip(self.seeds, self.curves, strict=True):
            for place, run_place in enumerate(self._places_in(curve)):
                for column, layer in enumerate(self.layers):
                    columns[curve.runs[run_place]["run_id"], layer] = {
                        "seed_group": self.name,
                        "mean_rank": mean_rank[place][column],
                        "rank_spread": spread[place][column],
                        "share_lowest": share[place][column],
                        "differing_seeds": differing.get((seed, place, layer)),
                        "seeds_no_claim": self.no_claim or None,
                    }
        return columns

    def _differing_seeds(self) -> dict[tuple[int, int, int], int]:
        """Return the number of other seeds from which a score differs, by seed, place of a point, and layer."""
        numbers: dict[tuple[int, int, int], int] = {}
        if self.differences is None:
            return numbers
        for seed, by_point in zip(self.seeds, self.differences.differing_seeds.tolist(), strict=True):
            for place, by_layer in enumerate(by_point):
                for layer, number in zip(self.differences.layers, by_layer, strict=True):
                    numbers[seed, place, layer] = number
        return numbers

    def sentences(self) -> list[str]:
        """Return what seeds share, where they differ, or why nothing is claimed, in sentences."""
        if self.differences is None:
            return [*self.notes, f"Nothing is claimed about seeds. {self.no_claim}"]
        shared, *others = self.differences.sentences(self.points)
        return [*self.notes, shared, *self._shared_changes(), *others]

    def _shared_changes(self) -> list[str]:
        """Return which changes between neighbouring points are those of all seeds, in sentences."""
        changes_of_seeds = [curve.changes for curve in self.curves]
        if any(changes is None for changes in changes_of_seeds):
            return ["Changes are not compared: they were not tested in every seed."]
        sentences = []
        for before, after in zip(self.places, self.places[1:], strict=False):
            rising = self._changed_in_all(before, after, 1)
            falling = self._changed_in_all(before, after, -1)
            parts = []
            if rising:
                parts.append(f"up {describe_layers(rising)}")
            if falling:
                parts.append(f"down {describe_layers(falling)}")
            if parts:
                sentences.append(f"{describe_count(before)} to {describe_count(after)}: {', '.join(parts)}")
        if not sentences:
            return ["No layer changed between the same points in all seeds beyond the choice of text."]
        return [f"Changed in all seeds beyond the choice of text: {first_names(sentences, MAX_LINES, '; ')}."]

    def _changed_in_all(self, before: int, after: int, sign: int) -> list[int]:
        """Return the layers that changed in every seed between two points, upwards (1) or downwards (-1).

        There are none if some seed has a point between the two.
        """
        changed: set[int] | None = None
        for curve in self.curves:
            place = curve.places.index(before)
            if curve.changes is None or curve.places[place + 1] != after:
                return []
            is_changed = curve.changes.is_changed[place] & (np.sign(curve.changes.change[place]) == sign)
            layers = {curve.changes.layers[column] for column in np.flatnonzero(is_changed)}
            changed = layers if changed is None else changed & layers
        return sorted(changed or ())

    def _places_in(self, curve: Curve) -> list[int]:
        """Return the indices of the common points in a curve."""
        index_of_place = {place: index for index, place in enumerate(curve.places)}
        return [index_of_place[place] for place in self.places]


def join_seeds(curves: Sequence[Curve], *, allow_mismatch: bool) -> tuple[list[SeedCurves], list[str]]:
    """Return the groups of curves that differ in the seed alone, without claims, and why others are no group.

    Args:
        allow_mismatch: also join curves under different conditions.
    """
    groups = []
    problems = []
    with_seed = [curve for curve in curves if curve.seed is not None]
    by_group = grouped(with_seed, lambda curve: _group_key(curve, allow_mismatch))
    for members in by_group.values():
        if len(members) == 1:
            continue
        members = sorted(members, key=lambda curve: curve.seeds)
        name = _group_name(members, curves)
        problem = _why_no_group(members)
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        common = set.intersection(*(set(curve.places) for curve in members))
        notes = tuple(_missing_points(members, common))
        groups.append(SeedCurves(along=members[0].along, name=name, curves=members, places=sorted(common), notes=notes))
    return groups, problems


def _group_key(curve: Curve, allow_mismatch: bool) -> tuple[object, ...]:
    """Return a key that curves have in common if they differ in the seed alone."""
    run = curve.runs[0]
    key = [_seed_group(curve)]
    if not allow_mismatch:
        key += [condition(run, name) for name in CONDITIONS if name != AXES[curve.along]]
    return tuple(key)


def _seed_group(curve: Curve) -> object:
    """Return the group of seeds of a curve. Runs of earlier versions may have none."""
    for run in curve.runs:
        if run["seed_group"] is not None:
            return run["seed_group"]
    return None


def _group_name(members: Sequence[Curve], curves: Sequence[Curve]) -> str:
    """Return the name of a group: that of its seeds, with the conditions that are in the names of its curves."""
    first = members[0]
    series = str(first.runs[0]["series"])
    return str(_seed_group(first)) + first.name.removeprefix(series)


def _why_no_group(members: Sequence[Curve]) -> str:
    """Return the reason why curves of different seeds cannot be joined; empty if they can."""
    curve_of_seed: dict[int, Curve] = {}
    for curve in members:
        other = curve_of_seed.setdefault(curve.seeds[0], curve)
        if other is not curve:
            return (
                f"seed {curve.seeds[0]} is there twice, {other.name} and {curve.name}. Choose one of them with `run`."
            )
    if len({tuple(curve.layers) for curve in members}) > 1:
        numbers = sorted({str(len(curve.layers)) for curve in members})
        return f"the seeds have different numbers of layers ({', '.join(numbers)})."
    if not set.intersection(*(set(curve.places) for curve in members)):
        return "the seeds have no point in common."
    return ""


def _missing_points(members: Sequence[Curve], common: set[int]) -> list[str]:
    """Return which points are left out, as some seed lacks them, in sentences."""
    every_place = set().union(*(curve.places for curve in members))
    sentences = []
    for curve in members:
        lacking = [describe_count(place) for place in sorted(every_place - set(curve.places))]
        if lacking:
            sentences.append(f"Seed {curve.seeds[0]} lacks {first_names(lacking, MOST_NAMED)}.")
    if sentences:
        sentences.append(f"Seeds are compared at the {count_of(len(common), 'point')} that all of them have.")
    return sentences


def require_seeds(seeds: SeedCurves) -> None:
    """Raise QueryError if there are fewer seeds than a claim needs."""
    if len(seeds.curves) < MINIMUM_SEEDS:
        raise QueryError(
            f"There are {len(seeds.curves)} seeds, and {MINIMUM_SEEDS} are needed to tell what seeds share from chance."
        )


def seed_differences(scores: ShardScores, seeds: SeedCurves) -> SeedDifferences:
    """Test which layers differ between seeds at the same points beyond the choice of text.

    Args:
        scores: scores of the runs.

    Raises:
        QueryError: nothing can be claimed. The message says why: there are too few seeds, the runs read different rows,
            or have too few shards.
    """
    require_seeds(seeds)
    shape = (len(seeds.curves), len(seeds.places))

    def values(theta: Float64, left_out: Float64) -> Float64:
        return change_stats.seed_values(
            theta.reshape(*shape, -1), left_out.reshape(len(left_out), *shape, left_out.shape[-1])
        )

    paired = paired_scores(scores, seeds.runs(), values)
    weighted = paired.weighted
    theta = weighted.theta.reshape(*shape, -1)
    resamples = weighted.resamples.reshape(len(weighted.resamples), *shape, theta.shape[-1])
    p = change_stats.adjusted_p(paired.pseudo)
    differs = p <= change_stats.LEVEL
    return SeedDifferences(
        seeds=tuple(seeds.seeds),
        layers=weighted.layers,
        units=len(paired.pseudo),
        difference=change_stats.seed_differences(theta),
        p=p,
        differs=differs,
        lowest_in_all=change_stats.lowest_in_all(theta),
        lowest_share=change_stats.lowest_in_all(resamples).mean(axis=0),
        notes=(*paired.notes, *limits_of_test(paired, differs, "difference"), CAVEAT),
    )
