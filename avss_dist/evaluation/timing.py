"""Timing of models that generate with a key-value cache on this machine, smaller ones beside their whole one.

The models generate in turn, round by round, so that a change of the machine's pace meets all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from avss_dist.core.devices import SPARE_SHARE, computing_threads, free_cores, free_memory, pick_device
from avss_dist.core.errors import ConfigError, ModelError, first_line
from avss_dist.core.intervention import Intervention
from avss_dist.distillation.curve import Preparing
from avss_dist.evaluation.events import OnEvent
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.evaluation.speed import (
    BATCH,
    BYTES,
    CACHE,
    DECODING,
    DECODING_BATCH,
    FIRST_TOKEN,
    SECONDS,
    TOKENS_PER_SECOND,
    WEIGHTS,
    Speed,
    SpeedMeasure,
    Spread,
)
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.remaining import remaining_modules
from avss_dist.models.checkpoint.loading import quiet, text_config
from avss_dist.models.forward import changing
from avss_dist.models.generation import generate_greedily
from avss_dist.partition.catalog import PARTITIONS, WHOLE
from avss_dist.partition.choose import size_of
from avss_dist.partition.placement import SINGLE
from avss_dist.partition.replica import open_replica

PROMPT_TOKENS = 512
"""Tokens of the prompt of one row. A model with a shorter context gets as many as it can read."""
BATCH_PROMPT_TOKENS = 32
"""Tokens of each prompt of a batch. Longer ones would take most of the time, and decoding is what is measured."""
NEW_TOKENS = 17
"""Tokens that are generated. The first one ends the prompt; the others are decoded."""
WARM_UP_TOKENS = 3
LEAST_ROUNDS = 3
MOST_ROUNDS = 10
MOST_SPREAD = 2.0
"""Highest ratio of a measure over its lowest, beyond which people are told that the rounds differ."""
ENOUGH_SECONDS = 20.0
"""Time after which no round begins, once there are `LEAST_ROUNDS`."""


@dataclass(frozen=True, kw_only=True)
class SpeedSubject:
    """A model whose speed is measured.

    Attributes:
        label: name for people.
        removed: layers that are left out in memory. The others run as those of the pruned checkpoint do.
    """

    label: str
    model: PlacedModel
    removed: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """Revision and dtype. Subjects with the same ones share an open model."""
        return self.model.checkpoint.revision, self.model.settings.dtype


def removed_layers(intervention: Intervention) -> tuple[int, ...] | None:
    """Return the layers that an intervention removes. None if it changes the work of a pass in another way.

    A patch has weights of the same shapes, so that it changes no time.
    """
    if intervention.sparsity is not None or intervention.rounding is not None:
        return None
    layers = []
    for removed in intervention.removed:
        if not isinstance(removed, int):
            return None
        layers.append(removed)
    return tuple(layers)


def measure_speed(whole: SpeedSubject, smaller: Sequence[SpeedSubject], on_event: OnEvent) -> list[Speed]:
    """Measure how fast smaller models and their whole model generate, in turn, and what memory they take.

    Models that do not fit into memory together are measured one after the other.

    Args:
        on_event: receives the share of the rounds that are done.

    Raises:
        ConfigError: a model is not whole in the memory of one device, or reads too few tokens.
        ModelError: a model cannot be opened, or does not generate with a key-value cache.
    """
    subjects = [whole, *smaller]
    _require_one_device(subjects)
    prompt_tokens = _prompt_tokens(subjects)
    threads = _threads(whole.model)
    notes = []
    if prompt_tokens < PROMPT_TOKENS:
        notes.append(f"The prompt has {prompt_tokens} tokens, as the context has room for no more.")
    together = [subjects]
    obstacle = _memory_obstacle(subjects, prompt_tokens)
    if obstacle:
        notes.append(f"The models were measured one after the other, not in turn: {obstacle}.")
        together = [[subject] for subject in subjects]
    measured: list[_Measured] = []
    rounds = None
    with quiet(), computing_threads(threads):
        for group in together:
            measured += _measure_together(group, prompt_tokens, threads, rounds, on_event)
            rounds = len(measured[0].rounds)
    return [_compare(measured[0], other, prompt_tokens, threads, notes) for other in measured[1:]]


def _require_one_device(subjects: Sequence[SpeedSubject]) -> None:
    """Refuse models of which not all weights are in the memory of one device."""
    for subject in subjects:
        partition = subject.model.placement.partition
        if not PARTITIONS[partition].whole:
            raise ConfigError(
                f"`partition` {partition} of {subject.label} divides or reads the weights, and its speed is that of "
                f"links and disks. Speed is measured with `partition` {WHOLE} alone.",
            )


def _threads(model: PlacedModel) -> int:
    """Return the threads that compute: those of the settings if they are several, else one for each idle core.

    More threads than idle cores would wait for each other.
    """
    if model.settings.threads > 1:
        return model.settings.threads
    return free_cores()


def _prompt_tokens(subjects: Sequence[SpeedSubject]) -> int:
    """Return the tokens of the prompt: `PROMPT_TOKENS`, or as many as the shortest context has room for."""
    tokens = PROMPT_TOKENS
    for subject in subjects:
        config = text_config(subject.model.checkpoint).get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and longest > 0:
            tokens = min(tokens, longest - NEW_TOKENS)
        if tokens < 1:
            raise ConfigError(
                f"{subject.label} reads at most {longest} tokens, and speed is measured with {NEW_TOKENS} new ones "
                "after a prompt."
            )
    return tokens


def _memory_obstacle(subjects: Sequence[SpeedSubject], prompt_tokens: int) -> str | None:
    """Return why the checkpoints of subjects do not fit into memory together, or None if they do."""
    models = {subject.key: subject.model for subject in subjects}
    if len(models) == 1:
        return None
    needed = 0
    activations = 0
    for model in models.values():
        size = size_of(model.checkpoint, model.settings)
        if size is None:
            return f"the size of {model.checkpoint.name} is not known"
        needed += size.weight_bytes
        activations = max(activations, size.activation_bytes(1, prompt_tokens, head=True))
    free = int(SPARE_SHARE * free_memory(pick_device(subjects[0].model.settings.device)))
    if needed + activations <= free:
        return None
    return "they do not fit into memory together"


@dataclass(frozen=True)
class _Round:
    """Times of one round: seconds to the first token, and decoded tokens per second of one row and of a batch."""

    first_token: float
    decoding: float
    decoding_batch: float


@dataclass(frozen=True)
class _Measured:
    """A model with the times of its rounds and the bytes of its memory."""

    label: str
    dtype: str
    device: torch.device
    weight_bytes: int
    cache_bytes: float
    rounds: list[_Round]

    @property
    def first_tokens(self) -> list[float]:
        """Seconds to the first token, by round."""
        return [times.first_token for times in self.rounds]

    @property
    def decodings(self) -> list[float]:
        """Tokens per second of one row, by round."""
        return [times.decoding for times in self.rounds]

    @property
    def batch_decodings(self) -> list[float]:
        """Tokens per second of a batch, by round."""
        return [times.decoding_batch for times in self.rounds]


def _measure_together(
    subjects: Sequence[SpeedSubject], prompt_tokens: int, threads: int, rounds: int | None, on_event: OnEvent
) -> list[_Measured]:
    """Open models together and measure them in turn.

    Args:
        rounds: number of rounds; None ends them by `ENOUGH_SECONDS`.
    """
    on_event(Preparing("opening models to measure their speed"))
    with ExitStack() as stack:
        opened: dict[tuple[str, str], LanguageModel] = {}
        generators = []
        for subject in subjects:
            if subject.key not in opened:
                settings = replace(subject.model.settings, threads=threads)
                replica = stack.enter_context(
                    closing(open_replica(subject.model.checkpoint, settings, SINGLE, head=True))
                )
                assert replica.language_model is not None
                opened[subject.key] = replica.language_model
            generators.append(_Generator(subject, opened[subject.key], prompt_tokens))
        on_event(Preparing("measuring speed"))
        for generator in generators:
            generator.warm_up()
        times: list[list[_Round]] = [[] for _ in generators]
        for number in _rounds(rounds):
            for generator, own_times in zip(generators, times, strict=True):
                own_times.append(generator.measure())
            on_event(Preparing("measuring speed", (number + 1) / (rounds or MOST_ROUNDS)))
        return [generator.result(own_times) for generator, own_times in zip(generators, times, strict=True)]


def _rounds(rounds: int | None) -> Iterator[int]:
    """Yield the numbers of the rounds to measure: so many, or by `ENOUGH_SECONDS`."""
    started = time.monotonic()
    for number in range(rounds or MOST_ROUNDS):
        is_enough = number >= LEAST_ROUNDS and time.monotonic() - started > ENOUGH_SECONDS
        if rounds is None and is_enough:
            return
        yield number


class _Clock:
    """Times of a pass: events in the stream of a GPU, or the clock of the host.

    A clock is also a stopping criterion that stops nothing. transformers calls it after each token.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        if self._on_gpu:
            torch.cuda.synchronize(device)

    def mark(self) -> None:
        """Note the time."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.mark()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def seconds(self, start: int, end: int) -> float:
        """Return the seconds between two marks, by their places."""
        if self._on_gpu:
            self._marks[end].synchronize()
            milliseconds: float = self._marks[start].elapsed_time(self._marks[end])
            return milliseconds / 1000
        return float(self._marks[end] - self._marks[start])


class _Generator:
    """Generates with an open model, and times it.

    Args:
        prompt_tokens: tokens of the prompt of one row.

    Raises:
        ModelError: the remaining layers cannot generate with a key-value cache.
    """

    def __init__(self, subject: SpeedSubject, language_model: LanguageModel, prompt_tokens: int) -> None:
        self._subject = subject
        self._model = language_model
        self._prompt_tokens = prompt_tokens
        self._cache_bytes = 0
        if subject.removed:
            with language_model.without(subject.removed):
                obstacle = language_model.cache_obstacle()
            if obstacle:
                raise ModelError(
                    f"{subject.label} does not generate with a key-value cache while layers are left out: {obstacle}.",
                    "Write the checkpoint with `avss prune`, and evaluate it.",
                )

    def warm_up(self) -> None:
        """Generate a few tokens untimed: first passes allocate memory and choose kernels."""
        self._generate(1, self._prompt_tokens, WARM_UP_TOKENS)
        self._generate(BATCH, self._batch_prompt_tokens, WARM_UP_TOKENS)

    def measure(self) -> _Round:
        """Return the times of one round."""
        alone, cache = self._generate(1, self._prompt_tokens, NEW_TOKENS)
        self._cache_bytes = sum(tensor.nbytes for tensor in cache_tensors(cache))
        batch, _ = self._generate(BATCH, self._batch_prompt_tokens, NEW_TOKENS)
        decoded = NEW_TOKENS - 1
        return _Round(
            first_token=alone.seconds(0, 1),
            decoding=decoded / alone.seconds(1, NEW_TOKENS),
            decoding_batch=BATCH * decoded / batch.seconds(1, NEW_TOKENS),
        )

    def result(self, rounds: list[_Round]) -> _Measured:
        """Return the times of all rounds with the bytes of the weights and of the cache."""
        with changing(self._changes()):
            weights = self._model.module.state_dict(keep_vars=True).values()
            tensors = {id(weight): weight for weight in weights if isinstance(weight, torch.Tensor)}
        return _Measured(
            label=self._subject.label,
            dtype=self._subject.model.settings.dtype,
            device=self._model.device,
            weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            cache_bytes=self._cache_bytes / cache_tokens(self._prompt_tokens),
            rounds=rounds,
        )

    @property
    def _batch_prompt_tokens(self) -> int:
        return min(BATCH_PROMPT_TOKENS, self._prompt_tokens)

    def _changes(self) -> list[Any]:
        if not self._subject.removed:
            return []
        return remaining_modules(self._model.module, self._model.layers, self._subject.removed)

    def _generate(self, rows: int, prompt_tokens: int, new_tokens: int) -> tuple[_Clock, object]:
        """Generate tokens, and return the times of the start and of each token, and the cache.

        Raises:
            ModelError: the model's own code fails, or it has no cache.
        """
        ids = _prompts(rows, prompt_tokens, self._model)
        clock = _Clock(self._model.device)
        try:
            with torch.no_grad(), changing(self._changes()):
                clock.mark()
                generated = generate_greedily(self._model.module, ids, new_tokens, stopping_criteria=[clock])
        except Exception as error:  # A model's own code can raise anything.
            raise ModelError(
                f"{self._subject.label} does not generate text ({type(error).__name__}: {first_line(error)})."
            ) from error
        cache = _cache_of(generated)
        if cache is None:
            raise ModelError(f"{self._subject.label} generates without a key-value cache.")
        return clock, cache


def _cache_of(generated: Any) -> object:
    """Return the cache of generated text, or None without one. Earlier versions of transformers name it otherwise."""
    cache = getattr(generated, "cache", None)
    if cache is None:
        cache = getattr(generated, "past_key_values", None)
    return cache


def _prompts(rows: int, tokens: int, model: LanguageModel) -> torch.Tensor:
    """Return token ids of prompts, the same ones each time.

    They are from the middle of the vocabulary, as ids with a meaning of their own are at its ends.
    """
    lowest = model.head.vocabulary // 4
    number = max(1, model.head.vocabulary // 2)
    drawn = torch.randint(number, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return (lowest + drawn).to(model.device)


def cache_tokens(prompt_tokens: int) -> int:
    """Return the tokens that a cache holds after generation: the last one that is generated is not read."""
    return prompt_tokens + NEW_TOKENS - 1


def cache_tensors(cache: object) -> list[torch.Tensor]:
    """Return the tensors of a cache of transformers, each once: keys and values, or the states of a recurrence.

    Counters, which have no dimension of rows, are left out.
    """
    tensors = []
    seen: set[int] = set()
    waiting = [cache]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.ndim > 1:
                tensors.append(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif type(value).__module__.startswith("transformers"):
            waiting += vars(value).values()
    return tensors


def _compare(whole: _Measured, smaller: _Measured, prompt_tokens: int, threads: int, notes: Iterable[str]) -> Speed:
    """Return the measures of a smaller model beside those of the whole one."""
    device = whole.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(whole.device)
    measures = (
        _timed(FIRST_TOKEN, SECONDS, smaller.first_tokens, whole.first_tokens),
        _timed(DECODING, TOKENS_PER_SECOND, smaller.decodings, whole.decodings),
        _timed(DECODING_BATCH, TOKENS_PER_SECOND, smaller.batch_decodings, whole.batch_decodings),
        _sized(WEIGHTS, smaller.weight_bytes, whole.weight_bytes),
        _sized(CACHE, smaller.cache_bytes, whole.cache_bytes),
    )
    return Speed(
        smaller=smaller.label,
        whole=whole.label,
        measures=measures,
        dtype=smaller.dtype,
        whole_dtype=whole.dtype,
        device=device,
        threads=threads,
        rounds=len(whole.rounds),
        prompt_tokens=prompt_tokens,
        cache_tokens=cache_tokens(prompt_tokens),
        notes=(*notes, *_unsteady(measures)),
    )


def _unsteady(measures: Iterable[SpeedMeasure]) -> Iterator[str]:
    """Yield a sentence if the rounds differ so much that their median says little."""
    for measure in measures:
        if measure.ratio.high > MOST_SPREAD * measure.ratio.low:
            yield "The rounds differ widely, as other work takes this machine's time: measure again when it is idle."
            return


def _timed(name: str, unit: str, smaller: Sequence[float], whole: Sequence[float]) -> SpeedMeasure:
    """Return a measure of time. Its ratios are those within each round, which both models spent side by side."""
    ratios = []
    for own, other in zip(smaller, whole, strict=True):
        if unit == SECONDS:
            ratios.append(other / own)
        else:
            ratios.append(own / other)
    return SpeedMeasure(
        name=name, unit=unit, ratio=Spread.over(ratios), smaller=Spread.over(smaller), whole=Spread.over(whole)
    )


def _sized(name: str, smaller: float, whole: float) -> SpeedMeasure:
    """Return a measure of memory, which is the same in every round."""
    return SpeedMeasure(
        name=name,
        unit=BYTES,
        ratio=Spread.over([smaller / whole]),
        smaller=Spread.over([smaller]),
        whole=Spread.over([whole]),
    )
