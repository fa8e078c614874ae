"""Partitions ``fsdp`` (PyTorch FSDP2) and ``zero3`` (DeepSpeed ZeRO-3): each rank holds a part of every parameter.

All ranks gather a layer's parameters when it begins and drop them when it ends, so all run equally many forward passes.
They measure different shards, and share the batches of a part of a task.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.values import NewObject
from avss_dist.corpus.shards import Batch
from avss_dist.models.checkpoint.loading import (
    Backbone,
    candidate_layers,
    compute_dtype,
    load_model,
    open_module,
    predictor,
    text_config,
    without_head,
)
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.quantization import quantization_method
from avss_dist.models.checkpoint.size import Footprint, load_skeleton
from avss_dist.models.gradients import WatcherT
from avss_dist.models.structure.layers import probe_tokens
from avss_dist.partition.device_map import unstored
from avss_dist.partition.estimate import MemoryQuery, PartitionEstimate
from avss_dist.partition.group import RankedLanguageModel, all_gather, quiet_deepspeed, share
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import Replica, dummy_batch
from avss_dist.partition.splitting import generic_name, layer_modules, require_version, scale_obstacle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
PREFETCHED = 50_000_000  # parameters that are gathered ahead, on GPUs, beside the arithmetic; DeepSpeed's own default


class ShardedLanguageModel(RankedLanguageModel):
    """Language model whose ranks share the batches and all return all results. See `causal_lm.LanguageModel`.

    A rank without a batch runs a dummy while others have one, because collectives wait for all.
    """

    weights_stay = False

    def __init__(self, checkpoint: Checkpoint, settings: Settings, backbone: Backbone, device: torch.device) -> None:
        super().__init__(checkpoint, settings, backbone, device)
        self.lockstep = self._split.ranks
        self._dummy = dummy_batch()  # the same in all passes: functions may look up what they recorded of a batch

    def pieces(self, number: int) -> list[slice]:
        """Return slices of ``number`` tokens, equally many on all ranks, because each gathers the head.

        Some are empty.
        """
        pieces = super().pieces(number)
        most = max(all_gather(len(pieces)))
        while len(pieces) < most:
            pieces.append(slice(number, number))
        return pieces

    def each(self, function: Callable[[Batch], T], batches: Sequence[Batch], activity: str = "Reading text") -> list[T]:
        """Return the result of a function for every batch, each computed by one rank."""
        return share(function, batches, lambda: function(self._dummy))

    def together(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of functions that run the model, each computed by one rank."""
        with torch.no_grad():
            return share(lambda function: function(), functions, lambda: self.losses(self._dummy))

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[WatcherT], *, draws: int = 0, seed: int = 0
    ) -> list[WatcherT]:
        """Run a forward and a backward pass of each batch, each on one rank, and return the watchers of all batches.

        Layers do not run again. See `causal_lm.LanguageModel.backpropagate`.
        """
        backpropagate = super().backpropagate

        def run(batch: Batch, watcher: WatcherT) -> WatcherT:
            (watched,) = backpropagate([batch], [watcher], draws=draws, seed=seed)
            return watched

        spare = copy.deepcopy(watchers[0])  # observes dummy passes, and is discarded
        pairs = list(zip(batches, watchers, strict=True))
        return share(lambda pair: run(*pair), pairs, lambda: run(batches[0], spare))

    def value(self, layer: int, path: str) -> torch.Tensor:
        """Return a whole parameter of a layer, gathered from the ranks, which must all call this."""
        value = super().value(layer, path)
        if isinstance(value, DTensor):
            return value.full_tensor()
        from deepspeed.runtime.zero import GatheredParameters

        parameter = self.layers[layer].module.get_parameter(path)
        with GatheredParameters([parameter]):  # of those that DeepSpeed has divided
            return parameter.detach().clone()


class ShardedReplica(Replica):
    """One rank of a model of which each rank holds a part of every parameter. All open it in a group (`group.join`).

    Attributes:
        loads_quantized_whole: whether each process of a GPU has quantized weights whole in host memory, unpacked or
            not, while the model is opened.
    """

    language_model_type = ShardedLanguageModel
    loads_quantized_whole = False

    @staticmethod
    def minimum_rank_weights(size: Footprint, ranks: int) -> int:
        """Return the bytes of weights that each rank must hold at once.

        A gathered module is there twice: as it comes, and put together.
        """
        part = math.ceil(size.weight_bytes / ranks)
        return part + 2 * max(*size.layer_bytes, size.embedding_bytes)

    @staticmethod
    def require_ranks(partition: str, checkpoint: Checkpoint, settings: Settings, ranks: int) -> None:
        """Refuse a model of which every rank would hold the whole, or whose parts cannot be gathered.

        Raises:
            ConfigError: the checkpoint is a .gguf file, or its weights stay in MXFP4, whose kernels need them in a form
                that is no longer a parameter.
        """
        if checkpoint.gguf:
            raise ConfigError(
                f"'{checkpoint.name}' is a .gguf file: transformers unpacks the whole model in every process, so that "
                f"{partition} would save no memory.",
                "Use `partition` single, device_map or tensor_parallel, or convert it to safetensors.",
            )
        model, _ = load_skeleton(checkpoint, settings)
        if quantization_method(model.config) == "mxfp4" and not settings.dequantize:
            raise ConfigError(
                f"'{checkpoint.name}' is quantized (mxfp4): transformers arranges such weights for its kernels as it "
                f"loads them, so that ranks of {partition} cannot gather them.",
                "Set `dequantize`, or use `partition` single, device_map or expert_parallel.",
            )

    @classmethod
    def usage(cls, query: MemoryQuery) -> PartitionEstimate:
        """Return the memory of a replica, with the weights that each rank holds and gathers."""
        size = query.size
        weights = cls.minimum_rank_weights(size, query.ranks)
        if query.on_gpu:
            weights += min(PREFETCHED * size.element_bytes, sum(size.layer_bytes) + size.other_bytes)
        host_weights = 0
        if query.on_gpu and cls.loads_quantized_whole:
            model, _ = load_skeleton(query.checkpoint, query.settings)
            if quantization_method(model.config):
                host_weights = size.weight_bytes
        return query.usage(
            weights, "every rank holds a part and gathers one layer at a time", host_weights=host_weights
        )


