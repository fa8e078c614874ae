"""avss_dist: which layers of a language model matter. Measure once, on many GPUs; compare with a query.

Rooms, from the top down; each package's own docstring says what is in it, and imports only go down::

    cli          the command line: parse, call, print
    report       terminal tables, the page, pictures, exports
    estimate     memory and time before anything is loaded
    evaluation   what models and plans are worth: evaluate, ablate, experiment, shrink
    runs         from a request to the warehouse: job files, planning, driving, submission
    executors    who does the work: this process, or Ray workers
    measure      one shard: hooks -> kernels -> LayerStats
    analysis     compare, findings, thresholds, score card, verdict
    partition    how one replica is spread over devices
    tasks        what a model is evaluated on
    pruning      plans, methods that choose layers, the pruned checkpoint
    models       checkpoints, loading, layers and sites, sizes, skipped layers
    warehouse    the Parquet contract: schema, store, reader (SQL), cache
    corpus       documents -> token rows -> shards
    stats        LayerStats and its merge, scores, rankings
    system       devices, memory, versions, doctor
    settings     every default; validation: classes that check their values
    text         sizes and thresholds in words; errors: errors for people
    registry     the partitions, and what each can do
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avss_dist.evaluation.shrink import Shrunk, shrink
    from avss_dist.runs.api import Run, score, score_all
    from avss_dist.warehouse.reader import Warehouse

__version__ = "0.1.0"
__all__ = ["Run", "Shrunk", "Warehouse", "__version__", "score", "score_all", "shrink"]

_HOMES = {
    "Run": "runs.run",
    "Shrunk": "evaluation.shrink",
    "Warehouse": "warehouse.reader",
    "score": "runs.api",
    "score_all": "runs.api",
    "shrink": "evaluation.shrink",
}


def __getattr__(name: str) -> Any:
    """Import what is used, when it is used: reading a warehouse must not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'avss_dist' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"avss_dist.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
