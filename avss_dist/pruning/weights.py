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
from avss_dist.models.expert_removal import RoutedExperts, require_routed_experts
from avss_dist.models.loading import skeleton, text_config, without_head
from avss_dist.models.naming import Naming
from avss_dist.models.patching import Parameter, Patch
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


@dataclass(frozen=True)
class StoredWeights:
    """Tensors of a checkpoint's files. Those of layers are named ``{prefix}.{layer}.{path}``.

    Attributes:
        files: tensors by file.
        prefix: name of the layer list in the files.
        plan: plan whose layers and experts are dropped.
        rows: rows of the remaining experts, by the name of each tensor that has a row for each expert.
    """

    files: Mapping[Path, Mapping[str, StoredTensor]]
    prefix: str
    plan: Plan
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, plan: Plan, settings: Settings) -> StoredWeights:
        """Read the headers of a checkpoint's files.

        Raises:
            PlanError: it is unclear which tensors are the plan's layers or experts, or an expert cannot be dropped.
            ModelError: a file cannot be read.
        """
        files = {file: {tensor.name: tensor for tensor in tensors_of(file)} for file in weight_files(checkpoint.folder)}
        inside = re.compile(rf"((?:.*\.)?{re.escape(plan.layers)})\.(\d+)\.(.*)")
        indices: dict[str, set[int]] = {}
        for match in filter(None, (inside.fullmatch(name) for stored in files.values() for name in stored)):
            indices.setdefault(match[1], set()).add(int(match[2]))
        prefixes = [prefix for prefix, seen in indices.items() if seen == set(range(plan.num_layers))]
        if len(prefixes) != 1:
            prefixes = _renamed_prefixes(
                checkpoint, plan, [name for stored in files.values() for name in stored], settings
            )
        if len(prefixes) != 1:
            raise _ambiguous_layers(checkpoint, plan, prefixes)
        rows = _rows_of_experts(checkpoint, plan, files, prefixes[0], settings) if plan.experts else {}
        return cls(files, prefixes[0], plan, rows)

    def name(self, parameter: Parameter) -> str:
        """Return the name of a layer's parameter in the files."""
        return f"{self.prefix}.{parameter[0]}.{parameter[1]}"

    def renamed(self, name: str) -> str | None:
        """Return the name of a stored tensor in the pruned checkpoint, or None if its layer or expert is dropped."""
        return renumbered(name, self.prefix, self.plan)

    def read(self, parameter: Parameter) -> torch.Tensor | None:
        """Read a layer's parameter as it is stored. Return None if the files have none of its name."""
        name = self.name(parameter)
        stored = next((tensors[name] for tensors in self.files.values() if name in tensors), None)
        return None if stored is None else read_tensor(stored)


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


def _rows_of_experts(
    checkpoint: Checkpoint,
    plan: Plan,
    files: Mapping[Path, Mapping[str, StoredTensor]],
    prefix: str,
    settings: Settings,
) -> dict[str, tuple[int, ...]]:
    """Return `StoredWeights.rows`.

    Raises:
        PlanError: the stored tensors of a layer's experts are not one for each expert, nor rows of one tensor.
    """
    model = skeleton(text_config(checkpoint, trust_remote_code=settings.trust_remote_code), settings, torch.float32)
    routed, named = routed_layers(model, plan), _module_names(model)
    target = re.compile(rf"{re.escape(list_path(model, plan))}\.\d+\.(.*)")
    rows: dict[str, tuple[int, ...]] = {}
    stored_experts: dict[int, set[int]] = {layer: set() for layer in routed}
    for layer, path, stored in _tensors_of_layers(files, prefix):
        if (experts := routed.get(layer)) is None:
            continue
        if single := _EXPERT.fullmatch(path):
            stored_experts[layer].add(int(single[2]))
            continue
        module = target.fullmatch(named(stored.name))
        in_model = module[1] if module else path
        if not experts.has_row_for_each(in_model):
            continue
        if stored.shape[:1] != (experts.number,):
            raise _unknown_experts(f"'{stored.name}' has the shape {stored.shape}", checkpoint, layer, experts)
        rows[stored.name] = tuple(i for i in range(experts.number) if i not in plan.experts[layer])
        if in_model.startswith(f"{experts.experts}."):
            stored_experts[layer] |= {*range(experts.number)}
    for layer, indices in stored_experts.items():
        if indices != {*range(routed[layer].number)}:
            raise _unknown_experts(f"{len(indices)} have known names", checkpoint, layer, routed[layer])
    return rows


def _tensors_of_layers(
    files: Mapping[Path, Mapping[str, StoredTensor]], prefix: str
) -> Iterator[tuple[int, str, StoredTensor]]:
    """Yield (layer, path below the layer, tensor) for the stored tensors of layers."""
    inside = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.*)")
    for tensors in files.values():
        for name, stored in tensors.items():
            if match := inside.fullmatch(name):
                yield int(match[1]), match[2], stored


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


def copy_weights(
    checkpoint: Checkpoint,
    weights: StoredWeights,
    replaced: Patch,
    folder: Path,
    copied: Callable[[int], None],
) -> int:
    """Write the remaining weights, and return their number of bytes.

    Args:
        replaced: values in place of the checkpoint's, of the same shapes and dtypes.
        copied: called with the number of bytes of weights copied since the last call.
    """
    values = {weights.renamed(weights.name(parameter)): tensor for parameter, tensor in replaced.items()}
    places: dict[str, str] = {}
    size = 0
    for file, stored in weights.files.items():
        names = {name: new for name in stored if (new := weights.renamed(name)) is not None}
        if names:
            place = file.relative_to(checkpoint.folder)
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            size += copy_tensors(file, folder / place, names, copied, weights.rows)
            places |= dict.fromkeys(names.values(), place.as_posix())
            for tensor in tensors_of(folder / place):
                if tensor.name in values:
                    overwrite_tensor(tensor, values[tensor.name])
    if [file.name for file in weights.files] != ["model.safetensors"]:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size
