"""Partition ``zero3``: each rank holds a part of every parameter (DeepSpeed ZeRO-3) and takes its own data.

All ranks gather a layer's parameters when it begins and drop them when it ends, so all run equally many forward passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import distributed

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.registry import WHOLE
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel, Watcher
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer, layer_lists
from avss_dist.models.loading import forward_function, load_model, open_module, text_config, without_head
from avss_dist.models.pinning import compute_dtype
from avss_dist.models.size import Footprint
from avss_dist.models.sparsifying import uncounted
from avss_dist.partition.base import Placement, dummy_batch
from avss_dist.partition.batchwise import BatchwiseReplica, describe
from avss_dist.partition.cost import DEEPSPEED_BYTES, LINK_SHARE, Calibration, PartitionCost, Usage
from avss_dist.partition.group import (
    all_gather,
    quiet_deepspeed,
    require_group,
    reraise_lost_ranks,
    share,
    sum_over_ranks,
)
from avss_dist.system.devices import free_device, pick_device
from avss_dist.system.memory import keep_freed_memory

S = TypeVar("S")
T = TypeVar("T")
PREFETCHED = 50_000_000  # parameters that are gathered ahead, on GPUs, beside the arithmetic; DeepSpeed's own default


class Zero3Cost(PartitionCost):
    """Memory and time of a run whose ranks hold parts of the parameters and gather one layer at a time."""

    @staticmethod
    def minimum_host_weights(size: Footprint, kind: str, *, head: bool) -> int:
        """See `PartitionCost`. ``max_memory`` has no effect."""
        return 0

    def usage(self, measured: Calibration, counters: int) -> Usage:
        """See `PartitionCost`. Ranks share the shards; on CPUs they also share the cores, which gains nothing."""
        ranks, on_gpu, size = self.ranks, self.on_gpu, self.size
        gathered = sum(size.layer_bytes) + size.other_bytes
        part = -(-size.weight_bytes // ranks)
        ahead = PREFETCHED * size.element_bytes if on_gpu else 0
        largest = max(*size.layer_bytes, size.embedding_bytes)  # twice: as it comes, and put together
        device, host = self.memory(measured, counters, part, more=2 * largest + min(ahead, gathered))
        if not on_gpu:  # while the model is opened, pages of its files, which the system can have back, are there too
            device = max(device, measured.library_bytes + DEEPSPEED_BYTES + part + size.weight_bytes)
        work = self.seconds(measured, measured.costs[WHOLE]) / (ranks if on_gpu else 1)
        link = measured.copy_bytes_per_second * LINK_SHARE * ranks / max(1, ranks - 1)
        exchange = -(-measured.num_batches // ranks) * gathered / (link if on_gpu else measured.gather_bytes_per_second)
        why = "every rank holds a part and gathers one layer at a time"
        why += "; the exchange is modelled, not measured" * on_gpu
        return Usage(device_bytes=device, host_bytes=host, seconds=work + exchange, why=why)


class Zero3Replica(BatchwiseReplica):
    """One rank of a ZeRO-3 model; see `partition.base.Replica`. All ranks open it in a group (`partition.group.join`).

    Raises:
        ConfigError: there is no group, or the checkpoint or the device cannot be partitioned this way.
        ModelError: the model cannot be opened or observed.
    """

    cost = Zero3Cost

    def __init__(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool = False) -> None:
        if checkpoint.gguf:
            raise ConfigError(
                f"'{checkpoint.name}' is a .gguf file: transformers unpacks the whole model in every process, so that "
                "zero3 would save no memory.",
                "Use `partition` single, device_map or tensor_parallel, or convert it to safetensors.",
            )
        require_group(placement)
        self.device = pick_device(settings.device)
        keep_freed_memory()
        text = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
        config = deepspeed_config(compute_dtype(checkpoint, text, settings), self.device)
        with quiet_deepspeed(), reraise_lost_ranks():
            model = _load_in_parts(checkpoint, settings, config, head=head)
            self._module = model
            self._engine = _partition(model, settings, config, head=head)
            backbone = open_module(model, layers=settings.layers, device=self.device)
            if head:
                self.language_model = Zero3LanguageModel(checkpoint, settings, backbone, self.device)
        self._run = forward_function(backbone.module)
        self.layers: tuple[Layer, ...] = backbone.structure.layers
        self.model: Mapping[str, Any] = describe(backbone, "zero3")

    def close(self) -> None:
        """Drop this rank's part of the weights, and DeepSpeed's hooks."""
        from deepspeed.runtime.zero import parameter_offload

        self._engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()
        for parameter in self._module.parameters():  # DeepSpeed keeps references to the modules
            parameter.ds_tensor.data = parameter.data = parameter.data.new_empty(0)
        self.language_model = None
        del self._engine, self._module, self._run, self.layers
        free_device(self.device)


class Zero3LanguageModel(LanguageModel):
    """Language model whose ranks share the batches and all return all results; see `causal_lm.LanguageModel`.

    A rank without a batch runs a dummy while others have one, because collectives wait for all.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reports = distributed.get_rank() == 0
        self._dummy = dummy_batch()

    def pieces(self, number: int) -> list[slice]:
        """See `causal_lm.LanguageModel`. Equally many on all ranks, because each gathers the head; some are empty."""
        mine = super().pieces(number)
        maximum = max(all_gather(len(mine), self.device))
        return mine + [slice(number, number)] * (int(maximum) - len(mine))

    def each(self, function: Callable[[Batch], T], batches: Sequence[Batch]) -> list[T]:
        """See `causal_lm.LanguageModel`."""
        return self._share(batches, function, lambda: function(self._dummy))

    def together(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """See `causal_lm.LanguageModel`."""
        with torch.no_grad():
            return self._share(functions, lambda function: function(), lambda: self.losses(self._dummy))

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[Watcher], *, draws: int = 0, seed: int = 0
    ) -> list[Watcher]:
        """See `causal_lm.LanguageModel`."""
        spare = copy.deepcopy(watchers[0])  # observes dummy passes, and is discarded
        run = partial(super().backpropagate, draws=draws, seed=seed)
        pairs = list(zip(batches, watchers, strict=True))
        return self._share(pairs, lambda pair: run([pair[0]], [pair[1]])[0], lambda: run([batches[0]], [spare]))

    def total(self, counts: list[list[int]]) -> list[list[int]]:
        """See `causal_lm.LanguageModel`."""
        return sum_over_ranks(counts)

    def _share(self, items: Sequence[S], function: Callable[[S], T], dummy: Callable[[], object]) -> list[T]:
        """Return the function's results for all items, each computed by one rank, in order. All ranks call this."""

        def idle() -> None:
            with uncounted():
                dummy()

        return share(function, items, idle)


