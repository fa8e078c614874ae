"""Precision plans as files of other programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.models.number_formats import FORMATS, CompressedTensorsFormat, GgufFormat
from avss_dist.precision.plan import MapPrecision, PrecisionPlan
from avss_dist.pruning.plan import to_yaml
from avss_dist.pruning.selection import PlanError

Names = Mapping[tuple[int, str], str]
"""Names of the linear maps in the checkpoint, by layer and path below it: ``model.layers.7.mlp.up_proj``."""


def module_names(plan: PrecisionPlan) -> Names:
    """Return the names of a plan's linear maps, from the configuration of its model.

    Raises:
        ModelError: the model cannot be found or built.
        PlanError: the model lacks a map.
    """
    from avss_dist.models.loading import without_head
    from avss_dist.models.size import find_layers, load_skeleton

    _, model, _ = load_skeleton(plan.model, Settings())
    names = {id(module): name for name, module in model.named_modules()}
    layers = find_layers(without_head(model), model.config.get_text_config(), Settings())
    found = {}
    for entry in plan.rounded:
        try:
            found[entry.layer, entry.map] = names[id(layers[entry.layer].get_submodule(entry.map))]
        except (AttributeError, IndexError, KeyError):
            raise PlanError(f"{plan.model} has no linear map '{entry.map}' in layer {entry.layer}.") from None
    return found


def llama_cpp(plan: PrecisionPlan) -> str:
    """Return a plan as a file for ``llama-quantize --tensor-type-file``: a pattern of a tensor and a type on each line.

    Raises:
        PlanError: llama.cpp lacks a format, or gguf does not know the architecture.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    types = _known(plan, GgufFormat, "llama.cpp", "q4_0 and q8_0")
    architecture = _architecture(plan)
    known = {name.replace("-", ""): key for key, name in MODEL_ARCH_NAMES.items()}
    if (key := known.get(re.sub("[^a-z0-9]|text$", "", architecture))) is None:
        raise PlanError(f"The library gguf does not know the architecture {architecture}.", "Use another `format`.")
    tensors = get_tensor_name_map(MODEL_ARCH(key), plan.num_layers)
    lines = []
    for entry, module in _named(plan):
        name = tensors.get_name(module, try_suffixes=(".weight", ""))
        if name is None:
            raise PlanError(f"The library gguf has no name for '{entry.map}' of layer {entry.layer} of {architecture}.")
        lines.append(f"{re.escape(name)}\\.weight={types[entry.format].type.lower()}\n")
    return "".join(lines)


def _architecture(plan: PrecisionPlan) -> str:
    from avss_dist.models.loading import text_config

    return str(text_config(resolve(plan.model)).get_text_config().model_type)


def llm_compressor(plan: PrecisionPlan) -> str:
    """Return a plan as a recipe of llm-compressor: a quantization modifier with a group for each format.

    Raises:
        PlanError: compressed-tensors lacks a format.
    """
    formats = _known(plan, CompressedTensorsFormat, "llm-compressor", "int4-g128 and int8")
    groups = {
        f"group_{number}": {"targets": names, "weights": _scheme(formats[name])}
        for number, (name, names) in enumerate(_by_format(plan).items())
    }
    modifier = {"QuantizationModifier": {"config_groups": groups, "ignore": ["lm_head"]}}
    return to_yaml({"precision_stage": {"precision_modifiers": modifier}})


def _scheme(known: CompressedTensorsFormat) -> dict[str, Any]:
    dtypes = {name: f"torch.{value}" for name, value in known.options.items() if name.endswith("_dtype")}
    options = {**known.options, **dtypes, "symmetric": True, "strategy": known.strategy, "group_size": known.group}
    return {name: value for name, value in options.items() if value is not None}


def _named(plan: PrecisionPlan) -> list[tuple[MapPrecision, str]]:
    names = module_names(plan)
    return [(entry, names[entry.layer, entry.map]) for entry in plan.rounded]


def _by_format(plan: PrecisionPlan) -> dict[str, list[str]]:
    by_format: dict[str, list[str]] = {}
    for entry, name in _named(plan):
        by_format.setdefault(entry.format, []).append(name)
    return by_format


def _known(plan: PrecisionPlan, kind: type[Any], program: str, examples: str) -> dict[str, Any]:
    """Return the formats of a plan by name.

    Raises:
        PlanError: a format is of another library.
    """
    formats = {entry.format: FORMATS[entry.format] for entry in plan.rounded}
    if others := sorted(name for name, known in formats.items() if not isinstance(known, kind)):
        raise PlanError(
            f"{program} does not have {', '.join(others)}.", f"Choose from its own formats, such as {examples}."
        )
    return formats


EXPORTS: Mapping[str, Callable[[PrecisionPlan], str]] = {
    "llama-cpp": llama_cpp,
    "llm-compressor": llm_compressor,
}
"""Functions that write a plan for other programs, by the name of the format."""
