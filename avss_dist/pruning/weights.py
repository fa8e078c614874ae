"""Weights of a pruned checkpoint: tensors are copied from file to file and renumbered, and some are replaced.

Experts are stored one by one, in tensors with their index in the name, or all in one tensor with a row for each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from avss_dist.models.loading import Naming, skeleton, text_config, without_head
from avss_dist.models.safetensors import (
    StoredTensor,
    copy_tensors,
    overwrite_tensor,
    read_tensor,
    tensors_of,
    weight_files,
)
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.selection import PlanError

_NAMING_ERRORS = (ImportError, TypeError, AttributeError, KeyError, ValueError)  # see Naming
_EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)(|\..*)")
_FUSED = re.compile(r"(?:.*\.)?experts\.[^.]+")


@dataclass(frozen=True)
class StoredWeights:
    """Tensors of a checkpoint's files. Those of layers are named ``{prefix}.{layer}.{path}``.

    Attributes:
        files: tensors by file.
        prefix: name of the layer list in the files.
        plan: plan whose layers and experts are dropped.
        rows: rows of the remaining experts, by the name of each tensor that has a row for each expert.
        experts: names of the tensors of each parameter that holds all experts of a layer in the model: one with a row
            for each expert, or one for each expert, in their order.
    """

    files: Mapping[Path, Mapping[str, StoredTensor]]
    prefix: str
    plan: Plan
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts: Mapping[Parameter, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, plan: Plan, settings: Settings) -> StoredWeights:
        """Read the headers of a checkpoint's files.

        Raises:
            PlanError: it is unclear which tensors are the plan's layers or experts, or an expert cannot be dropped.
            ModelError: a file cannot be read.
        """
        files = {file: {tensor.name: tensor for tensor in tensors_of(file)} for file in weight_files(checkpoint.folder)}
        names = [name for stored in files.values() for name in stored]
        prefixes = _prefixes(plan, names)
        if len(prefixes) != 1:
            prefixes = _renamed_prefixes(checkpoint, plan, names, settings)
        if len(prefixes) != 1:
            raise _ambiguous_layers(checkpoint, plan, prefixes)
        if not plan.experts and not any("experts." in name for name in names):
            return cls(files, prefixes[0], plan)
        config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
        model = skeleton(config, settings, torch.float32)
        tensors = list(_tensors_of_layers(files, prefixes[0], model, plan))
        rows = _rows_of_experts(checkpoint, plan, tensors, model) if plan.experts else {}
        return cls(files, prefixes[0], plan, rows, _names_of_experts(tensors))

    def name(self, parameter: Parameter) -> str:
        """Return the name of a layer's parameter in the files."""
        return f"{self.prefix}.{parameter[0]}.{parameter[1]}"

    def renamed(self, name: str) -> str | None:
        """Return the name of a stored tensor in the pruned checkpoint, or None if its layer or expert is dropped."""
        return renumbered(name, self.prefix, self.plan)

    def names(self, parameter: Parameter) -> tuple[str, ...]:
        """Return the names of the tensors that hold a layer's parameter: one, or one for each expert in order."""
        return self.experts.get(parameter, (self.name(parameter),))

    def read(self, parameter: Parameter) -> torch.Tensor | None:
        """Read a layer's parameter as it is stored. Return None if the files have none of its name and one dtype."""
        names = {*self.names(parameter)}
        stored = {name: tensor for tensors in self.files.values() for name, tensor in tensors.items() if name in names}
        if len(stored) < len(names) or len({tensor.dtype for tensor in stored.values()}) > 1:
            return None
        values = [read_tensor(stored[name]) for name in self.names(parameter)]
        return values[0] if len(values) == 1 else torch.stack(values)

    def replacements(self, patch: Patch) -> dict[str, torch.Tensor]:
        """Return the values of a patch by the names of tensors in the pruned checkpoint, without removed experts."""
        values: dict[str, torch.Tensor] = {}
        for parameter, value in patch.items():
            names = self.names(parameter)
            for name, part in zip(names, [value] if len(names) == 1 else value, strict=True):
                if (new := self.renamed(name)) is not None:
                    values[new] = part[list(self.rows[name])] if name in self.rows else part
        return values


