"""The registry of repairs and the records of fitted repairs.

An entry says what the repair fits, at which layers, and how much text it needs. A record is a small file beside the
weights of a repaired checkpoint.

A new repair is one entry of `REPAIRS`. A fit of another form than ``channel`` and ``full`` also needs that form there,
its solution in `fits.NormalEquations.solve`, and the way in which it becomes weights in `fits.fold`. A repair that
changes more than one linear map is a subclass of `fitter.RepairFitter`, as `borrow.BorrowFitter` is. Nothing here
imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from avss_dist.core.errors import ConfigError, explain_damaged_record
from avss_dist.core.settings import DTYPES, ROW_STARTS, TextOptions
from avss_dist.core.text import RedactedURI, describe_layers, describe_rows
from avss_dist.core.validation import Count, OneOf, RedactedText, checked
from avss_dist.corpus.seen import REPAIR, SELF, SeenText, describe_corpus

NO_REPAIR = "none"
DEFAULT_REPAIR = "borrow"
"""The repair that keeps the most, on text of other domains too, in one pass over the cuts (docs/results/repairs.md)."""
TOKENS_PER_UNKNOWN = 4
"""Minimum number of tokens for each unknown. With fewer, a fit follows the noise of its text."""


@dataclass(frozen=True, kw_only=True)
class RepairMethod:
    """A way to make up for removed layers or experts without training.

    Attributes:
        meaning: what is fitted, in a few words.
        features: what the missing part of the hidden states is fitted from: the ``output`` of the MLP, or the
            ``inputs`` of its last linear map.
        form: form of the fitted matrix, ``channel`` (a diagonal) or ``full``.
        every_layer: fit every remaining layer behind the first cut, not only the last one before each cut.
        borrows: neurons of the removed layers may take the place of neurons of the layer before a cut.
    """

    meaning: str
    features: Literal["inputs", "output"]
    form: Literal["channel", "full"]
    every_layer: bool = False
    borrows: bool = False

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
        if self.features == "inputs":
            return round(needed / chances)
        return needed


REPAIRS: Mapping[str, RepairMethod] = {
    "channel": RepairMethod(
        meaning="one factor for each channel of the output of the MLP", features="output", form="channel"
    ),
    "map": RepairMethod(meaning="a matrix applied to the output of the MLP", features="output", form="full"),
    "refit": RepairMethod(meaning="the last linear map of the MLP", features="inputs", form="full"),
    "borrow": RepairMethod(
        meaning="the last linear map of the MLP, whose least useful neurons give way to neurons of the removed layers",
        features="inputs",
        form="full",
        borrows=True,
    ),
    "refit_all": RepairMethod(
        meaning="the last linear map of the MLP, of every layer behind the first cut too",
        features="inputs",
        form="full",
        every_layer=True,
    ),
}
"""Repairs by name, from the fewest unknowns to the most."""

OptionalRepairName = Annotated[str, OneOf((NO_REPAIR, *REPAIRS))]
"""Type of a checked field that names a repair or `NO_REPAIR`."""


def searched_repair(name: str) -> str:
    """Return the repair that a search fits to each set of layers where ``name`` is fitted to the chosen set.

    It is ``map`` in place of a repair with more unknowns: a search reads little text.
    """
    if name == NO_REPAIR or REPAIRS[name].form == "channel":
        return name
    return "map"


FILE = "avss_repair.json"
MOST_RIDGES = 2
"""Maximum number of ridges that are named one by one."""
NO_RIDGE = "none helps"
# The query of a URI, after its question mark, has equals signs too.
_WEIGHTED = re.compile(r"([^?]+)=([0-9]*\.?[0-9]+)")
LayerIndices = Annotated[tuple[Count, ...], Field(strict=False)]
Error = Annotated[float, Field(ge=0, strict=False)]


def split_weight(corpus: str) -> tuple[RedactedURI, float]:
    """Return a corpus and its weight from ``CORPUS`` or ``CORPUS=0.5``. The weight is 1 by default.

    Any other ending, such as ``=abc``, belongs to the name of the corpus.

    Raises:
        ConfigError: the weight is 0.
    """
    full = RedactedURI(corpus).full
    match = _WEIGHTED.fullmatch(full)
    if not match or Path(full).is_file():
        return RedactedURI(corpus), 1.0
    if not float(match[2]):
        raise ConfigError(
            f"the weight of '{RedactedURI(corpus)}' is 0: expected a positive number.",
            "Leave the text out, or give it a weight.",
        )
    return RedactedURI(match[1]), float(match[2])


def names_own_text(corpora: Iterable[str]) -> bool:
    """Whether the text that the model writes itself is among texts, which may have weights."""
    return any(split_weight(corpus)[0] == SELF for corpus in corpora)


@checked
class RepairText:
    """A text that a repair was fitted on."""

    corpus: RedactedText
    """The corpus, as the user named it, without keys; or self for text that the whole model wrote."""
    fingerprint: str
    """Fingerprint of its content."""
    rows: Count
    """Rows of tokens that were read, held-back ones included."""
    tokens: Count
    """Tokens that were fitted to."""
    weight: Annotated[float, Field(gt=0, strict=False)] = 1.0
    """Weight relative to the other texts."""

    def describe(self, skipped: int) -> str:
        """Return a few words for people.

        Args:
            skipped: number of rows before those that were read.
        """
        weight = f", weight {self.weight:g}" if self.weight != 1 else ""
        if self.corpus == SELF:
            skipped = 0
        return f"{describe_corpus(self.corpus)} ({self.tokens:,} tokens of {describe_rows(skipped, self.rows)}{weight})"


@checked
class RepairedCut:
    """Result of a repair at one cut.

    Errors are measured on held-back tokens: the length of the missing part of the hidden states, over the length of
    the whole model's hidden states.
    """

    after: Count
    """Layer whose MLP was changed, counted in the whole model."""
    removed: LayerIndices
    """Removed layers right after it; empty where only its experts are, or a repair fits what an earlier cut left."""
    ridges: Annotated[tuple[float | None, ...], Field(strict=False)]
    """Ridge of each fit, as a multiple of the mean diagonal; None if the fit did not help and nothing was changed."""
    error_before: Error
    """Error without the repair of this cut."""
    error_after: Error
    """Error with the repair of this cut."""
    experts: LayerIndices = ()
    """Removed experts of ``after``, of which the remaining ones were changed."""
    borrowed: Count = 0
    """Neurons of ``removed`` that took the place of neurons of ``after``."""
    maps: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Linear maps that were fitted in ``after``; only repairs of earlier versions fitted others than the MLP's last."""

    @property
    def changed(self) -> bool:
        """Whether a fit helped, so that weights were changed."""
        return any(ridge is not None for ridge in self.ridges)

    def describe(self) -> str:
        """Return one line for people."""
        line = f"{self._describe_place()}: error {self.error_before:.3g} -> {self.error_after:.3g} on held-back text"
        if self.ridges:
            line += f" (ridge {self._describe_ridges()})"
        if self.borrowed:
            line += f"; {self.borrowed:,} of its neurons are borrowed from removed layers"
        return line

    def _describe_ridges(self) -> str:
        """Return the ridges of a few fits one by one, and the range of those of many."""
        if len(self.ridges) <= MOST_RIDGES:
            return ", ".join(_describe_ridge(ridge) for ridge in self.ridges)
        used = [ridge for ridge in self.ridges if ridge is not None]
        if not used:
            return NO_RIDGE
        return f"{min(used):g} to {max(used):g} in {len(used)} of {len(self.ridges)} fits"

    def _describe_place(self) -> str:
        """Return what is removed at the cut, and the layer that was changed."""
        if self.maps:
            return f"in {self.after}"
        places = []
        if self.experts:
            places.append(f"without experts {describe_layers(self.experts)} of layer {self.after}")
        if self.removed:
            places.append(f"without {describe_layers(self.removed)}, after {self.after}")
        if not places:
            places.append(f"after {self.after}")
        return ", and ".join(places)


