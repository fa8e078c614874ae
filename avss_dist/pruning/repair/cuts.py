"""Where a plan cuts the stream, and which layers can give back what is missing there."""

from __future__ import annotations

from dataclasses import dataclass

from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.outlet import RepairError
from avss_dist.text import describe_layers


@dataclass(frozen=True)
class Cut:
    """A layer that stays, and the run of removed layers right after it: none, where what was missing before goes on."""

    after: int
    removed: tuple[int, ...]

    @property
    def last(self) -> int:
        """The layer after which the whole model has the stream that is wanted here."""
        return self.removed[-1] if self.removed else self.after


def layer_behind(cut: Cut, layers: int) -> int | None:
    """The first layer behind a cut, of so many; None where the cut is the end."""
    return cut.last + 1 if cut.last + 1 < layers else None


def find_cuts(made: Plan, *, every_layer: bool = False) -> list[Cut]:
    """The cuts of a plan, in order; that before the first layer has no layer before it, and is none.

    Args:
        every_layer: add the other layers that stay behind the first cut, that before the first layer included.
    """
    kept = [layer for layer in made.keep if layer >= min(made.drop) - 1]
    ends = [*kept[1:], made.num_layers]
    cuts = [Cut(layer, tuple(range(layer + 1, end))) for layer, end in zip(kept, ends, strict=True)]
    return [cut for cut in cuts if cut.removed or every_layer]


def require_cuts(made: Plan, *, every_layer: bool = False) -> list[Cut]:
    """As `find_cuts`.

    Raises:
        RepairError: there is none.
    """
    if cuts := find_cuts(made, every_layer=every_layer):
        return cuts
    raise RepairError(
        f"Layers {describe_layers(made.drop)} are the first: no layer before them can give back what they did.",
        "Prune with `repair` none, keep the first layer, or repair by refit_all or refit_full.",
    )
