"""Changes of what modules do in a forward pass, in one context alone: actions, hooks, other weights and attributes.

Modules run through actions (`around`), which hold for the passes of a context alone: interleaved passes may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from avss_dist.core.process import bound

Action = Callable[..., Any]
"""Function of a module's ``forward`` and the arguments of a call; its result is that of the call."""
Hook = tuple[nn.Module, Callable[..., Any]]
"""Module and a function that `hooked` calls."""

_ACTIONS: ContextVar[Mapping[tuple[nn.Module, str], tuple[Action, ...]]] = ContextVar(
    "actions", default=MappingProxyType({})
)
_HOOKED: ContextVar[frozenset[object]] = ContextVar("hooked", default=frozenset())


@contextmanager
def around(actions: Mapping[nn.Module, Action], *, weights: bool = False) -> Iterator[None]:
    """Have modules run through actions inside the context.

    The action of an inner context runs those of outer ones. Actions on weights run in the order of their contexts.

    Args:
        weights: the actions need the weights of their modules, which Accelerate loads in a wrapper of ``forward``.
    """
    before = _ACTIONS.get()
    merged = dict(before)
    with ExitStack() as stack:
        for module, action in actions.items():
            place = module, "_old_forward" if weights and hasattr(module, "_old_forward") else "forward"
            earlier = before.get(place, ())
            merged[place] = (action, *earlier) if weights else (*earlier, action)
            stack.enter_context(_acting(*place))
        stack.enter_context(bound(_ACTIONS, merged))
        yield


@contextmanager
def _acting(module: nn.Module, name: str) -> Iterator[None]:
    """Have a module heed `_ACTIONS` inside the context. Contexts of several passes may overlap in any order."""
    installed = vars(module).get(name)
    if not isinstance(installed, _Acting):
        installed = vars(module)[name] = _Acting(module, name)
    installed.users += 1
    try:
        yield
    finally:
        installed.users -= 1
        if not installed.users:
            del vars(module)[name]
            vars(module).update(installed.original)


class _Acting:
    """Replacement ``forward`` of a module that runs the actions of the current context."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._place, self._forward = (module, name), getattr(module, name)
        self.original = {name: vars(module)[name]} if name in vars(module) else {}
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self._forward
        for action in _ACTIONS.get().get(self._place, ()):
            run = partial(action, run)
        return run(*args, **kwargs)


@contextmanager
def hooked(*, before: Iterable[Hook] = (), after: Iterable[Hook] = ()) -> Iterator[None]:
    """Have functions called before and after modules run, in the passes of this context alone.

    Unlike actions of `around`, they see what hooks of a partition make of arguments and outputs.

    Args:
        before: modules with functions of a call's positional and keyword arguments. They return None or others.
        after: modules with functions of the arguments and the output. They return None or another output.
    """
    token = object()

    def run(function: Callable[..., Any], _module: nn.Module, *call: Any) -> Any:
        return function(*call) if token in _HOOKED.get() else None

    with bound(_HOOKED, _HOOKED.get() | {token}), ExitStack() as stack:
        for module, function in before:
            stack.enter_context(module.register_forward_pre_hook(partial(run, function), with_kwargs=True))
        for module, function in after:
            stack.enter_context(module.register_forward_hook(partial(run, function), with_kwargs=True))
        yield


def actions_of(module: nn.Module) -> tuple[Action, ...]:
    """Return the actions that the ``forward`` of a module runs through in the current context, the outermost last."""
    return _ACTIONS.get().get((module, "forward"), ())


@contextmanager
def replaced_parameters(values: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Replace the values of parameters inside the context, in the parameters' dtypes and devices."""
    originals = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, original in originals.items():
            parameter.data = original


@contextmanager
def replaced_attributes(values: Iterable[tuple[object, Mapping[str, Any]]]) -> Iterator[None]:
    """Have objects hold other instance attributes inside the context. Those that an object lacks are removed again."""
    with ExitStack() as stack:
        for holder, new in values:
            attributes = vars(holder)
            stack.callback(attributes.update, {name: attributes[name] for name in new if name in attributes})
            for name in new.keys() - attributes.keys():
                stack.callback(attributes.pop, name)
            attributes.update(new)
        yield


def with_parameters(
    values: Callable[[], Mapping[nn.Parameter, torch.Tensor]], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run a module with replaced parameters, as an action of `around`."""
    with replaced_parameters(values()):
        return forward(*args, **kwargs)


def replace_tensor(output: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """Return a module's output with one tensor in it replaced."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        return type(output)(**{name: new if value is old else value for name, value in output.items()})
    values = [new if value is old else value for value in output]
    return output._make(values) if hasattr(output, "_make") else type(output)(values)
