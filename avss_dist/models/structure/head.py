"""The head of a causal language model: the logits of some tokens at a time, by the model's own code.

A family's ``forward`` may scale, cap or leave out logits. Therefore it runs for each piece of the hidden states: its
body returns a recorded output of a few tokens, and its output embeddings read the hidden states of the piece instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from avss_dist.corpus.shards import Batch
from avss_dist.models.forward import Arguments, CallAfter, Change, Forward, Keywords, Output, RunThrough, changing
from avss_dist.models.structure.layers import PROBE_SHAPE, Layer, probe_tokens
from avss_dist.stats.layer_stats import Float64

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Maximum difference between the logits of pieces and of all tokens, relative to the largest logit, by dtype."""
FLOAT32_BYTES = 4
LOGIT_BYTES = 128 << 20
"""Bytes of the logits that exist at once, in float32: of 128 tokens with a vocabulary of 262,144."""
WIDENED_BYTES = 16 << 20
"""Bytes of float32 logits that exist at once on a CPU. Memory of larger pieces would be taken from the system anew each
time."""


class Head:
    """Map from the hidden states before a model's head to logits, found by a forward pass over `PROBE_SHAPE` tokens.

    If logits of pieces would differ from those of all tokens, the head is not split: its ``hidden_states`` are the
    logits of a batch already.

    Attributes:
        vocabulary: number of logits of a token.
        looks_ahead: whether the logits of every token depend on tokens behind it. A loss would say nothing of them.
        body: the module that runs the layers, whose output is recorded; None if the head is not split.
    """

    def __init__(self, module: PreTrainedModel, layers: Sequence[Layer], device: torch.device) -> None:
        self._module = module
        self._linear = module.get_output_embeddings()
        self._ids = probe_tokens(device)
        self._ids[1, :-1] = self._ids[0, :-1]  # The rows differ in their last token alone.
        self.body: nn.Module | None = None
        outputs: dict[str, Output] = {}  # Outputs of the modules around the layers, by path.

        def keep(path: str, _args: Arguments, _kwargs: Keywords, output: Output) -> None:
            outputs[path] = output

        path = next(name for name, child in module.named_modules() if child is layers[0].module)
        parts = path.split(".")
        watched = []
        for number in range(1, len(parts)):
            above = ".".join(parts[:number])
            watched.append(CallAfter(module.get_submodule(above), partial(keep, above)))
        with torch.no_grad(), changing(watched), self._reading(runs=True) as inputs:
            logits: torch.Tensor = module(input_ids=self._ids, use_cache=False).logits
        self.vocabulary = logits.shape[-1]
        self.looks_ahead = _differ(logits[0, :-1], logits[1, :-1])
        if not outputs or len(inputs) != 1 or inputs[0].shape[:-1] != PROBE_SHAPE or inputs[0].dim() != 3:
            return
        body = min(outputs, key=lambda path: path.count("."))
        self._output = outputs[body]
        self.body = module.get_submodule(body)
        if not self._computes(inputs[0].flatten(0, 1), logits.flatten(0, 1)):
            self.body = None

    def _computes(self, hidden: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether the logits of hidden states, [tokens, units], are the expected ones, [tokens, vocabulary]."""
        try:
            with torch.no_grad():
                actual = self.logits(hidden)
        except Exception:  # A model's own code can raise anything where less runs.
            return False
        if actual.shape != expected.shape:
            return False
        tolerance = TOLERANCES.get(actual.dtype, 0.0) * expected.abs().max()
        return bool(((actual - expected).abs() <= tolerance).all())

    @contextmanager
    def _reading(self, *, runs: bool) -> Iterator[list[torch.Tensor]]:
        """Record the inputs of the output embeddings. Unless they run, they return zeros of one logit."""
        inputs: list[torch.Tensor] = []

        def read(forward: Forward, hidden: torch.Tensor, *args: object, **kwargs: object) -> Output:
            inputs.append(hidden)
            if runs:
                return forward(hidden, *args, **kwargs)
            return hidden.new_zeros((*hidden.shape[:-1], 1))

        changes: list[Change] = []
        if isinstance(self._linear, nn.Module):
            changes.append(RunThrough(self._linear, read))
        with changing(changes):
            yield inputs

    def hidden_states(self, run: Callable[[], Output]) -> torch.Tensor:
        """Return the input of the head in the forward pass of ``run``, [rows, tokens, units], on any device."""
        if self.body is None:
            return run().logits
        with self._reading(runs=False) as inputs:
            run()
        return inputs[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, [tokens, vocabulary], of hidden states, [tokens, units]."""
        if self.body is None:
            return hidden

        def return_recorded(_forward: Forward, *_args: object, **_kwargs: object) -> Output:
            return self._output

        def read_hidden(forward: Forward, _hidden: torch.Tensor, *args: object, **kwargs: object) -> Output:
            return forward(hidden[None], *args, **kwargs)

        with changing([RunThrough(self.body, return_recorded), RunThrough(self._linear, read_hidden)]):
            logits: torch.Tensor = self._module(input_ids=self._ids, use_cache=False).logits
        return logits.squeeze(0)


def _differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the logits of every token, [tokens, vocabulary], differ by more than rounding.

    Rounding can send a token to another expert, which changes that token and later ones, but not every token.
    """
    tolerance = TOLERANCES.get(first.dtype, 0.0) * first.abs().max()
    largest_by_token = (first - second).abs().amax(dim=-1)
    return bool((largest_by_token > tolerance).all())


def pieces(number: int, vocabulary: int, maximum: int) -> list[slice]:
    """Return slices of ``number`` tokens whose float32 logits take at most ``maximum`` bytes.

    A slice has at least one token.
    """
    step = max(1, maximum // (FLOAT32_BYTES * vocabulary))
    return [slice(start, min(start + step, number)) for start in range(0, number, step)]


def float32_pieces(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield logits, [tokens, vocabulary], in float32, as (slice of tokens, piece)."""
    maximum = LOGIT_BYTES
    if logits.device.type == "cpu":
        maximum = WIDENED_BYTES
    for piece in pieces(len(logits), logits.shape[1], maximum):
        yield piece, logits[piece].float()


def loss_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the summed cross entropy at logits, [tokens, vocabulary]: softmax minus one-hot label.

    Args:
        labels: int64[tokens].
    """
    gradient = torch.empty_like(logits)
    for piece, wide in float32_pieces(logits):
        probabilities = wide.softmax(dim=-1)
        targets = labels[piece, None]
        gradient[piece] = probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1.0))
    return gradient


def draw_labels(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return labels drawn from the softmax of logits, int64[draws, tokens], by inversion of its distribution function.

    Args:
        uniform: uniform numbers in [0, 1), float64[draws, tokens].
    """
    drawn_labels = torch.empty(uniform.shape, dtype=torch.int64, device=logits.device)
    for piece, wide in float32_pieces(logits):
        below = wide.double().softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(below, uniform[:, piece].T.contiguous(), right=True)
        drawn_labels[:, piece] = drawn.clamp_max_(logits.shape[-1] - 1).T
    return drawn_labels


def uniform_numbers(batch: Batch, draws: int, seed: int) -> Float64:
    """Return uniform numbers in [0, 1), float64[draws, rows, tokens - 1].

    Those of a row depend on its tokens and the seed.
    """
    rows, tokens = batch.input_ids.shape
    uniform = np.zeros((draws, rows, max(0, tokens - 1)))
    for row, (ids, real) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        tokens_of_row = ids[real].astype(np.int32)
        digest = np.frombuffer(hashlib.sha256(tokens_of_row.tobytes()).digest(), np.uint32)
        generator = np.random.default_rng([seed, *digest.tolist()])
        numbers = generator.random((max(0, len(tokens_of_row) - 1), draws))
        uniform[:, row, : len(numbers)] = numbers.T
    return uniform
