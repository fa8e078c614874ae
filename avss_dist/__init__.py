"""avss_dist: which layers of a language model matter. Measure once, on many GPUs; compare with a query.

Where things are, from the top down::

    cli        the command line: parse, call, print
    run        score one, several, or a job file's
    driver     all runs over one pool of workers;  planner  before it;  attempt  after it;  preview  what it would do
    report     tables and pictures of what was scored
    executors  local (this process) and ray (a cluster)
    compare    how far rankings agree;  findings  what to know before believing them
    thresholds scores at any threshold, quantiles
    query      SQL over the warehouse;  digest  copies that make it fast;  columns  what every column means
    jobs       job files;  nodes  YAML that knows its lines
    worker     one shard through one replica
    observe    hooks -> accumulators -> LayerStats;  kernels  the reductions
    partition  how one model copy is spread over devices
    checkpoints  find a checkpoint, pin its content;  models  open it;  structure  find its layers and sites
    corpus     documents -> token rows -> shards;  sources  where text comes from
    warehouse  the Parquet contract
    scoring    LayerStats -> AVSS and its rivals;  stats  what is measured
    config     settings and defaults;  errors  errors for people
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avss_dist.query import Warehouse
    from avss_dist.run import Run, score, score_all

__version__ = "0.1.0"
__all__ = ["Run", "Warehouse", "__version__", "score", "score_all"]

_HOMES = {"Run": "run", "Warehouse": "query", "score": "run", "score_all": "run"}


def __getattr__(name: str) -> Any:
    """Import what is used, when it is used: reading a warehouse must not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'avss_dist' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"avss_dist.{_HOMES[name]}"), name)