def _prefixes(plan: Plan, names: Sequence[str]) -> list[str]:
    """Return the possible names of the layer list in the files: its path, with anything before it."""
    inside = re.compile(rf"((?:.*\.)?{re.escape(plan.layers)})\.(\d+)\.(.*)")
    indices: dict[str, set[int]] = {}
    for match in filter(None, map(inside.fullmatch, names)):
        indices.setdefault(match[1], set()).add(int(match[2]))
    return [prefix for prefix, seen in indices.items() if seen == set(range(plan.num_layers))]


def renumbered(name: str, prefix: str, plan: Plan) -> str | None:
    """Return the name of a tensor in the pruned model, or None if its layer or expert is dropped.

    Args:
        prefix: path of the layer list.
    """
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.*)", name)
    if not match:
        return name
    layer = int(match[1])
    path = renumbered_expert(match[2], plan, layer)
    return f"{prefix}.{plan.keep.index(layer)}.{path}" if layer in plan.keep and path is not None else None


def renumbered_expert(path: str, plan: Plan, layer: int) -> str | None:
    """Return the path of a tensor or module of a layer in the pruned model, or None if its expert is dropped."""
    removed = plan.experts.get(layer, ())
    match = _EXPERT.fullmatch(path) if removed else None
    if not match:
        return path
    expert = int(match[2])
    before = sum(other < expert for other in removed)
    return None if expert in removed else f"{match[1]}.{expert - before}{match[3]}"


def routed_layers(model: Any, plan: Plan) -> dict[int, RoutedExperts]:
    """Return the routed experts of each layer that loses some, in a model that may be on the meta device.

    Raises:
        PlanError: an expert cannot be dropped; the message has the layer and the reason.
    """
    layers = dict(model.named_modules()).get(list_path(model, plan))
    if not isinstance(layers, nn.ModuleList) or len(layers) != plan.num_layers:
        return {}  # which is refused where layers are compared
    try:
        return {layer: require_routed_experts(layers[layer], layer, removed) for layer, removed in plan.experts.items()}
    except ModelError as error:
        raise PlanError(error.message, error.hint) from error


@dataclass(frozen=True)
class _LayerTensor:
    """A stored tensor of a layer.

    Attributes:
        layer: index of the layer in the whole model.
        path: path below the layer, in the files.
        parameter: path below the layer of the parameter that is made of it, in the model.
    """

    layer: int
    path: str
    parameter: str
    stored: StoredTensor

    @property
    def expert(self) -> int | None:
        """Index of the expert that the tensor belongs to; None if it is not one expert's."""
        match = _EXPERT.fullmatch(self.path)
        return int(match[2]) if match else None


def _tensors_of_layers(
    files: Mapping[Path, Mapping[str, StoredTensor]], prefix: str, model: Any, plan: Plan
) -> Iterator[_LayerTensor]:
    """Yield the stored tensors of layers."""
    inside = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.*)")
    target = re.compile(rf"{re.escape(list_path(model, plan))}\.\d+\.(.*)")
    named = _module_names(model)
    for tensors in files.values():
        for name, stored in tensors.items():
            if match := inside.fullmatch(name):
                parameter = target.fullmatch(named(name))
                yield _LayerTensor(int(match[1]), match[2], parameter[1] if parameter else match[2], stored)


def _rows_of_experts(
    checkpoint: Checkpoint, plan: Plan, tensors: Sequence[_LayerTensor], model: Any
) -> dict[str, tuple[int, ...]]:
    """Return `StoredWeights.rows`.

    Raises:
        PlanError: the stored tensors of a layer's experts are not one for each expert, nor rows of one tensor.
    """
    routed = routed_layers(model, plan)
    rows: dict[str, tuple[int, ...]] = {}
    stored_experts: dict[int, set[int]] = {layer: set() for layer in routed}
    for tensor in tensors:
        layer, stored = tensor.layer, tensor.stored
        if (experts := routed.get(layer)) is None:
            continue
        if tensor.expert is not None:
            stored_experts[layer].add(tensor.expert)
            continue
        if not experts.has_row_for_each(tensor.parameter):
            continue
        if stored.shape[:1] != (experts.number,):
            raise _unknown_experts(f"'{stored.name}' has the shape {stored.shape}", checkpoint, layer, experts)
        rows[stored.name] = tuple(i for i in range(experts.number) if i not in plan.experts[layer])
        if tensor.parameter.startswith(f"{experts.experts}."):
            stored_experts[layer] |= {*range(experts.number)}
    for layer, indices in stored_experts.items():
        if indices != {*range(routed[layer].number)}:
            raise _unknown_experts(f"{len(indices)} have known names", checkpoint, layer, routed[layer])
    return rows


