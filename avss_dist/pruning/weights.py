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
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.change.patches import Parameter, Patch
from avss_dist.models.checkpoint.complete import num_mtp_layers
from avss_dist.models.checkpoint.loading import renaming, skeleton, text_config, without_head
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.safetensors import (
    StoredTensor,
    copy_tensors,
    read_tensor,
    tensors_of,
)
from avss_dist.models.checkpoint.weight_files import weight_files
from avss_dist.models.structure.experts import RoutedExperts, require_routed_experts
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.warehouse.reader import grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)(|\..*)")
_FUSED = re.compile(r"(?:.*\.)?experts\.[^.]+")
_ALL_EXPERTS = -1
"""In place of an expert's index, for a tensor that holds all experts."""
_MTP_HEAD = re.compile(r"(?:model\.)?mtp\.")


class _PlaceOfName(NamedTuple):
    """Place of a module or tensor in a layer list.

    Attributes:
        prefix: path of the layer list.
        layer: index of the layer.
        inside: path below the layer.
    """

    prefix: str
    layer: int
    inside: str


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
    def of_model(cls, model: PreTrainedModel, plan: Plan, *stored: str) -> LayerNames:
        """Return the names in a model, which may be on the meta device, and in files.

        Args:
            stored: path of the layer list in the files.

        Raises:
            PlanError: an expert cannot be dropped; the message has the layer and the reason.
        """
        path = list_path(model, plan)
        modules = dict(model.named_modules())
        layers = modules.get(path)
        routed: dict[int, RoutedExperts] = {}
        # Another list, or one of another length, is refused later.
        if isinstance(layers, nn.ModuleList) and len(layers) == plan.num_layers:
            try:
                for layer, removed in plan.experts.items():
                    routed[layer] = require_routed_experts(layers[layer], layer, removed)
            except ModelError as error:
                raise PlanError(error.message, error.hint) from error
        return cls(plan, (path, *stored), [name for name in modules if name], routed)

    def renumbered(self, name: str) -> str | None:
        """Return the name of a module or tensor in the pruned model, or None if its layer or expert is dropped.

        Names may begin below or above the model. Layers of another tower keep their names.
        """
        place = self._place(name)
        if place is None:
            return name
        return renumbered(name, place.prefix, self.plan)

    def remaining_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor in the pruned model, which may have a row for each expert."""
        place = self._place(name)
        if place is None:
            return shape
        experts = self.routed.get(place.layer)
        if experts is None:
            return shape
        return experts.shape_without(place.inside, shape, len(self.plan.experts[place.layer]))

    def _place(self, name: str) -> _PlaceOfName | None:
        """Return the place of a name in the layer list, or None for names outside of it."""
        parts = name.split(".")
        for position, part in enumerate(parts):
            if position == 0 or not part.isdecimal():
                continue
            prefix = ".".join(parts[:position])
            if any(_have_same_end(prefix, path) for path in self.lists):
                return _PlaceOfName(prefix, int(part), ".".join(parts[position + 1 :]))
        return None


def _have_same_end(path: str, other: str) -> bool:
    """Whether one of two module paths is the other one, or its last part."""
    return f".{path}".endswith(f".{other}") or f".{other}".endswith(f".{path}")


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
        stored: dict[str, StoredTensor] = {}
        for file in weight_files(checkpoint.folder):
            stored |= {tensor.name: tensor for tensor in tensors_of(file)}
        config = text_config(checkpoint)
        model = skeleton(config, settings, torch.float32)
        prefix = _stored_prefix(checkpoint, plan, stored, model, num_mtp_layers(config.get_text_config()))
        layers = LayerNames.of_model(model, plan, prefix)
        tensors = _tensors_of_layers(layers, stored, model)
        rows = _rows_of_experts(checkpoint, layers, stored, tensors)
        return cls(stored, prefix, layers, rows, _parameters_of_experts(tensors))

    def renumbered(self, name: str) -> str | None:
        """Return the name of a tensor in the pruned checkpoint, or None if its layer or expert is dropped."""
        return renumbered(name, self.prefix, self.layers.plan)

    @property
    def has_mtp_head(self) -> bool:
        """Whether the files have a head that predicts several tokens (MTP)."""
        behind = re.compile(rf"{re.escape(self.prefix)}\.(\d+)\.")
        for name in self.tensors:
            match = behind.match(name)
            if _MTP_HEAD.match(name) or (match and int(match[1]) >= self.layers.plan.num_layers):
                return True
        return False

    def names(self, parameter: Parameter) -> tuple[str, ...]:
        """Return the names of the tensors that hold a layer's parameter: one, or one for each expert in order."""
        layer, path = parameter
        return self.experts.get(parameter, (f"{self.prefix}.{layer}.{path}",))

    def read(self, parameter: Parameter) -> torch.Tensor | None:
        """Read a layer's parameter as it is stored. Return None if the files have none of its name and one dtype."""
        names = self.names(parameter)
        stored = [self.tensors[name] for name in names if name in self.tensors]
        dtypes = {tensor.dtype for tensor in stored}
        if len(stored) < len(names) or len(dtypes) > 1:
            return None
        if len(stored) == 1:
            return read_tensor(stored[0])
        return torch.stack([read_tensor(tensor) for tensor in stored])


