"""Renumbering of layers in quantization settings.

Settings such as ``modules_to_not_convert: [model.layers.0.mlp.gate]`` or ``ignore: [re:model.layers.[0-1].mlp]`` name
layers by number. After pruning, another layer has that number, and its weights would be read wrongly. Skeletons of both
models with quantized modules, and the tensors of the files, prove that each module is quantized as before.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import torch

from avss_dist.core.errors import ModelError, first_names
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import quiet, renaming, skeleton, text_config
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.quantization import describe_quantization, quantize_skeleton
from avss_dist.models.checkpoint.safetensors import tensors_of
from avss_dist.models.checkpoint.weight_files import weight_files
from avss_dist.plans.choice import PlanError
from avss_dist.pruning.weights import LayerNames

FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files with quantization settings beside config.json."""
_PATTERN = re.compile(r"[\\^$*+?{}\[\]|()]")
_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d")
_MARK = re.compile(r"(re:|[+-]:)?(.*)", re.DOTALL)
"""Mark of a pattern in compressed-tensors or GPTQModel, and the pattern."""

Tensors = frozenset[tuple[str, tuple[int, ...]]]
"""Names and shapes of tensors."""


def renumber_quantization(config: object, names: LayerNames) -> object:
    """Return quantization settings, JSON values, with the new numbers of the remaining layers.

    A pattern with numbers is replaced by the names of the modules that it matches. Patterns match from the start of a
    name, as in transformers, compressed-tensors and GPTQModel.

    Raises:
        PlanError: a pattern with numbers cannot be read.
    """
    if isinstance(config, dict):
        settings = {}
        for key, part in config.items():
            for name in _new_names(key, names):
                settings[name] = renumber_quantization(part, names)
        return settings
    if isinstance(config, list):
        parts: list[object] = []
        for part in config:
            if isinstance(part, str):
                parts += _new_names(part, names)
            else:
                parts.append(renumber_quantization(part, names))
        return parts
    return config


def _new_names(text: str, names: LayerNames) -> list[str]:
    """Return the texts that replace a module's path or a pattern, empty if the layers are dropped."""
    match = _MARK.fullmatch(text)
    assert match
    mark, body = match.groups("")
    if not (_PATTERN.search(body) and _NUMBER.search(body)):
        new_name = names.renumbered(body)
        return [] if new_name is None else [f"{mark}{new_name}"]
    try:
        pattern = re.compile(body)
    except re.error as error:
        raise PlanError(
            f"The quantization settings name layers by '{text}', which is not a valid pattern: {error}.",
            "Prune the checkpoint before it is quantized, or evaluate the plan without a checkpoint.",
        ) from None
    remaining = []
    for name in names.modules:
        if not pattern.match(name):
            continue
        new_name = names.renumbered(name)
        if new_name is not None:
            remaining.append(new_name)
    if mark in ("+:", "-:"):
        return [f"{mark}{re.escape(name)}$" for name in remaining]
    return remaining


def require_same_modules(checkpoint: Checkpoint, names: LayerNames, folder: Path, settings: Settings) -> str:
    """Require that the quantized modules of both checkpoints have the names and shapes of their stored tensors.

    Args:
        names: names of the layers of the original.
        folder: folder of the pruned checkpoint.

    Returns:
        A note for people: the result, or why nothing could be compared.

    Raises:
        PlanError: a remaining weight would be read differently.
    """
    note = f"The weights are quantized ({describe_quantization(checkpoint, settings)}), and copied as they are"
    try:
        before = _unmatched_tensors(checkpoint, settings)
        after = _unmatched_tensors(replace(checkpoint, path=str(folder)), settings)
    except ModelError as error:
        return f"{note}. Whether the settings read each of them as before could not be seen here: {error}"
    expected = set()
    for name, shape in before:
        new_name = names.renumbered(name)
        if new_name is not None:
            expected.add((new_name, names.remaining_shape(name, shape)))
    strange = sorted(name for name, _ in after ^ expected)
    if strange:
        raise PlanError(
            f"The quantization settings of '{checkpoint.name}' would read weights as what they are not once layers are "
            f"dropped: {first_names(strange)}.",
            "Prune the checkpoint before it is quantized, or evaluate the plan without a checkpoint.",
        )
    return f"{note}. Built as quantized modules, they have the names and shapes of the tensors in the files, as before."


def _unmatched_tensors(checkpoint: Checkpoint, settings: Settings) -> Tensors:
    """Return tensors of the files that no quantized module has in that shape, and tensors of modules in no file."""
    config = text_config(checkpoint)
    with quiet():
        model = quantize_skeleton(checkpoint, config, skeleton(copy.deepcopy(config), settings, torch.bfloat16))
        rename, *_ = renaming(model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = set()
    for file in weight_files(checkpoint.folder):
        for tensor in tensors_of(file):
            name_in_model = rename(tensor.name)
            if name_in_model not in shapes:
                name_in_model = tensor.name
            stored.add((name_in_model, tensor.shape))
    return frozenset(shapes.items()) ^ stored
