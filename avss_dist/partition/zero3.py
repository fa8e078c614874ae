"""Partition ``zero3``: each rank holds a part of every parameter (DeepSpeed ZeRO-3) and takes its own data.

All ranks gather a layer's parameters when it begins and drop them when it ends, so all run equally many forward passes.
"""

from __future__ import annotations

from typing import Any

import torch

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import (
    Backbone,
    candidate_layers,
    compute_dtype,
    load_model,
    open_module,
    text_config,
    without_head,
)
from avss_dist.models.quantization import quantization_method
from avss_dist.models.size import load_skeleton
from avss_dist.partition.group import quiet_deepspeed, require_group
from avss_dist.partition.replica import Placement, Replica
from avss_dist.partition.sharded import PREFETCHED, ShardedLanguageModel, ShardedMemory


class Zero3Memory(ShardedMemory):
    """Memory of a replica with ZeRO-3. See `sharded.ShardedMemory`."""

    def host_weights(self) -> int:
        """Return the bytes of weights that each process holds in host memory while the model is opened on a GPU.

        transformers loads quantized weights whole, unpacked or not, before ranks keep parts.
        """
        _, model, _ = load_skeleton(self.weights, self.settings)
        return self.size.weight_bytes if self.on_gpu and quantization_method(model.config) else 0


class Zero3Replica(Replica):
    """One rank of a ZeRO-3 model. See `partition.replica.Replica`. All ranks open it in a group (`group.join`)."""

    memory = Zero3Memory

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        self.memory.require_ranks(placement.partition, checkpoint, settings, placement.ranks)
        require_group(placement.partition, placement.ranks)
        self.language_model_type = ShardedLanguageModel
        text = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
        config = deepspeed_config(compute_dtype(checkpoint, text, settings), self.device)
        with quiet_deepspeed():
            self._module = _load_in_parts(checkpoint, settings, config, head=head)
            self._engine = _partition(self._module, settings, config, head=head)
            return open_module(self._module, layers=settings.layers, device=self.device)

    def close(self) -> None:
        """Drop this rank's part of the weights, and DeepSpeed's hooks."""
        from deepspeed.runtime.zero import parameter_offload

        self._engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()
        for parameter in self._module.parameters():  # DeepSpeed keeps references to the modules
            parameter.data = parameter.data.new_empty(0)
            if hasattr(parameter, "ds_tensor"):  # not the unused head of a model that was loaded whole
                parameter.ds_tensor.data = parameter.data
        del self._engine, self._module
        super().close()


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
    """Load a model such that a process never holds more than its part and one module. Rank 0 maps the files."""
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
    """Hook the backbone, or the whole model, so that parameters are gathered when needed. Return the engine.

    A layer is gathered as one, because ranks must gather in the same order and routed experts depend on the data.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules_by_name

    backbone = without_head(model)
    lists = candidate_layers(model, settings.layers)
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