def _stored_prefix(
    checkpoint: Checkpoint, plan: Plan, names: Iterable[str], model: PreTrainedModel, num_mtp: int
) -> str:
    """Return the name of the layer list in the files. Transformers may rename tensors when it loads them.

    It is the only part of names before the index of a layer that stands with the index of every layer. Layers of a head
    that predicts several tokens may stand behind these, as in DeepSeek-V3.

    Args:
        num_mtp: number of layers of such a head.

    Raises:
        PlanError: it is unclear.
    """
    rename, *_ = renaming(model)
    in_layer = re.compile(rf"{re.escape(list_path(model, plan))}\.(\d+)\.")
    indices: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := in_layer.match(rename(name)):
            index = match[1]
            for place in re.finditer(rf"\.{index}\.", name):
                indices[name[: place.start()]].add(int(index))
    most = plan.num_layers + num_mtp
    expected = [set(range(number)) for number in range(plan.num_layers, most + 1)]
    prefixes = [prefix for prefix, layers in indices.items() if layers in expected]
    if len(prefixes) != 1:
        raise PlanError(
            f"It is unclear which stored tensors of '{checkpoint.name}' are layers of '{plan.layers}': "
            f"{', '.join(prefixes) or 'no names'} would fit.",
            "Save the checkpoint again with transformers' save_pretrained, and prune that.",
        )
    return prefixes[0]


def renumbered(name: str, prefix: str, plan: Plan) -> str | None:
    """Return the name of a tensor or module in the pruned model, or None if its layer or expert is dropped.

    Layers of a head that predicts several tokens stand behind the last layer. The head is left out if experts are
    dropped: its router would be wider than the configuration's one number of experts.

    Args:
        prefix: path of the layer list.
    """
    if plan.experts and _MTP_HEAD.match(name):
        return None
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)(|\..*)", name)
    if match is None:
        return name
    layer = int(match[1])
    path = match[2]
    if layer >= plan.num_layers:
        if plan.experts:
            return None
        place_behind_last = layer - plan.num_layers
        return f"{prefix}.{len(plan.keep) + place_behind_last}{path}"
    if layer not in plan.keep:
        return None
    removed = plan.experts.get(layer, ())
    expert = _EXPERT.fullmatch(path)
    if removed and expert:
        index = int(expert[2])
        if index in removed:
            return None
        removed_before = [other for other in removed if other < index]
        path = f"{expert[1]}.{index - len(removed_before)}{expert[3]}"
    return f"{prefix}.{plan.keep.index(layer)}{path}"


@dataclass(frozen=True)
class _TensorOfLayer:
    """A stored tensor of a layer.

    Attributes:
        name: name of the tensor in the files.
        layer: index of the layer.
        path: path of the parameter below the layer in the model, which may hold several tensors.
        expert: index of the expert in the tensor's name, or None if it has none.
    """

    name: str
    layer: int
    path: str
    expert: int | None


def _tensors_of_layers(layers: LayerNames, stored: Iterable[str], model: PreTrainedModel) -> list[_TensorOfLayer]:
    """Return the stored tensors of layers, by the names of all tensors."""
    path_in_model, prefix = layers.lists
    in_files = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.*)")
    in_model = re.compile(rf"{re.escape(path_in_model)}\.\d+\.(.*)")
    rename, *_ = renaming(model)
    tensors = []
    for name in stored:
        match = in_files.fullmatch(name)
        if match is None:
            continue
        path = match[2]
        expert = _EXPERT.fullmatch(path)
        if parameter := in_model.fullmatch(rename(name)):
            path = parameter[1]
        tensors.append(_TensorOfLayer(name, int(match[1]), path, int(expert[2]) if expert else None))
    return tensors


