"""Models whose matrices ranks split: transformers' plans, the units that a rank sees at a site, and their exchange.

A family has plans, which say how each module is split. Every rank reads its part of each tensor from the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch

from avss_dist.core.errors import ConfigError
from avss_dist.core.extras import pip_command
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import (
    Backbone,
    Forward,
    candidate_layers,
    forward_function,
    load_model,
    open_module,
    quiet,
)
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.quantization import scale_block
from avss_dist.models.checkpoint.size import load_skeleton, stored_skeleton
from avss_dist.models.structure.layers import (
    PROBE_SHAPE,
    Layer,
    Projection,
    Tap,
    as_rows,
    is_linear,
    linear_sizes,
    probe_tokens,
)
from avss_dist.models.watching import captured
from avss_dist.partition.group import all_gather, exchange_units_for_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Probe = dict[tuple[int, str], torch.Tensor]
"""Tensors of a pass, by layer and site."""


class SplitOptions(TypedDict, total=False):
    """How ranks split a model: fields of transformers' ``DistributedConfig``.

    Attributes:
        tp_size: number of ranks that divide matrices.
        ep_size: number of ranks that divide experts.
        fsdp_size: number of ranks that divide all weights.
        tp_plan: rules for modules, in place of those of the model's own plan.
    """

    tp_size: int
    ep_size: int
    fsdp_size: int
    tp_plan: dict[str, str] | None


def head_count(config: PreTrainedConfig) -> tuple[str, int] | None:
    """Return the attribute of a configuration with the number of heads that have keys of their own, and its value."""
    for name in ("num_key_value_heads", "num_kv_heads", "num_attention_heads"):
        with suppress(RuntimeError):  # it differs from layer to layer
            heads = getattr(config, name, None)
            if isinstance(heads, int):
                return name, heads
    return None


def taps_and_block(layer: Layer) -> dict[str, Tap]:
    """Return the taps of a layer by site, and before them that of its output as ``block``."""
    return {"block": Tap(layer.module, "output", layer.axes), **layer.taps}


def probe(run: Forward, layers: Sequence[Layer], device: torch.device) -> Probe:
    """Return the tensor of each site in a pass over ``PROBE_SHAPE`` tokens. The last call of a shared module."""
    taps: dict[tuple[int, str], Tap] = {}
    for layer in layers:
        for site, tap in taps_and_block(layer).items():
            taps[layer.index, site] = tap
    modules = {place: tap.module for place, tap in taps.items()}
    with torch.no_grad(), captured(modules) as calls:
        run(probe_tokens(device), None)
    return {place: getattr(calls[place], tap.reads) for place, tap in taps.items() if place in calls}


def exchange_for(part: torch.Tensor, width: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the function that exchanges parts of ``width`` units, or None where every rank has all of them."""
    widths = all_gather(part.shape[-1])
    if sum(widths) != width or len(widths) == 1:
        return None
    return partial(exchange_units_for_rows, widths=widths)


_DIVIDED = re.compile(r"^(packed_)?(colwise|rowwise)|^grouped_gemm|^embedding_")  # styles that divide a parameter


def version_obstacle() -> str | None:
    """Return why the installed transformers cannot load a model in parts, or None if it can."""
    import transformers

    try:
        from transformers.distributed import DistributedConfig

        DistributedConfig(fsdp_plan={}, ep_implementation="auto")
    except (ImportError, TypeError):
        return f"transformers {transformers.__version__} cannot load a model in parts; 5.23 or newer can"
    return None


def require_version() -> None:
    """Refuse a version of transformers that cannot load a model in parts.

    Raises:
        ConfigError: the installed transformers is too old.
    """
    if obstacle := version_obstacle():
        raise ConfigError(f"{obstacle}.", f"Run {pip_command()} install -U transformers, or use `partition` zero3.")


def generic_name(path: str) -> str:
    """Return the name of a module in plans, with ``*`` in place of each number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def layer_modules(model: PreTrainedModel, layers: str | None) -> list[torch.nn.Module]:
    """Return the modules of every list that may be the layers of a model.

    Args:
        model: the model with its head.
        layers: module path of the layer list in the backbone; None finds it.
    """
    every: list[torch.nn.Module] = []
    for modules in candidate_layers(model, layers).values():
        every += modules
    return every


def tensor_plan_obstacle(checkpoint: Checkpoint, settings: Settings, ranks: int) -> str | None:
    """Return why transformers cannot split the matrices of a model's layers over ranks, or None if it can."""
    if checkpoint.gguf:
        return "transformers unpacks the whole model of a .gguf file in every process"
    if obstacle := version_obstacle():
        return obstacle
    model, _ = load_skeleton(checkpoint, replace(settings, attention=None))
    plan = layer_plan(model, model.tp_plan, settings.layers)
    if not plan:
        return f"transformers has no plan for the layers of {type(model).__name__}"
    counted = head_count(model.config.get_text_config())
    if counted and "colwise" in attention_plan(plan).values():
        name, heads = counted
        if heads % ranks:
            return f"{ranks} ranks do not divide {heads} heads ({name} of the {model.config.model_type} configuration)"
    return None


def attention_plan(plan: dict[str, str]) -> dict[str, str]:
    """Return the rules of a plan for the attention of layers."""
    return {name: style for name, style in plan.items() if re.search(r"attn|attention", name)}


