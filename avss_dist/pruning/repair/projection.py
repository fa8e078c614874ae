"""The output projection of a layer's MLP, whose weights a repair changes.

Module names differ between families, so projections are found by pushing a probe: pushing the output of a module moves
the layer's output by a multiple of the push if, and only if, the module's output is added to the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from avss_dist.models.forward import Arguments, Keywords, Output
from avss_dist.models.structure.down_projections import DownProjections, find_down_projections
from avss_dist.models.structure.layers import PROBE_SHAPE, Experts, Layer, as_rows
from avss_dist.models.watching import captured
from avss_dist.plans.choice import PlanError

PUSHES = (1.0, 4.0)
"""Sizes of pushes, as multiples of the size of the layer's output. An output that is added is added at any size."""
_PLAIN_KINDS = ("Conv1D", "FalconLinear")
"""GPT-2's and Falcon's names for an ordinary linear map."""
TOLERANCE = 0.03
"""Largest error of a move, as a share of the move. Numbers in bfloat16 are rounded by up to 0.004."""
_ONE = 0.005
"""A factor that differs from 1 by less is 1 up to rounding."""
OFFSETS = (0.0, 1.0)
"""Numbers that families add to the weight of a norm to get its gain."""


@dataclass(frozen=True)
class OutputProjection:
    """The last linear map of a layer's MLP or of its routed experts, and the norm after it if there is one.

    The layer adds ``factor`` times the output of ``norm``, or of ``linear`` without a norm, to the hidden states.

    Attributes:
        linear: path of the linear map, or of the fused experts, below the layer.
        norm: path of the RMS norm between that map and the hidden states, or None.
        factor: multiple of the output that is added.
        offset: number that is added to the norm's weight to give its gain: 0, or 1 in some families.
        eps: number that the norm adds to the mean square.
        down: down projections of the routed experts; None for a linear map.
        remaining: indices of the remaining experts.
        chosen: number of experts that a token is sent to.
    """

    layer: Layer
    linear: str
    norm: str | None
    factor: float
    offset: float = 0.0
    eps: float = 0.0
    down: DownProjections | None = None
    remaining: tuple[int, ...] = ()
    chosen: int = 0

    @property
    def last(self) -> str:
        """Path of the module whose output is added."""
        return self.norm or self.linear

    @property
    def paths(self) -> dict[str, str]:
        """Paths of the parameters below the layer: ``linear``, ``bias`` if the layer has it, and ``gain`` of a norm."""
        if self.down:
            weight_path = f"{self.linear}.{DownProjections.WEIGHT}"
            bias_path = f"{self.linear}.{DownProjections.BIAS}"
        else:
            weight_path = f"{self.linear}.weight"
            bias_path = f"{self.linear}.bias"
        paths = {"linear": weight_path}
        if bias_path in dict(self.layer.module.named_parameters()):
            paths["bias"] = bias_path
        if self.norm is not None:
            paths["gain"] = f"{self.norm}.weight"
        return paths

    @property
    def chances(self) -> float:
        """Share of the tokens that reach one of the linear maps."""
        return self.chosen / len(self.remaining) if self.down else 1.0

    def values(self, field: str, stored: torch.Tensor) -> torch.Tensor:
        """Return a parameter as `fits.fold` takes it, without removed experts.

        Args:
            field: its key in `paths`.
        """
        if field == "gain":
            return stored + self.offset
        values = self._as_rows(stored) if field == "linear" else stored
        return values[list(self.remaining)] if self.down else values

    def stored(self, field: str, values: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """Return the parameter that `values` turns into ``values``. Removed experts have the values of ``old``."""
        if field == "gain":
            return values - self.offset
        if self.down:
            rows = self._as_rows(old) if field == "linear" else old
            rows = rows.to(values, copy=True)
            rows[list(self.remaining)] = values
            values = rows
        return self._as_rows(values) if field == "linear" else values

    def _as_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as [..., inputs, outputs], or such a matrix as the weight."""
        if self.down:
            return self.down.as_rows(weight)
        linear = self.layer.module.get_submodule(self.linear)
        return weight.T if isinstance(linear, nn.Linear) else weight  # GPT-2's map keeps [inputs, outputs]


def find_output_projection(
    layer: Layer,
    run: Callable[[], object],
    value: Callable[[str], torch.Tensor],
    removed: Collection[int] = (),
) -> OutputProjection:
    """Find the output projection of a layer's MLP with a few forward passes.

    Args:
        run: runs a forward pass of the model over the same ``PROBE_SHAPE`` tokens each time.
        value: returns a parameter of the layer by its path.
        removed: indices of the removed routed experts.

    Raises:
        PlanError: there is none, or its weights cannot be changed; the message says why.
    """
    paths = {module: path for path, module in layer.module.named_modules()}
    if layer.experts is not None:
        return _experts_projection(layer, layer.experts, paths[layer.experts.module], run, removed)
    tap = layer.taps.get("neuron")
    if tap is None:
        raise _refusal(layer, "has no MLP that ends in one linear map of its own")
    linear = tap.module
    if not is_plain_linear(linear):
        raise _refusal(
            layer,
            f"ends its MLP in a {type(linear).__name__}, whose weights are not plain numbers",
            "Repair the checkpoint that it was quantized from, or prune with `repair` none.",
        )
    unmoved = _output(layer, run)
    factor = _residual_multiple(layer, linear, run, unmoved)
    if factor is not None:
        return OutputProjection(layer, paths[linear], norm=None, factor=factor)
    for norm in _norms_after(layer, linear, run, value):
        factor = _residual_multiple(layer, norm.module, run, unmoved)
        if factor is not None:
            return OutputProjection(layer, paths[linear], paths[norm.module], factor, offset=norm.offset, eps=norm.eps)
    raise _refusal(layer, "does not simply add what its MLP gives to the residual stream")


def _experts_projection(
    layer: Layer, experts: Experts, path: str, run: Callable[[], object], removed: Collection[int]
) -> OutputProjection:
    """Return the projection of the remaining routed experts of a layer.

    See `find_output_projection`.
    """
    down = find_down_projections(experts.module)
    if down is None:
        raise _refusal(layer, f"has no plain '{DownProjections.WEIGHT}' of its routed experts")
    # Of each call of the experts: whether it is linear, and the number of experts of a token.
    linearity: list[bool] = []
    chosen: list[int] = []

    def check(_module: nn.Module, args: Arguments, kwargs: Keywords, output: Output) -> None:
        linearity.append(down.is_linear(args, kwargs, output, TOLERANCE))
        chosen.append(down.routing(args, kwargs).index.shape[1])

    with experts.module.register_forward_hook(check, with_kwargs=True):
        unmoved = _output(layer, run)
    if not linearity or not all(linearity):
        raise _refusal(layer, "computes with its routed experts in an unknown way")
    factor = _residual_multiple(layer, experts.module, run, unmoved)
    if factor is None:
        raise _refusal(layer, "does not simply add what its routed experts give to the residual stream")
    return OutputProjection(
        layer,
        path,
        norm=None,
        factor=factor,
        down=down,
        remaining=tuple(expert for expert in range(experts.number) if expert not in removed),
        chosen=chosen[-1],
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weights are plain numbers."""
    weight = getattr(module, "weight", None)
    is_plain = type(module) is nn.Linear or type(module).__name__ in _PLAIN_KINDS
    return is_plain and isinstance(weight, nn.Parameter) and weight.is_floating_point()


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm by the name of its class."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


def eps_of(norm: nn.Module) -> float:
    """Return the number that a norm adds to the mean square."""
    return float(getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the factor by which an RMS norm multiplies each token, float32[..., 1]."""
    return (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()


def _refusal(layer: Layer, why: str, hint: str = "Drop other layers, or prune with `repair` none.") -> PlanError:
    return PlanError(f"{layer} {why}: what is missing after it cannot be given back.", hint)


def _residual_multiple(
    layer: Layer, module: nn.Module, run: Callable[[], object], unmoved: torch.Tensor
) -> float | None:
    """Return the multiple of a push of the module's output by which the layer's output moves.

    None if the move is not a multiple of the push.
    """
    factors = []
    for number, size in enumerate(PUSHES):
        generator = torch.Generator().manual_seed(number)
        push = torch.randn(unmoved.shape, generator=generator).to(unmoved.device)
        push *= size * unmoved.square().mean().sqrt()
        with module.register_forward_hook(partial(_displace, push)):
            move = _output(layer, run) - unmoved
        factor = float((move * push).sum() / push.square().sum())
        rest = float((move - factor * push).norm())
        # NaN is no multiple, nor is an output that does not move at all.
        is_multiple = rest < TOLERANCE * float(move.norm())
        if not is_multiple:
            return None
        factors.append(factor)
    first, last = factors
    is_constant = abs(first - last) <= TOLERANCE * abs(last)
    if not is_constant:
        return None
    return 1.0 if abs(last - 1) < _ONE else last


def _displace(push: torch.Tensor, _module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
    if output.numel() != push.numel():
        return output
    return output + push.reshape(output.shape).to(output.dtype)


def _output(layer: Layer, run: Callable[[], object]) -> torch.Tensor:
    """Return the output of a layer, float32[rows, tokens, units]."""
    with captured({"layer": layer.module}) as calls:
        run()
    return as_rows(calls["layer"].output, layer.axes, *PROBE_SHAPE, place=layer).float()


class _RmsNorm(NamedTuple):
    """An RMS norm, with the offset and eps of `OutputProjection`."""

    module: nn.Module
    offset: float
    eps: float


def _norms_after(
    layer: Layer, linear: nn.Module, run: Callable[[], object], value: Callable[[str], torch.Tensor]
) -> Iterator[_RmsNorm]:
    """Yield each RMS norm that takes the output of a linear map."""
    norms = {}
    for path, module in layer.module.named_modules():
        if is_norm(module):
            norms[module] = path
    with captured({module: module for module in (linear, *norms)}) as calls:
        run()
    output = calls[linear].output
    for norm, path in norms.items():
        call = calls.get(norm)
        if call is None or call.input.shape != output.shape or not torch.equal(call.input, output):
            continue
        if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is not None:
            continue
        eps = eps_of(norm)
        weight = value(f"{path}.weight").to(output.device).float()
        unit = output.float() * inverse_rms(output, eps)
        expected = call.output.float()
        errors = {offset: float((unit * (weight + offset) - expected).norm()) for offset in OFFSETS}
        offset = min(errors, key=lambda offset: errors[offset])
        if errors[offset] <= TOLERANCE * float(expected.norm()):
            yield _RmsNorm(norm, offset, eps)
