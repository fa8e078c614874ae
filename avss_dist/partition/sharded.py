"""Ranks that each hold a part of every parameter: to measure, and, in the form of transformers' Trainer, to train.

``zero3`` and ``fsdp`` measure with it: ranks gather a layer at a time, measure different shards, and share the batches
of a part of a task.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

from avss_dist.core.errors import ConfigError
from avss_dist.core.registry import SHARDINGS
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import Watcher
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.quantization import quantization_method
from avss_dist.models.size import Footprint, load_skeleton
from avss_dist.partition.group import (
    DividedLanguageModel,
    all_gather,
    quiet_deepspeed,
    share,
)
from avss_dist.partition.memory import PartitionMemory, Usage
from avss_dist.partition.replica import dummy_batch

S = TypeVar("S")
T = TypeVar("T")
PREFETCHED = 50_000_000  # parameters that are gathered ahead, on GPUs, beside the arithmetic; DeepSpeed's own default


class ShardedMemory(PartitionMemory):
    """Memory of a replica whose ranks hold parts of the parameters and gather one layer at a time."""

    @staticmethod
    def minimum_rank_weights(size: Footprint, ranks: int) -> int:
        """Return the bytes of weights that each rank must hold at once.

        A gathered module is there twice: as it comes, and put together.
        """
        return -(-size.weight_bytes // ranks) + 2 * max(*size.layer_bytes, size.embedding_bytes)

    @staticmethod
    def require_ranks(partition: str, weights: Checkpoint | str, settings: Settings, ranks: int) -> None:
        """Refuse a model of which every rank would hold the whole, or whose parts cannot be gathered.

        Raises:
            ConfigError: the checkpoint is a .gguf file, or its weights stay in MXFP4, whose kernels need them in a form
                that is no longer a parameter.
        """
        checkpoint = weights if isinstance(weights, Checkpoint) else load_skeleton(weights, settings)[0]
        if checkpoint.gguf:
            raise ConfigError(
                f"'{checkpoint.name}' is a .gguf file: transformers unpacks the whole model in every process, so that "
                f"{partition} would save no memory.",
                "Use `partition` single, device_map or tensor_parallel, or convert it to safetensors.",
            )
        _, model, _ = load_skeleton(weights, settings)
        if quantization_method(model.config) == "mxfp4" and not settings.dequantize:
            raise ConfigError(
                f"'{checkpoint.name}' is quantized (mxfp4): transformers arranges such weights for its kernels as it "
                f"loads them, so that ranks of {partition} cannot gather them.",
                "Set `dequantize`, or use `partition` single, device_map or expert_parallel.",
            )

    def host_weights(self) -> int:
        """Return the bytes of weights that each process holds in host memory while the model is opened on a GPU."""
        return 0

    def usage(self) -> Usage:
        """Return the memory of a replica, with the weights that each rank holds and gathers."""
        weights = self.minimum_rank_weights(self.size, self.ranks)
        if self.on_gpu:
            gathered = sum(self.size.layer_bytes) + self.size.other_bytes
            weights += min(PREFETCHED * self.size.element_bytes, gathered)
        why = "every rank holds a part and gathers one layer at a time"
        return self.process_usage(weights, why, host_weights=self.host_weights())


class ShardedLanguageModel(DividedLanguageModel):
    """Language model whose ranks share the batches and all return all results. See `causal_lm.LanguageModel`.

    A rank without a batch runs a dummy while others have one, because collectives wait for all.
    """

    weights_stay = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lockstep = self._split.ranks
        self._dummy = dummy_batch()

    def pieces(self, number: int) -> list[slice]:
        """Return slices of ``number`` tokens, equally many on all ranks, because each gathers the head.

        Some are empty.
        """
        mine = super().pieces(number)
        return mine + [slice(number, number)] * (max(all_gather(len(mine))) - len(mine))

    def each(self, function: Callable[[Batch], T], batches: Sequence[Batch]) -> list[T]:
        """Return the result of a function for every batch, each computed by one rank."""
        return share(function, batches, lambda: function(self._dummy))

    def together(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of functions that run the model, each computed by one rank."""
        with torch.no_grad():
            return share(lambda function: function(), functions, lambda: self.losses(self._dummy))

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[Watcher], *, draws: int = 0, seed: int = 0
    ) -> list[Watcher]:
        """Run a forward and a backward pass of each batch, each on one rank, and return the watchers of all batches.

        See `causal_lm.LanguageModel.backpropagate`.
        """
        spare = copy.deepcopy(watchers[0])  # observes dummy passes, and is discarded
        run = partial(super().backpropagate, draws=draws, seed=seed)
        pairs = list(zip(batches, watchers, strict=True))
        return share(lambda pair: run([pair[0]], [pair[1]])[0], pairs, lambda: run([batches[0]], [spare]))

    def value(self, layer: int, path: str) -> torch.Tensor:
        """Return a whole parameter of a layer, gathered from the ranks, which must all call this."""
        value = super().value(layer, path)
        if isinstance(value, DTensor):
            return value.full_tensor()
        from deepspeed.runtime.zero import GatheredParameters

        parameter = self.layers[layer].module.get_parameter(path)
        with GatheredParameters([parameter]):  # of those that DeepSpeed has divided
            return parameter.detach().clone()


BUCKET = 12_500_000  # gradients or weights that DeepSpeed exchanges at once: 50 MB in float32


@contextmanager
def trainer_options(
    sharding: str, kind: str, *, rows: int, bfloat16: bool, layers: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Yield the arguments of the Trainer for a sharding. Inside the context, Accelerate is configured for it.

    On CPUs, Accelerate 1.15 ignores DeepSpeed and FSDP if it is told to use CPUs (its AcceleratorState), and has no
    backend if it is not. So it gets a state with gloo, in which CPUs pass for GPUs where it asks for FSDP.

    Args:
        sharding: a name of `registry.SHARDINGS`.
        kind: ``cpu`` or ``cuda``.
        rows: rows of a training step on each rank.
        layers: names of the classes of the model's layers, which are the units of FSDP.
    """
    from accelerate import DistributedType, PartialState
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    info = SHARDINGS[sharding]
    options: dict[str, Any] = {"per_device_train_batch_size": rows}
    if info.zero_stage:
        zero: dict[str, Any] = {"stage": info.zero_stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        if info.weights:
            zero |= {
                "stage3_gather_16bit_weights_on_model_save": True,  # in the dtype that they have
                "stage3_prefetch_bucket_size": BUCKET,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 4 * BUCKET,
            }
        config = {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": "auto",
            "zero_optimization": zero,
            "torch_autocast": {"enabled": bfloat16, "dtype": "bfloat16"},
        }
        options |= {"deepspeed": config, "bf16": False}  # weights stay in float32, and autocast is PyTorch's
    elif info.is_fsdp:
        options |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": sorted(layers)}}
    try:
        if kind == "cpu" and (info.zero_stage or info.is_fsdp):
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ["ACCELERATE_USE_DEEPSPEED"] = str(bool(info.zero_stage)).lower()
            state = PartialState(backend="gloo")
            if info.is_fsdp:
                state.distributed_type = DistributedType.MULTI_GPU
            options |= {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
        with quiet_deepspeed():
            yield options
    finally:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        unset_hf_deepspeed_config()  # or models that are opened later would be partitioned
        AcceleratorState._reset_state(reset_partial_state=True)
