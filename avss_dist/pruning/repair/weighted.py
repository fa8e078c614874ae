"""Texts of a repair with weights: how much each counts beside the others."""

from __future__ import annotations

import re
from pathlib import Path

from avss_dist.errors import ConfigError
from avss_dist.text import RedactedURI

_WEIGHTED = re.compile(r"([^?]+)=([0-9]*\.?[0-9]+)")  # a query of a URI, after its question mark, has equals signs too


def weighted(text: str) -> tuple[RedactedURI, float]:
    """A text and its weight, from ``CORPUS`` or ``CORPUS=0.5``; 1 where none is said.

    Raises:
        ConfigError: the weight is 0.
    """
    full = RedactedURI(text).full
    found = _WEIGHTED.fullmatch(full)
    if not found or Path(full).is_file():
        return RedactedURI(text), 1.0
    if not float(found[2]):
        raise ConfigError(f"'{RedactedURI(text)}': a text that counts nothing.", "Leave it out, or give it a weight.")
    return RedactedURI(found[1]), float(found[2])
