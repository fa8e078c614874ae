"""The ``config.json`` of a pruned checkpoint: per-layer settings and the number of experts change, and nothing else.

The result is compared with the original setting by setting, as transformers reads both files; and, in each class that
opens the original, parameter by parameter, and layer by layer as modules with their settings.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.experts import COUNT, RoutedExperts, find_routed_experts
from avss_dist.models.loading import auto_classes, skeleton, skeleton_by, text_config, without_head
from avss_dist.models.quantization import KEYS, quantization_method, require_known_method
from avss_dist.models.remaining import NUM_LAYERS, is_own_index, settings_by_layer
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.quantization import renumber_quantization
from avss_dist.pruning.selection import PlanError
from avss_dist.pruning.weights import LayerNames, StoredWeights, list_path, renumbered

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Settings that give the number of routed experts of a layer."""


def write_config(checkpoint: Checkpoint, plan: Plan, folder: Path, settings: Settings) -> None:
    """Write the ``config.json`` that gives each remaining layer the settings that it had.

    A key that the original lacks is added only where transformers would derive another value for the remaining layers.

    Raises:
        PlanError: no configuration does that, or the plan is for another number of layers.
    """
    plan.require_no_sublayers("No configuration has layers without one, and zeros in its weights would remove nothing")
    whole = text_config(checkpoint)
    text = whole.get_text_config()
    number = getattr(text, NUM_LAYERS, None)
    obstacles = {
        "num_kv_shared_layers": "its last layers use the keys and values of earlier ones",
        "scale_attn_by_inverse_layer_idx": "a layer's attention is scaled by its place",
    }
    PlanError.refuse(
        (
            number != plan.num_layers,
            f"The plan is for {plan.num_layers} layers; the model has {number}.",
            "Make a plan of its own.",
        ),
        *(
            (getattr(text, name, None), f"A {text.model_type} with {name} cannot be pruned: {why}.", None)
            for name, why in obstacles.items()
        ),
    )
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    part = next((raw[n] for n in ("text_config", "llm_config", "decoder") if text is not whole and n in raw), raw)
    expected = settings_by_layer(text.to_dict(), plan.num_layers, plan.keep)
    part |= settings_by_layer(part, plan.num_layers, plan.keep)
    names = {NUM_LAYERS, text.attribute_map.get(NUM_LAYERS, NUM_LAYERS)}
    part |= dict.fromkeys(names.intersection(part) or {NUM_LAYERS}, len(plan.keep))
    if plan.experts:
        part |= _expert_counts(whole, plan, part, settings)
        names |= {*EXPERT_COUNTS}
    if method := quantization_method(whole):
        require_known_method(checkpoint, method)
        layer_names = StoredWeights.of_checkpoint(checkpoint, plan, settings).layers
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
    _require_same_classes(whole, less, plan, settings)


def _expert_counts(whole: Any, plan: Plan, part: Mapping[str, Any], settings: Settings) -> dict[str, int]:
    """Return the settings with the number of routed experts, after those of a plan are dropped.

    Args:
        part: the part of ``config.json`` that describes the text model.

    Raises:
        PlanError: layers would have different numbers of experts, or no setting has the number.
    """
    model = skeleton(whole, settings, torch.float32)
    layer_names = LayerNames.of_model(model, plan)
    if not (routed := layer_names.routed):
        return {}  # the plan names another list of layers, which is refused below
    layers = model.get_submodule(layer_names.lists[0])
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
    if not (names := in_file or as_read):
        raise PlanError(f"No setting of a {whole.model_type} is its number of routed experts, {number}.")
    return dict.fromkeys(names, next(iter(numbers)))


