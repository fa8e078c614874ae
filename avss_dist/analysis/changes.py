"""Changes of layers between neighbouring checkpoints of a training that are beyond the choice of text.

The checkpoints read the same rows, so the shards of their runs are paired: `stats.changes` leaves out and resamples the
same rows in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from avss_dist.analysis.comparison import CONDITIONS, differing
from avss_dist.core.errors import QueryError, first_names
from avss_dist.core.text import count_of, describe_count, describe_layers
from avss_dist.core.values import TableRow
from avss_dist.stats import changes as change_stats
from avss_dist.stats.catalog import FROM_ACTIVATIONS, is_own
from avss_dist.stats.intervals import MINIMUM_UNITS, bootstrap_weights, left_out_weights, why_no_interval
from avss_dist.stats.layer_stats import Float64, Int64, LayerStats, ShardResult
from avss_dist.stats.rankings import MIN_VALUES
from avss_dist.stats.scores import SiteTable, Threshold, avss, weighted_baseline
from avss_dist.warehouse.reader import Warehouse

SHAPE = ("architecture", "num_layers", "hidden_size")
"""Columns of ``runs`` in which checkpoints of one training are equal."""
ROWS = ("shuffle_seed", "chat_template", "num_sequences", "num_tokens")
"""Columns of ``runs`` that decide which rows are read, besides the conditions of a comparison."""
MOST_NAMED = 3  # values that a message names
CAVEAT = (
    "A change is that of a layer relative to the mean layer. It is beyond the choice of text, which says nothing of "
    "another seed of the training."
)
COMPUTATION = ("device", "attention_implementation", "quantization")
"""Columns of ``runs`` that change numbers by rounding."""
SMALL_UNIT = 0.5  # tokens of a last unit, relative to the median, below which it is joined to the one before
MAX_LINES = 6  # points whose changes are told; the table has all


@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesChanges:
    """Changes of layers between neighbouring checkpoints of a training, tested against the choice of text.

    ``is_changed`` holds with a probability of 95% for all layers and points together, for one score and one reading.

    Attributes:
        layers: numbers of the layers.
        units: number of units that are left out and resampled: shards, or blocks of neighbouring shards.
        change: change of each layer's score, of AVSS its logarithm, relative to the mean layer, after each point but
            the last, float64[points - 1, layers].
        p: its p-value, adjusted for the number of layers and points, float64[points - 1, layers].
        is_changed: whether the score changed beyond the choice of text, bool[points - 1, layers].
        rank_moved: whether the rank moved, too: the score changed, and the layer passed another one from which it
            differs at both points. bool[points - 1, layers].
        agreement: Spearman's correlation of neighbouring points, and the ends of its interval, float64[3, points - 1].
        lowest_as_last: share of the joint resamples in which the lowest 25% are those of the last point from each point
            on, float64[points].
        notes: sentences about the limits of the test.
    """

    layers: tuple[int, ...]
    units: int
    change: Float64
    p: Float64
    is_changed: change_stats.Bools
    rank_moved: change_stats.Bools
    agreement: Float64
    lowest_as_last: Float64
    notes: tuple[str, ...]

    def sentences(self, points: Sequence[str]) -> list[str]:
        """Return which layers changed between which points, and the notes, in sentences.

        Args:
            points: name of each point.
        """
        places = np.flatnonzero(self.is_changed.any(axis=1)).tolist()
        tested = f"{count_of(self.units, 'part')} of the text, 5% for all layers and points together"
        if not places:
            return [
                f"No layer changed between neighbouring points beyond the choice of text ({tested}): the smallest "
                f"adjusted p is {self.p.min():.2g}.",
                *self.notes,
            ]
        sentences = [f"Changed beyond the choice of text ({tested}):"]
        for place in places[:MAX_LINES]:
            sentences.append(f"{points[place]} to {points[place + 1]}: {self._describe(place)}.")
        if len(places) > MAX_LINES:
            sentences.append(f"So did layers after {count_of(len(places) - MAX_LINES, 'other point')}: see the table.")
        return [*sentences, *self.notes]

    def _describe(self, place: int) -> str:
        """Return which layers changed after a point, the largest change among them, and which ranks moved."""
        sizes = np.where(self.is_changed[place], np.abs(self.change[place]), 0.0)
        largest = int(np.argmax(sizes))
        text = (
            f"layers {self.changed_layers(place)}, most layer {self.layers[largest]} "
            f"({self.change[place, largest]:+.3g}, p {self.p[place, largest]:.2g})"
        )
        if self.rank_moved[place].any():
            text += f"; in rank {self.moved_layers(place)}"
        return text

    def changed_layers(self, place: int) -> str:
        """Return the layers whose score changed after a point, as text."""
        return self._numbers(self.is_changed[place])

    def moved_layers(self, place: int) -> str:
        """Return the layers whose rank moved after a point, as text."""
        return self._numbers(self.rank_moved[place])

    def _numbers(self, selected: change_stats.Bools) -> str:
        return describe_layers([self.layers[column] for column in np.flatnonzero(selected)])


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The score whose changes are tested.

    Attributes:
        site, recipe, threshold: reading of AVSS.
        score: one of `FROM_ACTIVATIONS`.
    """

    site: str
    recipe: str
    threshold: Threshold
    score: str

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites whose statistics the score is computed from."""
        if self.score == FROM_ACTIVATIONS[0]:
            return (self.site,)
        return ("block", "update")


class ShardScores:
    """Scores of runs, computed from their shards. The shards of a run are read once for one division of the text.

    Args:
        warehouse: warehouse of the runs.
        reading: the score.
    """

    def __init__(self, warehouse: Warehouse, reading: Reading) -> None:
        self.warehouse = warehouse
        self.reading = reading
        self._scores: dict[tuple[str, bytes], dict[int, Float64]] = {}

    def of_run(self, run: TableRow, block_of_shard: Int64) -> dict[int, Float64]:
        """Return the score of each layer, of AVSS its logarithm, for each row of `_weights`: float64[weights].

        Args:
            block_of_shard: block of each shard, int64[shards]. Blocks are left out and resampled.

        Raises:
            QueryError: shards are missing, or the run lacks the site or the recipe.
        """
        key = (run["run_id"], block_of_shard.tobytes())
        if key not in self._scores:
            weights = _weights(int(block_of_shard[-1]) + 1)[:, block_of_shard]
            self._scores[key] = _scores_of_run(self.warehouse, run, self.reading, weights)
        return self._scores[key]


def _weights(blocks: int) -> Float64:
    """Return the weights of blocks: of all text, without each block, and of resamples. float64[weights, blocks]."""
    return np.vstack([np.ones((1, blocks)), left_out_weights(blocks), bootstrap_weights(blocks)])


def series_changes(scores: ShardScores, runs: Sequence[TableRow]) -> SeriesChanges:
    """Test which layers changed between neighbouring checkpoints of a training beyond the choice of text.

    Args:
        scores: scores of the runs.
        runs: rows of ``runs`` of the checkpoints, extended by `comparison.with_conditions`, in the order of training.

    Raises:
        QueryError: nothing can be claimed. The message says why: the runs are not of one training, read different rows,
            or have too few shards.
    """
    require_series(runs)
    return _tested(paired_scores(scores, runs, change_stats.change_values))


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedScores:
    """Scores of runs on parts of the text that are the same in all of them, with the pseudo-values of a test.

    Attributes:
        weighted: scores of the layers that have one in all runs.
        pseudo: pseudo-values of what is tested, float64[units, ...].
        notes: sentences about the units.
    """

    weighted: WeightedScores
    pseudo: Float64
    notes: tuple[str, ...]


def paired_scores(
    scores: ShardScores, runs: Sequence[TableRow], values: Callable[[Float64, Float64], Float64]
) -> PairedScores:
    """Return the scores of runs on units of the text that are about independent.

    Args:
        runs: rows of ``runs``, extended by `comparison.with_conditions`.
        values: returns the pseudo-values of a test, float64[units, ...], for theta and the values without each unit.

    Raises:
        QueryError: the runs read different rows, or have too few shards.
    """
    if is_own(scores.reading.score):
        raise QueryError("A score of your own has no shards, so that the noise of the text is not known.")
    require_same_rows(runs)
    _require_counted_alike(runs, scores.reading)
    unit_of_shard = _common_units(scores.warehouse, runs)
    units = int(unit_of_shard[0][-1]) + 1
    weighted = _weighted_scores(scores, runs, unit_of_shard, change_stats.block_of_units(units, 1))
    pseudo = values(weighted.theta, weighted.left_out)
    size = change_stats.independent_block_size(pseudo)
    if size is None:
        raise QueryError(
            f"Neighbouring shards are alike, also in blocks of which there are {MINIMUM_UNITS} or more, so that the "
            "noise of the text is not known.",
            "Score a longer text, or its rows in a random order: avss score --shuffle-seed 0.",
        )
    notes = []
    if len({run["num_shards"] for run in runs}) > 1:
        notes.append(f"The runs divide the text differently: shards were merged to {count_of(units, 'part')}.")
    computed_otherwise = differing(runs, COMPUTATION)
    if computed_otherwise:
        values_of_runs = _values_of(runs, computed_otherwise)
        notes.append(f"The runs differ in {values_of_runs}: what this does to rounding counts as a change.")
    if size > 1:
        block = change_stats.block_of_units(units, size)
        weighted = _weighted_scores(scores, runs, unit_of_shard, block)
        pseudo = values(weighted.theta, weighted.left_out)
        notes.append(f"Neighbouring shards are alike, so that these parts are blocks of {size} or more of them.")
    return PairedScores(weighted=weighted, pseudo=pseudo, notes=tuple(notes))


def require_series(runs: Sequence[TableRow]) -> None:
    """Raise QueryError unless runs are of different steps of one training.

    Args:
        runs: rows of ``runs``, extended by `comparison.with_conditions`.
    """
    trainings = sorted({str(run["series"]) for run in runs})
    if len(trainings) > 1:
        raise QueryError(
            f"The runs are of {len(trainings)} trainings: {first_names(trainings, MOST_NAMED)}.",
            "Choose the runs of one of them with `run`.",
        )
    seeds = sorted({run["seed"] for run in runs if run["seed"] is not None})
    if len(seeds) > 1:
        names = [str(seed) for seed in seeds]
        raise QueryError(
            f"The runs are of {len(seeds)} seeds, and in one series: {first_names(names, MOST_NAMED)}.",
            "Choose the runs of one of them with `run`.",
        )
    run_of_place: dict[object, str] = {}
    for run in runs:
        place = (run["training_step"], run["training_tokens"])
        if place in run_of_place:
            raise QueryError(
                f"Step {describe_count(run['training_step'])} is there twice: runs {run_of_place[place]} and "
                f"{run['run_id']}.",
                "Choose one of them with `run`.",
            )
        run_of_place[place] = run["run_id"]


def require_same_rows(runs: Sequence[TableRow]) -> None:
    """Raise QueryError unless checkpoints have one shape, and can have read the same rows, in enough shards.

    Args:
        runs: rows of ``runs``, extended by `comparison.with_conditions`.
    """
    shapes = differing(runs, SHAPE)
    if shapes:
        raise QueryError(f"The checkpoints have different shapes: {_values_of(runs, shapes)}.")
    conditions = differing(runs, (*CONDITIONS, *ROWS))
    if conditions:
        raise QueryError(
            f"The runs did not read the same rows in the same way: {_values_of(runs, conditions)}.",
            "Score them with the same text and settings.",
        )
    fewest = min(run["num_shards"] or 0 for run in runs)
    too_few = why_no_interval(fewest)
    if too_few:
        raise QueryError(too_few)


def _require_counted_alike(runs: Sequence[TableRow], reading: Reading) -> None:
    """Raise QueryError if some runs counted the elements below an absolute threshold, and others interpolate them."""
    threshold = reading.threshold
    if reading.score != FROM_ACTIVATIONS[0] or threshold.kind != "absolute":
        return
    counted = {threshold.value in (run["thresholds"] or ()) for run in runs}
    if len(counted) > 1:
        raise QueryError(
            f"Some of the runs counted the elements below {threshold.value:g}, and others did not.",
            "Choose a threshold that all of them counted.",
        )


def _values_of(runs: Sequence[TableRow], names: Sequence[str]) -> str:
    """Return the different values of columns of runs, as text."""
    texts = []
    for name in names:
        values = sorted({str(run[name]) for run in runs})
        if len(values) == 1:  # texts of the same name
            values.append("another of this name")
        texts.append(f"{name} ({first_names(values, MOST_NAMED)})")
    return "; ".join(texts)


def _common_units(warehouse: Warehouse, runs: Sequence[TableRow]) -> list[Int64]:
    """Return the unit of each shard, int64[shards] for each run, so that a unit has the same rows in all runs.

    Shards that are cut alike are units. Others are merged to the boundaries that all runs have. A last unit that is
    small is joined to the one before.

    Raises:
        QueryError: shards have other tokens, have fewer than `MINIMUM_UNITS` common boundaries, or are missing.
    """
    fingerprints = {run["tokens_fingerprint"] for run in runs}
    read = runs
    if len(fingerprints) == 1 and None not in fingerprints:
        read = runs[:1]
    cuts = [_read_cut(warehouse, run) for run in read]
    ends = cuts[0].ends
    for cut in cuts[1:]:
        ends = np.intersect1d(ends, cut.ends)
    for run, cut in zip(read, cuts, strict=True):
        if cut.ends[-1] != cuts[0].ends[-1] or not _has_equal_shards(cut, cuts[0]):
            raise QueryError(
                f"The runs {runs[0]['run_id']} and {run['run_id']} did not read the same tokens.",
                "Score them with the same text, tokenizer and settings.",
            )
    sizes = np.diff(ends, prepend=0)
    if len(sizes) > 1 and sizes[-1] < SMALL_UNIT * np.median(sizes):
        ends = np.delete(ends, -2)
    if len(ends) < MINIMUM_UNITS:
        raise QueryError(
            f"The shards of the runs have {count_of(len(ends), 'common part')} of about equal size, and "
            f"{MINIMUM_UNITS} are needed.",
            "Score them with the same number of rows in a shard (avss score --sequences-per-shard), or a longer text.",
        )
    units = [np.searchsorted(ends, cut.ends).astype(np.int64) for cut in cuts]
    if len(units) < len(runs):
        return units * len(runs)
    return units


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut:
    """Division of the rows of a run into shards.

    Attributes:
        ends: number of tokens up to the end of each shard, int64[shards].
        hashes: hash of the tokens of each shard.
    """

    ends: Int64
    hashes: Sequence[str]


def _read_cut(warehouse: Warehouse, run: TableRow) -> _Cut:
    shards = _read_shards(warehouse, run, ())
    tokens = np.array([shard.num_tokens for shard in shards], np.int64)
    return _Cut(ends=np.cumsum(tokens), hashes=[shard.content_hash for shard in shards])


def _has_equal_shards(cut: _Cut, other: _Cut) -> bool:
    """Whether shards with the same first and last token in two divisions have the same content."""
    hashes = dict(zip(_spans(other), other.hashes, strict=True))
    for span, content in zip(_spans(cut), cut.hashes, strict=True):
        if hashes.get(span, content) != content:
            return False
    return True


def _spans(cut: _Cut) -> list[tuple[int, int]]:
    """Return the number of tokens before and up to the end of each shard."""
    starts = [0, *cut.ends[:-1].tolist()]
    return list(zip(starts, cut.ends.tolist(), strict=True))


def _read_shards(warehouse: Warehouse, run: TableRow, sites: Sequence[str]) -> list[ShardResult]:
    """Return the shards of a run with the statistics of some sites.

    Raises:
        QueryError: one is missing or damaged.
    """
    shards = warehouse.read_partials(run, sites)
    if not shards:
        raise QueryError(
            f"Shards of run {run['run_id']} are missing or damaged, so that the noise of the text is not known.",
            "avss score --fresh measures it again.",
        )
    return shards


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedScores:
    """Scores of the layers that have one in all runs, also without each unit and of resamples.

    Attributes:
        layers: numbers of the layers.
        theta: float64[runs, layers].
        left_out: float64[units, runs, layers].
        resamples: float64[resamples, runs, layers].
        excluded: numbers of the layers that lack a score.
    """

    layers: tuple[int, ...]
    theta: Float64
    left_out: Float64
    resamples: Float64
    excluded: tuple[int, ...]


def _weighted_scores(
    scores: ShardScores,
    runs: Sequence[TableRow],
    unit_of_shard: Sequence[Int64],
    block_of_unit: Int64,
) -> WeightedScores:
    """Read the shards of all runs, one run after the other, and return their scores.

    Args:
        unit_of_shard: as returned by `_common_units`.
        block_of_unit: block of each unit, int64[units]. Blocks are left out and resampled.

    Raises:
        QueryError: shards are missing, or fewer than `MIN_VALUES` layers have a score at all points.
    """
    blocks = int(block_of_unit[-1]) + 1
    by_run = []
    for run, units in zip(runs, unit_of_shard, strict=True):
        by_run.append(scores.of_run(run, block_of_unit[units]))
    layers = sorted(set.intersection(*(set(of_run) for of_run in by_run)))
    theta = np.array([[of_run[layer] for layer in layers] for of_run in by_run])
    values = theta.transpose(2, 0, 1)
    has_score = np.isfinite(values).all(axis=(0, 1))
    chosen = [layer for layer, is_finite in zip(layers, has_score, strict=True) if is_finite]
    if len(chosen) < MIN_VALUES:
        raise QueryError(
            f"{count_of(len(chosen), 'layer')} have this score in all parts of the text at all points, and "
            f"{MIN_VALUES} are needed."
        )
    values = values[:, :, has_score]
    return WeightedScores(
        layers=tuple(chosen),
        theta=values[0],
        left_out=values[1 : 1 + blocks],
        resamples=values[1 + blocks :],
        excluded=tuple(sorted(set().union(*by_run) - set(chosen))),
    )


def _scores_of_run(warehouse: Warehouse, run: TableRow, reading: Reading, weights: Float64) -> dict[int, Float64]:
    """Return the score of each layer of a run, of AVSS its logarithm, for each row of weights: float64[weights].

    Args:
        weights: float64[weights, shards].

    Raises:
        QueryError: shards are missing, or the run lacks the site or the recipe.
    """
    merged = warehouse.read_layer_stats(run["run_id"])
    shards = [shard.stats for shard in _read_shards(warehouse, run, reading.sites)]
    main_site = reading.sites[0]
    layers = sorted(layer for layer, site in merged if site == main_site)
    if not layers:
        raise QueryError(f"Run {run['run_id']} has no statistics of the site '{main_site}'.")

    def table(site: str) -> SiteTable:
        empty = LayerStats.zero(merged[layers[0], main_site].thresholds)
        by_shard = []
        for stats in shards:
            by_shard.append([stats.get((layer, site), empty) for layer in layers])
        of_run = [merged.get((layer, site), empty) for layer in layers]
        return SiteTable(of_run, by_shard, [reading.threshold], weights)

    if reading.score == FROM_ACTIVATIONS[0]:
        site_table = table(main_site)
        if reading.recipe not in site_table.recipes():
            raise QueryError(f"The site has no statistics for the recipe '{reading.recipe}'.")
        parts = site_table.parts(reading.recipe, reading.threshold).weighted
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = np.log(avss(*parts, smoothed=True))
    else:
        scores = weighted_baseline(reading.score, table("block"), table("update"))
    return dict(zip(layers, scores.T, strict=True))


def _tested(paired: PairedScores) -> SeriesChanges:
    """Return the changes of scores.

    Args:
        paired: scores with the pseudo-values of the changes, float64[units, points - 1, layers].
    """
    weighted = paired.weighted
    p = change_stats.adjusted_p(paired.pseudo)
    is_changed = p <= change_stats.LEVEL
    return SeriesChanges(
        layers=weighted.layers,
        units=len(paired.pseudo),
        change=change_stats.differences(weighted.theta),
        p=p,
        is_changed=is_changed,
        rank_moved=change_stats.moved_ranks(weighted.theta, weighted.left_out, is_changed),
        agreement=change_stats.neighbour_agreement(weighted.theta, weighted.left_out),
        lowest_as_last=change_stats.lowest_as_last(weighted.resamples),
        notes=(*paired.notes, *limits_of_test(paired, is_changed, "change"), CAVEAT),
    )


def limits_of_test(paired: PairedScores, is_found: change_stats.Bools, noun: str) -> Iterator[str]:
    """Yield sentences about the limits of a test.

    Args:
        is_found: findings, in the shape of the pseudo-values of a unit.
        noun: noun for a finding.
    """
    units = len(paired.pseudo)
    if units <= change_stats.ALL_SIGNS:
        smallest_p = change_stats.smallest_p(units)
        yield f"{count_of(units, 'part')} of the text give no p below 1/{1 / smallest_p:,.0f}."
    is_skewed = is_found & (np.abs(change_stats.skewness(paired.pseudo)) > change_stats.SKEWED)
    if is_skewed.any():
        yield (
            f"The shards of {count_of(int(is_skewed.sum()), noun)} among {int(is_found.sum()):,} are skewed "
            f"(beyond {change_stats.SKEWED:g}): there p is a rough number."
        )
    if paired.weighted.excluded:
        yield f"Layers without this score in a part of the text: {describe_layers(paired.weighted.excluded)}."
