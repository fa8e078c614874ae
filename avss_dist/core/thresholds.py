"""Thresholds below which an activation counts as near zero: parsing, formatting, and the option that chooses them."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from avss_dist.core.errors import ConfigError
from avss_dist.core.validation import Accepts, check

PUBLISHED_THRESHOLD = 1e-5
THRESHOLDS = (1e-6, PUBLISHED_THRESHOLD, 1e-4, 1e-3, 1e-2, 1e-1)


def parse_threshold(text: str | float) -> tuple[float, str]:
    """Parse a threshold: ``1e-5`` is ``(1e-5, "absolute")``, ``0.1rms`` is ``(0.1, "rms")``.

    Raises:
        ConfigError: the text is not a positive number with an optional ``rms``.
    """
    number = str(text).strip().lower()
    kind = "rms" if number.endswith("rms") else "absolute"
    try:
        value = float(number.removesuffix("rms"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f"'{text}' is not a threshold.", "Write an absolute one like 1e-5, or a multiple of the RMS like 0.1rms."
        )
    return value, kind


def describe_threshold(value: float, kind: str) -> str:
    """Return a threshold as text: ``1e-05``, or ``0.1 x RMS``."""
    if kind == "rms":
        return f"{value:g} x RMS"
    return f"{value:g}"


def _absolute(threshold: float | str) -> float:
    """Return an absolute threshold that is given as text, as a number."""
    if not isinstance(threshold, str):
        return threshold
    value, kind = parse_threshold(threshold)
    if kind != "absolute":
        raise ConfigError(
            f"{threshold}: expected an absolute threshold. Multiples of the RMS are always scored.",
            "Write 1e-4, for example.",
        )
    return value


def _with_published(thresholds: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted({*thresholds, PUBLISHED_THRESHOLD}))


Threshold = Annotated[float, check(_absolute, before=True), Field(gt=0, allow_inf_nan=False), Accepts("float | str")]
Thresholds = Annotated[tuple[Threshold, ...], Field(strict=False), check(_with_published)]
