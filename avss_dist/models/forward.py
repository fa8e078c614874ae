"""Changes of what modules do in forward passes. A list of changes is made in one context, `changing`.

`RunThrough`, `CallBefore`, `CallAfter` and `BindVariable` hold for the passes of their context alone, so that passes
which are interleaved in greenlets may differ, and their contexts may end in any order. `ReplaceParameter` and
`ReplaceAttributes` change the modules themselves, for all passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from avss_dist.core.process import bound

Arguments = Sequence[object]
"""Positional arguments of a call of a module. Families differ in their number and types."""
Keywords = Mapping[str, object]
"""Keyword arguments of a call of a module."""
Output = Any
"""Output of a module: a tensor, or a tuple or ModelOutput of tensors and others."""
Forward = Callable[..., Output]
"""The ``forward`` of a module, or what stands in its place."""
Action = Callable[..., Output]
"""Function of a module's ``forward`` and the arguments of a call; its result is that of the call."""
BeforeHook = Callable[[Arguments, Keywords], tuple[Arguments, Keywords] | None]
"""Function of the arguments of a call, which returns None or other arguments."""
AfterHook = Callable[[Arguments, Keywords, Output], Output]
"""Function of the arguments and the output of a call, which returns None or another output."""


@dataclass(frozen=True, eq=False)
class RunThrough:
    """A module runs through an action, in place of its ``forward``.

    The action of a later change runs those of earlier ones. Of actions that need weights, the earlier ones run the
    later ones, so that each finds the weights as the changes before it left them.

    Attributes:
        needs_weights: the action needs the weights of the module, which Accelerate loads in a wrapper of ``forward``.
            It runs inside of that wrapper.
    """

    module: nn.Module
    action: Action
    needs_weights: bool = False


@dataclass(frozen=True, eq=False)
class CallBefore:
    """A function is called before a module runs, with arguments as hooks of a partition have made them."""

    module: nn.Module
    function: BeforeHook


@dataclass(frozen=True, eq=False)
class CallAfter:
    """A function is called after a module has run, with the output as hooks of a partition have made it."""

    module: nn.Module
    function: AfterHook


@dataclass(frozen=True, eq=False)
class BindVariable:
    """A context variable has another value."""

    variable: ContextVar[Any]
    value: object


@dataclass(frozen=True, eq=False)
class ReplaceParameter:
    """A parameter of a module has another value, in its dtype and on its device.

    Attributes:
        name: path of the parameter below the module.
        value: the tensor, or a function that returns it. The function finds the parameter as earlier changes left it.
    """

    module: nn.Module
    name: str
    value: torch.Tensor | Callable[[], torch.Tensor]


@dataclass(frozen=True, eq=False)
class ReplaceAttributes:
    """An object has other instance attributes. Those that it lacked are removed again."""

    holder: object
    values: Mapping[str, object]


Change = RunThrough | CallBefore | CallAfter | BindVariable | ReplaceParameter | ReplaceAttributes

_Place = tuple[nn.Module, str]
"""Module, and the name of the attribute that is its ``forward``."""
_ACTIONS: ContextVar[Mapping[_Place, tuple[Action, ...]]] = ContextVar("actions", default=MappingProxyType({}))
"""Actions of the current context by place, each of which runs those before it."""
_BLOCKS: ContextVar[frozenset[object]] = ContextVar("blocks", default=frozenset())
"""Blocks of `changing` that the current context is inside of, whose hooks are called."""


@contextmanager
def changing(changes: Iterable[Change]) -> Iterator[None]:
    """Make changes in their order inside the context, and undo them at its end.

    A context inside of another one makes its changes after those of the outer one.
    """
    block = object()
    actions = dict(_ACTIONS.get())
    with ExitStack() as stack:
        for change in changes:
            if isinstance(change, RunThrough):
                place = _place_of(change)
                actions[place] = _with_action(actions.get(place, ()), change)
                stack.enter_context(_running_through_actions(place))
            elif isinstance(change, CallBefore):
                hook = partial(_call_inside, block, change.function)
                stack.enter_context(change.module.register_forward_pre_hook(hook, with_kwargs=True))
            elif isinstance(change, CallAfter):
                hook = partial(_call_inside, block, change.function)
                stack.enter_context(change.module.register_forward_hook(hook, with_kwargs=True))
            elif isinstance(change, BindVariable):
                stack.enter_context(bound(change.variable, change.value))
            elif isinstance(change, ReplaceParameter):
                stack.enter_context(_replaced_parameter(change))
            else:
                stack.enter_context(_replaced_attributes(change))
        stack.enter_context(bound(_ACTIONS, actions))
        stack.enter_context(bound(_BLOCKS, _BLOCKS.get() | {block}))
        yield


