"""What a long command has got so far, in a file, so that the same command goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avss_dist.errors import ConfigError


class Journal:
    """Batches of texts, a line of JSON each; for a ``with`` block.

    Args:
        path: of the file. Its first line is the identity.
        identity: everything that decides what the texts are.

    Attributes:
        batches: those that are kept, in order.

    Raises:
        ConfigError: the file was begun under another identity.
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
                "Give the same ones to go on, remove it, or name another `output`.",
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
        """Keep another batch."""
        self._write(json.dumps(batch, ensure_ascii=False))
        self.batches.append(batch)

    def remove(self) -> None:
        """Nothing is left to go on with."""
        self._path.unlink()

    def _write(self, line: str) -> None:
        self._file.write(f"{line}\n".encode())
        self._file.flush()
