"""Precision plans by the losses that were predicted for rounded weights, and their files for other programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from avss_dist.analysis.chosen import ChosenRun, newest_run
from avss_dist.core.errors import AvssError, ConfigError, QueryError
from avss_dist.core.files import write_output
from avss_dist.core.intervention import RoundedPlace
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.core.yaml_files import to_yaml
from avss_dist.corpus.seen import SeenText
from avss_dist.models.change.number_formats import FORMATS, fitting
from avss_dist.models.checkpoint.locate import find_checkpoint, resolve
from avss_dist.plans.budget import ROUNDING_ERROR, Choice, in_order, least_damage, same_format, total
from avss_dist.plans.catalog import PRECISION_ESTIMATES, SECOND_ORDER
from avss_dist.plans.choice import PlanError
from avss_dist.plans.ground_truth import map_roundings, repeated_command
from avss_dist.plans.map_plans import MapPrecision, PrecisionPlan
from avss_dist.plans.plan import run_size
from avss_dist.plans.seen import seen_by_evaluation
from avss_dist.requests import PrecisionRequest
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import BITS_PER_WEIGHT, NUM_WEIGHTS
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.names import MEASURED_ONLY
from avss_dist.warehouse.reader import Warehouse

USUAL_FORMATS = ("int4-g64", "int4-g32", "int4")
"""Formats to predict beside int8: the first that every linear map can take. The last has no groups of inputs."""
MAX_FALL = 0.01  # nats per token that maps of a plan may gain together: other text does not have them
MAX_RISE = 0.5  # nats per token of all maps in one format, above which predictions of it mean little


class NotPredicted(QueryError):
    """The warehouse lacks a prediction of some number formats for the model of a run.

    Attributes:
        run: the row of ``runs``.
    """

    def __init__(self, message: str, run: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.run = run


def plan_precision(request: PrecisionRequest, store: Warehouse, run: Mapping[str, Any]) -> PrecisionPlan:
    """Choose the number format of each linear map of a run's model.

    Args:
        run: a row of ``runs``.

    Raises:
        NotPredicted: the effect of a format was not predicted.
        PlanError: the budget is below the smallest formats.
    """
    by = _estimate(request)
    evaluation, values, available = _measured(store, run, request.formats, by)
    formats = [name for name in available if name in (request.formats or available)]
    maps = sorted({(place.layer, place.path or "") for place in values[by]})
    shape = (len(maps), len(formats))
    damage = np.empty(shape)
    bits = np.empty(shape)  # of all weights of a map
    weights = np.empty(len(maps))
    for number, (layer, path) in enumerate(maps):
        places = [RoundedPlace(layer=layer, path=path, format=name) for name in formats]
        weights[number] = round(values[NUM_WEIGHTS][places[0]])
        damage[number] = [values[by][place] for place in places]
        bits[number] = [values[BITS_PER_WEIGHT][place] * weights[number] for place in places]
    chosen = _choose(request, damage, bits, _budget(request, run, weights, bits))
    rounded = []
    for number, (layer, path) in enumerate(maps):
        index = int(chosen[number])
        precision = MapPrecision(
            layer=layer,
            map=path,
            format=formats[index],
            weights=int(weights[number]),
            bits=float(bits[number, index] / weights[number]),
        )
        rounded.append(precision)
    why = {"by": request.by, "formats": ", ".join(formats), f"sum_of_{by}": round(total(damage, chosen), 6)}
    if request.bits:
        why["bits"] = request.bits
    else:
        why["memory"] = describe_bytes(request.memory or 0)
    if request.by == "random":
        why["seed"] = request.seed
    is_scored = run.get("status") != MEASURED_ONLY
    last_layer = max(layer for layer, _ in maps)
    plan = PrecisionPlan(
        model=run["model"],
        revision=run["revision"],
        num_layers=run["num_layers"] or 1 + last_layer,
        bits=float(total(bits, chosen) / weights.sum()),
        why=why,
        run_id=run["run_id"] if is_scored else None,
        evaluation=evaluation,
        seen=_seen(store, evaluation),
        findings=tuple(_findings(by, damage, chosen, formats)),
        rounded=tuple(rounded),
    )
    if request.output is not None:
        if request.format in EXPORTS:
            write_output(request.output, EXPORTS[request.format](plan), PlanError)
        else:
            plan.write(request.output)
    return plan


def predicted_run(request: PrecisionRequest, store: Warehouse) -> ChosenRun:
    """Return the newest run for whose model the damage of the formats of a request was predicted.

    Raises:
        QueryError: there is none. The hint is the command that predicts it, or formats that the model can take.
    """

    def require(run: Mapping[str, Any]) -> None:
        _measured(store, run, request.formats, _estimate(request))

    try:
        return newest_run(store, request.run, require, measured=True)
    except NotPredicted as error:
        raise QueryError(error.message, _how_to_predict(store, error.run, request.formats)) from None


def _how_to_predict(store: Warehouse, run: Mapping[str, Any], requested: Sequence[str]) -> str:
    """Return the command that predicts the damage of formats, or the formats that can be predicted.

    Args:
        requested: formats to predict; by default usual ones. The hint names none that a linear map cannot take.
    """
    shapes = _map_shapes(run)
    able = fitting(shapes or [(1, 1)])  # without shapes, only formats whose scales are of any number of inputs
    unable = [name for name in requested if shapes and name not in able]
    if unable:
        every = f"Formats that can take every linear map of {run['model']}: {', '.join(able)}."
        return f"{', '.join(unable)} cannot. {every}"
    names = requested or (next(name for name in USUAL_FORMATS if name in able), "int8")
    measures = {"leave_one_out": False, "rounded_layers": False, "quantize": names}
    return f"Do: {repeated_command('ablate', store, run, measures)}"


def _map_shapes(run: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Return the shapes (outputs, inputs) of the linear maps of a run's model, or none if the model is not found."""
    from avss_dist.models.checkpoint.size import find_layers, load_skeleton

    name, settings = run["model"], settings_of(run)
    if run["revision"] and not Path(name).expanduser().exists():
        name = f"{name}@{run['revision']}"
    options = Settings(layers=settings.get("layers"), trust_remote_code=settings.get("trust_remote_code", False))
    with suppress(AvssError):
        model, _ = load_skeleton(find_checkpoint(name, trust_remote_code=options.trust_remote_code), options)
        return _shapes_in(find_layers(model, options))
    return set()


