"""A plan as mergekit reads it: the slices of layers that stay."""

from __future__ import annotations

from avss_dist.pruning.plan import Plan, to_yaml


def mergekit_slices(plan: Plan) -> str:
    """The plan as a mergekit configuration: a passthrough merge of the slices of layers that stay, [from, to).

    Raises:
        PlanError: the plan leaves out sublayers.
    """
    plan.require_whole_layers("A mergekit configuration has slices of whole layers")
    slices: list[list[int]] = []
    for layer in plan.keep:
        if slices and slices[-1][1] == layer:
            slices[-1][1] = layer + 1
        else:
            slices.append([layer, layer + 1])
    sources = [{"sources": [{"model": plan.model, "layer_range": bounds}]} for bounds in slices]
    return to_yaml({"slices": sources, "merge_method": "passthrough"})
