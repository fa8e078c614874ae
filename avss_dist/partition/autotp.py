"""Split of a model over ranks by DeepSpeed AutoTP, for families that transformers has no plan for.

AutoTP splits a model by the names of its modules. For a family that it does not know, it silently computes wrong
numbers. Therefore each replica is checked as it is opened: every site of every layer, before and after the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.values import NewObject
from avss_dist.models.checkpoint.loading import (
    Backbone,
    forward_function,
    load_model,
    open_module,
    predictor,
    quiet,
    without_head,
)
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.structure.layers import PROBE_SHAPE, Layer, as_rows, probe_tokens
from avss_dist.partition.group import RowSplit, all_gather, quiet_deepspeed
from avss_dist.partition.splitting import Probe, exchange_for, head_count, probe, taps_and_block

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Maximum difference between the tensors of a whole and of a split model; see `difference`.

In SmolLM2-135M it is 2e-6, 5e-3 and 5e-2. Persimmon, which AutoTP splits wrongly, is off by 0.7.
"""

UNSUPPORTED = ("deberta", "flaubert", "fsmt", "gpt2", "led", "longformer", "xlm", "xlnet")
"""Families that ``deepspeed.module_inject.auto_tp.AutoTP.supported`` refuses."""

_REFUSALS = (AssertionError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)
_WITHOUT_SPLIT = "Use `partition` single, device_map, fsdp, zero3 or streaming."


def open_by_autotp(
    checkpoint: Checkpoint, settings: Settings, device: torch.device, split: RowSplit, *, head: bool
) -> Backbone:
    """Open a model, and split it over the ranks of the group. All ranks call this.

    Every rank first maps the files of the whole model. If the compute dtype is another one, it holds the whole model in
    host memory. Each rank has the whole head.

    Returns:
        The model, whose taps exchange the units of the ranks.

    Raises:
        ConfigError: the attention does not run on a CPU.
        ModelError: the model cannot be opened or observed, or DeepSpeed cannot split it correctly.
    """
    if settings.attention == "flash_attention_2":
        raise ConfigError(
            "`partition` tensor_parallel checks the model on the CPU, where flash_attention_2 cannot run.",
            "Set `attention` to sdpa.",
        )
    model = load_model(checkpoint, settings, head=head)
    with quiet(), quiet_deepspeed():
        whole = open_module(model, layers=settings.layers)
        run = forward_function(whole.module)
        cpu = torch.device("cpu")
        expected_logits = _logits(predictor(model), cpu) if head else None
        expected = probe(run, whole.layers, cpu)
        names = {module: name for name, module in model.named_modules()}
        with without_output_embeddings(predictor(model), keep=head):
            apply_autotp(model, split.ranks, device)
        again = _find_again(whole.layers, names, model)
        try:
            actual = probe(run, again, device)
            logits = _logits(predictor(model), device) if head else None
        except _REFUSALS as error:
            raise _cannot_split(model, f"the split model does not run: {error}") from error
        layers = _check(model, again, expected, actual, split)
        if expected_logits is not None and logits is not None:
            _require_equal(model, "the head", expected_logits, logits, TOLERANCES.get(logits.dtype, 0.0))
    return replace(whole, layers=layers)


