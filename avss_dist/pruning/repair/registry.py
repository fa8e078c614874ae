"""The registry of repairs: what each fits, at which layers, and how much text it needs.

A new repair is one entry of `REPAIRS`. A fit of another form than those of `fits.FORMS` also needs that
form there, and the way in which it becomes weights in `fits.fold`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from avss_dist.core.validation import OneOf

NO_REPAIR = "none"
DEFAULT_REPAIR = "refit"  # recovers the most, on text of other domains too, and needs the most text
TOKENS_PER_UNKNOWN = 4  # minimum; with fewer, a fit follows the noise of its text


@dataclass(frozen=True, kw_only=True)
class RepairMethod:
    """A way to make up for removed layers or experts without training.

    Attributes:
        meaning: what is fitted, in a few words.
        features: what the missing part of the hidden states is fitted from: the ``output`` of the MLP, or the
            ``inputs`` of its last linear map.
        form: form of the fitted matrix, one of `fits.FORMS`.
        every_layer: fit every remaining layer behind the first cut, not only the last one before each cut.
    """

    meaning: str
    features: Literal["inputs", "output"]
    form: Literal["channel", "full"]
    every_layer: bool = False

    def unknowns(self, inputs: int, outputs: int) -> int:
        """Return the number of unknowns for each output of the fit.

        Args:
            inputs, outputs: sizes of the MLP's last linear map.
        """
        if self.form != "full":
            return 1
        return inputs if self.features == "inputs" else outputs

    def tokens_needed(self, inputs: int, outputs: int, chances: float = 1.0) -> int:
        """Return the minimum number of tokens to fit to.

        Args:
            inputs, outputs: see `unknowns`.
            chances: share of the tokens that reach one of several linear maps, whose ``output`` all tokens have.
        """
        needed = TOKENS_PER_UNKNOWN * self.unknowns(inputs, outputs)
        return round(needed / chances) if self.features == "inputs" else needed

    @property
    def text_rank(self) -> int:
        """Order of repairs by the text that they need: 0 for a few numbers, 2 for a matrix as wide as the MLP."""
        if self.form != "full":
            return 0
        return 2 if self.features == "inputs" else 1


REPAIRS: Mapping[str, RepairMethod] = {
    "channel": RepairMethod(
        meaning="one factor for each channel of the output of the MLP", features="output", form="channel"
    ),
    "map": RepairMethod(meaning="a matrix applied to the output of the MLP", features="output", form="full"),
    "refit": RepairMethod(meaning="the last linear map of the MLP", features="inputs", form="full"),
    "refit_all": RepairMethod(
        meaning="the last linear map of the MLP, of every layer behind the first cut too",
        features="inputs",
        form="full",
        every_layer=True,
    ),
}
"""Repairs by name, from the fewest unknowns to the most."""

RepairName = Annotated[str, OneOf(tuple(REPAIRS))]
"""Type of a checked field that names a repair."""
OptionalRepairName = Annotated[str, OneOf((NO_REPAIR, *REPAIRS))]
"""Type of a checked field that names a repair or `NO_REPAIR`."""


def searched_repair(name: str) -> str:
    """Return the repair that a search fits to each set of layers where ``name`` is fitted to the chosen set.

    It is ``map`` in place of a repair with more unknowns: a search reads little text.
    """
    return name if name == NO_REPAIR or REPAIRS[name].text_rank == 0 else "map"
