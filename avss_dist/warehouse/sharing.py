"""The driver's warehouse, shared with workers that can reach it and write it themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from avss_dist.core.errors import AvssError
from avss_dist.core.text import RedactedURI
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.warehouse.store import Store


@dataclass(frozen=True)
class SharedWarehouse:
    """Reference to a driver's warehouse, pickled for its workers.

    Attributes:
        root: address of the warehouse for any process.
        mark: name of a file in it that the driver has written.
    """

    root: RedactedURI
    mark: str

    def store(self) -> Store | None:
        """Open the warehouse, or return None if this process does not find the driver's mark in it."""
        return _store_with_mark(self)


@lru_cache(maxsize=8)
def _store_with_mark(shared: SharedWarehouse) -> Store | None:
    try:
        store = Store(shared.root)
        return store if store.storage.has_mark(shared.mark) else None
    except AvssError:
        return None


@contextmanager
def shared(store: Store) -> Iterator[SharedWarehouse | None]:
    """Let workers write the warehouse inside the block. Yield None if no mark can be written, as on a full disk."""
    try:
        mark = store.storage.write_mark()
    except AvssError:
        yield None
        return
    try:
        yield SharedWarehouse(store.storage.address, mark)
    finally:
        store.storage.remove_mark(mark)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A worker's message that it has written the partial of a shard. It is short, as one driver serves many workers.

    Attributes:
        shard_id, content_hash, num_tokens, seconds: see `ShardResult`.
        size: size of the partial in bytes.
    """

    shard_id: int
    content_hash: str
    num_tokens: int
    seconds: float
    size: int

    @staticmethod
    def of_result(result: ShardResult, size: int) -> Receipt:
        """Return the receipt of a result."""
        return Receipt(
            shard_id=result.shard_id,
            content_hash=result.content_hash,
            num_tokens=result.num_tokens,
            seconds=result.seconds,
            size=size,
        )
