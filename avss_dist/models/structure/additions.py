"""Where the output of a sublayer is added to the residual stream, traced through one forward pass of a layer.

In many families the output of a sublayer passes through a norm, a short convolution or a multiplication by a number
before it is added. Names and values do not tell these apart from others, so `Trace` records which tensor goes where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from avss_dist.models.forward import Arguments, Keywords, Output
from avss_dist.models.structure.layers import PROBE_SHAPE, Scale, Tap, axes_of, is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ENTERS = "enters"
_LEAVES = "leaves"
_ADDITIONS = ("add", "__add__", "__radd__", "add_", "__iadd__")
_MULTIPLICATIONS = ("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply")
_DIVISIONS = ("div", "__truediv__", "div_", "__itruediv__", "true_divide", "divide")
_TRANSFORMING = {
    "afmoe",
    "beam",
    "diffusion_gemma_text",
    "embedding_gemma2_text",
    "exaone4",
    "flex_olmo",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm4",
    "glm4v_text",
    "glm_image_text",
    "glm_ocr_text",
    "inkling_text",
    "inkling2_text",
    "inkling2_loop_text",
    "kolibri1",
    "lfm3",
    "minicpm3",
    "muse_glimmer_text",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
}
"""Families, by ``model_type`` of their text configuration, that transform the outputs of sublayers at any setting."""
_NORMS = {"chameleon": "swin_norm", "hyperclovax": "use_post_norm", "molmo2_text": "norm_after"}
"""Settings with which a family has norms after its sublayers."""
_MULTIPLIERS = (
    "residual_multiplier",
    "attention_out_multiplier",
    "ssm_out_multiplier",
    "full_attn_beta_factor",
    "linear_attn_beta_factor",
    "mlp_beta_factor",
)
"""Settings that multiply the outputs of sublayers: of Granite and others, Falcon-H1, and MiniMax."""
_UNSCALED_ESMC_LAYERS = 36
"""Number of layers with which ESM C does not scale the outputs of its sublayers."""
_COPIES = ("to", "float", "half", "bfloat16", "type_as", "contiguous", "clone", "reshape", "flatten", "dropout")


_PASSING_ON = (*_ADDITIONS, *_MULTIPLICATIONS, *_DIVISIONS, *_COPIES)
"""Functions whose result is the residual stream if an operand is."""


def transforms_outputs(config: PreTrainedConfig) -> bool:
    """Whether layers transform the outputs of sublayers before they add them, so that `tap_addition` moves a tap.

    It is known before a model is loaded, for the ids of runs. Code that comes with a checkpoint is not known.

    Args:
        config: the model's configuration.
    """
    text = config.get_text_config()
    if text.model_type in _TRANSFORMING:
        return True
    if text.model_type == "esmc":
        return bool(text.num_hidden_layers != _UNSCALED_ESMC_LAYERS)
    if getattr(text, _NORMS.get(text.model_type, ""), False):
        return True
    return any(getattr(text, name, 1) not in (1, None) for name in _MULTIPLIERS)


@dataclass(frozen=True)
class Step:
    """A function of torch that ran in a layer, or the begin or the end of a module's call.

    Attributes:
        name: name of the function, `_ENTERS` or `_LEAVES`.
        operands: arguments of the function or of the module.
        result: result of the function or of the module; None if it has not the size of the residual stream.
        module: the module whose call begins or ends.
    """

    name: str
    operands: Arguments = ()
    result: torch.Tensor | None = None
    module: nn.Module | None = None


class Trace(TorchFunctionMode):
    """Record of the steps of one layer at a time that give a tensor of the size of the residual stream.

    The tensors are kept until the next layer begins, so that no two of them have the same address.

    Attributes:
        hidden: hidden states that the layer was given.
        output: hidden states that it returned; None while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.hidden: torch.Tensor | None = None
        self.output: torch.Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Output], types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> Output:
        """Run a function of torch, and record it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.output is None and self.is_traced(result):
            self.steps.append(Step(getattr(func, "__name__", ""), [*args, *kwargs.values()], result))
        return result

    def begin(self, hidden: torch.Tensor | None) -> None:
        """Begin a layer that is called with ``hidden``."""
        self.steps.clear()
        self.hidden = hidden
        self.output = None

    def end(self, output: torch.Tensor) -> None:
        """End the layer."""
        self.output = output

    def enter(self, module: nn.Module, inputs: Arguments) -> None:
        """Record the begin of a module's call."""
        self.steps.append(Step(_ENTERS, inputs, module=module))

    def leave(self, module: nn.Module, output: torch.Tensor | None) -> None:
        """Record the end of a module's call."""
        result = output if self.is_traced(output) else None
        self.steps.append(Step(_LEAVES, result=result, module=module))

    def is_traced(self, value: object) -> TypeGuard[torch.Tensor]:
        """Whether a value is a tensor of the size of the residual stream."""
        if self.hidden is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return False
        return value.numel() == PROBE_SHAPE[0] * PROBE_SHAPE[1] * self.hidden.shape[-1]


def tap_addition(trace: Trace, tap: Tap) -> Tap:
    """Return a tap on what the layer adds to the residual stream of the output that a tap reads.

    It is the tap itself if that output is added as it is, or if the layer does not simply add it.

    Args:
        trace: trace of the layer.
        tap: tap on the output of a sublayer, or of its last linear map.
    """
    addition = _Search(trace, tap).addition()
    if addition is None:
        return tap
    calls = [step for step in trace.steps if step.name == _LEAVES and step.module is addition.module]
    if len(calls) == 1:
        return addition
    return tap


