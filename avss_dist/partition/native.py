"""Models that transformers itself loads in parts, one for each rank: FSDP2, tensor parallelism, expert parallelism.

A family has plans, which say how each module is split. Every rank reads its part of each tensor from the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import PROBE_SHAPE, Layer, Projection, Tap, as_rows, is_linear, layer_lists, linear_sizes
from avss_dist.models.loading import Backbone, forward_function, load_model, open_module, quiet, without_head
from avss_dist.models.quantization import scale_block
from avss_dist.models.size import load_skeleton, load_stored_skeleton
from avss_dist.partition.splitting import Probe, exchange_for, head_count, probe

FIRST_VERSION = "5.23"  # of transformers, with every option that is used here
_ATTENTION = re.compile(r"attn|attention")
_DIVIDED = re.compile(r"^(packed_)?(colwise|rowwise)|^grouped_gemm|^embedding_")  # styles that divide a parameter


def version_obstacle() -> str | None:
    """Return why the installed transformers cannot load a model in parts; None if it can."""
    import transformers

    try:
        from transformers.distributed import DistributedConfig

        DistributedConfig(fsdp_plan={}, ep_implementation="auto")
    except (ImportError, TypeError):
        return f"transformers {transformers.__version__} cannot load a model in parts; {FIRST_VERSION} or newer can"
    return None


def distributed_config(**options: Any) -> dict[str, Any]:
    """Return the option of ``from_pretrained`` that has every rank of the group load its part of a model.

    Args:
        options: fields of transformers' ``DistributedConfig``.

    Raises:
        ConfigError: the installed transformers is too old.
    """
    if obstacle := version_obstacle():
        raise ConfigError(f"{obstacle}.", "Run pip install -U transformers, or use `partition` zero3.")
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(**options)}


def generic_name(path: str) -> str:
    """Return the name of a module in plans, with ``*`` in place of each number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def layer_modules(model: Any, layers: str | None) -> list[torch.nn.Module]:
    """Return the modules of every list that may be the layers of a model.

    Args:
        model: the model with its head.
        layers: module path of the layer list in the backbone; None finds it.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return [layer for modules in layer_lists(without_head(model), count, layers).values() for layer in modules]


def tensor_plan_obstacle(checkpoint: Checkpoint | str, settings: Settings, ranks: int) -> str | None:
    """Return why transformers cannot split the matrices of a model's layers over ranks; None if it can."""
    if isinstance(checkpoint, Checkpoint) and checkpoint.gguf:
        return "transformers unpacks the whole model of a .gguf file in every process"
    if obstacle := version_obstacle():
        return obstacle
    _, model, _ = load_skeleton(checkpoint, replace(settings, attention=None))
    plan = layer_plan(model, model.tp_plan, settings.layers)
    if not plan:
        return f"transformers has no plan for the layers of {type(model).__name__}"
    name, heads = head_count(model.config.get_text_config()) or ("", ranks)
    if heads % ranks and "colwise" in attention_plan(plan).values():
        return f"{ranks} ranks do not divide {heads} heads ({name} of the {model.config.model_type} configuration)"
    return None


def attention_plan(plan: dict[str, str]) -> dict[str, str]:
    """Return the rules of a plan for the attention of layers."""
    return {name: style for name, style in plan.items() if _ATTENTION.search(name)}


def layer_plan(model: Any, plan: dict[str, str], layers: str | None) -> dict[str, str]:
    """Return the rules of a plan for modules inside of the layers."""
    units = set(layer_modules(model, layers))
    prefixes = tuple({f"{generic_name(path)}." for path, module in model.named_modules() if module in units})
    return {name: style for name, style in plan.items() if name.startswith(prefixes)}


