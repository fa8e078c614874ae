"""Distributed analysis of the layers of language models.

Measure once, on many GPUs, and compare with a query. ``docs/architecture.md`` explains the packages. Type checkers read
the stub file beside this one.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.3.0"
__all__ = [
    "Ablation",
    "AvssError",
    "ConfigError",
    "CorpusError",
    "Distilled",
    "Estimate",
    "EvaluationSession",
    "Evaluations",
    "Execution",
    "ModelError",
    "Plan",
    "Progress",
    "Pruned",
    "QueryError",
    "Run",
    "RunFailed",
    "Runs",
    "Settings",
    "Shrunk",
    "Table",
    "TaskError",
    "Warehouse",
    "WarehouseError",
    "__version__",
    "ablate",
    "compact",
    "compare",
    "contrast",
    "distill",
    "doctor",
    "estimate",
    "evaluate",
    "findings",
    "ls",
    "plan",
    "prune",
    "publish",
    "quantize",
    "query",
    "report",
    "rm",
    "run",
    "score",
    "score_all",
    "show",
    "shrink",
    "sparsify",
]

_HOMES = {
    "commands": (
        *("Pruned", "Runs", "ablate", "distill", "estimate", "evaluate", "plan", "prune", "quantize"),
        *("run", "shrink", "sparsify"),
    ),
    "read_commands": (
        *("compact", "compare", "contrast", "doctor", "findings", "ls", "publish", "query", "report", "rm", "show"),
    ),
    "core.errors": (
        *("AvssError", "ConfigError", "CorpusError", "ModelError", "QueryError", "RunFailed", "TaskError"),
        "WarehouseError",
    ),
    "distillation.distill": ("Distilled",),
    "estimation": ("Estimate",),
    "evaluation.session": ("EvaluationSession",),
    "studies.ablate": ("Ablation",),
    "studies.evaluate": ("Evaluations",),
    "studies.shrink": ("Shrunk",),
    "plans.plan": ("Plan",),
    "reports.terminal.progress": ("Progress",),
    "core.results": ("Table",),
    "runs.scoring": ("score", "score_all"),
    "runs.result": ("Run",),
    "core.settings": ("Settings",),
    "partition.execution": ("Execution",),
    "warehouse.reader": ("Warehouse",),
}
"""Public names by the module that defines them."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that reading a warehouse does not load torch."""
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            try:
                module = import_module(f"avss_dist.{home}")
            except ModuleNotFoundError as error:
                from avss_dist.core.extras import not_installed

                if missing := not_installed(error, f"avss_dist.{name}"):
                    raise missing from error
                raise
            value = globals()[name] = getattr(module, name)
            return value
    raise AttributeError(f"module 'avss_dist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