def deepspeed_config(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the DeepSpeed configuration.

    ``cluster/deepspeed/zero3.json`` is that for bfloat16 on GPUs, explained by the README beside it.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": PREFETCHED if device.type == "cuda" else 0,
            "memory_efficient_linear": False,
        },
    }


def _load_in_parts(checkpoint: Checkpoint, settings: Settings, config: dict[str, Any], *, head: bool) -> Any:
    """Load a model such that a process never holds more than its part and one module; rank 0 maps the files."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    reference = HfDeepSpeedConfig(config)  # transformers refers to it weakly; while it lives, models are built in parts
    try:
        return load_model(checkpoint, settings, head=head)
    except ModelError as error:
        hint = error.hint or "If another `partition` opens it, transformers cannot load this family in parts."
        raise ModelError(f"{error.message} (It was loaded in parts, for zero3.)", hint) from error
    finally:
        unset_hf_deepspeed_config()
        del reference


def _partition(model: Any, settings: Settings, config: dict[str, Any], *, head: bool) -> Any:
    """Hook the backbone, or the whole model, so that parameters are gathered when needed; return the engine.

    A layer is gathered as one, because ranks must gather in the same order and routed experts depend on the data.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules_by_name

    backbone = without_head(model)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = layer_lists(backbone, count, settings.layers)
    set_z3_leaf_modules_by_name(
        backbone, [f"{path}.{i}" for path, modules in lists.items() for i in range(len(modules))]
    )
    try:
        engine, *_ = deepspeed.initialize(model=model if head else backbone, config=config)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"DeepSpeed cannot partition {type(model).__name__}: {error}", "Use another `partition`."
        ) from error
    return engine
