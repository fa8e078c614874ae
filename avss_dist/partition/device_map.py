"""Partition ``device_map``: layers over the GPUs of a process, and the rest in host memory or on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from avss_dist.core.devices import SPARE_SHARE, available_memory
from avss_dist.core.errors import ConfigError, nearest
from avss_dist.core.settings import Settings
from avss_dist.core.text import count_of, describe_bytes
from avss_dist.models.checkpoint.loading import Backbone, load, quiet
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.size import (
    Footprint,
    find_layers,
    footprint,
    load_skeleton,
    parameter_bytes,
    stored_skeleton,
)
from avss_dist.partition.estimate import MemoryQuery, PartitionEstimate, batch_bytes, bytes_beside_weights
from avss_dist.partition.offload import offload_folder
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import Replica

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Device = int | str  # a GPU's index, "cpu" or "disk"


class DeviceMapReplica(Replica):
    """Model whose modules are on the devices of a ``device_map``. See `partition.replica.Replica`.

    ``placement.max_memory`` limits weights; activations come on top. Weights on disk are read for every batch: from the
    checkpoint's own files if these have the compute dtype and layout, else from the offload folder.
    """

    @staticmethod
    def minimum_host_weights(size: Footprint, kind: str, *, head: bool) -> int:
        """Return the bytes of weights that must be in host memory at once: the largest layer on a CPU, otherwise 0."""
        return max(size.layer_bytes, default=0) if kind == "cpu" else 0

    @classmethod
    def usage(cls, query: MemoryQuery) -> PartitionEstimate:
        """Return the memory of a replica, whose layers may be on several devices and on disk."""
        size = query.size
        held, on_disk = spread(query.checkpoint, query.settings, cls._weight_limits(query))
        on_host = held.get("cpu", 0)
        layer = max(size.layer_bytes)
        why = "all in memory"
        if on_disk:
            why = f"{on_disk} of {size.num_layers} layers on disk, read for every batch"
        if not query.on_gpu:
            layer_from_disk = layer if on_disk else 0
            return query.usage(on_host + layer_from_disk, why)
        on_gpus = {gpu: weights for gpu, weights in held.items() if isinstance(gpu, int)}
        number = len(on_gpus)
        if on_host or on_disk:  # layers come to the first GPU, one at a time
            on_gpus[0] = on_gpus.get(0, 0) + layer
        if on_host:
            copied = f"{describe_bytes(on_host)} in host memory, copied for every batch"
            why = f"{copied}; {why}" if on_disk else copied
        return query.usage(max(on_gpus.values()), why, host_weights=on_host, gpus=max(1, number))

    @staticmethod
    def _weight_limits(query: MemoryQuery) -> dict[Device, int]:
        """Return the bytes that weights may take, by device, in the order in which devices are filled."""
        devices = query.devices
        batch = batch_bytes(query.size, query.settings)
        free: dict[Device, int] = {}
        if query.on_gpu:
            free = dict.fromkeys(range(devices.count_of_largest_node), devices.device_bytes)
        free["cpu"] = devices.host_bytes
        limits = {device: max(0, int(room * SPARE_SHARE) - batch) for device, room in free.items()}
        for name, limit in query.max_memory.items():
            if name == "cpu":
                limits["cpu"] = max(0, limit - bytes_beside_weights(query.size, query.settings, devices.kind))
            else:
                limits[int(name)] = max(0, limit - batch)
        return limits

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        model, tensors = load_skeleton(checkpoint, settings)
        stored = [tensor.name for tensor in tensors]
        limits = memory_limits(self.device, checkpoint, settings, placement)
        self.device_map = plan_map(stored_skeleton(checkpoint, model, settings), stored, limits, settings)
        on_disk = [p for name, p in model.named_parameters() if _device_of(name, self.device_map) == "disk"]
        if checkpoint.gguf and on_disk:  # transformers unpacks the file into memory
            raise ConfigError(
                f"{describe_bytes(parameter_bytes(on_disk))} of weights have no place: those of a .gguf file cannot be "
                "on disk.",
                "Allow more `max_memory`, or convert it to safetensors.",
            )
        rewritten = [p for name, p in unstored(model, stored).items() if _device_of(name, self.device_map) == "disk"]
        self._folder = offload_folder(parameter_bytes(rewritten))
        try:
            placing = {"device_map": self.device_map, "offload_folder": self._folder.name}
            backbone = load(checkpoint, settings, self.device, head=head, **placing)
        except BaseException:
            self._folder.cleanup()
            raise
        devices = set(self.device_map.values())
        num_gpus = len(devices - {"cpu", "disk"})
        self._handles = []
        if num_gpus > 1:
            self._handles = [_move_inputs(layer.module) for layer in backbone.layers]
        offloaded_to = devices & {"cpu", "disk"}
        if offloaded_to - {self.device.type}:
            self.no_gradients = (
                "`partition` device_map keeps some of the weights off the devices that compute, and has no gradients "
                "then.",
                "Use `partition` streaming, or give it more memory.",
            )
        # Weights on disk are untied while they are there; the skeleton still knows.
        number = sum(p.numel() for p in model.parameters())
        return replace(backbone, columns={**backbone.columns, "num_parameters": number})

    def close(self) -> None:
        """Drop the weights, Accelerate's hooks and what was written to the offload folder."""
        from accelerate.hooks import remove_hook_from_module

        for handle in self._handles:
            handle.remove()
        remove_hook_from_module(self._backbone.model, recurse=True)
        super().close()
        self._folder.cleanup()