def _shapes_in(layers: Any) -> set[tuple[int, int]]:
    """Return the shapes (outputs, inputs) of the linear maps in a module."""
    from avss_dist.models.structure.layers import is_linear, linear_sizes

    shapes = set()
    for module in layers.modules():
        if is_linear(module):
            inputs, outputs = linear_sizes(module)
            shapes.add((outputs, inputs))
    return shapes


def _estimate(request: PrecisionRequest) -> str:
    """Return the estimate of the damage that a request reads. Controls read the second order for its formats."""
    return request.by if request.by in PRECISION_ESTIMATES else SECOND_ORDER


def _seen(store: Warehouse, evaluation: str) -> tuple[SeenText, ...]:
    """Return the text of a prediction."""
    return seen_by_evaluation(store.table("evaluations", run_ids=[evaluation]).to_pylist()[0])


def _findings(by: str, damage: Float64, chosen: Choice, formats: Sequence[str]) -> Iterator[str]:
    """Yield a sentence on each format of a plan that costs so much that its prediction means little, and on falls."""
    predicts_loss = by != "output_error"
    for index in sorted(set(chosen.tolist())) if predicts_loss else ():
        rise = float(damage[:, index].sum())
        if rise > MAX_RISE:
            yield (
                f"Rounding every linear map to {formats[index]} is predicted to cost {rise:.2g} nats per token. "
                "Predictions are of small changes, and too low for this one: choose from other formats."
            )
    fall = -total(np.minimum(damage, 0.0), chosen)
    if fall > MAX_FALL:
        yield (
            f"Some linear maps are predicted to lower the loss when they are rounded, by {fall:.2g} nats per token "
            f"together. That is so on the text of the prediction: for other text, choose `by` {SECOND_ORDER}."
        )


