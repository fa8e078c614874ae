"""The ``config.json`` of a pruned checkpoint: per-layer settings and the number of experts change, and nothing else.

The result is compared with the original setting by setting, as transformers reads both files; layer by layer, as
modules with their shapes and settings; and parameter by parameter in each class that opens the original.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.experts import COUNT, RoutedExperts, find_routed_experts
from avss_dist.models.loading import auto_classes, skeleton, skeleton_by, text_config, without_head
from avss_dist.models.quantization import KEYS, quantization_method, require_known
from avss_dist.models.remaining import NUM_LAYERS, is_own_index, settings_by_layer
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.quantization import LayerNames, renumber_quantization
from avss_dist.pruning.selection import PlanError
from avss_dist.pruning.weights import list_path, renumbered, routed_layers

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Settings that give the number of routed experts of a layer."""


def write_config(checkpoint: Checkpoint, plan: Plan, folder: Path, settings: Settings) -> None:
    """Write the ``config.json`` that gives each remaining layer the settings that it had.

    A key that the original lacks is added only where transformers would derive another value for the remaining layers.

    Raises:
        PlanError: no configuration does that, or the plan is for another number of layers.
    """
    plan.require_no_sublayers("No configuration has layers without one, and zeros in its weights would remove nothing")
    whole = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    text = whole.get_text_config()
    number = getattr(text, NUM_LAYERS, None)
    if number != plan.num_layers:
        raise PlanError(f"The plan is for {plan.num_layers} layers; the model has {number}.", "Make a plan of its own.")
    for name, why in (
        ("num_kv_shared_layers", "its last layers use the keys and values of earlier ones"),
        ("scale_attn_by_inverse_layer_idx", "a layer's attention is scaled by its place"),
    ):
        if getattr(text, name, None):
            raise PlanError(f"A {text.model_type} with {name} cannot be pruned: {why}.")
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    part = next((raw[n] for n in ("text_config", "llm_config", "decoder") if text is not whole and n in raw), raw)
    expected = settings_by_layer(text.to_dict(), plan.num_layers, plan.keep)
    part |= settings_by_layer(part, plan.num_layers, plan.keep)
    names = {NUM_LAYERS, text.attribute_map.get(NUM_LAYERS, NUM_LAYERS)}
    part |= dict.fromkeys(names.intersection(part) or {NUM_LAYERS}, len(plan.keep))
    if plan.experts:
        counts = _expert_counts(whole, plan, part, settings)
        part |= counts
        names |= {*EXPERT_COUNTS}
    if method := quantization_method(whole):
        require_known(checkpoint, method)
        layer_names = LayerNames.of_checkpoint(checkpoint, plan, settings)
        for settings_of in [raw] if part is raw else [raw, part]:
            settings_of |= {
                key: renumber_quantization(settings_of[key], layer_names) for key in KEYS if key in settings_of
            }
    less = _write_and_read(checkpoint, whole, raw, folder, settings)
    derived = _as_json(less.get_text_config().to_dict())
    if missing := {name: value for name, value in expected.items() if derived.get(name) != value}:
        part |= missing
        less = _write_and_read(checkpoint, whole, raw, folder, settings)
    _require_same_settings(whole, less, {*expected, *names, *KEYS})
    _require_same_layers(whole, less, plan, settings)
    _require_same_classes(whole, less, plan, settings)


def _expert_counts(whole: Any, plan: Plan, part: Mapping[str, Any], settings: Settings) -> dict[str, int]:
    """Return the settings with the number of routed experts, after those of a plan are dropped.

    Args:
        part: the part of ``config.json`` that describes the text model.

    Raises:
        PlanError: layers would have different numbers of experts, or no setting has the number.
    """
    model = skeleton(whole, settings, torch.float32)
    if not (routed := routed_layers(model, plan)):
        return {}  # the plan names another list of layers, which is refused below
    layers = dict(model.named_modules())[list_path(model, plan)]
    numbers: dict[int, int] = {}
    for layer in plan.keep:
        if experts := routed.get(layer) or find_routed_experts(layers[layer]):
            numbers.setdefault(experts.number - len(plan.experts.get(layer, ())), layer)
    if len(numbers) > 1:
        (a, i), (b, j) = sorted(numbers.items())[:2]
        raise PlanError(
            f"Layer {i} would have {a} routed experts and layer {j} {b}, and a {whole.model_type} has one number for "
            "all layers.",
            "Drop as many of each layer, or evaluate the plan without a checkpoint.",
        )
    number = next(iter(routed.values())).number
    values = whole.get_text_config().to_dict()
    in_file, as_read = ([name for name in EXPERT_COUNTS if source.get(name) == number] for source in (part, values))
    if not (known := in_file or as_read):
        raise PlanError(f"No setting of a {whole.model_type} is its number of routed experts, {number}.")
    return dict.fromkeys(known, next(iter(numbers)))