def inference_config(dtype: torch.dtype, world: int) -> NewObject:
    """Return the configuration of ``deepspeed.init_inference``. ``cluster/deepspeed`` has that for two ranks."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel": {"tp_size": world},
        "replace_with_kernel_inject": False,
    }


def require_autotp(config: PreTrainedConfig, world: int) -> None:
    """Refuse a family that DeepSpeed refuses, and more ranks than heads: a head's keys and values are not split.

    Raises:
        ConfigError: the family is one of `UNSUPPORTED`, or there are more ranks than heads.
    """
    if config.model_type in UNSUPPORTED:
        raise ConfigError(f"Neither transformers nor DeepSpeed can split a {config.model_type} model.", _WITHOUT_SPLIT)
    counted = head_count(config)
    if not counted:
        return
    name, heads = counted
    if world > heads:
        hint = _WITHOUT_SPLIT
        if heads > 1:
            hint = f"Set `ranks` to {heads} at most. {hint}"
        raise ConfigError(
            f"{world} ranks cannot share {heads} heads ({name} of the {config.model_type} configuration).", hint
        )


def apply_autotp(model: PreTrainedModel, world: int, device: torch.device) -> None:
    """Replace the linear maps of the layers by this rank's parts, and move the model to the device.

    Tensors of another dtype, such as rotary frequencies in float32, keep it; DeepSpeed would convert them.

    Raises:
        ModelError: DeepSpeed cannot split the model.
    """
    import deepspeed

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    of_other_dtypes = []
    for module in model.modules():
        for tensors in (module._buffers, module._parameters):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    of_other_dtypes.append((tensors, name, tensor.data))
    try:
        deepspeed.init_inference(model, config=inference_config(dtype, world))
    except _REFUSALS as error:
        raise _cannot_split(model, str(error)) from error
    for tensors, name, value in of_other_dtypes:
        tensor = tensors[name]
        assert tensor is not None
        tensor.data = value.to(device)


@contextmanager
def without_output_embeddings(model: PreTrainedModel, *, keep: bool) -> Iterator[None]:
    """Remove the head of a model inside the context, so that AutoTP does not split it. Put it back if ``keep``."""
    heads = {}
    for name, child in model.named_children():
        if child is model.get_output_embeddings() and child is not without_head(model):
            heads[name] = child
    for name in heads:
        setattr(model, name, nn.Identity())
    yield
    if keep:
        device = next(model.parameters()).device
        for name, head in heads.items():
            setattr(model, name, head.to(device))


def _logits(model: PreTrainedModel, device: torch.device) -> torch.Tensor:
    """Return the logits of ``PROBE_SHAPE`` tokens, [rows, tokens, vocabulary], on the CPU."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=probe_tokens(device), use_cache=False).logits
    return logits.cpu()


def difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Return the median over tokens of |actual - expected| / |expected|, for tensors of shape [..., units].

    It is infinite for tensors of different shapes. A wrong split changes nearly every token, while rounding routes few
    tokens to other experts.
    """
    if expected.shape != actual.shape:
        return float("inf")
    expected = expected.double().reshape(-1, expected.shape[-1])
    actual = actual.double().reshape(-1, actual.shape[-1])
    sizes = expected.norm(dim=-1)
    ratios = (actual - expected).norm(dim=-1) / sizes.clamp_min(torch.finfo(torch.float64).tiny)
    ratios = ratios[sizes.isfinite()].nan_to_num(torch.inf)
    if not len(ratios):
        return 0.0
    return float(ratios.median())


def _find_again(layers: Sequence[Layer], names: Mapping[nn.Module, str], model: nn.Module) -> list[Layer]:
    """Return the same layers and taps in the model, after its modules were replaced."""
    modules = dict(model.named_modules())
    layers_again = []
    for layer in layers:
        taps = {site: replace(tap, module=modules[names[tap.module]]) for site, tap in layer.taps.items()}
        projections = tuple(replace(p, module=modules[names[p.module]]) for p in layer.projections)
        module = modules[names[layer.module]]
        layers_again.append(replace(layer, module=module, taps=taps, projections=projections))
    return layers_again


def _check(
    model: PreTrainedModel, layers: Sequence[Layer], expected: Probe, actual: Probe, split: RowSplit
) -> tuple[Layer, ...]:
    """Return the layers with taps that exchange the parts of the ranks. All ranks come to the same result.

    Raises:
        ModelError: the split changed a tensor.
    """
    tolerance = max(TOLERANCES.get(tensor.dtype, 0.0) for tensor in expected.values())
    checked: list[Layer] = []
    for layer in layers:
        taps = taps_and_block(layer)
        for site, tap in taps.items():
            reference = as_rows(expected[layer.index, site], tap.axes, *PROBE_SHAPE)
            part = as_rows(actual[layer.index, site], tap.axes, *PROBE_SHAPE)
            exchange = exchange_for(part, reference.shape[-1])
            taps[site] = replace(tap, exchange=exchange)
            rows = split.rows(len(part))
            received = exchange(part) if exchange else part[rows]
            if site == "block" and exchange:
                raise _cannot_split(model, f"each rank has a part of the output of layer {layer.index}")
            _require_equal(model, f"site '{site}' of layer {layer.index}", reference[rows], received.cpu(), tolerance)
        checked.append(replace(layer, taps={site: taps[site] for site in layer.taps}))
    return tuple(checked)


def _require_equal(
    model: PreTrainedModel, place: str, expected: torch.Tensor, actual: torch.Tensor, tolerance: float
) -> None:
    """Refuse a split that changed a tensor on any rank. All ranks call this."""
    error = max(all_gather(difference(expected, actual)))
    if error > tolerance:
        raise _cannot_split(model, f"{place} is off by {error:.2g} of its size after the split")


def _cannot_split(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"DeepSpeed cannot split a {model.config.model_type} model ({type(model).__name__}): {why}.",
        _WITHOUT_SPLIT,
    )
