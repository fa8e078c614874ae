"""The output projection of a layer's MLP, whose weights a repair changes.

Module names differ between families, so projections are found by pushing a probe: pushing the output of a module moves
the layer's output by a multiple of the push if, and only if, the module's output is added to the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from avss_dist.models.expert_units import ChosenUnits, DownProjections, find_down_projections
from avss_dist.models.experts import Experts
from avss_dist.models.layers import PROBE_SHAPE, Layer, as_rows, first_tensor, input_tensor
from avss_dist.pruning.selection import PlanError
from avss_dist.system.process import bound

PUSHES = (1.0, 4.0)  # multiples of the size of the layer's output; an output that is added is added at any size
_PLAIN_KINDS = ("Conv1D", "FalconLinear")  # GPT-2's and Falcon's names for an ordinary linear map
_TOLERANCE = 0.03  # of the move; bfloat16 rounds to 0.004
_ONE = 0.005  # a factor that differs from 1 by less is 1 up to rounding


class RepairError(PlanError):
    """The remaining layers cannot make up for the removed ones."""


@dataclass(frozen=True)
class OutputProjection:
    """The last linear map of a layer's MLP, and the norm after it if there is one.

    The layer adds ``factor`` times the output of ``norm``, or of ``linear`` without a norm, to the hidden states.

    Attributes:
        linear: path of the linear map, below the layer.
        norm: path of the RMS norm between that map and the hidden states, or None.
        factor: multiple of the output that is added.
        offset: number that is added to the norm's weight to give its gain: 0, or 1 in some families.
        eps: number that the norm adds to the mean square.
    """

    layer: Layer
    linear: str
    norm: str | None
    factor: float
    offset: float = 0.0
    eps: float = 0.0

    WEIGHT: ClassVar[str] = "weight"
    BIAS: ClassVar[str] = "bias"

    @property
    def last(self) -> str:
        """Path of the module whose output is added."""
        return self.norm or self.linear

    @property
    def weight(self) -> str:
        """Path of the weight, below the layer."""
        return f"{self.linear}.{self.WEIGHT}"

    @property
    def bias(self) -> str:
        """Path of the bias, which the layer may not have."""
        return f"{self.linear}.{self.BIAS}"

    @property
    def chances(self) -> float:
        """Share of the tokens that reach one of the linear maps."""
        return 1.0

    def reading(self, features: Literal["inputs", "output"]) -> OutputProjection:
        """Return the projection, of which these features are read. See `RepairMethod.features`."""
        return self

    def read_units(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ChosenUnits | None:
        """Return the units of routed experts from the arguments of a call; None if they are not fitted."""
        return None

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as [..., inputs, outputs]."""
        return weight if is_transposed(self.layer.module.get_submodule(self.linear)) else weight.T

    def from_matrix(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight, in the layout of ``weight``, that `matrix` turns into ``matrix``."""
        return self.matrix(matrix)

    def biases(self, bias: torch.Tensor) -> torch.Tensor:
        """Return the bias as [..., outputs]."""
        return bias

    def from_biases(self, biases: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the bias, in the layout of ``bias``, that `biases` turns into ``biases``."""
        return biases


@dataclass(frozen=True)
class ExpertsProjection(OutputProjection):
    """The down projections of a layer's remaining routed experts.

    Attributes:
        linear: path of the fused experts, below the layer.
        down: their down projections.
        remaining: indices of the remaining experts.
        chosen: number of experts that a token is sent to.
        output_only: whether no units are read.
    """

    down: DownProjections = field(kw_only=True)
    remaining: tuple[int, ...] = field(kw_only=True)
    chosen: int = field(kw_only=True)
    output_only: bool = False

    WEIGHT: ClassVar[str] = DownProjections.WEIGHT
    BIAS: ClassVar[str] = DownProjections.BIAS

    def reading(self, features: Literal["inputs", "output"]) -> OutputProjection:
        """See `OutputProjection`."""
        return replace(self, output_only=features == "output")

    def read_units(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ChosenUnits | None:
        """See `OutputProjection`."""
        return None if self.output_only else self.down.units(args, kwargs)

    @property
    def chances(self) -> float:
        """See `OutputProjection`."""
        return self.chosen / len(self.remaining)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """See `OutputProjection`: [remaining, inputs, outputs]."""
        return self.down.as_rows(weight)[list(self.remaining)]

    def from_matrix(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `OutputProjection`. Removed experts have the values of ``weight``."""
        rows = self.down.as_rows(weight).to(matrix, copy=True)
        rows[list(self.remaining)] = matrix
        return self.down.as_rows(rows)

    def biases(self, bias: torch.Tensor) -> torch.Tensor:
        """See `OutputProjection`."""
        return bias[list(self.remaining)]

    def from_biases(self, biases: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """See `OutputProjection`."""
        values = bias.to(biases, copy=True)
        values[list(self.remaining)] = biases
        return values


def find_output_projection(
    layer: Layer,
    run: Callable[[], Any],
    value: Callable[[str], torch.Tensor],
    removed_experts: Collection[int] = (),
) -> OutputProjection:
    """Find the output projection of a layer's MLP with a few forward passes.

    Args:
        run: runs a forward pass of the model over the same ``PROBE_SHAPE`` tokens each time.
        value: returns a parameter of the layer by its path.

    Raises:
        RepairError: there is none, or its weights cannot be changed; the message says why.
    """
    paths = {module: path for path, module in layer.module.named_modules()}
    if layer.experts is not None:
        return _experts_projection(layer, layer.experts, paths[layer.experts.module], run, removed_experts)
    tap = layer.taps.get("neuron")
    if tap is None:
        raise _refusal(layer, "has no MLP that ends in one linear map of its own")
    linear = tap.module
    weight = getattr(linear, "weight", None)
    if not _is_plain(linear) or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise _refusal(
            layer,
            f"ends its MLP in a {type(linear).__name__}, whose weights are not plain numbers",
            "Repair the checkpoint that it was quantized from, or prune with `repair` none.",
        )
    unmoved = _output(layer, run)
    if (factor := _residual_multiple(layer, linear, run, unmoved)) is not None:
        return OutputProjection(layer, paths[linear], None, factor)
    if (norm_settings := _norm_after(layer, linear, run, value)) is not None:
        norm, offset, eps = norm_settings
        if (factor := _residual_multiple(layer, norm, run, unmoved)) is not None:
            return OutputProjection(layer, paths[linear], paths[norm], factor, offset, eps)
    raise _refusal(layer, "does not simply add what its MLP gives to the residual stream")


def _experts_projection(
    layer: Layer, experts: Experts, path: str, run: Callable[[], Any], removed: Collection[int]
) -> OutputProjection:
    """Return the projection of the remaining routed experts of a layer; see `find_output_projection`."""
    down = find_down_projections(experts.module)
    if down is None:
        raise _refusal(layer, f"has no plain '{DownProjections.WEIGHT}' of its routed experts")
    linear, chosen = [], 0

    def check(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal chosen
        linear.append(down.is_linear(args, kwargs, output, _TOLERANCE))
        chosen = down.routing(args, kwargs).index.shape[1]

    handle = experts.module.register_forward_hook(check, with_kwargs=True)
    try:
        unmoved = _output(layer, run)
    finally:
        handle.remove()
    if not linear or not all(linear):
        raise _refusal(layer, "computes with its routed experts in an unknown way")
    factor = _residual_multiple(layer, experts.module, run, unmoved)
    if factor is None:
        raise _refusal(layer, "does not simply add what its routed experts give to the residual stream")
    remaining = tuple(expert for expert in range(experts.number) if expert not in removed)
    return ExpertsProjection(layer, path, None, factor, down=down, remaining=remaining, chosen=chosen)


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear map keeps its weight as [inputs, outputs], as GPT-2's does."""
    return not isinstance(linear, nn.Linear)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the factor by which an RMS norm multiplies each token, float32[..., 1]."""
    return (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weights are plain numbers."""
    return type(module) is nn.Linear or type(module).__name__ in _PLAIN_KINDS


def _refusal(layer: Layer, why: str, hint: str = "Drop other layers, or prune with `repair` none.") -> RepairError:
    return RepairError(
        f"Layer {layer.index} ({layer.name}) {why}: what is missing after it cannot be given back.", hint
    )


def _residual_multiple(layer: Layer, module: nn.Module, run: Callable[[], Any], unmoved: torch.Tensor) -> float | None:
    """Return the multiple of a push of the module's output by which the layer's output moves.

    None if the move is not a multiple of the push.
    """
    factors = []
    for number, size in enumerate(PUSHES):
        push = torch.randn(unmoved.shape, generator=torch.Generator().manual_seed(number)).to(unmoved.device)
        push *= size * unmoved.square().mean().sqrt()
        with _displaced(module, push):
            move = _output(layer, run) - unmoved
        factors.append(float((move * push).sum() / push.square().sum()))
        if not float((move - factors[-1] * push).norm()) < _TOLERANCE * float(move.norm()):
            return None  # includes outputs that do not move at all
    first, last = factors
    if not abs(first - last) <= _TOLERANCE * abs(last):
        return None
    return 1.0 if abs(last - 1) < _ONE else last


@contextmanager
def _displaced(module: nn.Module, push: torch.Tensor) -> Iterator[None]:
    def move(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + push.reshape(output.shape).to(output.dtype) if output.numel() == push.numel() else output

    with ExitStack() as stack:
        stack.callback(module.register_forward_hook(move).remove)
        yield


def _output(layer: Layer, run: Callable[[], Any]) -> torch.Tensor:
    """Return the output of a layer, float32[rows, tokens, units]."""
    with captured({"layer": layer.module}) as calls:
        run()
    output = as_rows(calls["layer"].output, layer.axes, *PROBE_SHAPE)
    if output is None:
        raise _refusal(layer, "gives hidden states of another shape than it takes")
    return output.float()


def _norm_after(
    layer: Layer, linear: nn.Module, run: Callable[[], Any], value: Callable[[str], torch.Tensor]
) -> tuple[nn.Module, float, float] | None:
    """Return the RMS norm that takes the output of a linear map, its offset and its eps, or None if there is none."""
    norms = {
        module: path
        for path, module in layer.module.named_modules()
        if "norm" in type(module).__name__.lower() and not any(module.children())
    }
    with captured({m: m for m in (linear, *norms)}) as calls:
        run()
    output = calls[linear].output
    for norm, path in norms.items():
        if norm not in calls or getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is not None:
            continue
        if calls[norm].input.shape != output.shape or not torch.equal(calls[norm].input, output):
            continue
        eps = float(getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0)
        weight = value(f"{path}.weight").to(output.device)
        unit = output.float() * inverse_rms(output, eps)
        errors = {o: float((unit * (weight.float() + o) - calls[norm].output.float()).norm()) for o in (0.0, 1.0)}
        offset = min(errors, key=lambda o: errors[o])
        if errors[offset] <= _TOLERANCE * float(calls[norm].output.float().norm()):
            return norm, offset, eps
    return None


@dataclass(frozen=True)
class CapturedCall:
    """The input and the output of one call of a module, and its units if it holds routed experts."""

    input: torch.Tensor
    output: torch.Tensor
    units: ChosenUnits | None = None


ReadUnits = Callable[[Sequence[Any], Mapping[str, Any]], ChosenUnits | None]
"""Returns the units of routed experts from the arguments of a call."""


@contextmanager
def captured(
    modules: Mapping[Any, nn.Module], read_units: Mapping[Any, ReadUnits] | None = None
) -> Iterator[dict[Any, CapturedCall]]:
    """Record the last call of each module, under the key that it has in ``modules``.

    Among interleaved passes, it records the calls of the pass that entered it.

    Args:
        read_units: functions that read the units of routed experts, by key.
    """
    calls: dict[Any, CapturedCall] = {}

    def record(key: Any) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if _CAPTURING.get() is not calls:
                return
            input_, output_ = input_tensor(args, kwargs), first_tensor(output)
            if input_ is not None and output_ is not None:
                units = read_units[key](args, kwargs) if read_units and key in read_units else None
                calls[key] = CapturedCall(input_.clone(), output_.clone(), units)  # which later modules may change

        return hook

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_hook(record(key), with_kwargs=True).remove)
        stack.enter_context(bound(_CAPTURING, calls))
        yield calls


_CAPTURING: ContextVar[dict[Any, CapturedCall] | None] = ContextVar("capturing", default=None)
