"""Files of precision plans for other programs, and the shapes of linear maps that number formats must fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from avss_dist.core.settings import Settings
from avss_dist.core.values import NewObject
from avss_dist.core.yaml_files import to_yaml
from avss_dist.models.change.number_formats import FORMATS, fitting
from avss_dist.models.checkpoint.locate import find_checkpoint, resolve
from avss_dist.plans.choice import PlanError
from avss_dist.plans.map_plans import MapPrecision, PrecisionPlan

if TYPE_CHECKING:
    from torch import nn


def map_shapes(layers: nn.Module) -> set[tuple[int, int]]:
    """Return the shapes (outputs, inputs) of the linear maps in a module."""
    from avss_dist.models.structure.layers import is_linear, linear_sizes

    shapes = set()
    for module in layers.modules():
        if is_linear(module):
            inputs, outputs = linear_sizes(module)
            shapes.add((outputs, inputs))
    return shapes


def _named(plan: PrecisionPlan, library: str, program: str) -> list[tuple[MapPrecision, str]]:
    """Return the linear maps of a plan with their names in the checkpoint, such as ``model.layers.7.mlp.up_proj``.

    Raises:
        ModelError: the model cannot be found or built.
        PlanError: a format is of another library than the program's, or the model lacks a map.
    """
    from avss_dist.models.checkpoint.size import find_layers, load_skeleton

    model, _ = load_skeleton(find_checkpoint(plan.model), Settings())
    layers = find_layers(model, Settings())
    foreign = sorted({entry.format for entry in plan.rounded if FORMATS[entry.format].module != library})
    if foreign:
        own = [name for name in fitting(map_shapes(layers)) if FORMATS[name].module == library]
        hint = f"Choose from its formats for this model: {', '.join(own)}."
        raise PlanError(f"{program} does not have {', '.join(foreign)}.", hint)
    names = {id(module): name for name, module in model.named_modules()}
    entries = []
    for entry in plan.rounded:
        try:
            entries.append((entry, names[id(layers[entry.layer].get_submodule(entry.map))]))
        except (AttributeError, IndexError, KeyError):
            raise PlanError(f"{plan.model} has no linear map '{entry.map}' in layer {entry.layer}.") from None
    return entries


def llama_cpp(plan: PrecisionPlan) -> str:
    """Return a plan as a file for ``llama-quantize --tensor-type-file``: a pattern of a tensor and a type on each line.

    Raises:
        PlanError: llama.cpp lacks a format, or gguf does not know the architecture.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    from avss_dist.models.checkpoint.loading import text_config

    entries = _named(plan, "gguf", "llama.cpp")
    architecture = str(text_config(resolve(plan.model)).get_text_config().model_type)
    architectures = {name.replace("-", ""): key for key, name in MODEL_ARCH_NAMES.items()}
    key = architectures.get(re.sub("[^a-z0-9]|text$", "", architecture))
    if key is None:
        raise PlanError(f"The library gguf does not know the architecture {architecture}.", "Use another `format`.")
    tensors = get_tensor_name_map(MODEL_ARCH(key), plan.num_layers)
    lines = []
    for entry, module in entries:
        name = tensors.get_name(module, try_suffixes=(".weight", ""))
        if name is None:
            raise PlanError(f"The library gguf has no name for '{entry.map}' of layer {entry.layer} of {architecture}.")
        lines.append(f"{re.escape(name)}\\.weight={FORMATS[entry.format].type.lower()}\n")
    return "".join(lines)


def llm_compressor(plan: PrecisionPlan) -> str:
    """Return a plan as a recipe of llm-compressor: a quantization modifier with a group for each format.

    Raises:
        PlanError: compressed-tensors lacks a format.
    """
    by_format: dict[str, list[str]] = {}
    for entry, name in _named(plan, "compressed_tensors", "llm-compressor"):
        by_format.setdefault(entry.format, []).append(name)
    groups = {}
    for number, (format, names) in enumerate(by_format.items()):
        about = FORMATS[format]
        weights: NewObject = {}
        for name, value in about.options.items():
            weights[name] = f"torch.{value}" if name.endswith("_dtype") else value
        weights["symmetric"] = True
        weights["strategy"] = about.strategy
        weights["group_size"] = about.group
        weights = {name: value for name, value in weights.items() if value is not None}
        groups[f"group_{number}"] = {"targets": names, "weights": weights}
    modifiers = {"QuantizationModifier": {"config_groups": groups, "ignore": ["lm_head"]}}
    return to_yaml({"precision_stage": {"precision_modifiers": modifiers}})


EXPORTS: Mapping[str, Callable[[PrecisionPlan], str]] = {
    "llama-cpp": llama_cpp,
    "llm-compressor": llm_compressor,
}
"""Functions that write a plan for other programs, by the name of the format."""
