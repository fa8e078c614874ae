"""One model over the GPUs of a process; what has no room there is kept in host memory or on disk, layer by layer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from avss_dist.corpus.shards import Batch
from avss_dist.errors import ConfigError, ModelError, nearest
from avss_dist.models.causal_lm import LanguageModel, Watcher
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer
from avss_dist.models.loading import forward_function, load, without_head
from avss_dist.models.size import Footprint, find_layers, footprint, load_skeleton, token_embeddings
from avss_dist.partition.base import Placement
from avss_dist.partition.batchwise import BatchwiseReplica, describe
from avss_dist.partition.choose import bytes_beside_weights
from avss_dist.partition.cost import Calibration, PartitionCost, Usage
from avss_dist.partition.offload import OffloadFolder
from avss_dist.registry import WHOLE
from avss_dist.settings import Settings
from avss_dist.system.devices import available_memory, free_device, pick_device
from avss_dist.system.memory import keep_freed_memory
from avss_dist.text import describe_bytes

SPARE_SHARE = 0.9  # of free memory that weights may take where there is no limit

Device = int | str  # a GPU's index, "cpu" or "disk"


class DeviceMapCost(PartitionCost):
    """Memory and time of a run with layers over GPUs, host memory and disk."""

    timed_limits = {"cpu": 1}  # noqa: RUF012  (no weight stays in memory: layers on disk are timed)

    @staticmethod
    def minimum_host_weights(size: Footprint, kind: str, *, head: bool) -> int:
        """See `PartitionCost`."""
        return max(size.layer_bytes, default=0) if kind == "cpu" else 0

    @cached_property
    def spread(self) -> Spread:
        """Where a device map would put the weights on this machine."""
        batch = self.size.activation_bytes(self.settings.batch_size, self.settings.sequence_length)
        machine = self.machine
        free: dict[Device, int] = {**dict.fromkeys(range(machine.gpus), machine.device_free), "cpu": machine.host_free}
        limits = {name: max(0, int(room * SPARE_SHARE) - batch) for name, room in free.items()}
        beside = {"cpu": bytes_beside_weights(self.size, self.settings, machine.device)}
        limits |= {
            name if name == "cpu" else int(name): max(0, limit - beside.get(name, batch))
            for name, limit in self.max_memory.items()
        }
        return spread(self.weights, self.settings, limits)

    def is_timed(self) -> bool:
        """See `PartitionCost`. Layers in memory take as long as those of a whole model."""
        return self.spread.layers_on_disk > 0

    def usage(self, measured: Calibration, counters: int) -> Usage:
        """See `PartitionCost`."""
        on_host, on_disk = self.spread.held.get("cpu", 0), self.spread.layers_on_disk
        seconds = self.seconds(measured, measured.costs[WHOLE], self.size.num_layers - on_disk)
        if on_disk:
            seconds += self.seconds(measured, replace(measured.costs[self.partition], rest=0.0), on_disk)
        if on_host and self.machine.gpus:  # copied to a GPU for every batch
            seconds += measured.num_batches * on_host / measured.copy_bytes_per_second
        layer = max(self.size.layer_bytes)
        if self.on_gpu:
            on_gpu = max((size for name, size in self.spread.held.items() if isinstance(name, int)), default=0)
            device, host = self.memory(measured, counters, on_gpu, host_weights=on_host, more=layer)
        else:
            resident = self.resident(measured, on_host, table=self.spread.table == "cpu")
            device, host = self.memory(measured, counters, resident, more=layer if on_disk else 0)
        disk = f"{on_disk} of {self.size.num_layers} layers on disk, read for every batch"
        return Usage(device_bytes=device, host_bytes=host, seconds=seconds, why=disk if on_disk else "all in memory")


class DeviceMapReplica(BatchwiseReplica):
    """See `partition.base.Replica`. ``device_map`` says where each module's weights are.

    ``placement.max_memory`` bounds weights; activations come on top. Weights on disk are read for every batch, from the
    checkpoint's own files where these hold them as they are computed with, else from the offload folder.
    """

    cost = DeviceMapCost

    def __init__(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool = False) -> None:
        self.device = pick_device(settings.device)
        keep_freed_memory()
        _, model, tensors = load_skeleton(checkpoint, settings)
        stored = [tensor.name for tensor in tensors]
        limits = memory_limits(self.device, checkpoint, settings, placement)
        self.device_map = plan_map(model, stored, limits, settings)
        if checkpoint.gguf:
            _refuse_disk(model, self.device_map)
        rewritten = [p for name, p in unstored(model, stored).items() if _place(name, self.device_map)[1] == "disk"]
        self._folder = OffloadFolder(placement.offload_folder, _bytes(rewritten))
        try:
            with _quiet_accelerate():
                placing = {"device_map": self.device_map, "offload_folder": self._folder.path}
                self._backbone = load(checkpoint, settings, self.device, head=head, **placing)
        except BaseException:
            self._folder.remove()
            raise
        self._run = forward_function(self._backbone.module)
        self.layers: tuple[Layer, ...] = self._backbone.structure.layers
        several = len(set(self.device_map.values()) - {"cpu", "disk"}) > 1
        self._handles = [_move_inputs(layer.module) for layer in self.layers] if several else []
        # Weights on disk are untied while they are there; the skeleton still knows.
        tied_once = sum(p.numel() for p in model.parameters())
        self.model: Mapping[str, Any] = describe(self._backbone, "device_map") | {"num_parameters": tied_once}
        if head:
            offloaded = bool({"cpu", "disk"} & set(self.device_map.values()) - {self.device.type})
            self.language_model = DeviceMapLanguageModel(
                checkpoint, settings, self._backbone, self.device, offloaded=offloaded
            )

    def close(self) -> None:
        """Drop the weights, Accelerate's hooks and what was written to the offload folder."""
        from accelerate.hooks import remove_hook_from_module

        for handle in self._handles:
            handle.remove()
        remove_hook_from_module(self._backbone.model, recurse=True)
        self.language_model = None
        del self._backbone, self._run, self.layers, self._handles
        self._folder.remove()
        free_device(self.device)


