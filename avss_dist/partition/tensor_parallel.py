"""Partition ``tensor_parallel``: matrices are split over the ranks (DeepSpeed AutoTP), which take the same data.

Each rank counts some rows of every batch, and rank 0 reports the counts of all.

AutoTP splits a model by the names of its modules. For a family that it does not know, it silently computes wrong
numbers. Therefore each replica is checked as it is opened: every site of every layer, before and after the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.intervention import THRESHOLD, Sparsity
from avss_dist.core.registry import WHOLE
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Batch
from avss_dist.models.auto import predictor
from avss_dist.models.causal_lm import LanguageModel, Watcher
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import PROBE_SHAPE, Layer, Tap, as_rows, first_tensor
from avss_dist.models.loading import forward_function, load_model, open_module, quiet, without_head
from avss_dist.models.size import Footprint
from avss_dist.models.sparsifying import SparsityCounts
from avss_dist.partition.base import Placement, RowSplit
from avss_dist.partition.batchwise import BatchwiseReplica, describe
from avss_dist.partition.cost import LINK_SHARE, Calibration, PartitionCost, Usage
from avss_dist.partition.group import (
    all_gather,
    exchange_units_for_rows,
    gather,
    quiet_deepspeed,
    require_group,
    reraise_lost_ranks,
    sum_over_ranks,
)
from avss_dist.system.devices import free_device, pick_device
from avss_dist.system.memory import keep_freed_memory

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Maximum difference between the tensors of a whole and of a split model; see `difference`.

In SmolLM2-135M it is 2e-6, 5e-3 and 5e-2. Persimmon, which AutoTP splits wrongly, is off by 0.7.
"""

_REFUSALS = (AssertionError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)
_HEADS = ("num_key_value_heads", "num_kv_heads", "num_attention_heads")
_Probe = dict[tuple[int, str], torch.Tensor]  # by layer and site
T = TypeVar("T")
_ELSEWHERE = "Use `partition` single, device_map, zero3 or streaming."


class TensorParallelCost(PartitionCost):
    """Memory and time of a run with ranks that divide attention and MLP.

    Each rank computes all norms, residuals and statistics; on CPUs, with its share of the cores.
    """

    @staticmethod
    def minimum_host_weights(size: Footprint, kind: str, *, head: bool) -> int:
        """See `PartitionCost`. ``max_memory`` has no effect."""
        return 0

    def usage(self, measured: Calibration, counters: int) -> Usage:
        """See `PartitionCost`."""
        ranks, on_gpu, size = self.ranks, self.on_gpu, self.size
        divided = measured.sublayer_share
        work = (
            self.seconds(measured, measured.costs[WHOLE]) * (divided / ranks + 1 - divided) * (1 if on_gpu else ranks)
        )
        sums = 2 * size.num_layers
        hidden = size.hidden_bytes(measured.num_sequences, self.settings.sequence_length)
        modelled = sums * 2 * hidden * (ranks - 1) / (measured.copy_bytes_per_second * LINK_SHARE)
        exchange = modelled if on_gpu else sums * measured.num_batches * measured.sum_seconds * (ranks - 1)
        whole = size.weight_bytes
        part = size.other_bytes + sum(size.layer_bytes) // ranks
        if on_gpu:
            device, host = self.memory(measured, counters, part, host_weights=whole)
        else:
            device, host = self.memory(measured, counters, whole + part)
        why = "every rank loads the whole model first, and keeps a part of each layer"
        why += "; the exchange is modelled, not measured" * on_gpu
        return Usage(device_bytes=device, host_bytes=host, seconds=work + exchange, why=why)


class TensorParallelReplica(BatchwiseReplica):
    """One rank of a split model; see `partition.base.Replica`. All ranks open it in one group (`partition.group.join`).

    Every rank first maps the files of the whole model; if the compute dtype is another one, it holds the whole model in
    host memory.

    Raises:
        ConfigError: there is no group, or it has more ranks than the model has heads.
        ModelError: the model cannot be opened or observed, or DeepSpeed cannot split it correctly.
    """

    cost = TensorParallelCost

    def __init__(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool = False) -> None:
        rank, world = require_group(placement)
        self.split, self.reports_stats = RowSplit(rank, world), rank == 0
        self.device = pick_device(settings.device)
        if settings.attention == "flash_attention_2":
            raise ConfigError(
                "`partition` tensor_parallel checks the model on the CPU, where flash_attention_2 cannot run.",
                "Set `attention` to sdpa.",
            )
        keep_freed_memory()
        model = load_model(checkpoint, settings, head=head)
        with quiet(), quiet_deepspeed(), reraise_lost_ranks():
            whole = open_module(model, layers=settings.layers)
            require_heads(model.config.get_text_config(), world)
            run = forward_function(whole.module)
            logits = _logits(predictor(model), torch.device("cpu")) if head else None
            expected = _probe(run, whole.structure.layers, torch.device("cpu"))
            names = {module: name for name, module in model.named_modules()}
            with without_output_embeddings(predictor(model), keep=head):
                apply_autotp(model, world, self.device)
            layers = _find_again(whole.structure.layers, names, model)
            with _running(model):
                actual = _probe(run, layers, self.device)
            self.layers: tuple[Layer, ...] = _check(model, layers, expected, actual, self.split)
            if logits is not None:
                _check_logits(predictor(model), logits, self.device)
                opened = replace(whole, structure=replace(whole.structure, layers=self.layers))
                self.language_model = TensorParallelLanguageModel(checkpoint, settings, opened, self.device)
                self.language_model.reports = self.reports_stats
        self._model, self._run = model, run
        self.model: Mapping[str, Any] = describe(whole, "tensor_parallel")

    def collect(self, counted: T) -> list[T]:
        """See `partition.base.Replica`."""
        return gather(counted)

    def close(self) -> None:
        """Drop this rank's part of the weights."""
        self.language_model = None
        del self._model, self._run, self.layers
        free_device(self.device)