def _measured(
    store: Warehouse, run: Mapping[str, Any], formats: Sequence[str], by: str
) -> tuple[str, dict[str, dict[RoundedPlace, float]], list[str]]:
    """Return the newest prediction that has all formats, as `map_roundings`, and its formats from the fewest bits on.

    Raises:
        NotPredicted: there is none.
    """
    predictions = [*map_roundings(store, run, by)]
    for run_id, values in predictions:
        sizes = {place.format: bits for place, bits in values[BITS_PER_WEIGHT].items()}
        if set(formats) <= {*sizes}:
            return run_id, values, sorted(sizes, key=lambda name: sizes[name])
    what = "a prediction of rounded weights"
    if predictions and formats:
        what = f"one prediction of {', '.join(formats)}"
    raise NotPredicted(f"{store.root} lacks {what} for the linear maps of {run['model']}.", run)


def _budget(request: PrecisionRequest, run: Mapping[str, Any], weights: Float64, bits: Float64) -> float:
    """Return the bits that all linear maps may have together.

    Raises:
        PlanError: they are fewer than those of the smallest formats.
    """
    least = float(bits.min(axis=1).sum())
    if request.bits is not None:
        budget = request.bits * weights.sum()
        if budget < least * (1 - ROUNDING_ERROR):
            raise PlanError(
                f"`bits` {request.bits:g} is below the {least / weights.sum():.4g} bits per weight of the smallest "
                "formats.",
                "Raise `bits`, or predict a smaller format with avss ablate --quantize.",
            )
        return float(budget)
    assert request.memory is not None
    size = run_size(run)
    outside = size.weight_bytes - weights.sum() * size.element_bytes
    if request.memory * 8 < outside * 8 + least:
        raise PlanError(
            f"`memory` {describe_bytes(request.memory)} is below the {describe_bytes(outside + least / 8)} of the "
            f"model with the smallest formats: its other weights take {describe_bytes(outside)} in {size.dtype}.",
            "Raise `memory`, or predict a smaller format with avss ablate --quantize.",
        )
    return float((request.memory - outside) * 8)


def _choose(request: PrecisionRequest, damage: Float64, bits: Float64, budget: float) -> Choice:
    """Return the format of each map by the method of a request.

    Raises:
        ConfigError: no single format is within the budget of ``uniform``.
    """
    if request.by in PRECISION_ESTIMATES:
        return least_damage(damage, bits, budget)
    if request.by == "uniform":
        if bits.sum(axis=0).min() > budget * (1 + ROUNDING_ERROR):
            raise ConfigError("No single format is within the budget.", f"Raise it, or use `by` {SECOND_ORDER}.")
        return same_format(bits, budget)
    return in_order(np.random.default_rng(request.seed).permutation(len(bits)).tolist(), damage, bits, budget)


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
        own = [name for name in fitting(_shapes_in(layers)) if FORMATS[name].module == library]
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
        dtypes = {name: f"torch.{value}" for name, value in about.options.items() if name.endswith("_dtype")}
        scheme = {**about.options, **dtypes, "symmetric": True, "strategy": about.strategy, "group_size": about.group}
        weights = {name: value for name, value in scheme.items() if value is not None}
        groups[f"group_{number}"] = {"targets": names, "weights": weights}
    modifiers = {"QuantizationModifier": {"config_groups": groups, "ignore": ["lm_head"]}}
    return to_yaml({"precision_stage": {"precision_modifiers": modifiers}})


EXPORTS: Mapping[str, Callable[[PrecisionPlan], str]] = {
    "llama-cpp": llama_cpp,
    "llm-compressor": llm_compressor,
}
"""Functions that write a plan for other programs, by the name of the format."""