class DeviceMapLanguageModel(LanguageModel):
    """See `causal_lm.LanguageModel`. Where weights are kept elsewhere, they are gone when gradients would need them."""

    def __init__(self, *args: Any, offloaded: bool) -> None:
        super().__init__(*args)
        self._offloaded = offloaded

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[Watcher], *, draws: int = 0, seed: int = 0
    ) -> list[Watcher]:
        """See `causal_lm.LanguageModel`."""
        if self._offloaded:
            raise ModelError(
                "`partition` device_map keeps some of the weights off the devices that compute, and has no gradients "
                "then.",
                "Use `partition` streaming, or give it more memory.",
            )
        return super().backpropagate(batches, watchers, draws=draws, seed=seed)


def memory_limits(
    device: torch.device, checkpoint: Checkpoint, settings: Settings, placement: Placement
) -> dict[Device, int]:
    """Return the bytes that weights may take, by device, in the order in which devices are filled.

    A device for which no limit was given has what is free on it, less a margin and the activations of a batch.

    Raises:
        ConfigError: a limit was given for a device that is not here.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    gpus = range(min(count, placement.gpus or count))
    here = [*map(str, gpus), "cpu"]
    for name in placement.max_memory:
        if name != "cpu" and not name.isdecimal():
            raise ConfigError(f"`max_memory` names '{name}', which is no device.", nearest(name, here))
        if name not in here:
            raise ConfigError(
                f"`max_memory` names GPU {name}; this replica has {len(gpus) or 'no'} GPU{'s' * (len(gpus) != 1)}.",
                f"Valid: {', '.join(here)}.",
            )
    batch = footprint(checkpoint, settings).activation_bytes(settings.batch_size, settings.sequence_length)
    free = {str(gpu): int(torch.cuda.mem_get_info(gpu)[0] * SPARE_SHARE) - batch for gpu in gpus}
    free["cpu"] = int(available_memory() * SPARE_SHARE) - (0 if free else batch)
    limits = {name: placement.max_memory.get(name, max(0, free[name])) for name in here}
    return {name if name == "cpu" else int(name): size for name, size in limits.items()}


def plan_map(model: Any, stored: Iterable[str], limits: Mapping[Device, int], settings: Settings) -> dict[str, Device]:
    """Return the device of each module of a skeleton: the first device with room, layers whole, the rest on disk.

    On the device that computes, room for the largest layer is left for those that come from elsewhere. What no file
    holds, such as a pooler that transformers makes up, cannot be on disk.

    Args:
        stored: names of the tensors in the checkpoint's files.
        limits: from `memory_limits`.
    """
    from accelerate import infer_auto_device_map

    first, room = next(iter(limits.items()))
    if _bytes(model.parameters()) <= room:
        return {"": first}
    layers = find_layers(without_head(model), model.config.get_text_config(), settings)
    whole = sorted({type(layer).__name__ for layer in layers})
    with _quiet_accelerate():
        device_map = infer_auto_device_map(model, dict(limits), no_split_module_classes=whole, clean_result=False)
    in_layers = {id(p) for p in layers.parameters()}
    for name, parameter in unstored(model, stored).items():
        module, device = _place(name, device_map)
        if device == "disk" and id(parameter) not in in_layers:
            device_map[module] = first
    require_complete(model, device_map)
    return dict(device_map)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Where the weights of a model go.

    Attributes:
        held: bytes of weights by device: a GPU's index, ``cpu``, ``disk``.
        layers_on_disk: layers of which a weight is on disk.
        table: the device that has the token embeddings; None where transformers knows none.
    """

    held: Mapping[Device, int]
    layers_on_disk: int
    table: Device | None


