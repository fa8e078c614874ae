"""Selection of layers, and of routed experts, by a score of each, for plans and experiments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

import numpy as np

from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import Expert
from avss_dist.core.validation import Count, OneOf, Positive, Share, checked
from avss_dist.plans.criteria import BlockValues, Criterion, CriterionValues, Layers, Reading
from avss_dist.plans.pattern import Pattern
from avss_dist.stats.catalog import BLOCK_DISTANCE, CONTRAST, GREEDY, LOWEST_SHARE, RANDOM, SCORES, is_own
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import count_lowest, rank_lowest

COMPARED_EXPERTS = 2
"""Number of experts of each group by whose sum routers compare groups (DeepSeek-V3). A group needs as many."""


ADDITIVE = ("loss", "shapley", "taylor", "predicted", "damage")
"""Scores whose sum over a set of layers says something about it: nats, and mean ranks."""


class PlanError(ConfigError):
    """Error of a plan that cannot be made, read, or applied to a model."""


@checked
class Choice:
    """Request to choose layers.

    Raises:
        ConfigError: values out of their range, or that exclude each other.
    """

    by: Annotated[str, OneOf((*SCORES, CONTRAST), accepts=is_own)]
    """The score. There is no default: which one to trust is the user's decision."""
    reading: Reading | None = None
    """Reading of AVSS: site, recipe, threshold and its kind; the first stored one by default."""
    share: Share | None = None
    """Drop the lowest share of the layers; a quarter by default."""
    count: Positive | None = None
    """Number of layers to drop, in place of a share."""
    first: Count = 0
    """Layers at the start that are never dropped."""
    last: Count = 0
    """Layers at the end that are never dropped."""
    highest: bool = False
    """Drop the highest instead of the lowest."""
    seed: Count = 0
    """Seed of a random choice."""
    keep_pattern: bool = False
    """Choose only layers after which programs that go by the place of a layer read the others as they are."""

    def __post_init__(self) -> None:
        problems = []
        if self.share is not None and self.count is not None:
            problems.append(ConfigError("`share` and `count` are mutually exclusive.", "Keep one of them."))
        if self.highest and self.by in (BLOCK_DISTANCE, GREEDY):
            problems.append(ConfigError(f"`by` {self.by} chooses among sets of layers.", "Leave out `highest`."))
        if problems:
            raise ConfigError.combine(problems)

    @property
    def criterion(self) -> Criterion:
        """Criterion by which the layers are chosen."""
        return Criterion(by=self.by, reading=self.reading, seed=self.seed if self.by == RANDOM else 0)

    def choose(self, values: CriterionValues, num_layers: int, pattern: Pattern | None = None) -> Layers:
        """Return the layers to drop, ascending, by the values of the criterion.

        Args:
            num_layers: number of layers of the model.
            pattern: kinds of layers that the choice keeps where they are derived, if it does.

        Raises:
            PlanError: see `drop` and `drop_block`; or no set of so many layers keeps the pattern.
        """
        if self.keep_pattern:
            assert pattern is not None
            return self._choose_in_pattern(values, num_layers, pattern)
        if isinstance(values, BlockValues):
            return self.drop_block(values.values, num_layers)
        return self.drop(values.by_layer(num_layers))

    def _choose_in_pattern(self, values: CriterionValues, num_layers: int, pattern: Pattern) -> Layers:
        """Return the layers to drop after which the others keep a pattern.

        If the choice without the pattern keeps it, it is the choice. Else it is the set with the least sum: of the
        values themselves where these add up, of the ranks of others, as sums of AVSS mean nothing.
        """
        number = self.number(num_layers)
        candidates = self.unprotected(num_layers)
        require_pattern_size(pattern, number, candidates)
        if isinstance(values, BlockValues):
            return self._block_in_pattern(values.values, num_layers, pattern)
        scores = values.by_layer(num_layers)
        dropped: Layers | None
        if self.by == RANDOM:
            dropped = pattern.draw(number, candidates, self.seed)
        else:
            dropped = self.drop(scores)
            if not pattern.fits_without(dropped):
                dropped = pattern.cheapest(self._costs(scores), number, candidates)
        assert dropped is not None  # There is a set of this size.
        return dropped

    def _block_in_pattern(self, distances: Mapping[Layers, float], num_layers: int, pattern: Pattern) -> Layers:
        """Return the neighbours of least distance after which the others keep a pattern.

        Raises:
            PlanError: there are none, or a distance is missing.
        """
        fitting = {block: value for block, value in distances.items() if pattern.fits_without(block)}
        blocks = [block for block in self._blocks(num_layers) if block in fitting]
        if not blocks:
            raise PlanError(
                f"Without {self.number(num_layers)} neighbours, no set of the others keeps the pattern.",
                "Choose by another score, or another number of layers.",
            )
        return min(blocks, key=lambda block: fitting[block])

    def _costs(self, scores: Float64) -> list[float]:
        """Return the cost of dropping each layer, whose sum is least for the best set."""
        values = -scores if self.highest else scores
        if self.by in ADDITIVE:
            return [float(value) for value in values]
        return [float(rank) for rank in rank_lowest(values)]

    def _blocks(self, num_layers: int) -> list[Layers]:
        """Return the runs of as many neighbours as are dropped, of layers that may be dropped."""
        number = self.number(num_layers)
        candidates = self.unprotected(num_layers)
        starts = range(len(candidates) - number + 1)
        return [tuple(candidates[start : start + number]) for start in starts]

    def drop_block(self, distances: Mapping[Layers, float], layers: int) -> Layers:
        """Return the neighbours to drop, by the distance of the hidden states before and after each run of them.

        Raises:
            PlanError: as `drop`, or a distance is missing.
        """
        blocks = self._blocks(layers)
        for block in blocks:
            if not np.isfinite(distances.get(block, np.nan)):
                raise PlanError(
                    f"Layers {block[0]} to {block[-1]} have no measurement '{self.by}'.", "Measure it again."
                )
        return min(blocks, key=lambda block: distances[block])

    def drop(self, scores: Sequence[float] | Float64) -> Layers:
        """Return the layers to drop, ascending, by the score of each (ties go to the earlier layer).

        Raises:
            PlanError: no layer would remain, none would be dropped, or a score is missing.
        """
        values = np.asarray(scores, np.float64)
        if self.highest:
            values = -values
        missing = np.flatnonzero(~np.isfinite(values))
        if missing.size:
            layers = ", ".join(str(layer) for layer in missing)
            raise PlanError(f"Layers {layers} have no score '{self.by}'.", "Choose by another score or recipe.")
        candidates = np.array(self.unprotected(len(values)), np.intp)
        ranks = rank_lowest(values[candidates])
        number = self.number(len(values))
        return tuple(candidates[ranks <= number].tolist())

    def unprotected(self, layers: int) -> range:
        """Return the indices of the layers that may be dropped.

        Args:
            layers: number of layers of the model.
        """
        return range(self.first, max(self.first, layers - self.last))

    def number(self, layers: int) -> int:
        """Return the number of layers to drop, by ``count`` or ``share``.

        Args:
            layers: number of layers of the model.

        Raises:
            PlanError: no layer would remain, or too many are protected.
        """
        if self.count:
            number = self.count
        else:
            number = count_lowest(layers, LOWEST_SHARE if self.share is None else self.share)
        if number >= layers:
            raise PlanError(f"{number} of {layers} layers would be dropped.", "Keep at least one.")
        free = len(self.unprotected(layers))
        if number > free:
            raise PlanError(
                f"{number} layers would be dropped, but only {free} of {layers} are not protected.",
                "Protect fewer, or drop fewer.",
            )
        return number


