"""Text and memory that a repair needs, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import candidate_layers
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.safetensors import DTYPES
from avss_dist.models.checkpoint.size import load_skeleton
from avss_dist.models.structure.down_projections import find_down_projections
from avss_dist.models.structure.experts import find_routed_experts
from avss_dist.models.structure.find import find_down_projection
from avss_dist.models.structure.layers import linear_sizes
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.pruning.repair.fitter import PLAIN_HINT, Products, holds_sums, products_of
from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.pruning.weights import StoredWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tokens_needed(checkpoint: Checkpoint, repair: str, settings: Settings) -> int:
    """Return the minimum number of tokens to fit a repair to, at the layer that needs the fewest.

    Args:
        repair: one of `pruning.repair.registry.REPAIRS`.

    Returns:
        0 if only a pass over tokens can tell which modules are the layers.

    Raises:
        PlanError: no layer can hold the repair; the message says why.
        ModelError: the checkpoint cannot be read, or its model cannot be built.
    """
    model, _ = load_skeleton(checkpoint, settings)
    lists = candidate_layers(model, settings.layers)
    if len(lists) != 1:
        return 0
    ((path, layers),) = lists.items()
    changed = _changed_weights(checkpoint, model, layers)
    plan = Plan(model=checkpoint.name, num_layers=len(layers), layers=path, drop=(0,))
    weights = StoredWeights.of_checkpoint(checkpoint, plan, settings)
    names = [weights.names((layer, weight.path))[0] for layer, weight in changed.items()]
    stored = {name: weights.tensors[name].dtype for name in names if name in weights.tensors}
    dtypes = [DTYPES[dtype] for dtype in stored.values() if dtype in DTYPES]
    if not any(holds_sums(dtype) for dtype in dtypes):
        name = names[0]
        form = f"as {stored[name]}" if name in stored else "under other names"
        raise PlanError(
            f"The files of '{checkpoint.name}' hold '{name}' {form}, quantized or fused: nothing can be added to it.",
            PLAIN_HINT,
        )
    method = REPAIRS[repair]
    return min(method.tokens_needed(weight.inputs, weight.outputs, weight.chances) for weight in changed.values())


@dataclass(frozen=True, kw_only=True)
class RepairCost:
    """Text and memory that the fit of a repair takes, beside the model and its hidden states.

    Attributes:
        repair: its name.
        tokens: minimum number of tokens to fit to, at the layer that needs the fewest.
        num_bytes: memory of the products at the largest layer, after which as many layers are removed as possible.
        why: the products in words.
    """

    repair: str
    tokens: int
    num_bytes: int
    why: str


def repair_cost(checkpoint: Checkpoint, repair: str, settings: Settings) -> RepairCost:
    """Return the cost of a repair from the configuration of a checkpoint.

    Raises:
        PlanError: no layer can hold the repair, or only a pass over tokens can tell which modules are the layers.
        ModelError: the checkpoint cannot be read, or its model cannot be built.
    """
    model, _ = load_skeleton(checkpoint, settings)
    layers = _only_layers(checkpoint, model, settings)
    method = REPAIRS[repair]
    lenders = len(layers) - 1
    tokens = []
    largest = Products(0, 0, 0)
    for weight in _changed_weights(checkpoint, model, layers).values():
        tokens.append(method.tokens_needed(weight.inputs, weight.outputs, weight.chances))
        products = products_of(method, weight.inputs, weight.outputs, experts=weight.experts, lenders=lenders)
        if products.num_bytes > largest.num_bytes:
            largest = products
    return RepairCost(repair=repair, tokens=min(tokens), num_bytes=largest.num_bytes, why=str(largest))


def fit_operations(
    checkpoint: Checkpoint, repair: str, settings: Settings, lenders: Sequence[int], tokens: int
) -> float:
    """Return the floating-point operations of a fit beside its passes, about, as the number in float32.

    Every cut is taken to be after the largest layer.

    Args:
        lenders: number of removed layers of each cut.
        tokens: tokens of the text.

    Raises: as `repair_cost`.
    """
    model, _ = load_skeleton(checkpoint, settings)
    layers = _only_layers(checkpoint, model, settings)
    changed = _changed_weights(checkpoint, model, layers).values()
    largest = max(changed, key=lambda weight: weight.inputs)
    operations = 0.0
    for number in lenders:
        products = products_of(
            REPAIRS[repair], largest.inputs, largest.outputs, experts=largest.experts, lenders=number
        )
        operations += products.operations(largest.chances * tokens)
    return operations


def _only_layers(checkpoint: Checkpoint, model: PreTrainedModel, settings: Settings) -> nn.ModuleList:
    """Return the list of layers of a model.

    Raises:
        PlanError: it has several, so that only a pass over tokens can tell which modules are the layers.
    """
    lists = candidate_layers(model, settings.layers)
    if len(lists) != 1:
        raise PlanError(f"'{checkpoint.name}' has several lists of layers: {', '.join(lists)}.", "Set `layers`.")
    (layers,) = lists.values()
    return layers


def _changed_weights(checkpoint: Checkpoint, model: PreTrainedModel, layers: nn.ModuleList) -> dict[int, ChangedWeight]:
    """Return the weight of each layer that a repair changes.

    Raises:
        PlanError: there is none.
    """
    width = model.config.get_text_config().hidden_size
    changed: dict[int, ChangedWeight] = {}
    for index, layer in enumerate(layers):
        if weight := _changed_weight(layer, width):
            changed[index] = weight
    if not changed:
        raise PlanError(
            f"No layer of '{checkpoint.name}' has an MLP that ends in one linear map, or in those of its routed "
            "experts: what is missing after it cannot be given back.",
            "Set `repair` to none.",
        )
    return changed


@dataclass(frozen=True)
class ChangedWeight:
    """The weight of a layer that a repair changes.

    Attributes:
        path: path below the layer.
        inputs, outputs: sizes of the linear map, or of that of each expert.
        chances: share of the tokens that reach a linear map.
        experts: number of routed experts; 0 for a linear map.
    """

    path: str
    inputs: int
    outputs: int
    chances: float = 1.0
    experts: int = 0


def _changed_weight(layer: nn.Module, width: int) -> ChangedWeight | None:
    """Return the weight of a layer that a repair changes, or None if it has none.

    Args:
        layer: the module, which may be on the meta device.
        width: units of the residual stream.
    """
    with suppress(ModelError):
        if weight := _experts_weight(layer):
            return weight
    linear = find_down_projection(layer, width)
    if linear is None:
        return None
    path, module = linear
    inputs, outputs = linear_sizes(module)
    return ChangedWeight(f"{path}.weight", inputs, outputs)


def _experts_weight(layer: nn.Module) -> ChangedWeight | None:
    """Return the weight of the routed experts of a layer, or None if it has none that is known.

    Raises:
        ModelError: as `find_routed_experts`.
    """
    routed = find_routed_experts(layer)
    if routed is None:
        return None
    down = find_down_projections(layer.get_submodule(routed.experts))
    if down is None:
        return None
    experts, units, outputs = down.as_rows(down.module.get_parameter(down.WEIGHT)).shape
    return ChangedWeight(f"{routed.experts}.{down.WEIGHT}", units, outputs, routed.top_k / experts, experts)
