"""What a repaired checkpoint says of its repair, in a small file beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from avss_dist.errors import ConfigError, ModelError
from avss_dist.settings import DTYPES, LAYOUTS, REPAIRS, RIVAL_PATCHES, ROW_STARTS, OneOf, Settings, checked
from avss_dist.text import describe_layers

FILE = "avss_repair.json"
Count = Annotated[int, Field(ge=0)]
Layers = Annotated[tuple[Count, ...], Field(strict=False)]
Error = Annotated[float, Field(ge=0, strict=False)]


@checked
class RepairText:
    """A text that a repair was fitted on."""

    corpus: str
    """As the user named it."""
    fingerprint: str
    """Of its content."""
    rows: Count
    """Rows of tokens that were read, those that judged the fit among them."""
    tokens: Count
    """Tokens that were fitted to."""
    weight: Annotated[float, Field(gt=0, strict=False)] = 1.0
    """How much it counts beside the others."""

    def describe(self) -> str:
        """A few words for people."""
        return f"{self.corpus} ({self.tokens:,} tokens" + (f", weight {self.weight:g})" if self.weight != 1 else ")")


@checked
class RepairedCut:
    """What was done at one cut, judged on held-back text: lengths of vectors over that of the whole model's stream."""

    after: Count
    """The last layer before it, counted in the whole model, whose MLP, or the stream after it, was changed."""
    removed: Layers
    """The layers that are missing there; none, where what was missing before is given back once more."""
    ridges: Annotated[tuple[float | None, ...], Field(strict=False)]
    """Of each fit, as a multiple of the mean diagonal; None where the fit did not help, and nothing was changed."""
    error_before: Error
    """What is missing in the stream, without the repair of this cut."""
    error_after: Error
    """And with it."""
    maps: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Linear maps that were fitted again, where ``after`` is the layer behind a cut: errors are of what they give."""

    @property
    def changed(self) -> bool:
        """Whether a fit helped, so that weights were changed."""
        return any(ridge is not None for ridge in self.ridges)

    def describe(self) -> str:
        """One line for people."""
        ridges = ", ".join("none helps" if ridge is None else f"{ridge:g}" for ridge in self.ridges)
        return f"{self._where}: error {self.error_before:.3g} -> {self.error_after:.3g} on held-back text" + (
            f" (ridge {ridges})" if ridges else ""
        )

    @property
    def _where(self) -> str:
        if self.maps:
            return f"in {self.after}"
        return f"without {describe_layers(self.removed)}, after {self.after}" if self.removed else f"after {self.after}"


@checked
class RepairRecord:
    """A repair: of which model, on which text, with what effect."""

    repair: Annotated[str, OneOf((*REPAIRS, *RIVAL_PATCHES))]
    model: str
    revision: str
    removed: Layers
    texts: Annotated[tuple[RepairText, ...], Field(strict=False)]
    cuts: Annotated[tuple[RepairedCut, ...], Field(strict=False)]
    sequence_length: Annotated[int, Field(ge=1)]
    layout: Annotated[str, OneOf(LAYOUTS)]
    row_start: Annotated[str, OneOf(ROW_STARTS)] = "none"  # records of earlier versions have no such key
    skip_sequences: Count = 0
    max_sequences: Annotated[int, Field(ge=1)] | None = None
    shuffle_seed: Count | None = None
    chat_template: bool = False
    dtype: Annotated[str, OneOf(DTYPES)]

    def reading(self) -> Settings:
        """The settings with which its texts are read again."""
        names = ("sequence_length", "layout", "row_start", "max_sequences", "shuffle_seed", "chat_template", "dtype")
        return Settings(**{name: getattr(self, name) for name in names})

    def describe(self) -> list[str]:
        """Lines for people."""
        texts = ", ".join(text.describe() for text in self.texts)
        return [
            f"Repaired by {self.repair}, fitted on {texts}; do not evaluate on that text.",
            *(f"Repaired {cut.describe()}." for cut in self.cuts),
        ]


def write_repairs(folder: Path, records: Sequence[RepairRecord]) -> None:
    """Write the file, in place of one that is there."""
    text = json.dumps({"repairs": [asdict(record) for record in records]}, indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_repairs(folder: Path) -> list[RepairRecord]:
    """The repairs of a checkpoint, in order; none where it has no such file.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return []
    try:
        return [parse_record(values) for values in json.loads(file.read_text(encoding="utf-8"))["repairs"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        why = error.message if isinstance(error, ConfigError) else str(error)
        raise ModelError(f"{file} is no record of a repair: {why}", "Copy the checkpoint again.") from error


def parse_record(values: Mapping[str, Any]) -> RepairRecord:
    """A record from its fields, as ``dataclasses.asdict`` has them.

    Raises:
        KeyError, TypeError, ConfigError: they are no record.
    """
    values = dict(values)
    texts = tuple(RepairText(**text) for text in values.pop("texts"))
    cuts = tuple(RepairedCut(**cut) for cut in values.pop("cuts"))
    return RepairRecord(**values, texts=texts, cuts=cuts)
