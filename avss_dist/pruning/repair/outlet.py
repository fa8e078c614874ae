"""Where the MLP of a layer meets the residual stream, and the weights there that can give back what is missing.

Names differ between families, what happens does not: pushing the output of a module moves the layer's output by a
multiple of the push if, and only if, the one is added to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from avss_dist.models.layers import PROBE_SHAPE, Layer, as_rows, first_tensor, input_tensor
from avss_dist.pruning.selection import PlanError
from avss_dist.system.context import bound

PUSHES = (1.0, 4.0)  # multiples of the size of the layer's output; what is added once is added at any size
_PLAIN_KINDS = ("Conv1D", "FalconLinear")  # GPT-2's and Falcon's names for a linear map like any other
_TOLERANCE = 0.03  # of the move; bfloat16 rounds to 0.004
_ONE = 0.005  # a factor so near to 1 is 1, seen through rounding


class RepairError(PlanError):
    """What removed layers did cannot be given back by the layers that stay."""


@dataclass(frozen=True)
class Outlet:
    """What the MLP of a layer adds to the stream: ``factor`` times what ``norm`` gives, or ``linear`` if that is None.

    Attributes:
        linear: path, below the layer, of the MLP's last linear map.
        norm: path of an RMS norm between that map and the stream.
        offset: what is added to that norm's weight to give its gain: 0, or 1 in some families.
        eps: what that norm adds to the mean square.
    """

    layer: Layer
    linear: str
    norm: str | None
    factor: float
    offset: float = 0.0
    eps: float = 0.0

    @property
    def last(self) -> str:
        """The path of the module whose output is added."""
        return self.norm or self.linear


def find_outlet(layer: Layer, run: Callable[[], Any], value: Callable[[str], torch.Tensor]) -> Outlet:
    """Where a layer's MLP meets the stream, seen in a few passes.

    Args:
        run: a forward pass of the model over the same ``PROBE_SHAPE`` tokens each time.
        value: reads a parameter of the layer, by its path.

    Raises:
        RepairError: there is no such place, or no weights there that can be changed; the message says why.
    """
    tap = layer.taps.get("neuron")
    if tap is None:
        raise _refusal(layer, "has no MLP that ends in one linear map of its own (experts are routed, or fused)")
    paths = {module: path for path, module in layer.module.named_modules()}
    linear = tap.module
    weight = getattr(linear, "weight", None)
    if not is_plain(linear) or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise _refusal(
            layer,
            f"ends its MLP in a {type(linear).__name__}, whose weights are not plain numbers",
            "Repair the checkpoint that it was quantized from, or prune with `repair` none.",
        )
    still = _output(layer, run)
    if (factor := _factor(layer, linear, run, still)) is not None:
        return Outlet(layer, paths[linear], None, factor)
    if (found := _norm_after(layer, linear, run, value)) is not None:
        norm, offset, eps = found
        if (factor := _factor(layer, norm, run, still)) is not None:
            return Outlet(layer, paths[linear], paths[norm], factor, offset, eps)
    raise _refusal(layer, "does not simply add what its MLP gives to the residual stream")


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear map keeps its weight as [inputs, outputs], as GPT-2's does."""
    return not isinstance(linear, nn.Linear)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """float32[..., 1]: what an RMS norm multiplies each token by."""
    return (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weights are plain numbers."""
    return type(module) is nn.Linear or type(module).__name__ in _PLAIN_KINDS


def _refusal(layer: Layer, why: str, hint: str = "Drop other layers, or prune with `repair` none.") -> RepairError:
    return RepairError(
        f"Layer {layer.index} ({layer.name}) {why}: what is missing after it cannot be given back.", hint
    )


def _factor(layer: Layer, module: nn.Module, run: Callable[[], Any], still: torch.Tensor) -> float | None:
    """How many times the layer's output moves when the module's is pushed; None where it is not a multiple."""
    factors = []
    for number, size in enumerate(PUSHES):
        push = torch.randn(still.shape, generator=torch.Generator().manual_seed(number)).to(still.device)
        push *= size * still.square().mean().sqrt()
        with _pushed(module, push):
            move = _output(layer, run) - still
        factors.append(float((move * push).sum() / push.square().sum()))
        if not float((move - factors[-1] * push).norm()) < _TOLERANCE * float(move.norm()):
            return None  # among them those that do not move at all
    first, last = factors
    if not abs(first - last) <= _TOLERANCE * abs(last):
        return None
    return 1.0 if abs(last - 1) < _ONE else last


@contextmanager
def _pushed(module: nn.Module, push: torch.Tensor) -> Iterator[None]:
    def move(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + push.reshape(output.shape).to(output.dtype) if output.numel() == push.numel() else output

    with ExitStack() as stack:
        stack.callback(module.register_forward_hook(move).remove)
        yield


def _output(layer: Layer, run: Callable[[], Any]) -> torch.Tensor:
    """float32[rows, tokens, units] that a layer gives."""
    with captured({"layer": layer.module}) as seen:
        run()
    output = as_rows(seen["layer"].output, layer.axes, *PROBE_SHAPE)
    if output is None:
        raise _refusal(layer, "gives hidden states of another shape than it takes")
    return output.float()


def _norm_after(
    layer: Layer, linear: nn.Module, run: Callable[[], Any], value: Callable[[str], torch.Tensor]
) -> tuple[nn.Module, float, float] | None:
    """The RMS norm that takes what the linear map gives, what is added to its weight, and to the mean square."""
    norms = {
        module: path
        for path, module in layer.module.named_modules()
        if "norm" in type(module).__name__.lower() and not any(module.children())
    }
    with captured({m: m for m in (linear, *norms)}) as seen:
        run()
    given = seen[linear].output
    for norm, path in norms.items():
        if norm not in seen or getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is not None:
            continue
        if seen[norm].input.shape != given.shape or not torch.equal(seen[norm].input, given):
            continue
        eps = float(getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0)
        weight = value(f"{path}.weight").to(given.device)
        unit = given.float() * inverse_rms(given, eps)
        errors = {o: float((unit * (weight.float() + o) - seen[norm].output.float()).norm()) for o in (0.0, 1.0)}
        offset = min(errors, key=lambda o: errors[o])
        if errors[offset] <= _TOLERANCE * float(seen[norm].output.float().norm()):
            return norm, offset, eps
    return None


@dataclass(frozen=True)
class Seen:
    """What a module took in and gave out."""

    input: torch.Tensor
    output: torch.Tensor


@contextmanager
def captured(modules: Mapping[Any, nn.Module]) -> Iterator[dict[Any, Seen]]:
    """Inside, the last call of each module is kept, under the key that it has here.

    Of passes that interleave, it sees its own.
    """
    seen: dict[Any, Seen] = {}

    def keep(key: Any) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if _CAPTURING.get() is not seen:
                return
            taken, given = input_tensor(args, kwargs), first_tensor(output)
            if taken is not None and given is not None:
                seen[key] = Seen(taken.clone(), given.clone())  # which later modules may change

        return hook

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_hook(keep(key), with_kwargs=True).remove)
        stack.enter_context(bound(_CAPTURING, seen))
        yield seen


_CAPTURING: ContextVar[dict[Any, Seen] | None] = ContextVar("capturing", default=None)
