"""The keywords that functions take for settings and prompts: seen by type checkers and editors, and by ``help``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict, TypeVar

from avss_dist.errors import ConfigError
from avss_dist.settings import Execution, Settings

F = TypeVar("F", bound=Callable[..., Any])


class ModelOptions(TypedDict, total=False):
    """Fields of `Settings` that matter wherever a model reads text."""

    max_sequences: int | None
    sequence_length: int
    batch_size: int
    sequences_per_shard: int | None
    shuffle_seed: int | None
    chat_template: bool
    layout: str
    row_start: str
    dtype: str
    dequantize: bool
    layers: str | None
    attention: str | None
    device: str
    threads: int
    trust_remote_code: bool


class WorkOptions(TypedDict, total=False):
    """Fields of `Execution`."""

    executor: str
    replicas: int | str | None
    address: str | None
    fresh: bool
    partition: str
    ranks: int | None
    gpus_per_replica: int | None
    max_memory: Mapping[str, int | str]
    offload_folder: str | None
    placement_seconds: float
    hang_seconds: float


class JobOptions(WorkOptions, total=False):
    """What the runs of a job take in place of what its file says."""

    tracker: str | None


class EvaluationOptions(ModelOptions, WorkOptions, total=False):
    """What evaluations take."""


class ShrinkingOptions(EvaluationOptions, total=False):
    """What shrinking takes: the fields of `pruning.shrinking.Shrinking`, too."""

    share: float | None
    keep: float | None
    by: str
    repair: str
    repair_corpora: Sequence[str]
    tasks: Sequence[str]
    first: int
    last: int
    limit: int | None
    num_fewshot: int | None
    allow_overlap: bool


class ScoringOptions(EvaluationOptions, total=False):
    """What scoring takes: every field of `Settings` and `Execution`."""

    skip_first_tokens: int
    sites: tuple[str, ...]
    thresholds: tuple[float, ...]
    experts: bool
    allow_pickle: bool
    tracker: str | None


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """What stands around a question of lm-evaluation-harness; by default what its task says, as plain text.

    Attributes:
        num_fewshot: examples before each question, unless the task has none at all; None leaves it to the task.
        apply_chat_template: put the question in the tokenizer's chat template, as what a user says.
        system_instruction: what stands before everything, and in a chat is what the system says.
        fewshot_as_multiturn: make a turn of each example; they are one turn with the question otherwise.

    Raises:
        ConfigError: turns without a chat, or fewer examples than none.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = False

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"`num_fewshot` must be at least 0, not {self.num_fewshot}.")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ConfigError(
                "`fewshot_as_multiturn` makes turns of a chat, and there is none.", "Set `apply_chat_template` too."
            )

    def changes(self) -> dict[str, Any]:
        """What is not as the task says."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}


AS_THE_TASK_SAYS = Prompting()


def refuse_unused(given: Mapping[str, Any], defaults: Mapping[str, Any], why: str, hint: str = "Leave it out.") -> None:
    """Refuse options that are given, beside their defaults, and have no effect.

    Raises:
        ConfigError: there is one; ``why`` says when it has none.
    """
    for name, value in given.items():
        if value and value != defaults.get(name):
            raise ConfigError(f"`{name}` has no effect {why}.", hint)


def with_options(options: Any, *classes: Any) -> Callable[[F], F]:
    """Show in a function's signature, with their defaults, the keywords that its ``**options`` stand for.

    Args:
        options: one of the classes above.
        classes: what has the fields, beside `Settings` and `Execution`.
    """
    defaults = {f.name: f.default for cls in (Settings, Execution, *classes) for f in fields(cls)} | {"max_memory": {}}
    shown = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=one.__forward_arg__)
        for name, one in options.__annotations__.items()
    ]

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return decorate
