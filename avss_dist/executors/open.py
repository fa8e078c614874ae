"""Choice of the executor: this process, or Ray."""

from __future__ import annotations

import os

import torch

from avss_dist.core.registry import GANGS
from avss_dist.core.settings import Execution, Settings
from avss_dist.executors.base import Executor


def open_executor(execution: Execution, settings: Settings) -> Executor:
    """Open the requested executor; ``auto`` is Ray if there is a cluster, or more than one process to run.

    Raises:
        ConfigError: the cluster cannot be reached, or its workers lack this package.
    """
    from avss_dist.executors.local import LocalExecutor

    gpus = torch.cuda.device_count() if settings.device != "cpu" else 0
    replicas = execution.replicas.maximum if execution.replicas else gpus
    distributed = execution.address or os.environ.get("RAY_ADDRESS") or replicas > 1
    distributed = distributed or execution.partition in GANGS or bool(execution.node_labels)
    if execution.executor == "local" or (execution.executor == "auto" and not distributed):
        return LocalExecutor(settings)
    from avss_dist.executors.ray.executor import RayExecutor

    executor = RayExecutor(execution, settings)
    try:
        executor.reach()
    except BaseException:
        executor.close()
        raise
    return executor
