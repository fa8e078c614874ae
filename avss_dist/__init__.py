"""Distributed analysis of the layers of language models.

Measure once, on many GPUs, and compare with a query. ``docs/architecture.md`` explains the packages. Type checkers read
the stub file beside this one.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.3.0"
_MODULES = {
    "Ablation": "studies.ablate",
    "AvssError": "core.errors",
    "ConfigError": "core.errors",
    "CorpusError": "core.errors",
    "Distilled": "distillation.distill",
    "Estimate": "estimation",
    "EvaluationSession": "evaluation.session",
    "Evaluations": "studies.evaluate",
    "Execution": "partition.execution",
    "ModelError": "core.errors",
    "Plan": "plans.plan",
    "Progress": "reports.terminal.progress",
    "Pruned": "commands",
    "QueryError": "core.errors",
    "Run": "runs.result",
    "RunFailed": "core.errors",
    "Runs": "commands",
    "Settings": "core.settings",
    "Shrunk": "studies.shrunk",
    "Table": "core.results",
    "TaskError": "core.errors",
    "Verified": "serving.verify",
    "Warehouse": "warehouse.reader",
    "WarehouseError": "core.errors",
    "ablate": "commands",
    "compact": "read_commands",
    "compare": "read_commands",
    "contrast": "read_commands",
    "distill": "commands",
    "doctor": "read_commands",
    "estimate": "commands",
    "evaluate": "commands",
    "findings": "read_commands",
    "ls": "read_commands",
    "plan": "commands",
    "prune": "commands",
    "publish": "read_commands",
    "quantize": "commands",
    "query": "read_commands",
    "report": "read_commands",
    "rm": "read_commands",
    "run": "commands",
    "score": "runs.scoring",
    "score_all": "runs.scoring",
    "show": "read_commands",
    "shrink": "commands",
    "sparsify": "commands",
    "verify": "commands",
}
"""The module that defines each public name."""
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that reading a warehouse does not load torch."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'avss_dist' has no attribute {name!r}")
    try:
        module = import_module(f"avss_dist.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        from avss_dist.core.extras import not_installed

        missing = not_installed(error, f"avss_dist.{name}")
        if missing is not None:
            raise missing from error
        raise
    value = getattr(module, name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