def _describe_ridge(ridge: float | None) -> str:
    return NO_RIDGE if ridge is None else f"{ridge:g}"


@checked
class RepairRecord(TextOptions):
    """A repair of a checkpoint: model, texts, settings and results."""

    repair: Annotated[str, Field(min_length=1)]
    """Name of the repair, which may no longer exist."""
    model: str
    """Name of the whole model."""
    revision: str
    """Revision of the whole model."""
    removed: LayerIndices
    """Layers that the pruned model lacks."""
    texts: Annotated[tuple[RepairText, ...], Field(strict=False)]
    """Texts that the repair was fitted on."""
    cuts: Annotated[tuple[RepairedCut, ...], Field(strict=False)]
    """Results by cut."""
    row_start: Annotated[str, OneOf(ROW_STARTS)] = "none"  # records of earlier versions have no such key
    dtype: Annotated[str, OneOf(DTYPES)]

    def seen(self, name: str) -> list[SeenText]:
        """Return the texts that it was fitted on.

        Args:
            name: name of the repaired checkpoint.
        """
        texts = []
        for text in self.texts:
            options = self.text_options()
            options["max_sequences"] = text.rows or None
            if text.corpus == SELF:
                options["skip_sequences"] = 0
            seen = SeenText(use=REPAIR, by=name, corpus=text.corpus, corpus_fingerprint=text.fingerprint, **options)
            texts.append(seen)
        return texts

    def describe(self) -> list[str]:
        """Return lines for people."""
        texts = ", ".join(text.describe(self.skip_sequences) for text in self.texts)
        lines = [f"Repaired by {self.repair}, fitted on {texts}; evaluate on other rows or text."]
        lines += [f"Repaired {cut.describe()}." for cut in self.cuts]
        return lines


def write_repairs(folder: Path, records: Sequence[RepairRecord]) -> None:
    """Write the records of a checkpoint, in place of those that are there."""
    text = json.dumps({"repairs": [asdict(record) for record in records]}, indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_repairs(folder: Path) -> list[RepairRecord]:
    """Return the repairs of a checkpoint, in order. Empty if it has no such file.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return []
    with explain_damaged_record(file, "is not a valid record of a repair", "Copy the checkpoint again."):
        content = json.loads(file.read_text(encoding="utf-8"))
        return [RepairRecord(**values) for values in content["repairs"]]