def _names_of_experts(tensors: Sequence[_LayerTensor]) -> dict[Parameter, tuple[str, ...]]:
    """Return `StoredWeights.experts`, without parameters that are made of several tensors of an expert."""
    names: dict[Parameter, list[tuple[int | None, str]]] = {}
    for tensor in tensors:
        if _FUSED.fullmatch(tensor.parameter):
            names.setdefault((tensor.layer, tensor.parameter), []).append((tensor.expert, tensor.stored.name))
    unique = {key: dict(pairs) for key, pairs in names.items() if len(dict(pairs)) == len(pairs)}
    return {
        key: tuple(by_expert[expert] for expert in sorted(by_expert))  # type: ignore[type-var]
        for key, by_expert in unique.items()
        if {*by_expert} in ({None}, {*range(len(by_expert))})
    }


def _unknown_experts(what: str, checkpoint: Checkpoint, layer: int, experts: RoutedExperts) -> PlanError:
    return PlanError(
        f"It is unclear how '{checkpoint.name}' stores the {experts.number} experts of layer {layer}: {what}.",
        "Save the checkpoint again with transformers' save_pretrained, and prune that.",
    )


def _module_names(model: Any) -> Callable[[str], str]:
    """Return a function from the name of a stored tensor to its name in a model, by `Naming` where that works."""
    try:
        naming = Naming(model)
    except _NAMING_ERRORS:
        return str

    def named(stored: str) -> str:
        try:
            return naming.renamed(stored)
        except _NAMING_ERRORS:
            return stored

    return named


def list_path(model: Any, plan: Plan) -> str:
    """Return the path of a plan's layer list in the whole model."""
    backbone = without_head(model)
    return next((f"{path}." for path, module in model.named_modules() if module is backbone and path), "") + plan.layers


def _renamed_prefixes(checkpoint: Checkpoint, plan: Plan, names: Sequence[str], settings: Settings) -> list[str]:
    """Return possible names of the layer list in the files, where transformers renames tensors on loading."""
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    model = skeleton(config, settings, torch.float32)
    path = list_path(model, plan)
    indices: dict[str, set[int]] = {}
    try:
        naming = Naming(model)
        for name in names:
            if inside := re.match(rf"{re.escape(path)}\.(\d+)\.", naming.renamed(name)):
                for place in re.finditer(rf"\.{inside[1]}\.", name):
                    indices.setdefault(name[: place.start()], set()).add(int(inside[1]))
    except _NAMING_ERRORS:
        return []
    return [prefix for prefix, seen in indices.items() if seen == set(range(plan.num_layers))]


def _ambiguous_layers(checkpoint: Checkpoint, plan: Plan, prefixes: list[str]) -> PlanError:
    return PlanError(
        f"It is unclear which stored tensors of '{checkpoint.name}' are layers of '{plan.layers}': "
        f"{', '.join(prefixes) or 'no names'} would fit.",
        "Save the checkpoint again with transformers' save_pretrained, and prune that.",
    )


def copy_weights(checkpoint: Checkpoint, weights: StoredWeights, replaced: Patch, folder: Path) -> int:
    """Write the remaining weights, and return their number of bytes.

    Args:
        replaced: values in place of the checkpoint's, of the same shapes and dtypes, removed experts included.
    """
    values = weights.replacements(replaced)
    places: dict[str, str] = {}
    size = 0
    for file, stored in weights.files.items():
        names = {name: new for name in stored if (new := weights.renamed(name)) is not None}
        if names:
            place = file.relative_to(checkpoint.folder)
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            size += copy_tensors(file, folder / place, names, weights.rows)
            places |= dict.fromkeys(names.values(), place.as_posix())
            for tensor in tensors_of(folder / place):
                if tensor.name in values:
                    overwrite_tensor(tensor, values[tensor.name])
    if [file.name for file in weights.files] != ["model.safetensors"]:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size
