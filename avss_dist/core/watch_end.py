"""The end of a watch over folders of checkpoints, as people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from avss_dist.core.errors import ConfigError
from avss_dist.core.validation import Accepts, check

_CHECKPOINTS = re.compile(r"[1-9]\d{0,8}")
_MINUTES = re.compile(r"(\d{1,8}(?:\.\d+)?)m")


@dataclass(frozen=True)
class WatchEnd:
    """The end of a watch, written ``20`` (after 20 checkpoints) or ``30m`` (after 30 minutes without a new one).

    Attributes:
        checkpoints: number of checkpoints; None if minutes are given.
        minutes: minutes in which no folder appears or is written to; None if a number of checkpoints is given.
    """

    checkpoints: int | None = None
    minutes: float | None = None

    def __str__(self) -> str:
        if self.minutes is not None:
            return f"{self.minutes:g}m"
        return str(self.checkpoints)


def _watch_end(value: object) -> WatchEnd:
    """Return the end of a watch from a number, from text such as ``30m``, or from an end."""
    text = str(value).strip()
    if _CHECKPOINTS.fullmatch(text):
        return WatchEnd(checkpoints=int(text))
    match = _MINUTES.fullmatch(text)
    if match and float(match[1]) > 0:
        return WatchEnd(minutes=float(match[1]))
    raise ConfigError(
        f"invalid end of a watch '{value}': expected a number of checkpoints (20), or minutes without a new one (30m)."
    )


WatchEndText = Annotated[WatchEnd, check(_watch_end, before=True), Accepts("int | str")]
