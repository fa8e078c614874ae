"""The ``config.json`` of a pruned checkpoint: per-layer settings and the number of experts change, and nothing else.

The result is compared with the original setting by setting, as transformers reads both files; and, in each class that
opens the original, parameter by parameter, and layer by layer as modules with their settings.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.values import JsonObject, NewObject
from avss_dist.models.change.remaining import is_own_index
from avss_dist.models.checkpoint.complete import MTP_COUNTS
from avss_dist.models.checkpoint.layer_settings import NUM_LAYERS, settings_by_layer
from avss_dist.models.checkpoint.loading import auto_classes, skeleton, skeleton_by, text_config, without_head
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.quantization import KEYS, quantization_method, require_known_method
from avss_dist.models.structure.experts import COUNT, RoutedExperts, find_routed_experts
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.pruning.layer_rules import changed_rules, disagreeing_rules
from avss_dist.pruning.quantization import renumber_quantization
from avss_dist.pruning.weights import LayerNames, StoredWeights, list_path, renumbered

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Settings that give the number of routed experts of a layer."""
OBSTACLES = {
    "num_kv_shared_layers": "its last layers use the keys and values of earlier ones",
    "scale_attn_by_inverse_layer_idx": "a layer's attention is scaled by its place",
}
"""Reasons why a model cannot be pruned, by the setting that it then has."""


def write_config(checkpoint: Checkpoint, plan: Plan, folder: Path, settings: Settings) -> None:
    """Write the ``config.json`` that gives each remaining layer the settings that it had.

    A key that the original lacks is added only where transformers would derive another value for the remaining layers.
    A rule for the kinds of layers that would then say something else is left out; see `layer_rules`.

    Raises:
        PlanError: no configuration does that, or the plan is for another number of layers.
    """
    plan.require_no_sublayers("No configuration has layers without one, and zeros in its weights would remove nothing")
    whole = text_config(checkpoint)
    text = whole.get_text_config()
    _require_supported(text, plan)
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    part = raw if text is whole else _text_part(raw)
    values = text.to_dict()
    rules = changed_rules(values, plan.num_layers, plan.keep)
    expected = settings_by_layer(values, plan.num_layers, plan.keep) | rules
    part |= settings_by_layer(part, plan.num_layers, plan.keep) | rules
    names = {NUM_LAYERS, text.attribute_map.get(NUM_LAYERS, NUM_LAYERS)}
    names_in_file = names.intersection(part) or {NUM_LAYERS}
    part |= dict.fromkeys(names_in_file, len(plan.keep))
    if plan.experts:
        part |= _expert_counts(whole, plan, part, settings)
        # The head that predicts several tokens is left out, see `weights.renumbered`.
        part |= dict.fromkeys([name for name in MTP_COUNTS if part.get(name)], 0)
        names.update(EXPERT_COUNTS, MTP_COUNTS)
    if method := quantization_method(whole):
        require_known_method(checkpoint, method)
        layer_names = StoredWeights.of_checkpoint(checkpoint, plan, settings).layers
        _renumber_quantization(raw, layer_names)
        if part is not raw:
            _renumber_quantization(part, layer_names)
    pruned = _write_and_read(checkpoint, whole, raw, folder)
    derived = _as_json(pruned.get_text_config().to_dict())
    missing = {name: value for name, value in expected.items() if derived.get(name) != value}
    if missing:
        part |= missing
        pruned = _write_and_read(checkpoint, whole, raw, folder)
    disagreeing = disagreeing_rules(part, lambda without: _derived(checkpoint, raw, part, without))
    if disagreeing:
        for rule in disagreeing:
            del part[rule]
        pruned = _write_and_read(checkpoint, whole, raw, folder)
    _require_same_settings(whole, pruned, {*expected, *disagreeing, *names, *KEYS})
    _require_same_classes(whole, pruned, plan, settings)


def _derived(checkpoint: Checkpoint, raw: JsonObject, part: JsonObject, replacement: JsonObject) -> NewObject:
    """Return the text model's settings as transformers derives them; empty if it cannot read the configuration.

    Args:
        raw: content of ``config.json``.
        part: the part of it that describes the text model.
        replacement: other values for this part.
    """
    values = dict(replacement)
    if part is not raw:
        values = dict(raw)
        for name, value in raw.items():
            if value is part:
                values[name] = replacement
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        try:
            config = text_config(checkpoint, Path(folder))
        except ModelError:
            return {}
    return _as_json(config.get_text_config().to_dict())


