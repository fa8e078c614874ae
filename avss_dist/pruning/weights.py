"""Weights of a pruned checkpoint: tensors are copied from file to file and renumbered, and some are replaced.

Experts are stored one by one, in tensors with their index in the name, or all in one tensor with a row for each.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.experts import RoutedExperts, require_routed_experts
from avss_dist.models.interventions import Parameter, Patch
from avss_dist.models.loading import renaming, skeleton, text_config, without_head
from avss_dist.models.safetensors import (
    StoredTensor,
    copy_tensors,
    read_tensor,
    tensors_of,
)
from avss_dist.models.weight_files import weight_files
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.selection import PlanError
from avss_dist.warehouse.reader import grouped

_EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)(|\..*)")
_FUSED = re.compile(r"(?:.*\.)?experts\.[^.]+")


@dataclass(frozen=True)
class LayerNames:
    """Names of a plan's layers in a model and in its files.

    Attributes:
        lists: paths of the layer list in the whole model, and in its files if they differ.
        modules: paths of the whole model's modules.
        routed: routed experts of the layers that lose some.
    """

    plan: Plan
    lists: tuple[str, ...]
    modules: Sequence[str] = ()
    routed: Mapping[int, RoutedExperts] = field(default_factory=dict)

    @classmethod
    def of_model(cls, model: Any, plan: Plan, *stored: str) -> LayerNames:
        """Return the names in a model, which may be on the meta device, and in files.

        Args:
            stored: path of the layer list in the files.

        Raises:
            PlanError: an expert cannot be dropped; the message has the layer and the reason.
        """
        path, modules = list_path(model, plan), dict(model.named_modules())
        layers, routed = modules.get(path), {}
        if isinstance(layers, nn.ModuleList) and len(layers) == plan.num_layers:  # or else it is refused later
            try:
                routed = {
                    layer: require_routed_experts(layers[layer], layer, removed)
                    for layer, removed in plan.experts.items()
                }
            except ModelError as error:
                raise PlanError(error.message, error.hint) from error
        return cls(plan, (path, *stored), [name for name in modules if name], routed)

    def renumbered(self, name: str) -> str | None:
        """Return the name of a module or tensor in the pruned model, or None if its layer or expert is dropped.

        Names may begin below or above the model. Layers of another tower keep their names.
        """
        split = self._split(name)
        return renumbered(name, split[0], self.plan) if split else name

    def remaining_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor in the pruned model, which may have a row for each expert."""
        _, layer, inside = self._split(name) or (None, None, "")
        if layer is None or (experts := self.routed.get(layer)) is None:
            return shape
        return experts.shape_without(inside, shape, len(self.plan.experts[layer]))

    def _split(self, name: str) -> tuple[str, int, str] | None:
        """Return the path of the layer list in a name, the layer, and the path below it, or None for names outside."""
        parts = name.split(".")
        for place, part in enumerate(parts):
            path = ".".join(parts[:place])
            lists = (f".{layers}" for layers in self.lists)
            if (
                place
                and part.isdecimal()
                and any(f".{path}".endswith(end) or end.endswith(f".{path}") for end in lists)
            ):
                return path, int(part), ".".join(parts[place + 1 :])
        return None


@dataclass(frozen=True)
class StoredWeights:
    """Tensors of a checkpoint's files. Those of layers are named ``{prefix}.{layer}.{path}``.

    Attributes:
        tensors: tensors by name.
        prefix: name of the layer list in the files.
        layers: names of the layers, and the plan whose layers and experts are dropped.
        rows: rows of the remaining experts, by the name of each tensor that has a row for each expert.
        experts: names of the tensors of each parameter that holds all experts of a layer in the model: one with a row
            for each expert, or one for each expert, in their order.
    """

    tensors: Mapping[str, StoredTensor]
    prefix: str
    layers: LayerNames
    rows: Mapping[str, tuple[int, ...]]
    experts: Mapping[Parameter, tuple[str, ...]]

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, plan: Plan, settings: Settings) -> StoredWeights:
        """Read the headers of a checkpoint's files.

        Raises:
            PlanError: it is unclear which tensors are the plan's layers or experts, or an expert cannot be dropped.
            ModelError: a file cannot be read.
        """
        stored = {tensor.name: tensor for file in weight_files(checkpoint.folder) for tensor in tensors_of(file)}
        model = skeleton(text_config(checkpoint), settings, torch.float32)
        prefix = _stored_prefix(checkpoint, plan, stored, model)
        layers = LayerNames.of_model(model, plan, prefix)
        rows, experts = _find_experts(checkpoint, layers, stored, model)
        return cls(stored, prefix, layers, rows, experts)

    def names(self, parameter: Parameter) -> tuple[str, ...]:
        """Return the names of the tensors that hold a layer's parameter: one, or one for each expert in order."""
        return self.experts.get(parameter, (f"{self.prefix}.{parameter[0]}.{parameter[1]}",))

    def read(self, parameter: Parameter) -> torch.Tensor | None:
        """Read a layer's parameter as it is stored. Return None if the files have none of its name and one dtype."""
        names = self.names(parameter)
        stored = [self.tensors[name] for name in names if name in self.tensors]
        if len(stored) < len(names) or len({tensor.dtype for tensor in stored}) > 1:
            return None
        values = [*map(read_tensor, stored)]
        return values[0] if len(values) == 1 else torch.stack(values)