def while_running(change: ReplaceParameter) -> RunThrough:
    """Return a change that replaces a parameter whenever its module runs, and restores it when it has run.

    It is for weights that are in memory, or whole, only while their module runs. Backward passes use the original ones.
    """
    return RunThrough(change.module, partial(_run_with_parameter, change), needs_weights=True)


def actions_of(module: nn.Module, *, needs_weights: bool = False) -> tuple[Action, ...]:
    """Return the actions that a module runs through in the current context, the outermost last.

    Args:
        needs_weights: return those that need its weights, where Accelerate loads them; else the others.
    """
    return _ACTIONS.get().get((module, _forward_name(module, needs_weights=needs_weights)), ())


def replace_tensor(output: Output, old: torch.Tensor, new: torch.Tensor) -> Output:
    """Return a module's output with one tensor in it replaced."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        fields = dict(output)
        for name, value in output.items():
            if value is old:
                fields[name] = new
        return type(output)(**fields)
    values = []
    for value in output:
        values.append(new if value is old else value)
    if hasattr(output, "_make"):  # a named tuple
        return output._make(values)
    return type(output)(values)


def _forward_name(module: nn.Module, *, needs_weights: bool) -> str:
    if needs_weights and hasattr(module, "_old_forward"):
        return "_old_forward"
    return "forward"


def _place_of(change: RunThrough) -> _Place:
    return change.module, _forward_name(change.module, needs_weights=change.needs_weights)


def _with_action(earlier: tuple[Action, ...], change: RunThrough) -> tuple[Action, ...]:
    """Return the actions of a place, the outermost last, after one more change."""
    if change.needs_weights:
        return (change.action, *earlier)
    return (*earlier, change.action)


@contextmanager
def _running_through_actions(place: _Place) -> Iterator[None]:
    """Have a module heed `_ACTIONS` inside the context. Contexts of several passes may overlap in any order."""
    module, name = place
    attributes = vars(module)
    installed = attributes.get(name)
    if not isinstance(installed, _ActingForward):
        installed = _ActingForward(place)
        attributes[name] = installed
    installed.users += 1
    try:
        yield
    finally:
        installed.users -= 1
        if installed.users == 0:
            del attributes[name]
            attributes.update(installed.original)


class _ActingForward:
    """Replacement ``forward`` of a module that runs the actions of the current context.

    Attributes:
        original: the instance attribute that it replaces, by name; empty if ``forward`` is that of the class.
        users: number of contexts that it is installed for.
    """

    def __init__(self, place: _Place) -> None:
        module, name = place
        self._place = place
        self._forward: Forward = getattr(module, name)
        self.original: dict[str, object] = {}
        if name in vars(module):
            self.original[name] = vars(module)[name]
        self.users = 0

    def __call__(self, *args: object, **kwargs: object) -> Output:
        run = self._forward
        for action in _ACTIONS.get().get(self._place, ()):
            run = partial(action, run)
        return run(*args, **kwargs)


def _call_inside(block: object, function: Callable[..., Output], _module: nn.Module, *call: object) -> Output:
    """Call the function of a hook if the current context is inside of its block."""
    if block in _BLOCKS.get():
        return function(*call)
    return None


@contextmanager
def _replaced_parameter(change: ReplaceParameter) -> Iterator[None]:
    parameter = change.module.get_parameter(change.name)
    value = change.value() if callable(change.value) else change.value
    original = parameter.data
    parameter.data = value.to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        parameter.data = original


def _run_with_parameter(change: ReplaceParameter, forward: Forward, *args: object, **kwargs: object) -> Output:
    with _replaced_parameter(change):
        return forward(*args, **kwargs)


@contextmanager
def _replaced_attributes(change: ReplaceAttributes) -> Iterator[None]:
    attributes = vars(change.holder)
    originals = {name: attributes[name] for name in change.values if name in attributes}
    attributes.update(change.values)
    try:
        yield
    finally:
        for name in change.values:
            if name not in originals:
                del attributes[name]
        attributes.update(originals)