def _require_supported(text: PreTrainedConfig, plan: Plan) -> None:
    """Raise PlanError if a plan is for another number of layers, or a family's layers depend on their places.

    Args:
        text: configuration of the text model.
    """
    problems = []
    number = getattr(text, NUM_LAYERS, None)
    if number != plan.num_layers:
        problem = PlanError(
            f"The plan is for {plan.num_layers} layers; the model has {number}.", "Make a plan of its own."
        )
        problems.append(problem)
    for name, reason in OBSTACLES.items():
        if getattr(text, name, None):
            problems.append(PlanError(f"A {text.model_type} with {name} cannot be pruned: {reason}."))
    if problems:
        raise PlanError.combine(problems)


def _text_part(raw: NewObject) -> NewObject:
    """Return the part of ``config.json`` that describes the text model of several models, or all of it."""
    for name in ("text_config", "llm_config", "decoder"):
        if name in raw:
            part: NewObject = raw[name]
            return part
    return raw


def _renumber_quantization(part: NewObject, names: LayerNames) -> None:
    """Renumber the layers in the quantization settings of a part of ``config.json``, in place."""
    for key in KEYS:
        if key in part:
            part[key] = renumber_quantization(part[key], names)


def _expert_counts(whole: PreTrainedConfig, plan: Plan, part: JsonObject, settings: Settings) -> dict[str, int]:
    """Return the settings with the number of routed experts, after those of a plan are dropped.

    Args:
        part: the part of ``config.json`` that describes the text model.

    Raises:
        PlanError: layers would have different numbers of experts, or no setting has the number.
    """
    model = skeleton(whole, settings, torch.float32)
    layer_names = LayerNames.of_model(model, plan)
    routed = layer_names.routed
    if not routed:
        return {}  # The plan names another list of layers, which `_require_same_classes` refuses.
    layers = model.get_submodule(layer_names.lists[0])
    # The first layer that would have a number of experts, by that number.
    first_layers: dict[int, int] = {}
    for layer in plan.keep:
        experts = routed.get(layer) or find_routed_experts(layers[layer])
        if experts:
            remaining = experts.number - len(plan.experts.get(layer, ()))
            first_layers.setdefault(remaining, layer)
    if len(first_layers) > 1:
        fewer, more = sorted(first_layers)[:2]
        raise PlanError(
            f"Layer {first_layers[fewer]} would have {fewer} routed experts and layer {first_layers[more]} {more}, and "
            f"a {whole.model_type} has one number for all layers.",
            "Drop as many of each layer, or evaluate the plan without a checkpoint.",
        )
    (remaining,) = first_layers
    number = next(iter(routed.values())).number
    names = [name for name in EXPERT_COUNTS if part.get(name) == number]
    if not names:
        values = whole.get_text_config().to_dict()
        names = [name for name in EXPERT_COUNTS if values.get(name) == number]
    if not names:
        raise PlanError(f"No setting of a {whole.model_type} is its number of routed experts, {number}.")
    return dict.fromkeys(names, remaining)


def _write_and_read(checkpoint: Checkpoint, whole: PreTrainedConfig, raw: JsonObject, folder: Path) -> PreTrainedConfig:
    """Write a configuration, and return it as transformers reads it."""
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    try:
        return text_config(checkpoint, folder)
    except ModelError as error:
        raise _changed_model_error(whole, error.message) from error


def _as_json(config: JsonObject) -> NewObject:
    """Return a configuration as its file holds it, with strings as keys."""
    return dict(json.loads(json.dumps(config, default=str)))


def _require_same_settings(whole: PreTrainedConfig, pruned: PreTrainedConfig, changed: set[str]) -> None:
    """Require that transformers reads all settings but the per-layer ones as before.

    Raises:
        PlanError: a setting differs; the message names it and both values.
    """
    before = _as_json(whole.to_dict())
    after = _as_json(pruned.to_dict())
    for setting in _differences(before, after, {*changed, "_name_or_path"}):
        raise _changed_model_error(
            whole, f"its setting `{setting.path}` would be {setting.after!r} for {setting.before!r}"
        )


class _Difference(NamedTuple):
    """A value that differs between two nested mappings, and its path of keys."""

    path: str
    before: object
    after: object


