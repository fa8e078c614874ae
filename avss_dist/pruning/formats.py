"""Plans as other tools take them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import PurePath

from avss_dist.errors import ConfigError, require_known
from avss_dist.pruning.mergekit import mergekit_slices
from avss_dist.pruning.plan import Plan


def llama_cpp_command(plan: Plan) -> str:
    """The plan as a command line of llama.cpp, for a GGUF file of the model; no tensor is quantized.

    Raises:
        PlanError: the plan leaves out sublayers.
    """
    plan.require_whole_layers("llama-quantize prunes whole layers")
    name = PurePath(plan.model).name.removesuffix(".gguf") or "model"
    files = shlex.join([f"{name}.gguf", f"{name}-pruned.gguf"])
    return f"llama-quantize --prune-layers {','.join(map(str, plan.drop))} {files} COPY\n"


def require_format(name: str, valid: Sequence[str]) -> None:
    """Refuse (`ConfigError`) formats that there are none of; of tools that cannot remove layers, with the reason."""
    if name == "llm-compressor":
        raise ConfigError(
            "`format` llm-compressor: its modifiers prune and quantize weights inside of layers; none removes a layer.",
            "Write the checkpoint with avss prune, and compress that.",
        )
    require_known("`format`", name, valid)


OTHERS: dict[str, Callable[[Plan], str]] = {"mergekit": mergekit_slices, "llama-cpp": llama_cpp_command}
"""What writes a plan for other tools, by the name of its format."""
