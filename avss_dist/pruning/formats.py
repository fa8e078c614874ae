"""Plans in the formats of other tools."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import PurePath

from avss_dist.core.errors import ConfigError, require_known
from avss_dist.pruning.plan import Plan, to_yaml


def mergekit_slices(plan: Plan) -> str:
    """Return a plan as a mergekit configuration: a passthrough merge of the slices [from, to) of remaining layers.

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


def llama_cpp_command(plan: Plan) -> str:
    """Return a plan as a command line of llama.cpp for a GGUF file of the model. It quantizes no tensor.

    Raises:
        PlanError: the plan leaves out sublayers.
    """
    plan.require_whole_layers("llama-quantize prunes whole layers")
    name = PurePath(plan.model).name.removesuffix(".gguf") or "model"
    files = shlex.join([f"{name}.gguf", f"{name}-pruned.gguf"])
    return f"llama-quantize --prune-layers {','.join(map(str, plan.drop))} {files} COPY\n"


def require_format(name: str, valid: Sequence[str]) -> None:
    """Raise ConfigError if a format is unknown, or is of a tool that cannot remove layers."""
    if name == "llm-compressor":
        raise ConfigError(
            "`format` llm-compressor: its modifiers prune and quantize weights inside of layers; none removes a layer.",
            "Write the checkpoint with avss prune, and compress that.",
        )
    require_known("`format`", name, valid)


OTHERS: dict[str, Callable[[Plan], str]] = {"mergekit": mergekit_slices, "llama-cpp": llama_cpp_command}
"""Functions that write a plan for other tools, by the name of the format."""