def _parameters_of_experts(tensors: Iterable[_TensorOfLayer]) -> dict[Parameter, tuple[str, ...]]:
    """Return the names of the tensors of each parameter that holds all experts of a layer: `StoredWeights.experts`."""
    parts: defaultdict[Parameter, list[tuple[int, str]]] = defaultdict(list)
    for tensor in tensors:
        if _FUSED.fullmatch(tensor.path):
            index = _ALL_EXPERTS if tensor.expert is None else tensor.expert
            parts[tensor.layer, tensor.path].append((index, tensor.name))
    parameters: dict[Parameter, tuple[str, ...]] = {}
    for parameter, indexed_names in parts.items():
        names = dict(sorted(indexed_names))
        # Several tensors of an expert are no parameter of it.
        if list(names) in ([_ALL_EXPERTS], list(range(len(indexed_names)))):
            parameters[parameter] = tuple(names.values())
    return parameters


def _rows_of_experts(
    checkpoint: Checkpoint,
    layers: LayerNames,
    stored: Mapping[str, StoredTensor],
    tensors: Iterable[_TensorOfLayer],
) -> dict[str, tuple[int, ...]]:
    """Return the rows of the remaining experts in each tensor with a row for each expert: `StoredWeights.rows`.

    Raises:
        PlanError: the stored tensors of a layer's experts are not one for each expert, nor rows of one tensor.
    """
    rows: dict[str, tuple[int, ...]] = {}
    stored_experts: dict[int, set[int]] = {layer: set() for layer in layers.routed}
    for tensor in tensors:
        experts = layers.routed.get(tensor.layer)
        if experts is None:
            continue
        if tensor.expert is not None:
            stored_experts[tensor.layer].add(tensor.expert)
        elif experts.has_row_for_each(tensor.path):
            shape = stored[tensor.name].shape
            if shape[:1] != (experts.number,):
                raise _unknown_experts(f"'{tensor.name}' has the shape {shape}", checkpoint, tensor.layer, experts)
            removed = layers.plan.experts[tensor.layer]
            rows[tensor.name] = tuple(expert for expert in range(experts.number) if expert not in removed)
            if tensor.path.startswith(f"{experts.experts}."):
                stored_experts[tensor.layer].update(range(experts.number))
    for layer, indices in stored_experts.items():
        experts = layers.routed[layer]
        if indices != set(range(experts.number)):
            raise _unknown_experts(f"{len(indices)} have known names", checkpoint, layer, experts)
    return rows


def _unknown_experts(problem: str, checkpoint: Checkpoint, layer: int, experts: RoutedExperts) -> PlanError:
    return PlanError(
        f"It is unclear how '{checkpoint.name}' stores the {experts.number} experts of layer {layer}: {problem}.",
        "Save the checkpoint again with transformers' save_pretrained, and prune that.",
    )


def list_path(model: PreTrainedModel, plan: Plan) -> str:
    """Return the path of a plan's layer list in the whole model."""
    backbone = without_head(model)
    for path, module in model.named_modules():
        if module is backbone and path:
            return f"{path}.{plan.layers}"
    return plan.layers


def copy_weights(checkpoint: Checkpoint, weights: StoredWeights, replaced: Patch, folder: Path) -> int:
    """Write the remaining weights, and return their number of bytes.

    Args:
        replaced: values in place of the checkpoint's, of the same shapes and dtypes, removed experts included.
    """
    values = _new_values(weights, replaced)
    # Names of the files, by the names of tensors in the pruned checkpoint.
    files: dict[str, str] = {}
    size = 0
    for file, stored in grouped(weights.tensors.values(), lambda tensor: tensor.file).items():
        names: dict[str, str] = {}
        for tensor in stored:
            new_name = weights.renumbered(tensor.name)
            if new_name is not None:
                names[tensor.name] = new_name
        if not names:
            continue
        place = file.relative_to(checkpoint.folder)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        size += copy_tensors(file, folder / place, names, weights.rows, values)
        files |= dict.fromkeys(names.values(), place.as_posix())
    if set(files.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size


def _new_values(weights: StoredWeights, replaced: Patch) -> dict[str, torch.Tensor]:
    """Return the values of `copy_weights` by the names of tensors in the pruned checkpoint, without removed experts."""
    values: dict[str, torch.Tensor] = {}
    for parameter, value in replaced.items():
        names = weights.names(parameter)
        parts = [value] if len(names) == 1 else list(value)
        for name, part in zip(names, parts, strict=True):
            new_name = weights.renumbered(name)
            if new_name is None:
                continue
            values[new_name] = part[list(weights.rows[name])] if name in weights.rows else part
    return values