def layer_plan(model: PreTrainedModel, plan: dict[str, str], layers: str | None) -> dict[str, str]:
    """Return the rules of a plan for modules inside of the layers."""
    modules_of_layers = set(layer_modules(model, layers))
    prefixes = {f"{generic_name(path)}." for path, module in model.named_modules() if module in modules_of_layers}
    return {name: style for name, style in plan.items() if name.startswith(tuple(prefixes))}


def part_bytes(checkpoint: Checkpoint, settings: Settings, options: SplitOptions) -> int:
    """Return the bytes of the weights that each rank holds, from the configuration and headers of a model.

    Args:
        options: how ranks split the model.

    Raises:
        ModelError: the model cannot be built.
    """
    settings = replace(settings, attention=None)
    model, _ = load_skeleton(checkpoint, settings)
    plan = applied_plan(model, options)
    ranks = options["tp_size"]
    part = 0
    for name, parameter in stored_skeleton(checkpoint, model, settings).named_parameters():
        size = parameter.numel() * parameter.element_size()
        style = _style(name, plan)
        # The inputs of a product are divided here, so that its bias is added once, by a rank that has all of it.
        is_whole_bias = style.startswith("rowwise") and name.endswith("bias")
        if _DIVIDED.match(style) and not is_whole_bias:
            part += math.ceil(size / ranks)
        else:
            part += size
    return part


def applied_plan(model: PreTrainedModel, options: SplitOptions) -> dict[str, str]:
    """Return the rules by which transformers splits a model, by the name of a module or parameter in plans.

    Args:
        options: how ranks split the model.
    """
    experts = model.ep_plan if "ep_size" in options else {}
    return {**model.tp_plan, **(options.get("tp_plan") or {}), **experts}


def _style(name: str, plan: Mapping[str, str]) -> str:
    """Return the rule for a parameter, or an empty string if there is none."""
    generic = generic_name(name)
    return plan.get(generic) or plan.get(generic.rpartition(".")[0], "")


def scale_obstacle(checkpoint: Checkpoint, settings: Settings, options: SplitOptions) -> str | None:
    """Return why ranks cannot divide weights in block FP8 among them, or None if they can.

    transformers 5.24 divides weights and scales evenly, each by itself. A rank whose part is not whole blocks has the
    scales of other blocks, and computes or unpacks wrong numbers, or fails.

    Args:
        options: how ranks split the model.
    """
    settings = replace(settings, attention=None)
    model, _ = load_skeleton(checkpoint, settings)
    block = scale_block(model.config)
    if block is None:
        return None
    is_fully_sharded = "fsdp_size" in options
    if is_fully_sharded and not settings.dequantize:
        return None  # stored parts are gathered with their scales before they are used
    if is_fully_sharded:
        ranks = options["fsdp_size"]
        plan = {}
    else:
        ranks = options["tp_size"]
        plan = applied_plan(model, options)
    stored = dict(stored_skeleton(checkpoint, model, replace(settings, dequantize=False)).named_parameters())
    for name, parameter in model.named_parameters():
        style = _style(name, plan)
        if is_fully_sharded and parameter.dim() == 2:
            style = "colwise"
        is_divided = _DIVIDED.match(style) and style != "grouped_gemm"
        if stored[name].dtype != torch.uint8 or not is_divided:
            continue
        dimension = 1 if "rowwise" in style else 0
        size = parameter.shape[-2:][dimension]
        if style.startswith("packed"):
            size //= 2
        if size % (ranks * block[dimension]):
            lines = ("rows", "columns")[dimension]
            return (
                f"{ranks} ranks do not divide the {size} {lines} of {generic_name(name)} into whole blocks of "
                f"{block[dimension]} that share a scale"
            )
    return None


def open_by_plan(
    checkpoint: Checkpoint, settings: Settings, device: torch.device, *, head: bool, **options: Unpack[SplitOptions]
) -> Backbone:
    """Open this rank's part of a model whose matrices are split. All ranks of the group call this.

    Args:
        options: how ranks split the model.

    Returns:
        The model, whose taps exchange the units of the ranks, and whose linear maps have the sizes of all ranks.

    Raises:
        ModelError: the model cannot be opened or observed.
    """
    from transformers.distributed import DistributedConfig

    model = load_model(checkpoint, settings, head=head, distributed_config=DistributedConfig(**options))
    with quiet():
        backbone = open_module(model, layers=settings.layers, device=device)
        tensors = probe(forward_function(backbone.module), backbone.layers, device)
    layers = []
    for layer in backbone.layers:
        taps = {site: _exchanging(tap, tensors[layer.index, site]) for site, tap in layer.taps.items()}
        projections = tuple(_whole_map(projection) for projection in layer.projections)
        layers.append(replace(layer, taps=taps, projections=projections))
    return replace(backbone, layers=tuple(layers))


def _exchanging(tap: Tap, tensor: torch.Tensor) -> Tap:
    """Return a tap that exchanges units if ranks have different ones. Those of a linear map tell their number."""
    part = as_rows(tensor, tap.axes, *PROBE_SHAPE)
    width = part.shape[-1]
    if is_linear(tap.module):
        inputs, outputs = linear_sizes(tap.module)
        width = inputs if tap.reads == "input" else outputs
    return replace(tap, exchange=exchange_for(part, width))


def _whole_map(projection: Projection) -> Projection:
    """Return a linear map with the sizes of its weight, of which the ranks have parts."""
    inputs, outputs = linear_sizes(projection.module)
    return replace(projection, inputs=inputs, outputs=outputs)