def _differences(before: object, after: object, changed: Collection[str] = (), path: str = "") -> Iterator[_Difference]:
    """Yield each difference of two values, which may be nested mappings, except for the ``changed`` names."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            if name not in changed:
                path_inside = f"{path}.{name}".lstrip(".")
                yield from _differences(before.get(name), after.get(name), changed, path_inside)
    elif before != after:
        yield _Difference(path, before, after)


def _layer_properties(layer: nn.Module, index: int, routed: RoutedExperts | None = None, removed: int = 0) -> NewObject:
    """Return kinds and attributes of a layer's modules by path and name, without the layer's own index.

    Args:
        routed: routed experts of the layer, if it loses some.
        removed: number of experts by which their count is lowered.
    """
    properties: NewObject = {}
    for path, module in layer.named_modules():
        properties[f"{path} kind"] = type(module).__name__
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or is_own_index(name, value, index):
                continue
            if isinstance(value, (int, float, str, bool, tuple)):
                properties[f"{path} {name}"] = value
        if routed and path in (routed.block, routed.router, routed.experts):
            if vars(module).get(COUNT) == routed.number:
                properties[f"{path} {COUNT}"] = routed.number - removed
    return properties


def _require_same_classes(whole: PreTrainedConfig, pruned: PreTrainedConfig, plan: Plan, settings: Settings) -> None:
    """Require that each class that opens the original also opens the pruned checkpoint, with the same layers.

    Parameters have the names and shapes that they had, and modules of layers the same kinds and attributes.

    Raises:
        PlanError: the message names the class and the first parameter that would be missing or of another shape, or the
            layer and the first attribute that would differ; or no class has the plan's layers.
    """
    is_compared = False
    for auto in auto_classes(whole):
        before = skeleton_by(auto, whole, settings)
        if before is None or not _has_layers(before, plan):
            continue
        after = skeleton_by(auto, pruned, settings)
        if after is None:
            raise _changed_model_error(whole, f"{auto.__name__}, which opens the original, would not open it")
        names = LayerNames.of_model(before, plan)
        for shape in _differences(_remaining_shapes(before, names), _shapes(after)):
            raise _changed_model_error(
                whole, f"in {auto.__name__}, {shape.path} would have the shape {shape.after} for {shape.before}"
            )
        _require_same_layers(whole, before, after, names)
        is_compared = True
    if not is_compared:
        raise _no_such_layers(whole, plan, settings)


def _has_layers(model: PreTrainedModel, plan: Plan) -> bool:
    """Whether a model has the plan's list of layers, with as many of them."""
    layers = dict(model.named_modules()).get(list_path(model, plan))
    return isinstance(layers, nn.ModuleList) and len(layers) == plan.num_layers


def _remaining_shapes(model: nn.Module, names: LayerNames) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that remain of a whole model, by their names in the pruned one."""
    (path,) = names.lists
    shapes = {}
    for name, shape in _shapes(model).items():
        new_name = renumbered(name, path, names.plan)
        if new_name is not None:
            shapes[new_name] = names.remaining_shape(name, shape)
    return shapes


def _require_same_layers(config: PreTrainedConfig, before: nn.Module, after: nn.Module, names: LayerNames) -> None:
    """Raise PlanError if a remaining layer would have modules of another kind, or with other attributes.

    Args:
        config: configuration of the whole model.
        before, after: the whole model and the pruned one.
        names: names of the layers of the whole model.
    """
    (path,) = names.lists
    for index, layer in enumerate(names.plan.keep):
        num_removed = len(names.plan.experts.get(layer, ()))
        old_layer = before.get_submodule(f"{path}.{layer}")
        expected = _layer_properties(old_layer, layer, names.routed.get(layer), num_removed)
        actual = _layer_properties(after.get_submodule(f"{path}.{index}"), index)
        for attribute in _differences(expected, actual):
            change = f"{attribute.path} {attribute.after!r} for {attribute.before!r}"
            raise _changed_model_error(config, f"layer {layer} would have {change} as layer {index}")


def _no_such_layers(config: PreTrainedConfig, plan: Plan, settings: Settings) -> PlanError:
    """Return the error that no class that opens a model has the plan's layers."""
    modules = dict(without_head(skeleton(config, settings, torch.float32)).named_modules())
    number = plan.num_layers
    lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) == number]
    hint = "None can be taken out of a checkpoint."
    if len(lists) == 1 and plan.layers not in modules:
        hint = f"Set `layers: {lists[0]}` in the plan."
    return PlanError(
        f"The layers of a {config.model_type} are not the {number} modules of '{plan.layers}', each on its own.", hint
    )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model by its name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _changed_model_error(config: PreTrainedConfig, why: str) -> PlanError:
    return PlanError(
        f"A pruned {config.model_type} would not be what it was: {why}.",
        "Its configuration tells layers apart by their place: drop others, or evaluate the plan without a checkpoint.",
    )
