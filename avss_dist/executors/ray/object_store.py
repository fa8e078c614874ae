"""Transfer of patches and shards to workers by Ray's object store, which copies each once to a node for all of its
workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from avss_dist.core.intervention import EncodedPatch
from avss_dist.corpus.shards import Shard

MOST_SHARED = 2  # patches, or blocks of shards, that are held at once: units that need the same one are consecutive
BLOCK_SHARDS = 16  # consecutive shards, as one object
SENT_BYTES = 64_000  # of tokens that travel with a call; Ray puts arguments over 100 KB into the object store


@dataclass(frozen=True)
class SharedPatch:
    """A patch in the object store, kept as long as it is referred to. See `intervention.EncodedPatch`."""

    key: str
    data: Any = field(compare=False, repr=False)

    def read(self) -> bytes:
        """See `intervention.EncodedPatch`. Reads the copy on the worker's node."""
        data: bytes = ray.get(self.data)
        return data


class PatchSharer:
    """Puts each patch into the object store once, while its cells follow each other.

    Args:
        put: stores bytes, and returns a reference to them.
    """

    def __init__(self, put: Callable[[bytes], Any] = ray.put) -> None:
        self._put = put
        self._shared: dict[str, SharedPatch] = {}

    def share(self, patch: EncodedPatch) -> SharedPatch:
        """Return the patch as an object that workers on any node can read."""
        if patch.key not in self._shared:
            self._shared[patch.key] = SharedPatch(patch.key, self._put(patch.read()))
            for key in [*self._shared][:-MOST_SHARED]:
                del self._shared[key]
        return self._shared[patch.key]


class ShardSharer:
    """Puts blocks of consecutive shards into the object store, so that a call to a worker only names its shards.

    Args:
        put: stores a tuple of shards, and returns a reference to it.
    """

    def __init__(self, shards: Sequence[Shard], put: Callable[[tuple[Shard, ...]], Any] = ray.put) -> None:
        self._shards, self._put = shards, put
        self._blocks: dict[int, Any] = {}

    def share(self, indices: Sequence[int]) -> tuple[list[tuple[int, int]], list[Any]]:
        """Return the place of each shard, as (index of a returned block, index in the block), and the blocks.

        Small shards form a block that travels with the call. A driver that has lost its raylet then does not touch the
        object store, which would make Ray end it.
        """
        shards = tuple(self._shards[index] for index in indices)
        if sum(shard.input_ids.nbytes for shard in shards) <= SENT_BYTES:
            return [(0, i) for i in range(len(shards))], [shards]
        numbers = sorted({index // BLOCK_SHARDS for index in indices})
        places = [(numbers.index(index // BLOCK_SHARDS), index % BLOCK_SHARDS) for index in indices]
        return places, [self._block(number) for number in numbers]

    def _block(self, number: int) -> Any:
        """Return a reference to a block, or its shards if the object store has no room. The caller keeps it alive."""
        if number not in self._blocks:
            shards = tuple(self._shards[number * BLOCK_SHARDS : (number + 1) * BLOCK_SHARDS])
            try:
                self._blocks[number] = self._put(shards)
            except RayError:
                return shards
            for old in [*self._blocks][:-MOST_SHARED]:
                del self._blocks[old]
        return self._blocks[number]
