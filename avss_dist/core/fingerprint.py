"""Hashes that ids of runs, evaluations and experiments are made of, and the version of the numbers."""

from __future__ import annotations

import hashlib
import json

NUMBERS_VERSION = 3
"""Version of the numbers, hashed into the ids of runs, evaluations and experiments.

A change after which the same request gives other numbers raises it. A new column of a table does not.
"""


def fingerprint(**parts: object) -> str:
    """Return the SHA-256, in hex, of the canonical JSON of ``parts``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
