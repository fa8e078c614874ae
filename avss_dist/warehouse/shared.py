"""A driver's warehouse in its workers, which write into it while their run lasts."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

from avss_dist.core.errors import AvssError
from avss_dist.core.text import RedactedURI
from avss_dist.warehouse.store import Store

OpenShared = Callable[[], Store | None]
"""Opens a driver's warehouse in one of its workers. Returns None if the worker does not reach it, or once the run has
ended. It is pickled."""


def share(store: Store, run_id: str, **plan: object) -> OpenShared:
    """Write the description of an unfinished run, and return what opens the warehouse in its workers.

    It opens the warehouse in those processes alone that see this very description.

    Args:
        plan: as for `Store.write_unfinished_run`.
    """
    data = store.write_unfinished_run(run_id, **plan)
    root = store.root
    if store.storage.is_local:
        root = RedactedURI(store.storage.base)  # absolute, since a worker may have another working directory
    return partial(_open_shared, root, store.storage.plan_path(run_id), data)


def _open_shared(root: RedactedURI, path: str, data: bytes) -> Store | None:
    """Open a warehouse, or return None if this process does not find the file in it that the driver has written.

    It is looked for at each call: a late worker must not write the shard of a run that has ended. What the file says is
    compared once, since another driver of the same run replaces it by its own.
    """
    store = _opened(root, path, data)
    if store is None:
        return None
    try:
        run_has_ended = store.storage.read(path) is None
    except AvssError:
        return None
    if run_has_ended:
        return None
    return store


@lru_cache(maxsize=8)
def _opened(root: RedactedURI, path: str, data: bytes) -> Store | None:
    """Open a warehouse, or return None if this process does not find a file with this content in it."""
    try:
        store = Store(root)
        stored = store.storage.read(path)
    except AvssError:
        return None
    if stored != data:
        return None
    return store