def _write_and_read(
    checkpoint: Checkpoint, whole: Any, raw: Mapping[str, Any], folder: Path, settings: Settings
) -> Any:
    """Write a configuration, and return it as transformers reads it."""
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    try:
        return text_config(replace(checkpoint, path=str(folder)), trust_remote_code=settings.trust_remote_code)
    except ModelError as error:
        raise _changed_model_error(whole, error.message) from error


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as its file holds it, with strings as keys."""
    values: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return values


def _require_same_settings(whole: Any, less: Any, changed: set[str]) -> None:
    """Require that transformers reads all settings but the per-layer ones as before.

    Raises:
        PlanError: a setting differs; the message names it and both values.
    """
    before, after = _as_json(whole.to_dict()), _as_json(less.to_dict())
    for path, old, new in _differences(before, after, {*changed, "_name_or_path"}):
        raise _changed_model_error(whole, f"its setting `{path}` would be {new!r} for {old!r}")


def _differences(before: Any, after: Any, changed: set[str], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, value, other value) for each difference of two configurations, except for the ``changed`` names."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            if name not in changed:
                yield from _differences(before.get(name), after.get(name), changed, f"{path}.{name}".lstrip("."))
    elif before != after:
        yield path, before, after


def _require_same_layers(whole: Any, less: Any, plan: Plan, settings: Settings) -> None:
    """Require that modules of both models have the same kinds, shapes and settings, layer by layer."""
    models = [without_head(skeleton(config, settings, torch.float32)) for config in (whole, less)]
    lists = []
    for model, number in zip(models, (plan.num_layers, len(plan.keep)), strict=True):
        layers = dict(model.named_modules()).get(plan.layers)
        if not isinstance(layers, nn.ModuleList) or len(layers) != number:
            raise PlanError(
                f"The layers of a {whole.model_type} are not the {number} modules of '{plan.layers}', each on its own.",
                _other_layers(model, plan) or "None can be taken out of a checkpoint.",
            )
        lists.append(layers)
    before, after = lists
    routed = routed_layers(models[0], plan)
    for new, old in enumerate(plan.keep):
        seen = zip(_layer_properties(before[old], old), _layer_properties(after[new], new), strict=False)
        for (path, what, whole_value), (other, _, b) in seen:
            a = _of_remaining(routed.get(old), len(plan.experts.get(old, ())), path, what, whole_value)
            if path != other or a != b:
                raise _changed_model_error(
                    whole, f"layer {old} would have {path} {what} {b!r} for {a!r} as layer {new}"
                )
        if len(list(before[old].modules())) != len(list(after[new].modules())):
            raise _changed_model_error(whole, f"layer {old} would have other modules as layer {new}")


def _of_remaining(routed: RoutedExperts | None, removed: int, path: str, name: str, value: Any) -> Any:
    """Return a property of a layer's module once some routed experts are removed.

    Args:
        path, name: path of the module below the layer, and name of its parameter or attribute.
        value: property before the removal: the shape of a parameter, or an attribute's value.
    """
    if routed is None:
        return value
    if isinstance(value, tuple):
        return routed.shape_without(f"{path}.{name}", value, removed)
    is_count = name == COUNT and path in (routed.block, routed.router, routed.experts) and value == routed.number
    return routed.number - removed if is_count else value


def _other_layers(model: nn.Module, plan: Plan) -> str:
    """Return a hint that names the model's list of layers, or an empty text if the plan's path names a module.

    The hint is empty, too, unless exactly one list has as many layers as the plan.
    """
    modules = dict(model.named_modules())
    lists = [path for path, part in modules.items() if isinstance(part, nn.ModuleList) and len(part) == plan.num_layers]
    return f"Set `layers: {lists[0]}` in the plan." if len(lists) == 1 and plan.layers not in modules else ""


def _layer_properties(layer: nn.Module, index: int) -> Iterator[tuple[str, str, Any]]:
    """Yield (module path, property, value) for all properties of a layer except its own index."""
    for path, module in layer.named_modules():
        yield path, "kind", type(module).__name__
        for name, parameter in sorted(module._parameters.items()):
            yield path, name, None if parameter is None else tuple(parameter.shape)
        for name, value in sorted(vars(module).items()):
            is_index = is_own_index(name, value, index)
            if not name.startswith("_") and not is_index and isinstance(value, (int, float, str, bool, tuple)):
                yield path, name, value


def _require_same_classes(whole: Any, less: Any, plan: Plan, settings: Settings) -> None:
    """Require that each class that opens the original also opens the pruned checkpoint, with the same parameters.

    Raises:
        PlanError: the message names the class, and the first parameter that would be missing or of another shape.
    """
    for auto in auto_classes(whole):
        before = skeleton_by(auto, whole, settings)
        layers = before is not None and dict(before.named_modules()).get(list_path(before, plan))
        if not isinstance(layers, nn.ModuleList) or len(layers) != plan.num_layers:
            continue
        if (after := skeleton_by(auto, less, settings)) is None:
            raise _changed_model_error(whole, f"{auto.__name__}, which opens the original, would not open it")
        place = list_path(before, plan)
        names = LayerNames(plan, (place,), (), routed_layers(before, plan))
        expected = {
            new: names.remaining_shape(name, shape)
            for name, shape in _shapes(before)
            if (new := renumbered(name, place, plan)) is not None
        }
        shapes = dict(_shapes(after))
        if different := [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]:
            shape, other = expected.get(different[0]), shapes.get(different[0])
            raise _changed_model_error(
                whole, f"in {auto.__name__}, {different[0]} would have the shape {other} for {shape}"
            )


def _shapes(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())


def _changed_model_error(config: Any, why: str) -> PlanError:
    return PlanError(
        f"A pruned {config.model_type} would not be what it was: {why}.",
        "Its configuration tells layers apart by their place: drop others, or evaluate the plan without a checkpoint.",
    )