def memory_limits(
    device: torch.device, checkpoint: Checkpoint, settings: Settings, placement: Placement
) -> dict[Device, int]:
    """Return the bytes that weights may take, by device, in the order in which devices are filled.

    A device without a limit has its free memory minus a margin and the activations of a batch.

    Raises:
        ConfigError: a limit names a device that this replica does not have.
    """
    count = 0
    if device.type == "cuda":
        count = torch.cuda.device_count()
    gpus = range(min(count, placement.gpus or count))
    available = [*map(str, gpus), "cpu"]
    for name in placement.max_memory:
        if name not in available:
            wrong = f"'{name}', which is no device"
            if name.isdecimal():
                gpus_here = count_of(len(gpus), "GPU") if gpus else "no GPUs"
                wrong = f"GPU {name}; this replica has {gpus_here}"
            raise ConfigError(f"`max_memory` names {wrong}.", nearest(name, available))
    batch = batch_bytes(footprint(checkpoint, settings), settings)
    limits: dict[Device, int] = {}
    for gpu in gpus:
        free, _ = torch.cuda.mem_get_info(gpu)
        limits[gpu] = placement.max_memory.get(str(gpu), max(0, int(free * SPARE_SHARE) - batch))
    free_on_host = int(available_memory() * SPARE_SHARE)
    if not gpus:
        free_on_host -= batch
    limits["cpu"] = placement.max_memory.get("cpu", max(0, free_on_host))
    return limits


def plan_map(
    model: PreTrainedModel, stored: Iterable[str], limits: Mapping[Device, int], settings: Settings
) -> dict[str, Device]:
    """Return the device of each module of a skeleton: the first device with room for it, with whole layers, else disk.

    On the first device, room for the largest layer is reserved for offloaded ones. Parameters that no file holds, such
    as a pooler that transformers initializes, cannot be on disk.

    Args:
        stored: names of the tensors in the checkpoint's files.
        limits: from `memory_limits`.
    """
    from accelerate import infer_auto_device_map

    first, room = next(iter(limits.items()))
    if parameter_bytes(model.parameters()) <= room:
        return {"": first}
    layers = find_layers(model, settings)
    whole = sorted({type(layer).__name__ for layer in layers})
    with quiet():
        device_map = infer_auto_device_map(model, dict(limits), no_split_module_classes=whole, clean_result=False)
    in_layers = {id(p) for p in layers.parameters()}
    for name, parameter in unstored(model, stored).items():
        module = _entry_of(name, device_map)
        if device_map.get(module) == "disk" and id(parameter) not in in_layers:
            device_map[module] = first
    require_complete(model, device_map)
    return dict(device_map)


def spread(
    checkpoint: Checkpoint, settings: Settings, limits: Mapping[Device, int]
) -> tuple[Mapping[Device, int], int]:
    """Distribute weights by `plan_map`, from headers alone. See it for ``limits``.

    Returns:
        Bytes of weights by device, which is a GPU's index, ``cpu`` or ``disk``, and the number of layers with a weight
        on disk.
    """
    skeleton, tensors = load_skeleton(checkpoint, settings)
    model = stored_skeleton(checkpoint, skeleton, settings)
    device_map = plan_map(model, [tensor.name for tensor in tensors], limits, settings)
    device_of: dict[nn.Parameter, Device] = {}
    for name, parameter in model.named_parameters():
        device_of[parameter] = device_map[_entry_of(name, device_map)]
    held: Counter[Device] = Counter()
    for parameter, device in device_of.items():
        held[device] += parameter_bytes([parameter])
    layers_on_disk = 0
    for layer in find_layers(model, settings):
        if any(device_of[parameter] == "disk" for parameter in layer.parameters()):
            layers_on_disk += 1
    return held, layers_on_disk


def require_complete(model: nn.Module, device_map: Mapping[str, Device]) -> None:
    """Refuse a device map that leaves weights without a device.

    Raises:
        ConfigError: a parameter has no device; the message has the first one and the number of bytes.
    """
    placeless = {name: p for name, p in model.named_parameters() if _device_of(name, device_map) is None}
    if placeless:
        raise ConfigError(
            f"The device map has no place for {describe_bytes(parameter_bytes(placeless.values()))} of weights, "
            f"{next(iter(placeless))} first.",
            "Allow more `max_memory`.",
        )


def _entry_of(name: str, device_map: Mapping[str, Device]) -> str:
    """Return the name of the device map's entry for a parameter or for the nearest module around it."""
    while name and name not in device_map:
        name, _, _ = name.rpartition(".")
    return name


def _device_of(name: str, device_map: Mapping[str, Device]) -> Device | None:
    """Return the device of a parameter, or None if the device map has no place for it."""
    return device_map.get(_entry_of(name, device_map))


def unstored(model: nn.Module, stored: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that no stored tensor is equal to: fused experts, quantized or missing ones.

    Names in the files may have a backbone's prefix that the model's names lack, and vice versa.
    """
    names: set[str] = set()
    for name in stored:
        names |= {name, _without_prefix(name)}
    absent = {}
    for name, parameter in model.named_parameters():
        if name not in names and _without_prefix(name) not in names:
            absent[name] = parameter
    return absent


def _without_prefix(name: str) -> str:
    """Return a name of a tensor without its first part, or an empty string if it has only one."""
    _, _, remainder = name.partition(".")
    return remainder


def _move_inputs(layer: nn.Module) -> RemovableHandle:
    """Register a hook that moves a layer's inputs to its device before any other hook. Return its handle."""
    from accelerate.utils import send_to_device

    def move(
        module: Any, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        device = module._hf_hook.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device)

    return layer.register_forward_pre_hook(move, with_kwargs=True)
