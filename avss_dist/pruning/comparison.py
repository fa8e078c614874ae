"""Comparison of the outputs of a pruned checkpoint and of its original under the plan's intervention and repair."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import Removals, whole_layers
from avss_dist.core.registry import LAYERWISE
from avss_dist.core.settings import Execution, Settings
from avss_dist.models.auto import has_head
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.expert_removal import require_experts, without_parts
from avss_dist.models.layers import first_tensor
from avss_dist.models.loading import forward_function, load_model, open_module, text_config
from avss_dist.models.patching import Patch, patched
from avss_dist.models.size import footprint
from avss_dist.models.skipping import skipping
from avss_dist.partition.base import Placement
from avss_dist.partition.choose import size_of, weight_limits
from avss_dist.partition.open import open_replica
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.selection import PlanError
from avss_dist.system.devices import available_memory, pick_device

TOLERANCE = 1e-5  # of the largest output, in float32
CHECKED_SHAPE = (2, 12)  # rows and tokens


def largest_difference(
    checkpoint: Checkpoint, plan: Plan, replaced: Patch, folder: Path, settings: Settings, execution: Execution
) -> float | None:
    """Return the largest difference between the outputs of both backbones' last layers on some tokens.

    Args:
        plan: its layers are skipped in the original, and its experts masked.
        replaced: weights of the original to replace.
        folder: folder of the pruned checkpoint.
        settings: settings with which both compute.
        execution: memory limits for streaming, which is used if the models do not fit in memory twice, or on request.

    Returns:
        None if the models do not fit in memory and have no head, without which they cannot be streamed.

    Raises:
        PlanError: the outputs differ.
        ModelError: one of them cannot be opened, or returns no hidden states.
    """
    fits = 2 * footprint(checkpoint, settings).weight_bytes <= available_memory() // 2
    pruned = resolve(str(folder), trust_remote_code=settings.trust_remote_code)
    pruned = replace(pruned, name=f"{checkpoint.name} without these {'experts' if plan.experts else 'layers'}")
    settings, outputs = replace(settings, layers=plan.layers), []
    for tested, drop, patch in ((checkpoint, plan.drop, replaced), (pruned, (), {})):
        if fits and execution.partition != LAYERWISE:
            output = _output(tested, settings, drop, patch)
        elif has_head(text_config(tested, trust_remote_code=settings.trust_remote_code)):
            output = _streamed_output(tested, settings, drop, patch, execution)
        else:
            return None
        if output is None:
            raise ModelError(f"'{tested.name}' returns no hidden states.")
        outputs.append(output)
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= TOLERANCE * float(outputs[0].abs().max()):
        raise PlanError(
            f"The pruned checkpoint would compute something else than '{checkpoint.name}' with these "
            f"{'experts masked' if plan.experts else 'layers skipped'}: outputs differ by {difference:.3g}.",
            "Layers of this family depend on each other; evaluate the plan without a checkpoint.",
        )
    return difference


def _output(checkpoint: Checkpoint, settings: Settings, drop: Removals, patch: Patch) -> torch.Tensor | None:
    backbone = open_module(load_model(checkpoint, settings), layers=settings.layers)
    layers = backbone.structure.layers
    require_experts(layers, drop)
    with torch.no_grad(), patched(layers, patch), skipping(layers, whole_layers(drop)), without_parts(layers, drop):
        return first_tensor(forward_function(backbone.module)(_checked_tokens(), None))


def _streamed_output(
    checkpoint: Checkpoint, settings: Settings, drop: Removals, patch: Patch, execution: Execution
) -> torch.Tensor | None:
    kind = pick_device(settings.device).type
    limits = weight_limits(LAYERWISE, size_of(checkpoint, settings), settings, execution.max_memory, kind, head=True)
    placement = Placement(partition=LAYERWISE, max_memory=limits)
    with closing(open_replica(checkpoint, settings, placement, head=True)) as replica:
        model = replica.language_model
        assert model is not None
        forward = forward_function(model.backbone.module)
        with model.without(drop), model.patched(patch):
            (output,) = model.together([lambda: first_tensor(forward(_checked_tokens(), None))])
        return output


def _checked_tokens() -> torch.Tensor:
    return torch.arange(CHECKED_SHAPE[0] * CHECKED_SHAPE[1]).reshape(CHECKED_SHAPE) + 5
