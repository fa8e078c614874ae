"""Journal of the results of a long command, so that the same command continues after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avss_dist.core.errors import ConfigError


class Journal:
    """File of batches of texts, a line of JSON each. Used as a context manager.

    Args:
        path: the file. Its first line is the identity.
        identity: all options that determine the texts.

    Attributes:
        batches: recorded batches, in order.

    Raises:
        ConfigError: the file was written with another identity.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._identity = json.dumps(identity, sort_keys=True, default=str)
        self.batches: list[list[str]] = []

    def __enter__(self) -> Journal:
        self._file = self._path.open("ab+")
        self._file.seek(0)
        identity, *batches = [line for line in self._file if line.endswith(b"\n")] or [b""]  # a kill cuts lines off
        if identity and identity != f"{self._identity}\n".encode():
            raise ConfigError(
                f"{self._path} was begun with another model or other options.",
                "Use the same ones to continue, delete the file, or name another `output`.",
            )
        self._file.truncate(len(identity) + sum(map(len, batches)))
        self.batches = [json.loads(line) for line in batches]
        if not identity:
            self._write(self._identity)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.batches:
            self.remove()

    def add(self, batch: list[str]) -> None:
        """Record a batch."""
        self._write(json.dumps(batch, ensure_ascii=False))
        self.batches.append(batch)

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink()

    def _write(self, line: str) -> None:
        self._file.write(f"{line}\n".encode())
        self._file.flush()
