"""The record of a repair: a small file beside the weights of a repaired checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import DTYPES, ROW_STARTS, Settings, TextOptions
from avss_dist.core.text import RedactedURI, describe_layers
from avss_dist.core.validation import OneOf, checked

FILE = "avss_repair.json"
MOST_RIDGES = 2  # that are named one by one
_WEIGHTED = re.compile(
    r"([^?]+)=([0-9]*\.?[0-9]+)"
)  # the query of a URI, after its question mark, has equals signs too
Count = Annotated[int, Field(ge=0)]
Layers = Annotated[tuple[Count, ...], Field(strict=False)]
Error = Annotated[float, Field(ge=0, strict=False)]


def split_weight(corpus: str) -> tuple[RedactedURI, float]:
    """Return a corpus and its weight from ``CORPUS`` or ``CORPUS=0.5``. The weight is 1 by default.

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


@checked
class RepairText:
    """A text that a repair was fitted on."""

    corpus: str
    """The corpus, as the user named it."""
    fingerprint: str
    """Fingerprint of its content."""
    rows: Count
    """Rows of tokens that were read, held-back ones included."""
    tokens: Count
    """Tokens that were fitted to."""
    weight: Annotated[float, Field(gt=0, strict=False)] = 1.0
    """Weight relative to the other texts."""

    def describe(self) -> str:
        """Return a few words for people."""
        return f"{self.corpus} ({self.tokens:,} tokens" + (f", weight {self.weight:g})" if self.weight != 1 else ")")


@checked
class RepairedCut:
    """Result of a repair at one cut.

    Errors are measured on held-back tokens: the length of the missing part of the hidden states, over the length of
    the whole model's hidden states.
    """

    after: Count
    """Layer whose MLP was changed, counted in the whole model."""
    removed: Layers
    """Removed layers right after it; empty where only its experts are, or a repair fits what an earlier cut left."""
    ridges: Annotated[tuple[float | None, ...], Field(strict=False)]
    """Ridge of each fit, as a multiple of the mean diagonal; None if the fit did not help and nothing was changed."""
    error_before: Error
    """Error without the repair of this cut."""
    error_after: Error
    """Error with the repair of this cut."""
    experts: Layers = ()
    """Removed experts of ``after``, of which the remaining ones were changed."""
    maps: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Linear maps that were fitted in ``after``; only repairs of earlier versions fitted others than the MLP's last."""

    @property
    def changed(self) -> bool:
        """Whether a fit helped, so that weights were changed."""
        return any(ridge is not None for ridge in self.ridges)

    def describe(self) -> str:
        """Return one line for people."""
        ridges = ", ".join("none helps" if ridge is None else f"{ridge:g}" for ridge in self.ridges)
        if len(self.ridges) > MOST_RIDGES:
            used = [ridge for ridge in self.ridges if ridge is not None]
            helped = f"{len(used)} of {len(self.ridges)} fits"
            ridges = f"{min(used):g} to {max(used):g} in {helped}" if used else "none helps"
        return f"{self._place}: error {self.error_before:.3g} -> {self.error_after:.3g} on held-back text" + (
            f" (ridge {ridges})" if ridges else ""
        )

    @property
    def _place(self) -> str:
        if self.maps:
            return f"in {self.after}"
        without = f"without {describe_layers(self.removed)}, " if self.removed else ""
        layers = f"{without}after {self.after}"
        experts = f"without experts {describe_layers(self.experts)} of layer {self.after}"
        if not self.experts:
            return layers
        return f"{experts}, and {layers}" if self.removed else experts


@checked
class RepairRecord(TextOptions):
    """A repair of a checkpoint: model, texts, settings and results."""

    repair: Annotated[str, Field(min_length=1)]
    """Name of the repair, which may no longer exist."""
    model: str
    """Name of the whole model."""
    revision: str
    """Revision of the whole model."""
    removed: Layers
    """Layers that the pruned model lacks."""
    texts: Annotated[tuple[RepairText, ...], Field(strict=False)]
    """Texts that the repair was fitted on."""
    cuts: Annotated[tuple[RepairedCut, ...], Field(strict=False)]
    """Results by cut."""
    row_start: Annotated[str, OneOf(ROW_STARTS)] = "none"  # records of earlier versions have no such key
    dtype: Annotated[str, OneOf(DTYPES)]

    def reading(self) -> Settings:
        """Return the settings that read the same texts again."""
        return Settings.from_stored(vars(self))

    def describe(self) -> list[str]:
        """Return lines for people."""
        texts = ", ".join(text.describe() for text in self.texts)
        return [
            f"Repaired by {self.repair}, fitted on {texts}; do not evaluate on that text.",
            *(f"Repaired {cut.describe()}." for cut in self.cuts),
        ]


def write_repairs(folder: Path, records: Sequence[RepairRecord]) -> None:
    """Write the records of a checkpoint, in place of those that are there."""
    text = json.dumps({"repairs": [asdict(record) for record in records]}, indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_repairs(folder: Path) -> list[RepairRecord]:
    """Return the repairs of a checkpoint, in order. Empty if it has no such file.

    Raises:
        ModelError: the file is damaged.
    """
    if not (file := folder / FILE).is_file():
        return []
    try:
        return [RepairRecord(**values) for values in json.loads(file.read_text(encoding="utf-8"))["repairs"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        why = error.message if isinstance(error, ConfigError) else str(error)
        raise ModelError(f"{file} is not a valid record of a repair: {why}", "Copy the checkpoint again.") from error
