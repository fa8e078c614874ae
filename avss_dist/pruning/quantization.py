"""Quantization settings that name layers by number: what they say of the layers that stay.

Such as ``modules_to_not_convert: [model.layers.0.mlp.gate]`` or ``ignored_layers``: after pruning, another layer has
that number, and its weights would be read as what they are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from avss_dist.pruning.plan import Plan
from avss_dist.pruning.selection import PlanError

KEYS = ("quantization_config", "compression_config")  # of config.json
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # beside it
_PATTERN = re.compile(r"[\\^$*+?{}\[\]|()]")
_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d")

Rename = Callable[[str], str | None]  # of a module's path; None where its layer is dropped


def renumber_quantization(config: Any, plan: Plan) -> Any:
    """Quantization settings, JSON values, with the layers that stay under their new numbers.

    Raises:
        PlanError: a pattern names layers by number; which ones it means is unclear.
    """
    return _renumbered(config, _renaming(plan))


def quantization_note(config: dict[str, Any]) -> str | None:
    """What the check of a pruned checkpoint cannot see of quantized weights; None where they are not quantized."""
    method = next((found.get("quant_method", key) for key, found in _settings(config)), None)
    if method is None:
        return None
    return (
        f"The weights are quantized ({method}). The check compares outputs on this machine's CPU, where weights may be "
        "dequantized first: it cannot see whether a device computes with them as before. Evaluate it where it will run."
    )


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    yield from ((key, part[key]) for part in parts for key in KEYS if isinstance(part.get(key), dict))


def _renaming(plan: Plan) -> Rename:
    inside = re.compile(rf"((?:.*?\.)?{re.escape(plan.layers)}\.)(\d+)((?:\..*)?)")
    place = {layer: i for i, layer in enumerate(plan.keep)}

    def rename(name: str) -> str | None:
        if match := inside.fullmatch(name):
            layer = int(match[2])
            return f"{match[1]}{place[layer]}{match[3]}" if layer in place else None
        if _PATTERN.search(name) and _NUMBER.search(name):
            raise PlanError(
                f"The quantization settings name layers by a pattern, '{name}': which ones it means is unclear.",
                "Prune the checkpoint before it is quantized, or evaluate the plan without a checkpoint.",
            )
        return name

    return rename


def _renumbered(value: Any, rename: Rename) -> Any:
    if isinstance(value, dict):
        named = {rename(key): part for key, part in value.items()}
        return {key: _renumbered(part, rename) for key, part in named.items() if key is not None}
    if isinstance(value, list):
        names = [rename(part) if isinstance(part, str) else _renumbered(part, rename) for part in value]
        return [part for part in names if part is not None]
    return value