class TensorParallelLanguageModel(LanguageModel):
    """Language model with split layers and a whole head on each rank; see `causal_lm.LanguageModel`."""

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[Watcher], *, draws: int = 0, seed: int = 0
    ) -> list[Watcher]:
        """See `causal_lm.LanguageModel`."""
        raise ModelError("`partition` tensor_parallel has no gradients: DeepSpeed splits models for inference alone.")

    @contextmanager
    def sparsified(self, sparsity: Sparsity) -> Iterator[SparsityCounts]:
        """See `causal_lm.LanguageModel`. A rank has some of a token's units, and cannot choose the largest of all."""
        if any(cut.by != THRESHOLD or cut.weighted or cut.group for cut in sparsity.maps):
            raise ModelError(
                "`partition` tensor_parallel splits the units of a token, and cannot choose the largest of them.",
                "Use single, device_map, streaming or zero3, or a plan of thresholds.",
            )
        with super().sparsified(sparsity) as counts:
            yield counts

    def total(self, counts: list[list[int]]) -> list[list[int]]:
        """See `causal_lm.LanguageModel`. Whole maps are counted by every rank, which leaves their share unchanged."""
        return sum_over_ranks(counts)


def inference_config(dtype: torch.dtype, world: int) -> dict[str, Any]:
    """Return the configuration of ``deepspeed.init_inference``; ``cluster/deepspeed`` has that for two ranks."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel": {"tp_size": world},
        "replace_with_kernel_inject": False,
    }


def require_heads(config: Any, world: int) -> None:
    """Refuse more ranks than heads, because a head's keys and values are not split.

    Raises:
        ConfigError: there are more ranks than heads; the message has the numbers.
    """
    name, heads = next(((n, h) for n in _HEADS if isinstance(h := _attribute(config, n), int)), ("", world))
    if world > heads:
        raise ConfigError(
            f"{world} ranks cannot share {heads} heads ({name} of the {config.model_type} configuration).",
            f"Set `ranks` to {heads} at most. {_ELSEWHERE}" if heads > 1 else _ELSEWHERE,
        )


def _attribute(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # it differs from layer to layer
        return None


def apply_autotp(model: Any, world: int, device: torch.device) -> None:
    """Replace the linear maps of the layers by this rank's parts, and move the model to the device.

    Tensors of another dtype, such as rotary frequencies in float32, keep it; DeepSpeed would convert them.

    Raises:
        ModelError: DeepSpeed cannot split the model.
    """
    import deepspeed

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    others = list(_in_another_dtype(model, dtype))
    try:
        deepspeed.init_inference(model, config=inference_config(dtype, world))
    except _REFUSALS as error:
        raise _cannot_split(model, str(error)) from error
    for tensors, name, value in others:
        tensors[name].data = value.to(device)


@contextmanager
def without_output_embeddings(model: Any, *, keep: bool) -> Iterator[None]:
    """Remove the head of a model inside the context, so that AutoTP does not split it; put it back if ``keep``."""
    heads = {
        name: child
        for name, child in model.named_children()
        if child is model.get_output_embeddings() and child is not without_head(model)
    }
    for name in heads:
        setattr(model, name, nn.Identity())
    yield
    if keep:
        device = next(model.parameters()).device
        for name, head in heads.items():
            setattr(model, name, head.to(device))


def _logits(model: Any, device: torch.device) -> torch.Tensor:
    """Return the logits of ``PROBE_SHAPE`` tokens, [rows, tokens, vocabulary], on the CPU."""
    ids = torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1], device=device).reshape(PROBE_SHAPE)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.cpu()


@contextmanager
def _running(model: Any) -> Iterator[None]:
    """Raise ModelError if the split model fails inside the context."""
    try:
        yield
    except _REFUSALS as error:
        raise _cannot_split(model, f"the split model does not run: {error}") from error


def _check_logits(model: Any, expected: torch.Tensor, device: torch.device) -> None:
    """Refuse a model whose logits changed by the split; all ranks come to the same result."""
    with _running(model):
        actual = _logits(model, device)
    error = difference(expected, actual) if actual.shape == expected.shape else float("inf")
    maximum = max(all_gather(error, device))
    if maximum > TOLERANCES.get(expected.dtype, 0.0):
        raise _cannot_split(model, f"its logits are off by {maximum:.2g} of their size after the split")


def _in_another_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Yield (tensors of a module, name, value) of every tensor with another dtype."""
    for module in model.modules():
        for tensors in (module._buffers, module._parameters):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    yield tensors, name, tensor.data


def difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Return the median over tokens of |actual - expected| / |expected|, for tensors of shape [..., units].

    A wrong split changes nearly every token, while rounding routes few tokens to other experts.
    """
    expected, actual = (x.double().reshape(-1, x.shape[-1]) for x in (expected, actual))
    sizes = expected.norm(dim=-1)
    ratios = (actual - expected).norm(dim=-1) / sizes.clamp_min(torch.finfo(torch.float64).tiny)
    ratios = ratios[sizes.isfinite()].nan_to_num(torch.inf)
    return float(ratios.median()) if len(ratios) else 0.0


def _probe(run: Callable[..., Any], layers: Sequence[Layer], device: torch.device) -> _Probe:
    """Return the tensor of each site in a pass over ``PROBE_SHAPE`` tokens; the last call of a shared module."""
    tensors: _Probe = {}

    def keep(key: tuple[int, str], value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is not None:
            tensors[key] = tensor.detach().clone()

    handles: list[Any] = []
    try:
        for layer in layers:
            for site, tap in {"block": Tap(layer.module, "output", layer.axes), **layer.taps}.items():
                key = layer.index, site
                if tap.reads == "input":
                    hook = lambda _m, args, kwargs, key=key: keep(key, (*args, *kwargs.values()))  # noqa: E731
                    handles.append(tap.module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(tap.module.register_forward_hook(lambda _m, _a, out, key=key: keep(key, out)))
        with torch.no_grad():
            run(torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1]).reshape(PROBE_SHAPE).to(device), None)
    finally:
        for handle in handles:
            handle.remove()
    return tensors


def _find_again(layers: Sequence[Layer], names: Mapping[nn.Module, str], model: nn.Module) -> list[Layer]:
    """Return the same layers and taps in the model, after its modules were replaced."""

    def again(module: nn.Module) -> nn.Module:
        return model.get_submodule(names[module])

    return [
        replace(
            layer,
            module=again(layer.module),
            taps={site: replace(tap, module=again(tap.module)) for site, tap in layer.taps.items()},
            projections=tuple(replace(p, module=again(p.module)) for p in layer.projections),
        )
        for layer in layers
    ]


def _check(model: Any, layers: Sequence[Layer], expected: _Probe, actual: _Probe, split: RowSplit) -> tuple[Layer, ...]:
    """Return the layers with taps that exchange the parts of the ranks; all ranks come to the same result.

    Raises:
        ModelError: the split changed a tensor.
    """
    tolerance = max(TOLERANCES.get(tensor.dtype, 0.0) for tensor in expected.values())
    checked: list[Layer] = []
    for layer in layers:
        taps = {"block": Tap(layer.module, "output", layer.axes), **layer.taps}
        for site, tap in taps.items():
            reference, part = (as_rows(x[layer.index, site], tap.axes, *PROBE_SHAPE) for x in (expected, actual))
            assert reference is not None and part is not None
            taps[site] = tap = replace(tap, exchange=_exchange_for(part, reference.shape[-1]))
            rows = split.rows(len(part))
            got, reference = tap.exchange(part) if tap.exchange else part[rows], reference[rows]
            error = difference(reference, got.cpu()) if got.shape == reference.shape else float("inf")
            error = max(all_gather(error, part.device))
            if error > tolerance or (site == "block" and tap.exchange):
                raise _cannot_split(
                    model, f"site '{site}' of layer {layer.index} is off by {error:.2g} of its size after the split"
                )
        checked.append(replace(layer, taps={site: taps[site] for site in layer.taps}))
    return tuple(checked)


def _exchange_for(part: torch.Tensor, width: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the function that exchanges parts of ``width`` units; None where every rank has all of them."""
    widths = [int(n) for n in all_gather(part.shape[-1], part.device)]
    if sum(widths) != width or len(widths) == 1:
        return None
    return partial(exchange_units_for_rows, widths=widths)


def _cannot_split(model: Any, why: str) -> ModelError:
    return ModelError(
        f"DeepSpeed cannot split a {model.config.model_type} model ({type(model).__name__}): {why}.",
        _ELSEWHERE,
    )