def part_bytes(checkpoint: Checkpoint | str, settings: Settings, options: Mapping[str, Any]) -> int:
    """Return the bytes of the weights that each rank holds, from the configuration and headers of a model.

    Args:
        options: fields of transformers' ``DistributedConfig``: see `open_by_plan`.

    Raises:
        ModelError: the model cannot be built.
    """
    settings = replace(settings, attention=None)
    _, model, _ = load_skeleton(checkpoint, settings)
    plan, ranks = applied_plan(model, options), options["tp_size"]
    part = 0
    for name, parameter in load_stored_skeleton(checkpoint, settings).named_parameters():
        size = parameter.numel() * parameter.element_size()
        part += -(-size // ranks) if _is_divided(name, plan) else size
    return part


def applied_plan(model: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the rules by which transformers splits a model, by the name of a module or parameter in plans.

    Args:
        options: fields of transformers' ``DistributedConfig``.
    """
    experts = model.ep_plan if "ep_size" in options else {}
    return {**model.tp_plan, **(options.get("tp_plan") or {}), **experts}


def _style(name: str, plan: Mapping[str, str]) -> str:
    """Return the rule for a parameter; empty if there is none."""
    generic = generic_name(name)
    return plan.get(generic) or plan.get(generic.rpartition(".")[0], "")


def _is_divided(name: str, plan: Mapping[str, str]) -> bool:
    """Whether ranks hold parts of a parameter. The bias of a product whose inputs are divided is whole."""
    style = _style(name, plan)
    return bool(_DIVIDED.match(style)) and not (style.startswith("rowwise") and name.endswith("bias"))


def scale_obstacle(checkpoint: Checkpoint | str, settings: Settings, options: Mapping[str, Any]) -> str | None:
    """Return why ranks cannot divide weights in block FP8 among them; None if they can.

    transformers 5.24 divides weights and scales evenly, each by itself. A rank whose part is not whole blocks has the
    scales of other blocks, and computes or unpacks wrong numbers, or fails.

    Args:
        options: fields of transformers' ``DistributedConfig``.
    """
    settings = replace(settings, attention=None)
    _, model, _ = load_skeleton(checkpoint, settings)
    block = scale_block(model.config)
    if block is None or (fully_sharded := "fsdp_size" in options) > settings.dequantize:
        return None  # stored parts are gathered with their scales before they are used
    ranks = options["fsdp_size"] if fully_sharded else options["tp_size"]
    plan = {} if fully_sharded else applied_plan(model, options)
    stored = dict(load_stored_skeleton(checkpoint, replace(settings, dequantize=False)).named_parameters())
    for name, parameter in model.named_parameters():
        style = "colwise" if fully_sharded and parameter.dim() == 2 else _style(name, plan)
        if stored[name].dtype != torch.uint8 or style == "grouped_gemm" or not _DIVIDED.match(style):
            continue
        dimension = int("rowwise" in style)
        size = parameter.shape[-2:][dimension] // (2 if style.startswith("packed") else 1)
        if size % (ranks * block[dimension]):
            return (
                f"{ranks} ranks do not divide the {size} {('rows', 'columns')[dimension]} of {generic_name(name)} into "
                f"whole blocks of {block[dimension]} that share a scale"
            )
    return None


def open_by_plan(
    checkpoint: Checkpoint, settings: Settings, device: torch.device, *, head: bool, **options: Any
) -> Backbone:
    """Open this rank's part of a model whose matrices are split. All ranks of the group call this.

    Args:
        options: fields of transformers' ``DistributedConfig``.

    Returns:
        The model, whose taps exchange the units of the ranks.

    Raises:
        ConfigError: the installed transformers is too old.
        ModelError: the model cannot be opened or observed.
    """
    model = load_model(checkpoint, settings, head=head, **distributed_config(**options))
    with quiet():
        backbone = open_module(model, layers=settings.layers, device=device)
        layers = backbone.structure.layers
        seen = probe(forward_function(backbone.module), layers, device)
    return replace(backbone, structure=replace(backbone.structure, layers=tuple(_whole_layers(layers, seen))))


def _whole_layers(layers: Sequence[Layer], seen: Probe) -> Iterator[Layer]:
    """Yield layers whose taps exchange the units of the ranks, and whose linear maps have the sizes of all ranks."""
    for layer in layers:
        taps = {site: _exchanging(tap, seen[layer.index, site]) for site, tap in layer.taps.items()}
        maps = tuple(_whole_map(projection) for projection in layer.projections)
        yield replace(layer, taps=taps, projections=maps)


def _exchanging(tap: Tap, tensor: torch.Tensor) -> Tap:
    """Return a tap that exchanges units if ranks have different ones; those of a linear map tell their number."""
    part = as_rows(tensor, tap.axes, *PROBE_SHAPE)
    assert part is not None
    width = part.shape[-1]
    if is_linear(tap.module):
        inputs, outputs = linear_sizes(tap.module)
        width = inputs if tap.reads == "input" else outputs
    return replace(tap, exchange=exchange_for(part, width))


def _whole_map(projection: Projection) -> Projection:
    """Return a linear map with the sizes of its weight, of which the ranks have parts."""
    inputs, outputs = linear_sizes(projection.module)
    return replace(projection, inputs=inputs, outputs=outputs)
