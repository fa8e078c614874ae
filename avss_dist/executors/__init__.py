"""Executors: measurement in this process, or on Ray workers.

Both executors have the same methods. `local.LocalExecutor`, the reference, says what they promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from avss_dist.executors.local import LocalExecutor
    from avss_dist.executors.ray.executor import RayExecutor

Executor: TypeAlias = "LocalExecutor | RayExecutor"
"""Measures shards and cells."""