class FsdpReplica(ShardedReplica):
    """One rank of an FSDP2 model, which reads its part of every tensor from the files."""

    @staticmethod
    def require_ranks(partition: str, checkpoint: Checkpoint, settings: Settings, ranks: int) -> None:
        """Refuse a model of which transformers cannot load parts on so many ranks. See `ShardedReplica`.

        Raises:
            ConfigError: the installed transformers is too old; a rank would have none of the experts of a layer that
                the files store one by one; or ranks would unpack parts of blocks in FP8.
        """
        ShardedReplica.require_ranks(partition, checkpoint, settings, ranks)
        require_version()
        model, tensors = load_skeleton(checkpoint, settings)
        for stack in unstored(model, [tensor.name for tensor in tensors]).values():
            if stack.dim() != 3:
                continue
            experts = len(stack)
            first_of_last_rank = math.ceil(experts / ranks) * (ranks - 1)
            if first_of_last_rank >= experts:
                raise ConfigError(
                    f"`partition` fsdp would leave one of {ranks} ranks without any of the {experts} experts of a "
                    "layer, which transformers cannot load where files have them one by one.",
                    f"Set `ranks` to a divisor of {experts}, or use `partition` zero3.",
                )
        if obstacle := scale_obstacle(checkpoint, settings, {"fsdp_size": ranks}):
            raise ConfigError(
                f"`partition` fsdp cannot unpack the weights: {obstacle}.",
                "Set `ranks` to a smaller number, leave out `dequantize`, or use `partition` streaming.",
            )

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        from torch.distributed.fsdp import FSDPModule
        from transformers.distributed import DistributedConfig

        skeleton, _ = load_skeleton(checkpoint, settings)
        plan = gathering_plan(skeleton, settings.layers)
        parts = DistributedConfig(fsdp_size=placement.ranks, fsdp_plan=plan)
        model = load_model(checkpoint, settings, head=head, distributed_config=parts)
        for module in model.modules():
            # The model itself and tied embeddings would keep their weights after they ran.
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(True, recurse=False)
                type(module).__name__ = type(module).__name__.removeprefix("FSDP")
        if head:  # FSDP2 refuses a module that first runs after those inside it
            with torch.no_grad():
                predictor(model)(input_ids=probe_tokens(self.device), use_cache=False)
        return open_module(model, layers=settings.layers, device=self.device)


def gathering_plan(model: PreTrainedModel, layers: str | None) -> dict[str, str]:
    """Return transformers' plan for FSDP2 in which each layer, and each other module with weights, is gathered alone.

    Embeddings that are tied to the head are gathered with the backbone: two modules share their weights, and each part
    of the model that runs must gather them itself.

    Args:
        model: the model with its head, on any device.
        layers: module path of the layer list in the backbone; None finds it.
    """
    gathered = {*layer_modules(model, layers), without_head(model)}
    elsewhere: set[torch.nn.Module] = set()  # modules whose weights are gathered with those of another module
    for layer in layer_modules(model, layers):
        elsewhere.update(module for module in layer.modules() if module is not layer)
    if model.all_tied_weights_keys:
        elsewhere.add(model.get_input_embeddings())
    plan = {}
    for path, module in model.named_modules():
        if not path or module in elsewhere:
            continue
        if module in gathered or list(module.parameters(recurse=False)):
            plan[generic_name(path)] = "free_full_weight"  # gathered while it runs
    return plan


class Zero3Replica(ShardedReplica):
    """One rank of a ZeRO-3 model."""

    loads_quantized_whole = True

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        dtype = compute_dtype(checkpoint, text_config(checkpoint), settings)
        config = deepspeed_config(dtype, self.device)
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


def deepspeed_config(dtype: torch.dtype, device: torch.device) -> NewObject:
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


def _load_in_parts(checkpoint: Checkpoint, settings: Settings, config: NewObject, *, head: bool) -> PreTrainedModel:
    """Load a model such that a process never holds more than its part and one module. Rank 0 maps the files."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # While this object lives, models are built in parts. transformers refers to it weakly.
    reference = HfDeepSpeedConfig(config)
    try:
        return load_model(checkpoint, settings, head=head)
    except ModelError as error:
        hint = error.hint or "If another `partition` opens it, transformers cannot load this family in parts."
        raise ModelError(f"{error.message} (It was loaded in parts, for zero3.)", hint) from error
    finally:
        unset_hf_deepspeed_config()
        del reference


def _partition(model: PreTrainedModel, settings: Settings, config: NewObject, *, head: bool) -> Any:
    """Hook the backbone, or the whole model, so that parameters are gathered when needed. Return the engine.

    A layer is gathered as one, because ranks must gather in the same order and routed experts depend on the data.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules_by_name

    backbone = without_head(model)
    layer_names: list[str] = []
    for path, modules in candidate_layers(model, settings.layers).items():
        layer_names += [f"{path}.{index}" for index in range(len(modules))]
    set_z3_leaf_modules_by_name(backbone, layer_names)
    try:
        engine, *_ = deepspeed.initialize(model=model if head else backbone, config=config)
        return engine
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"DeepSpeed cannot partition {type(model).__name__}: {error}", "Use another `partition`."
        ) from error
