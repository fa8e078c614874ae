"""Training with a model, gradients or an optimizer that are divided among ranks: options of transformers' Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from avss_dist.core.values import NewObject
from avss_dist.partition.catalog import SHARDINGS, ShardingInfo
from avss_dist.partition.group import quiet_deepspeed

BUCKET = 12_500_000  # gradients or weights that DeepSpeed exchanges at once: 50 MB in float32


@contextmanager
def trainer_options(
    sharding: str, kind: str, *, bfloat16: bool, layers: Iterable[str]
) -> Iterator[Mapping[str, object]]:
    """Yield the arguments of the Trainer for a sharding. Inside the context, Accelerate is configured for it.

    On CPUs, Accelerate 1.15 ignores DeepSpeed and FSDP if it is told to use CPUs (its AcceleratorState), and has no
    backend if it is not. So it gets a state with gloo, in which CPUs pass for GPUs where it asks for FSDP.

    Args:
        sharding: a name of `partition.catalog.SHARDINGS`.
        kind: ``cpu`` or ``cuda``.
        layers: names of the classes of the model's layers, which are the units of FSDP.
    """
    from accelerate import DistributedType, PartialState
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    info = SHARDINGS[sharding]
    options: dict[str, object] = {}
    if info.zero_stage:
        options["deepspeed"] = _zero_config(info, bfloat16=bfloat16)
        options["bf16"] = False  # weights stay in float32, and autocast is PyTorch's
    elif info.is_fsdp:
        options["fsdp"] = True
        options["fsdp_config"] = {"transformer_layer_cls_to_wrap": sorted(layers)}
    try:
        if kind == "cpu" and (info.zero_stage or info.is_fsdp):
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ["ACCELERATE_USE_DEEPSPEED"] = str(bool(info.zero_stage)).lower()
            state = PartialState(backend="gloo")
            if info.is_fsdp:
                state.distributed_type = DistributedType.MULTI_GPU
            options["use_cpu"] = False
            options["accelerator_config"] = {"use_configured_state": True}
        with quiet_deepspeed():
            yield options
    finally:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        unset_hf_deepspeed_config()  # or models that are opened later would be partitioned
        AcceleratorState._reset_state(reset_partial_state=True)


def _zero_config(info: ShardingInfo, *, bfloat16: bool) -> NewObject:
    """Return the DeepSpeed configuration of the Trainer for a stage of ZeRO."""
    zero: NewObject = {
        "stage": info.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if info.weights:
        zero |= {
            "stage3_gather_16bit_weights_on_model_save": True,  # in the dtype that they have
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 4 * BUCKET,
        }
    return {
        "train_micro_batch_size_per_gpu": "auto",  # that of the Trainer's arguments
        "gradient_accumulation_steps": 1,
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "torch_autocast": {"enabled": bfloat16, "dtype": "bfloat16"},
    }
