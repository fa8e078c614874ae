"""The neurons of an MLP: the rows of its first linear maps, and the norm before them.

A neuron is a function of the hidden states before the MLP. With the normalized hidden states u, the gain gamma and the
bias beta of the norm, and its rows G and b of a first linear map, it reads ``(gamma * u + beta) G + b``. A neuron of
another layer with ``gamma_s``, ``beta_s``, ``G_s`` and ``b_s`` reads the same in this layer with the rows

- ``G = G_s * gamma_s / gamma``,
- ``b = b_s + beta_s G_s - beta G``.

Nothing here knows an activation function. Which rows belong to a neuron is tried by exchanging neurons, and whether
another layer's neurons are the same functions here is tried by giving this layer its hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from avss_dist.models.change.patches import Parameter, Patch
from avss_dist.models.forward import Arguments, CallBefore, Keywords, changing
from avss_dist.models.structure.layers import Layer, LayerCall, is_linear, is_transposed
from avss_dist.models.watching import CapturedCall, captured
from avss_dist.pruning.repair.projection import (
    OFFSETS,
    TOLERANCE,
    eps_of,
    inverse_rms,
    is_norm,
    is_plain_linear,
)

TINY_GAIN = 1e-3
"""Share of the mean gain below which a gain is tiny: rows of other layers would be divided by it."""

Patching = Callable[[Patch], Any]
"""Function of a patch that returns a context in which the model computes with it: `LanguageModel.patched`."""
ReadParameter = Callable[[int, str], torch.Tensor]
"""Function of a layer and a path below it that returns a parameter as the files hold it."""


@dataclass(frozen=True)
class AffineModule:
    """A module with a weight and perhaps a bias.

    Attributes:
        path: path of the module below the layer.
    """

    path: str

    @property
    def weight(self) -> str:
        """Path of the weight below the layer."""
        return f"{self.path}.weight"

    @property
    def bias(self) -> str:
        """Path of the bias below the layer."""
        return f"{self.path}.bias"


@dataclass(frozen=True)
class FirstLinear(AffineModule):
    """A linear map at the beginning of an MLP, which has one or more rows for each neuron.

    Attributes:
        parts: number of rows of a neuron: 2 where gate and up are one map.
        alternates: whether the rows of a neuron stand side by side; else the first rows of all neurons come first.
        transposed: whether the weight is [inputs, outputs].
        has_bias: whether the map has a bias.
    """

    parts: int
    alternates: bool
    transposed: bool
    has_bias: bool

    @property
    def parameters(self) -> list[str]:
        """Paths of the parameters below the layer."""
        return [self.weight, self.bias] if self.has_bias else [self.weight]

    def rows(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the weight as [neurons, parts, inputs], or the bias as [neurons, parts]."""
        if self.transposed and parameter.dim() == 2:
            parameter = parameter.T
        if self.alternates:
            return parameter.unflatten(0, (-1, self.parts))
        return parameter.unflatten(0, (self.parts, -1)).transpose(0, 1)

    def parameter(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the parameter that `rows` turns into ``rows``."""
        if not self.alternates:
            rows = rows.transpose(0, 1)
        parameter = rows.flatten(0, 1)
        if self.transposed and parameter.dim() == 2:
            parameter = parameter.T
        return parameter.contiguous()


@dataclass(frozen=True)
class InputNorm(AffineModule):
    """The norm before an MLP.

    Attributes:
        offset: number that is added to the weight to give the gain.
        has_gain, has_bias: whether the norm has a weight, and a bias.
        is_shared: whether something besides the MLP reads its output.
    """

    offset: float
    has_gain: bool
    has_bias: bool
    is_shared: bool


@dataclass(frozen=True, eq=False)
class MlpNeurons:
    """The neurons of a layer's MLP.

    Attributes:
        linears: linear maps at the beginning of the MLP.
        last: path of the linear map at its end, whose inputs are the neurons.
        norm: norm before the MLP, or None.
        call: call of the norm, or of the first linear map without a norm, for the tokens of the probe.
        values: values of the neurons for these tokens.
    """

    layer: Layer
    linears: tuple[FirstLinear, ...]
    last: str
    norm: InputNorm | None
    call: CapturedCall
    values: torch.Tensor

    @property
    def number(self) -> int:
        """Number of neurons."""
        return self.values.shape[-1]

    @property
    def width(self) -> int:
        """Number of channels of the hidden states."""
        return self.call.input.shape[-1]


NeuronRows = Mapping[str, torch.Tensor]
"""Rows of some neurons by the path of their parameter: [neurons, parts, inputs] of a weight, [neurons, parts] of a
bias."""


def find_neurons(
    layer: Layer, run: Callable[[], object], value: Callable[[str], torch.Tensor], patched: Patching
) -> MlpNeurons | None:
    """Find the neurons of a layer's MLP with a few forward passes.

    Args:
        run: runs a forward pass of the model over the same ``PROBE_SHAPE`` tokens each time.
        value: returns a parameter of the layer by its path.
        patched: makes the model compute with a patch.

    Returns:
        None if the layer has no MLP whose neurons each have rows of their own.
    """
    tap = layer.taps.get("neuron")
    if tap is None or layer.experts is not None:
        return None
    paths = {module: path for path, module in layer.module.named_modules()}
    last = paths[tap.module]
    firsts = [projection for projection in layer.projections if projection.site == "up_input"]
    watched = [module for module in paths if is_norm(module) or is_linear(module)]
    with captured({module: module for module in watched}) as calls:
        run()
    if not firsts or any(first.module not in calls for first in firsts) or tap.module not in calls:
        return None
    values = calls[tap.module].input
    for alternates in (False, True):
        linears = []
        for first in firsts:
            parts, rest = divmod(first.outputs, values.shape[-1])
            if rest or not parts or not is_plain_linear(first.module):
                return None
            has_bias = getattr(first.module, "bias", None) is not None
            linears.append(FirstLinear(first.path, parts, alternates, is_transposed(first.module), has_bias))
        neurons = MlpNeurons(layer, tuple(linears), last, None, calls[firsts[0].module], values)
        if _has_rows_of_its_own(neurons, run, value, patched):
            return _with_norm(neurons, {paths[module]: call for module, call in calls.items()}, value)
    return None


def _has_rows_of_its_own(
    neurons: MlpNeurons, run: Callable[[], object], value: Callable[[str], torch.Tensor], patched: Patching
) -> bool:
    """Whether neurons change places if their rows do."""
    patch = {}
    for linear in neurons.linears:
        for path in linear.parameters:
            patch[neurons.layer.index, path] = linear.parameter(linear.rows(value(path)).roll(1, 0))
    with patched(patch):
        exchanged = _values(neurons, run)
    return _is_close(exchanged, neurons.values.roll(1, -1))


def _values(neurons: MlpNeurons, run: Callable[[], object]) -> torch.Tensor:
    """Return the values of the neurons in a pass."""
    with captured({"last": neurons.layer.module.get_submodule(neurons.last)}) as calls:
        run()
    return calls["last"].input


def _is_close(values: torch.Tensor, expected: torch.Tensor) -> bool:
    if values.shape != expected.shape:
        return False
    return float((values.float() - expected.float()).norm()) <= TOLERANCE * float(expected.float().norm())


def _with_norm(
    neurons: MlpNeurons, calls: Mapping[str, CapturedCall], value: Callable[[str], torch.Tensor]
) -> MlpNeurons | None:
    """Return the neurons with the norm before them, or None if it is of an unknown kind.

    Args:
        calls: calls of the norms and linear maps of the layer by path.
    """
    hidden = neurons.call.input
    own = [linear.path for linear in neurons.linears]
    norm_path = None
    is_shared = False
    for path, call in calls.items():
        if is_norm(neurons.layer.module.get_submodule(path)):
            if _is_same(call.output, hidden):
                norm_path = path
        elif path not in own and _is_same(call.input, hidden):
            is_shared = True
    if norm_path is None:
        return neurons
    call = calls[norm_path]
    offset = _norm_offset(neurons.layer.module.get_submodule(norm_path), norm_path, call, value)
    if offset is None:
        return None
    module = neurons.layer.module.get_submodule(norm_path)
    norm = InputNorm(
        path=norm_path,
        offset=offset,
        has_gain=getattr(module, "weight", None) is not None,
        has_bias=getattr(module, "bias", None) is not None,
        is_shared=is_shared,
    )
    return replace(neurons, norm=norm, call=call)


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor, other)


def _norm_offset(
    module: nn.Module, path: str, call: CapturedCall, value: Callable[[str], torch.Tensor]
) -> float | None:
    """Return the number that is added to the weight of an RMS norm or a layer norm to give its gain.

    None if its output is not the gain times the normalized input, plus the bias.
    """
    has_gain = getattr(module, "weight", None) is not None
    has_bias = getattr(module, "bias", None) is not None
    x = call.input.float()
    expected = call.output.float()
    gain = torch.ones(x.shape[-1], device=x.device)
    bias = torch.zeros(x.shape[-1], device=x.device)
    if has_gain:
        gain = value(f"{path}.weight").to(x.device).float()
    if has_bias:
        bias = value(f"{path}.bias").to(x.device).float()
    errors = {}
    for centers, offset in product((False, True), OFFSETS if has_gain else (0.0,)):
        centered = x - x.mean(-1, keepdim=True) if centers else x
        normalized = centered * inverse_rms(centered, eps_of(module))
        output = normalized * (gain + offset) + bias
        errors[offset, centers] = float((output - expected).norm())
    best = min(errors, key=lambda form: errors[form])
    if errors[best] > TOLERANCE * float(expected.norm()):
        return None
    return best[0]


class NotBorrowed(Exception):
    """Neurons of a layer cannot be used in another one; the message says why."""


@dataclass(frozen=True, eq=False)
class BorrowedNeurons:
    """Neurons of removed layers, as rows of a remaining layer.

    Attributes:
        layers: int64[number], the layer of each neuron.
        rows: their rows, in the dtypes of the files.
    """

    layers: torch.Tensor
    rows: NeuronRows

    def __len__(self) -> int:
        """Return the number of neurons."""
        return len(self.layers)

    def __getitem__(self, indices: torch.Tensor | slice) -> BorrowedNeurons:
        """Return some of the neurons."""
        return BorrowedNeurons(self.layers[indices], {path: rows[indices] for path, rows in self.rows.items()})

    @classmethod
    def joined(cls, parts: Sequence[BorrowedNeurons]) -> BorrowedNeurons:
        """Return the neurons of several groups as one group."""
        layers = torch.cat([part.layers for part in parts])
        rows = {}
        for path in parts[0].rows:
            rows[path] = torch.cat([part.rows[path] for part in parts])
        return cls(layers, rows)


class NeuronBank(NamedTuple):
    """Borrowed neurons that a layer may have in place of its own first ones.

    Attributes:
        patch: parameters of the layer with them.
        number: number of borrowed neurons.
    """

    patch: Patch
    number: int


class Recipient:
    """An MLP whose neurons may give way to neurons of removed layers.

    Where a gain of its norm is tiny, rows of other layers would be divided by it. If nothing else reads the norm, such
    gains become 1, and its own rows take them. Otherwise borrowed neurons do not read these channels.

    Args:
        neurons: its neurons.
        read: reads a parameter.

    Attributes:
        changed: parameters that differ because gains became 1, in the dtypes of the files.
    """

    def __init__(self, neurons: MlpNeurons, read: ReadParameter) -> None:
        self.neurons = neurons
        self._read = read
        self.changed: dict[Parameter, torch.Tensor] = {}
        gain = _gain(neurons, read)
        is_tiny = gain.abs() <= TINY_GAIN * gain.abs().mean()
        norm = neurons.norm
        if is_tiny.any() and norm is not None and not norm.is_shared and not norm.has_bias:
            self._move_gains(norm, gain, is_tiny)
            gain = torch.where(is_tiny, 1.0, gain)
            is_tiny = torch.zeros_like(is_tiny)
        self._inverse_gain = torch.where(is_tiny, 0.0, 1 / gain)

    def read(self, path: str) -> torch.Tensor:
        """Return a parameter of the layer as the files will hold it."""
        index = self.neurons.layer.index
        changed = self.changed.get((index, path))
        if changed is not None:
            return changed
        return self._read(index, path)

    def _move_gains(self, norm: InputNorm, gain: torch.Tensor, is_tiny: torch.Tensor) -> None:
        """Make tiny gains 1, and multiply the rows by them."""
        index = self.neurons.layer.index
        weight = self._read(index, norm.weight).clone()
        weight[is_tiny.to(weight.device)] = 1.0 - norm.offset
        self.changed[index, norm.weight] = weight
        moved = torch.where(is_tiny, gain, 1.0)
        for linear in self.neurons.linears:
            stored = self._read(index, linear.weight)
            rows = linear.rows(stored).double() * moved.to(stored.device)
            self.changed[index, linear.weight] = linear.parameter(rows.to(stored.dtype))

    def borrowed_from(self, donor: MlpNeurons) -> BorrowedNeurons:
        """Return the neurons of another layer as rows of this one.

        Raises:
            NotBorrowed: they are of another kind, need a bias that this layer does not have, or have rows that do not
                fit into the dtype.
        """
        own = self.neurons
        kinds = [(linear.path, linear.parts, linear.alternates) for linear in own.linears]
        if kinds != [(linear.path, linear.parts, linear.alternates) for linear in donor.linears]:
            raise NotBorrowed("its MLP has other linear maps")
        gain = _gain(donor, self._read)
        donor_bias = _norm_bias(donor, self._read)
        own_bias = _norm_bias(own, self._read)
        rows: dict[str, torch.Tensor] = {}
        for linear, lent in zip(own.linears, donor.linears, strict=True):
            weight = lent.rows(self._read(donor.layer.index, lent.weight)).double()
            stored = self.read(linear.weight)
            translated = (weight * (gain * self._inverse_gain)).to(stored.dtype)
            bias = weight @ donor_bias - translated.double() @ own_bias
            if lent.has_bias:
                bias += lent.rows(self._read(donor.layer.index, lent.bias)).double()
            rows[linear.weight] = translated
            if linear.has_bias:
                rows[linear.bias] = bias.to(self.read(linear.bias).dtype)
            elif bias.any():
                raise NotBorrowed(f"its neurons have a bias, for which '{linear.path}' has no place")
        for path, values in rows.items():
            if not torch.isfinite(values).all():
                raise NotBorrowed(f"its rows of '{path}' do not fit into {values.dtype}")
        layers = torch.full((donor.number,), donor.layer.index)
        return BorrowedNeurons(layers, rows)

    def patch(self, borrowed: BorrowedNeurons, places: torch.Tensor) -> dict[Parameter, torch.Tensor]:
        """Return the parameters of the layer with borrowed neurons in the places of its own.

        Args:
            places: int64[number], the neuron that each borrowed one replaces.
        """
        patch = dict(self.changed)
        for linear in self.neurons.linears:
            for path in linear.parameters:
                rows = linear.rows(self.read(path)).clone()
                rows[places] = borrowed.rows[path]
                patch[self.neurons.layer.index, path] = linear.parameter(rows)
        return patch

    def banks(self, borrowed: BorrowedNeurons) -> list[NeuronBank]:
        """Return borrowed neurons as banks, in order, of at most as many neurons as the layer has."""
        banks = []
        for begin in range(0, len(borrowed), self.neurons.number):
            part = borrowed[begin : begin + self.neurons.number]
            banks.append(NeuronBank(self.patch(part, torch.arange(len(part))), len(part)))
        return banks

    def has_the_values_of(
        self, donor: MlpNeurons, borrowed: BorrowedNeurons, run: Callable[[], object], patched: Patching
    ) -> bool:
        """Whether borrowed neurons have here the values that they have in their own layer, for the same hidden states.

        They do not if the layers differ in the activation function, or in the norm. At most as many neurons as this
        layer has are tried.

        Args:
            run, patched: as for `find_neurons`, in this layer.
        """
        number = min(len(borrowed), self.neurons.number)
        patch = self.patch(borrowed[:number], torch.arange(number))
        module = self.neurons.layer.module
        readers = [linear.path for linear in self.neurons.linears]
        if self.neurons.norm is not None:
            readers = [self.neurons.norm.path]
        replacements = []
        for path in readers:
            replacements.append(CallBefore(module.get_submodule(path), partial(_with_hidden, donor.call.input)))
        with patched(patch), changing(replacements):
            values = _values(self.neurons, run)
        return _is_close(values[..., :number], donor.values[..., :number])


def _with_hidden(hidden: torch.Tensor, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
    """Return the arguments of a call with other hidden states."""
    call = LayerCall(args, kwargs).with_hidden(hidden)
    return call.args, call.kwargs


def _gain(neurons: MlpNeurons, read: ReadParameter) -> torch.Tensor:
    """Return the gain of the norm before an MLP, float64[channels]."""
    norm = neurons.norm
    if norm is None or not norm.has_gain:
        return torch.ones(neurons.width, dtype=torch.float64)
    return read(neurons.layer.index, norm.weight).double() + norm.offset


def _norm_bias(neurons: MlpNeurons, read: ReadParameter) -> torch.Tensor:
    """Return the bias of the norm before an MLP, float64[channels]."""
    norm = neurons.norm
    if norm is None or not norm.has_bias:
        return torch.zeros(neurons.width, dtype=torch.float64)
    return read(neurons.layer.index, norm.bias).double()
