"""A training with FSDP in a group of ranks, and its checkpoint as Accelerate writes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from support.checkpoints import VOCABULARY, llama


def train_and_save(whole: Path, target: Path) -> list[str]:
    """Train a small Llama for two steps with FSDP 2, and write its checkpoint twice.

    Accelerate itself shards models only on accelerators. Its functions that save take any sharded model, and are those
    that the Trainer calls.

    Args:
        whole: folder for the weights and the configuration as safetensors, which rank 0 writes.
        target: folder for the pieces of the model and of the optimizer.

    Returns:
        The classes of the weights that this rank has.
    """
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    rank = torch.distributed.get_rank()
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    for _ in range(2):
        tokens = torch.randint(VOCABULARY, (2, 16))
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    PartialState(cpu=True)  # Accelerate logs what it saves, which needs this state.
    accelerator = SimpleNamespace(process_index=rank, num_processes=torch.distributed.get_world_size())
    save_fsdp_model(plugin, accelerator, model, str(target))
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(target))
    PartialState._reset_state()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        unsharded = llama()
        unsharded.load_state_dict(state)
        unsharded.save_pretrained(whole)
    torch.distributed.barrier()
    return sorted({type(parameter).__name__ for parameter in model.parameters()})
