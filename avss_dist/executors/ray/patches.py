"""Patches on their way to workers: by Ray's object store, which brings each to a node once, for all of its workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from avss_dist.tasks.cells import KeptPatch

MOST_SHARED = 2  # patches that are held at once: the cells of one follow each other


@dataclass(frozen=True)
class SharedPatch:
    """See `tasks.cells.KeptPatch`: in the object store, as long as somebody refers to it."""

    key: str
    data: Any = field(compare=False, repr=False)

    def read(self) -> bytes:
        """See `tasks.cells.KeptPatch`; on the worker's node."""
        found: bytes = ray.get(self.data)
        return found


class PatchSharer:
    """Puts each patch into the object store once, while its cells follow each other.

    Args:
        put: stores bytes, and gives a reference to them.
    """

    def __init__(self, put: Callable[[bytes], Any] = ray.put) -> None:
        self._put = put
        self._shared: dict[str, SharedPatch] = {}

    def share(self, patch: KeptPatch) -> SharedPatch:
        """The same patch, for workers on any node."""
        if patch.key not in self._shared:
            self._shared[patch.key] = SharedPatch(patch.key, self._put(patch.read()))
            for key in [*self._shared][:-MOST_SHARED]:
                del self._shared[key]
        return self._shared[patch.key]