def _stored_prefix(checkpoint: Checkpoint, plan: Plan, names: Iterable[str], model: Any) -> str:
    """Return the name of the layer list in the files. Transformers may rename tensors when it loads them.

    It is the only part of names before the index of a layer that stands with the index of every layer.

    Raises:
        PlanError: it is unclear.
    """
    (rename, *_), target = renaming(model), re.compile(rf"{re.escape(list_path(model, plan))}\.(\d+)\.")
    indices: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := target.match(rename(name)):
            for place in re.finditer(rf"\.{match[1]}\.", name):
                indices[name[: place.start()]].add(int(match[1]))
    prefixes = [prefix for prefix, layers in indices.items() if layers == {*range(plan.num_layers)}]
    if len(prefixes) != 1:
        raise PlanError(
            f"It is unclear which stored tensors of '{checkpoint.name}' are layers of '{plan.layers}': "
            f"{', '.join(prefixes) or 'no names'} would fit.",
            "Save the checkpoint again with transformers' save_pretrained, and prune that.",
        )
    return prefixes[0]


def renumbered(name: str, prefix: str, plan: Plan) -> str | None:
    """Return the name of a tensor or module in the pruned model, or None if its layer or expert is dropped.

    Args:
        prefix: path of the layer list.
    """
    if not (match := re.fullmatch(rf"{re.escape(prefix)}\.(\d+)(|\..*)", name)):
        return name
    layer, path = int(match[1]), match[2]
    removed = plan.experts.get(layer, ())
    if removed and (expert := _EXPERT.fullmatch(path)):
        if (index := int(expert[2])) in removed:
            return None
        path = f"{expert[1]}.{index - sum(other < index for other in removed)}{expert[3]}"
    return f"{prefix}.{plan.keep.index(layer)}{path}" if layer in plan.keep else None


def _find_experts(
    checkpoint: Checkpoint, layers: LayerNames, stored: Mapping[str, StoredTensor], model: Any
) -> tuple[dict[str, tuple[int, ...]], dict[Parameter, tuple[str, ...]]]:
    """Find the stored tensors of routed experts.

    Returns:
        `StoredWeights.rows` and `StoredWeights.experts`.

    Raises:
        PlanError: the stored tensors of a layer's experts are not one for each expert, nor rows of one tensor.
    """
    routed, (path_in_model, prefix) = layers.routed, layers.lists
    rows: dict[str, tuple[int, ...]] = {}
    fused: dict[Parameter, list[tuple[int, str]]] = {}  # index of the expert, -1 for a tensor of all, and name
    stored_experts: dict[int, set[int]] = {layer: set() for layer in routed}
    inside = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.*)")
    target = re.compile(rf"{re.escape(path_in_model)}\.\d+\.(.*)")
    rename, *_ = renaming(model)
    for name, match in ((name, match) for name in stored if (match := inside.fullmatch(name))):
        layer, parameter, expert = int(match[1]), target.fullmatch(rename(name)), _EXPERT.fullmatch(match[2])
        path, experts = parameter[1] if parameter else match[2], routed.get(layer)
        if _FUSED.fullmatch(path):
            fused.setdefault((layer, path), []).append((int(expert[2]) if expert else -1, name))
        if experts and expert:
            stored_experts[layer].add(int(expert[2]))
        elif experts and experts.has_row_for_each(path):
            if (shape := stored[name].shape)[:1] != (experts.number,):
                raise _unknown_experts(f"'{name}' has the shape {shape}", checkpoint, layer, experts)
            rows[name] = tuple(i for i in range(experts.number) if i not in layers.plan.experts[layer])
            if path.startswith(f"{experts.experts}."):
                stored_experts[layer] |= {*range(experts.number)}
    for layer, indices in stored_experts.items():
        if indices != {*range(routed[layer].number)}:
            raise _unknown_experts(f"{len(indices)} have known names", checkpoint, layer, routed[layer])
    ordered = {parameter: dict(sorted(tensors)) for parameter, tensors in fused.items()}
    return rows, {
        parameter: tuple(names.values())
        for parameter, names in ordered.items()  # several tensors of an expert are no parameter of it
        if [*names] in ([-1], [*range(len(fused[parameter]))])
    }


def _unknown_experts(what: str, checkpoint: Checkpoint, layer: int, experts: RoutedExperts) -> PlanError:
    return PlanError(
        f"It is unclear how '{checkpoint.name}' stores the {experts.number} experts of layer {layer}: {what}.",
        "Save the checkpoint again with transformers' save_pretrained, and prune that.",
    )


def list_path(model: Any, plan: Plan) -> str:
    """Return the path of a plan's layer list in the whole model."""
    backbone = without_head(model)
    return next((f"{path}." for path, module in model.named_modules() if module is backbone and path), "") + plan.layers


def copy_weights(checkpoint: Checkpoint, weights: StoredWeights, replaced: Patch, folder: Path) -> int:
    """Write the remaining weights, and return their number of bytes.

    Args:
        replaced: values in place of the checkpoint's, of the same shapes and dtypes, removed experts included.
    """
    values: dict[str, torch.Tensor] = {}  # by the names of tensors in the pruned checkpoint, without removed experts
    for parameter, value in replaced.items():
        names_of_parts = weights.names(parameter)
        for name, part in zip(names_of_parts, [value] if len(names_of_parts) == 1 else value, strict=True):
            if (new := renumbered(name, weights.prefix, weights.layers.plan)) is not None:
                values[new] = part[list(weights.rows[name])] if name in weights.rows else part
    places: dict[str, str] = {}
    size = 0
    for file, stored in grouped(weights.tensors.values(), lambda tensor: tensor.file).items():
        new_names = ((tensor.name, renumbered(tensor.name, weights.prefix, weights.layers.plan)) for tensor in stored)
        if names := {name: new for name, new in new_names if new is not None}:
            place = file.relative_to(checkpoint.folder)
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            size += copy_tensors(file, folder / place, names, weights.rows, values)
            places |= dict.fromkeys(names.values(), place.as_posix())
    if {*places.values()} != {"model.safetensors"}:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size