def _write_and_read(
    checkpoint: Checkpoint, whole: Any, raw: Mapping[str, Any], folder: Path, settings: Settings
) -> Any:
    """Write a configuration, and return it as transformers reads it."""
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    try:
        return text_config(checkpoint, folder)
    except ModelError as error:
        raise _changed_model_error(whole, error.message) from error


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as its file holds it, with strings as keys."""
    return dict(json.loads(json.dumps(config, default=str)))


def _require_same_settings(whole: Any, less: Any, changed: set[str]) -> None:
    """Require that transformers reads all settings but the per-layer ones as before.

    Raises:
        PlanError: a setting differs; the message names it and both values.
    """
    before, after = _as_json(whole.to_dict()), _as_json(less.to_dict())
    for path, old, new in _differences(before, after, {*changed, "_name_or_path"}):
        raise _changed_model_error(whole, f"its setting `{path}` would be {new!r} for {old!r}")


def _differences(
    before: Any, after: Any, changed: Collection[str] = (), path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, value, other value) for each difference of nested mappings, except for the ``changed`` names."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            if name not in changed:
                yield from _differences(before.get(name), after.get(name), changed, f"{path}.{name}".lstrip("."))
    elif before != after:
        yield path, before, after


def _layer_properties(
    layer: nn.Module, index: int, routed: RoutedExperts | None = None, removed: int = 0
) -> dict[str, Any]:
    """Return kinds and attributes of a layer's modules by path and name, without the layer's own index.

    Args:
        routed: routed experts of the layer, if it loses some.
        removed: number of experts by which their count is lowered.
    """
    properties: dict[str, Any] = {}
    for path, module in layer.named_modules():
        properties[f"{path} kind"] = type(module).__name__
        for name, value in sorted(vars(module).items()):
            is_index = is_own_index(name, value, index)
            if not name.startswith("_") and not is_index and isinstance(value, (int, float, str, bool, tuple)):
                properties[f"{path} {name}"] = value
        if (
            routed
            and path in (routed.block, routed.router, routed.experts)
            and vars(module).get(COUNT) == routed.number
        ):
            properties[f"{path} {COUNT}"] = routed.number - removed
    return properties


def _require_same_classes(whole: Any, less: Any, plan: Plan, settings: Settings) -> None:
    """Require that each class that opens the original also opens the pruned checkpoint, with the same layers.

    Parameters have the names and shapes that they had, and modules of layers the same kinds and attributes.

    Raises:
        PlanError: the message names the class and the first parameter that would be missing or of another shape, or the
            layer and the first attribute that would differ; or no class has the plan's layers.
    """
    is_compared = False
    for auto in auto_classes(whole):
        before = skeleton_by(auto, whole, settings)
        layers = before is not None and dict(before.named_modules()).get(list_path(before, plan))
        if not isinstance(layers, nn.ModuleList) or len(layers) != plan.num_layers:
            continue
        if (after := skeleton_by(auto, less, settings)) is None:
            raise _changed_model_error(whole, f"{auto.__name__}, which opens the original, would not open it")
        names = LayerNames.of_model(before, plan)
        (place,) = names.lists
        expected = {
            new: names.remaining_shape(name, shape)
            for name, shape in _shapes(before)
            if (new := renumbered(name, place, plan)) is not None
        }
        for name, shape, other in _differences(expected, dict(_shapes(after))):
            raise _changed_model_error(whole, f"in {auto.__name__}, {name} would have the shape {other} for {shape}")
        for index, old in enumerate(plan.keep):
            before = _layer_properties(layers[old], old, names.routed.get(old), len(plan.experts.get(old, ())))
            for at, was, now in _differences(before, _layer_properties(after.get_submodule(place)[index], index)):
                raise _changed_model_error(whole, f"layer {old} would have {at} {now!r} for {was!r} as layer {index}")
        is_compared = True
    if not is_compared:
        modules = dict(without_head(skeleton(whole, settings, torch.float32)).named_modules())
        number = plan.num_layers
        fitting = [path for path, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) == number]
        is_clear = len(fitting) == 1 and plan.layers not in modules
        raise PlanError(
            f"The layers of a {whole.model_type} are not the {number} modules of '{plan.layers}', each on its own.",
            f"Set `layers: {fitting[0]}` in the plan." if is_clear else "None can be taken out of a checkpoint.",
        )


def _shapes(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())


def _changed_model_error(config: Any, why: str) -> PlanError:
    return PlanError(
        f"A pruned {config.model_type} would not be what it was: {why}.",
        "Its configuration tells layers apart by their place: drop others, or evaluate the plan without a checkpoint.",
    )