def spread(checkpoint: Checkpoint | str, settings: Settings, limits: Mapping[Device, int]) -> Spread:
    """Return the result of `plan_map`, from headers alone; ``limits`` as it takes them."""
    _, model, tensors = load_skeleton(checkpoint, settings)
    device_map = plan_map(model, [tensor.name for tensor in tensors], limits, settings)
    places = {id(p): _place(name, device_map)[1] for name, p in model.named_parameters()}
    held: Counter[Device] = Counter()
    for parameter in model.parameters():
        held[places[id(parameter)] or "cpu"] += _bytes([parameter])
    layers = find_layers(without_head(model), model.config.get_text_config(), settings)
    on_disk = sum(any(places[id(p)] == "disk" for p in layer.parameters()) for layer in layers)
    embeddings = token_embeddings(model)
    table = places.get(id(embeddings.weight)) if embeddings else None
    return Spread(held=held, layers_on_disk=on_disk, table=table)


def require_complete(model: nn.Module, device_map: Mapping[str, Device]) -> None:
    """Refuse a map that leaves weights without a place.

    Raises:
        ConfigError: it does; the message says which and how much.
    """
    placeless = {name: p for name, p in model.named_parameters() if _place(name, device_map)[1] is None}
    if placeless:
        raise ConfigError(
            f"The device map has no place for {describe_bytes(_bytes(placeless.values()))} of weights, "
            f"{next(iter(placeless))} first.",
            "Allow more `max_memory`.",
        )


def _refuse_disk(model: nn.Module, device_map: Mapping[str, Device]) -> None:
    """Refuse weights on disk: transformers unpacks a .gguf file when it is loaded, and keeps it in memory."""
    left = [p for name, p in model.named_parameters() if _place(name, device_map)[1] == "disk"]
    if left:
        raise ConfigError(
            f"{describe_bytes(_bytes(left))} of weights have no place: those of a .gguf file cannot be on disk.",
            "Allow more `max_memory`, or convert it to safetensors.",
        )


def _place(name: str, device_map: Mapping[str, Device]) -> tuple[str, Device | None]:
    """Return the map's entry of a parameter, or of the nearest module around it, and the device."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return name, device_map.get(name)


def unstored(model: nn.Module, stored: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that are not stored as they are: fused experts, quantized or missing ones.

    A file's names may have the prefix of a backbone that the model's have not, or the other way round.
    """
    known = {part for name in stored for part in (name, name.partition(".")[2])}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name not in known and name.partition(".")[2] not in known
    }


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _move_inputs(layer: nn.Module) -> Any:
    """Move a layer's inputs to its device before any other hook sees them: it then observes both on one device."""
    from accelerate.utils import send_to_device

    def move(module: Any, args: Any, kwargs: Any) -> Any:
        device = module._hf_hook.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device)

    return layer.register_forward_pre_hook(move, with_kwargs=True)


@contextmanager
def _quiet_accelerate() -> Iterator[None]:
    """Without its warning that some weights are offloaded, which is intended."""
    logger = logging.getLogger("accelerate")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