@dataclass(frozen=True)
class _Call:
    """Call of a module with tensors of the size of the residual stream, by their addresses."""

    module: nn.Module
    inputs: set[int]

    @property
    def transforms(self) -> bool:
        """Whether the module only transforms one tensor, as norms, layer scales and short convolutions do."""
        return len(self.inputs) == 1 and not _mixes_units(self.module)


class _Search:
    """Search for the addition of a sublayer's output. Tensors are known by their addresses.

    Attributes:
        taps: taps on tensors that are the sublayer's output, transformed or not.
        contributions: tensors that are computed of outputs of linear maps without the residual stream.
        streams: the residual stream, before and after additions, transformed or not.
    """

    def __init__(self, trace: Trace, tap: Tap) -> None:
        self.trace = trace
        self.start = tap
        self.taps: dict[int, Tap] = {}
        self.contributions: set[int] = set()
        self.streams: set[int] = set()
        self.calls: list[_Call] = []  # of the modules that run, the innermost last

    def addition(self) -> Tap | None:
        """Return a tap on what is added, or None if the output is not simply added.

        A layer that begins a new residual stream returns sums of outputs alone.
        """
        if self.trace.hidden is not None:
            self.streams.add(_address(self.trace.hidden))
        for step in self.trace.steps:
            if step.module is not None and step.name == _ENTERS:
                self.calls.append(_Call(step.module, self._traced(step.operands)))
            elif step.name == _LEAVES:
                call = self.calls.pop()
                if step.result is not None and not self._is_inside_transform():
                    self._leave(call, step.result)
            elif self._is_inside_transform():
                continue
            elif self._is_addition(step):
                return self._tap_of(step.operands)
            else:
                self._follow(step)
        return self._tap_of([self.trace.output])

    def _is_inside_transform(self) -> bool:
        return any(call.transforms for call in self.calls)

    def _leave(self, call: _Call, output: torch.Tensor) -> None:
        """Follow the tensors that a module was given and returned."""
        address = _address(output)
        if call.module is self.start.module:
            self.taps[address] = self.start
        if _mixes_units(call.module):
            if is_linear(call.module) or address not in self.streams:
                self._label(address, self.contributions)
        elif call.transforms and address not in call.inputs:
            if call.inputs.issubset(self.taps):
                self.taps[address] = Tap(call.module, "output", axes_of(output.shape, *PROBE_SHAPE))
            for labelled in (self.contributions, self.streams):
                if call.inputs.issubset(labelled):
                    self._label(address, labelled)

    def _is_addition(self, step: Step) -> bool:
        """Whether a step adds the sublayer's output to something else than another sublayer's output."""
        addends = self._traced(step.operands)
        if step.name not in _ADDITIONS or len(addends) != 2:
            return False
        has_output = any(address in self.taps for address in addends)
        return has_output and not addends.issubset(self.contributions)

    def _follow(self, step: Step) -> None:
        """Follow the tensors that a function was given and returned."""
        inputs = self._traced(step.operands)
        if step.result is None or not inputs:
            return
        address = _address(step.result)
        tap = self._tap_of(step.operands)
        if tap is not None:
            numbers = [value for value in step.operands if isinstance(value, int | float)]
            if step.name in _MULTIPLICATIONS and len(numbers) == 1:
                self.taps[address] = _scaled(tap, Scale(numbers[0]))
            elif step.name in _DIVISIONS and len(numbers) == 1 and step.operands[0] is not numbers[0]:
                self.taps[address] = _scaled(tap, Scale(numbers[0], divides=True))
            elif step.name in _COPIES or (step.name in _ADDITIONS and len(inputs) == 2):
                self.taps[address] = tap
        if inputs.issubset(self.contributions):
            self._label(address, self.contributions)
        elif step.name in _PASSING_ON and inputs & self.streams:
            self._label(address, self.streams)

    def _label(self, address: int, labelled: set[int]) -> None:
        self.contributions.discard(address)
        self.streams.discard(address)
        labelled.add(address)

    def _tap_of(self, operands: Arguments) -> Tap | None:
        for address in self._addresses(operands):
            if address in self.taps:
                return self.taps[address]
        return None

    def _traced(self, operands: Arguments) -> set[int]:
        return set(self._addresses(operands))

    def _addresses(self, operands: Arguments) -> list[int]:
        return [_address(value) for value in operands if self.trace.is_traced(value)]


def _address(tensor: torch.Tensor) -> int:
    """Return what a tensor has in common with its views, and with no other tensor of its size."""
    return tensor.data_ptr() or id(tensor)


def _mixes_units(module: nn.Module) -> bool:
    """Whether a module has a matrix, unlike norms and convolutions of each unit alone."""
    if any(is_linear(part) for part in module.modules()):
        return True
    for parameter in module.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 may hold a part of it.
        if len(shape) > 1 and shape[1] > 1:
            return True
    return False


def _scaled(tap: Tap, scale: Scale) -> Tap:
    if scale.number == 1:
        return tap
    return replace(tap, scales=(*tap.scales, scale))
