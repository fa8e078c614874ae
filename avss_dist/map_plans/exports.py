"""Precision plans as files of other programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from avss_dist.core.settings import Settings
from avss_dist.map_plans.plans import MapPrecision, PrecisionPlan
from avss_dist.models.checkpoints import resolve
from avss_dist.models.number_formats import FORMATS
from avss_dist.pruning.plan import to_yaml
from avss_dist.pruning.selection import PlanError


def _named(plan: PrecisionPlan, library: str, program: str, examples: str) -> list[tuple[MapPrecision, str]]:
    """Return the linear maps of a plan with their names in the checkpoint, such as ``model.layers.7.mlp.up_proj``.

    Raises:
        ModelError: the model cannot be found or built.
        PlanError: a format is of another library than the program's, or the model lacks a map.
    """
    from avss_dist.models.size import find_layers, load_skeleton

    if foreign := sorted({e.format for e in plan.rounded if FORMATS[e.format].module != library}):
        raise PlanError(
            f"{program} does not have {', '.join(foreign)}.", f"Choose from its own formats, such as {examples}."
        )
    _, model, _ = load_skeleton(plan.model, Settings())
    names = {id(module): name for name, module in model.named_modules()}
    layers = find_layers(model, Settings())
    named = []
    for entry in plan.rounded:
        try:
            named.append((entry, names[id(layers[entry.layer].get_submodule(entry.map))]))
        except (AttributeError, IndexError, KeyError):
            raise PlanError(f"{plan.model} has no linear map '{entry.map}' in layer {entry.layer}.") from None
    return named


def llama_cpp(plan: PrecisionPlan) -> str:
    """Return a plan as a file for ``llama-quantize --tensor-type-file``: a pattern of a tensor and a type on each line.

    Raises:
        PlanError: llama.cpp lacks a format, or gguf does not know the architecture.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    from avss_dist.models.loading import text_config

    named = _named(plan, "gguf", "llama.cpp", "q4_0 and q8_0")
    architecture = str(text_config(resolve(plan.model)).get_text_config().model_type)
    architectures = {name.replace("-", ""): key for key, name in MODEL_ARCH_NAMES.items()}
    if (key := architectures.get(re.sub("[^a-z0-9]|text$", "", architecture))) is None:
        raise PlanError(f"The library gguf does not know the architecture {architecture}.", "Use another `format`.")
    tensors = get_tensor_name_map(MODEL_ARCH(key), plan.num_layers)
    lines = []
    for entry, module in named:
        if (name := tensors.get_name(module, try_suffixes=(".weight", ""))) is None:
            raise PlanError(f"The library gguf has no name for '{entry.map}' of layer {entry.layer} of {architecture}.")
        known = FORMATS[entry.format]
        lines.append(f"{re.escape(name)}\\.weight={known.type.lower()}\n")
    return "".join(lines)


def llm_compressor(plan: PrecisionPlan) -> str:
    """Return a plan as a recipe of llm-compressor: a quantization modifier with a group for each format.

    Raises:
        PlanError: compressed-tensors lacks a format.
    """
    by_format: dict[str, list[str]] = {}
    for entry, name in _named(plan, "compressed_tensors", "llm-compressor", "int4-g128 and int8"):
        by_format.setdefault(entry.format, []).append(name)
    groups = {}
    for number, (format, names) in enumerate(by_format.items()):
        known = FORMATS[format]
        dtypes = {name: f"torch.{value}" for name, value in known.options.items() if name.endswith("_dtype")}
        scheme = {**known.options, **dtypes, "symmetric": True, "strategy": known.strategy, "group_size": known.group}
        weights = {name: value for name, value in scheme.items() if value is not None}
        groups[f"group_{number}"] = {"targets": names, "weights": weights}
    modifier = {"QuantizationModifier": {"config_groups": groups, "ignore": ["lm_head"]}}
    return to_yaml({"precision_stage": {"precision_modifiers": modifier}})


EXPORTS: Mapping[str, Callable[[PrecisionPlan], str]] = {
    "llama-cpp": llama_cpp,
    "llm-compressor": llm_compressor,
}
"""Functions that write a plan for other programs, by the name of the format."""
