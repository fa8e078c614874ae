"""Weights of a pruned checkpoint: tensors are copied from file to file and renumbered, and some are replaced."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
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


@dataclass(frozen=True)
class StoredWeights:
    """Tensors of a checkpoint's files. Those of layers are named ``{prefix}.{layer}.{path}``.

    Attributes:
        files: tensors by file.
        prefix: name of the layer list in the files.
        plan: plan whose layers are dropped.
    """

    files: Mapping[Path, Mapping[str, StoredTensor]]
    prefix: str
    plan: Plan

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, plan: Plan, settings: Settings) -> StoredWeights:
        """Read the headers of a checkpoint's files.

        Raises:
            PlanError: it is unclear which tensors are the plan's layers.
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
        return cls(files, prefixes[0], plan)

    def name(self, parameter: Parameter) -> str:
        """Return the name of a layer's parameter in the files."""
        return f"{self.prefix}.{parameter[0]}.{parameter[1]}"

    def renamed(self, name: str) -> str | None:
        """Return the name of a stored tensor in the pruned checkpoint, or None if its layer is dropped."""
        return renumbered(name, self.prefix, self.plan)

    def read(self, parameter: Parameter) -> torch.Tensor | None:
        """Read a layer's parameter as it is stored. Return None if the files have none of its name."""
        name = self.name(parameter)
        stored = next((tensors[name] for tensors in self.files.values() if name in tensors), None)
        return None if stored is None else read_tensor(stored)


def renumbered(name: str, prefix: str, plan: Plan) -> str | None:
    """Return the name of a tensor in the pruned model, or None if its layer is dropped.

    Args:
        prefix: path of the layer list.
    """
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.*)", name)
    if not match:
        return name
    layer = int(match[1])
    return f"{prefix}.{plan.keep.index(layer)}.{match[2]}" if layer in plan.keep else None


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
    except (ImportError, TypeError, AttributeError, KeyError, ValueError):  # see Naming
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
            size += copy_tensors(file, folder / place, names, copied)
            places |= dict.fromkeys(names.values(), place.as_posix())
            for tensor in tensors_of(folder / place):
                if tensor.name in values:
                    overwrite_tensor(tensor, values[tensor.name])
    if [file.name for file in weights.files] != ["model.safetensors"]:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size
