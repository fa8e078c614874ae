"""Settings that give the kinds of layers by a rule, such as a period, and what becomes of them in a pruned model.

A configuration may say twice what kind a layer is: in a list with an entry for each layer, and by a rule. Some programs
read the list, others the rule. After layers are dropped, a rule that no longer describes the list is left out, and one
without a list beside it is changed to describe the remaining layers, if it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from avss_dist.core.values import JsonObject, NewObject
from avss_dist.models.checkpoint.layer_settings import LIST_OF_RULE

PERIODS = {"attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}
"""Setting with the offset of a period, by the setting with the period: special are layers with i % period == offset."""


def changed_rules(settings: JsonObject, num_layers: int, keep: Sequence[int]) -> NewObject:
    """Return the rules without a list that must change, with their values for the remaining layers.

    A rule that describes the remaining layers as it is, or that no value would make describe them, is not returned.

    Args:
        settings: all settings of the whole text model, as transformers reads them.
        num_layers: number of layers of the whole model.
        keep: indices of the remaining layers, ascending.
    """
    changed: NewObject = {}
    for period, offset in PERIODS.items():
        has_list = LIST_OF_RULE.get(period) in settings
        if period in settings and offset in settings and not has_list:
            changed |= _shifted_period(settings, period, offset, keep)
    changed |= _dense_layers(settings, keep)
    changed |= _unrolled_blocks(settings, num_layers, keep)
    return changed


def disagreeing_rules(part: JsonObject, derive: Callable[[JsonObject], JsonObject]) -> list[str]:
    """Return the rules of a configuration that give other kinds of layers than the lists beside them.

    Args:
        part: the text model's settings as a file holds them.
        derive: returns all settings as transformers derives them from those of a file; empty if it reads none.
    """
    rules = [rule for rule, name in LIST_OF_RULE.items() if rule in part and name in part]
    if not rules:
        return []
    lists = {LIST_OF_RULE[rule] for rule in rules}
    derived = derive({name: value for name, value in part.items() if name not in lists})
    return [rule for rule in rules if derived.get(LIST_OF_RULE[rule]) != part[LIST_OF_RULE[rule]]]


def _shifted_period(settings: JsonObject, period: str, offset: str, keep: Sequence[int]) -> dict[str, int]:
    """Return period and offset that describe the remaining layers. Empty if the present ones do, or none do.

    Of several, the one with the present period is chosen, else the shortest.
    """
    old_period: int = settings[period]
    old_offset: int = settings[offset]
    special = [new for new, old in enumerate(keep) if old % old_period == old_offset]
    for new_period in (old_period, *range(1, len(keep) + 1)):
        for new_offset in (old_offset, *range(new_period)):
            if [*range(new_offset, len(keep), new_period)] == special and new_offset < new_period:
                new = {period: new_period, offset: new_offset}
                return {} if new == {period: old_period, offset: old_offset} else new
    return {}


def _dense_layers(settings: JsonObject, keep: Sequence[int]) -> NewObject:
    """Return the settings by which Qwen's models with experts list their dense layers, instead of by a step.

    Layers whose number from 1 is no multiple of ``decoder_sparse_step`` are dense, and those in ``mlp_only_layers``.
    """
    step = settings.get("decoder_sparse_step")
    listed = settings.get("mlp_only_layers")
    if type(step) is not int or step < 2 or listed is None:
        return {}

    def is_dense(layer: int) -> bool:
        return (layer + 1) % step != 0

    before = [is_dense(layer) for layer in keep]
    after = [is_dense(layer) for layer in range(len(keep))]
    if before == after:
        return {}
    dense = [new for new, old in enumerate(keep) if is_dense(old) or old in listed]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _unrolled_blocks(settings: JsonObject, num_layers: int, keep: Sequence[int]) -> dict[str, list[str]]:
    """Return the kind of each remaining layer where ``block_types`` is repeated until all layers have one."""
    repeated = settings.get("block_types")
    if not isinstance(repeated, list | tuple) or not 0 < len(repeated) < num_layers:
        return {}

    def kind(layer: int) -> str:
        return str(repeated[layer % len(repeated)])

    before = [kind(layer) for layer in keep]
    after = [kind(layer) for layer in range(len(keep))]
    return {} if before == after else {"block_types": before}