def require_pattern_size(pattern: Pattern, number: int, candidates: Collection[int]) -> None:
    """Raise PlanError if no set of so many layers can be dropped so that the others keep a pattern.

    The message has the nearest numbers of layers that can.

    Args:
        candidates: layers that may be dropped.
    """
    # The numbers that can go take much longer to find than whether one of them can.
    if pattern.can_complete((), number, candidates):
        return
    sizes = pattern.sizes(candidates)
    message = f"Without {number} of {len(pattern.kinds)} layers, no set of the others keeps the pattern."
    if not sizes:
        raise PlanError(message, "No other number does: choose without `keep_pattern`, or protect fewer layers.")
    fewer = [size for size in sizes if size < number][-1:]
    more = [size for size in sizes if size > number][:1]
    nearest = " or ".join(str(size) for size in fewer + more)
    raise PlanError(message, f"Drop {nearest} (`count`), or choose without `keep_pattern`.")


def choose_experts(
    scores: Mapping[int, Float64], share: float, top_k: int, groups: int = 1, seed: int | None = None
) -> tuple[Expert, ...]:
    """Return the experts to drop: the same share of every layer, as configurations have one number for all.

    Args:
        scores: float64[experts] by layer. The lowest are dropped (ties go to the earlier expert).
        share: share of the experts of each layer.
        top_k: number of experts that a router sends each token to.
        groups: number of groups of equal size that routers divide the experts into. Each loses equally many.
        seed: seed of a random choice, which does not go by the scores.

    Raises:
        PlanError: layers have different numbers of experts, or too few experts would remain.
    """
    number = _experts_of_each_layer(scores)
    size = number // groups
    lost = count_lowest(size, share)
    _require_enough_experts(number, lost, share, top_k, groups)
    rng = np.random.default_rng(seed)
    chosen = []
    for layer in sorted(scores):
        values = scores[layer] if seed is None else rng.permutation(number).astype(np.float64)
        ranks = rank_lowest(values.reshape(groups, size)).reshape(number)
        chosen += [Expert(layer, int(expert)) for expert in np.flatnonzero(ranks <= lost)]
    return tuple(chosen)


def _experts_of_each_layer(scores: Mapping[int, Float64]) -> int:
    """Return the number of experts that all layers have. Raise PlanError if layers have different numbers."""
    first_layers: dict[int, int] = {}
    for layer in sorted(scores):
        first_layers.setdefault(len(scores[layer]), layer)
    numbers = sorted(first_layers)
    if len(numbers) > 1:
        fewer, more = numbers[:2]
        raise PlanError(
            f"Layer {first_layers[fewer]} has {fewer} routed experts and layer {first_layers[more]} has {more}: no "
            "share of them is one number.",
            "List the experts in `drop` of a plan by hand.",
        )
    return numbers[0]


def _require_enough_experts(number: int, lost: int, share: float, top_k: int, groups: int) -> None:
    """Raise PlanError if routers could not choose among the experts that remain.

    Args:
        number: number of experts of each layer.
        lost: number of experts that each group of a layer would lose.
        share, top_k, groups: as for `choose_experts`.
    """
    problems = []
    remaining = number - lost * groups
    if remaining < top_k:
        problem = PlanError(
            f"`experts` {share:g} would leave {remaining} of {number} experts in each layer, and each token "
            f"is sent to {top_k}.",
            f"Set at most {(number - top_k) / number:.3g}.",
        )
        problems.append(problem)
    size = number // groups
    if groups > 1 and size - lost < COMPARED_EXPERTS:
        problem = PlanError(
            f"{size - lost} of {size} experts would remain in each of the {groups} groups that a router compares "
            "by their two best.",
            "Set a smaller share in `experts`.",
        )
        problems.append(problem)
    if problems:
        raise PlanError.combine(problems)
