"""Language model of the partition ``streaming``: all passes of a request share one reading of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import Intervention
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel, Watcher, begins_behind
from avss_dist.models.interventions import skip_of
from avss_dist.models.layers import Layer
from avss_dist.partition.streaming.passes import FORKS, RECORD, Fork, Passes, Record
from avss_dist.stats.layer_stats import Float64
from avss_dist.system.process import bound

MAX_WAITING_BYTES = 2 << 30  # of hidden states of all waiting passes, without a limit by the user

T = TypeVar("T")


class StreamingLanguageModel(LanguageModel):
    """Language model whose layers are loaded one at a time; see `causal_lm.LanguageModel`.

    It is constructed while all layers have random weights; ``passes`` is set afterwards.
    """

    keeps_hidden_states = False
    weights_stay = False
    passes: Passes | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.resumes, self.obstacles  # noqa: B018  (while the layers have numbers)

    @property
    def _ready(self) -> Passes:
        assert self.passes is not None
        return self.passes

    def _groups(self, batches: Sequence[Batch], passes: int) -> Iterator[range]:
        """Return groups of batch indices whose hidden states fit in memory, ``passes`` times each."""
        room = MAX_WAITING_BYTES if self._ready.host_bytes is None else self._ready.host_bytes
        largest = max((batch.input_ids.size for batch in batches), default=1) * self.token_bytes
        step = max(1, room // (passes * largest))
        return (range(start, min(start + step, len(batches))) for start in range(0, len(batches), step))

    @contextmanager
    def running(self, layer: Layer) -> Iterator[Callable[..., Any]]:
        """See `causal_lm.LanguageModel`."""
        with self._ready.window() as window:
            window.load(self._ready.index(layer.module))
            yield partial(self._ready.call, layer.module)

    def value(self, layer: int, path: str) -> torch.Tensor:
        """See `causal_lm.LanguageModel`."""
        with self._ready.window() as window:
            window.load(self._ready.index(self.layers[layer].module))
            return self.layers[layer].module.get_parameter(path).detach().clone()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """See `causal_lm.LanguageModel`."""
        return self._alone(partial(super().call, *args, **kwargs))

    def generate(self, **kwargs: Any) -> Any:
        """See `causal_lm.LanguageModel`. The weights are read for every token."""
        return self._alone(partial(super().generate, **kwargs))

    def _find_cache_obstacle(self, skipped: frozenset[int]) -> str | None:
        return "`partition` streaming finds the weights of a layer by its place in the whole model"

    def _alone(self, function: Callable[[], T]) -> T:
        if self.passes is None or self.passes.running:
            return function()
        return self.passes.run([function])[0]

    def each(self, function: Callable[[Batch], T], batches: Sequence[Batch]) -> list[T]:
        """See `causal_lm.LanguageModel`."""
        return self.together([partial(function, batch) for batch in batches])

    def together(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """See `causal_lm.LanguageModel`."""
        return self._ready.run(functions)

    def losses_under(self, batches: Sequence[Batch], interventions: Sequence[Intervention]) -> list[Float64]:
        """See `causal_lm.LanguageModel`. A pass that removes more layers forks from the first one where they differ."""
        first, branches = interventions[0], self.branches(interventions)
        losses: dict[tuple[Intervention, int], Float64] = {}

        def ask(intervention: Intervention, i: int, hidden: torch.Tensor | None = None) -> None:
            with self.applying(intervention):
                if hidden is None:
                    losses[intervention, i] = self.losses(batches[i])
                    return
                with self.beginning(begins_behind(intervention, branches[intervention]), hidden):
                    losses[intervention, i] = self.losses(batches[i])

        def ask_first(i: int) -> None:
            forks: dict[nn.Module, Sequence[Fork]] = {
                self.layers[layer].module: [partial(ask, branch, i) for branch, at in branches.items() if at == layer]
                for layer in set(branches.values())
            }
            with bound(FORKS, forks):
                ask(first, i)

        others = [other for other in dict.fromkeys(interventions[1:]) if other not in branches and other != first]
        for group in self._groups(batches, 2 * len(interventions)):
            self._ready.run(
                [*(partial(ask_first, i) for i in group), *(partial(ask, other, i) for other in others for i in group)]
            )
        return [np.concatenate([losses[key, i] for i in range(len(batches))]) for key in interventions]

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[Watcher], *, draws: int = 0, seed: int = 0
    ) -> list[Watcher]:
        """See `causal_lm.LanguageModel`. Each layer runs again in the backward pass, when it is loaded again."""
        if not self.resumes:
            raise ModelError(
                f"`partition` streaming has no gradients of a {self.family} model: more than hidden states goes from "
                "layer to layer.",
                "Use `partition` single.",
            )
        keeps = max((watcher.keeps for watcher in watchers), default=0)
        for group in self._groups(batches, len(self.layers) * (1 + keeps) + draws):
            self._backpropagate([batches[i] for i in group], [watchers[i] for i in group], draws, seed)
        return list(watchers)

    def _backpropagate(self, batches: Sequence[Batch], watchers: Sequence[Watcher], draws: int, seed: int) -> None:
        layers = [layer for layer in self.layers if not skip_of(layer.module)]
        records = [Record(layers[-1].module, self.forms[layers[-1].index]) for _ in batches]

        def forward(batch: Batch, record: Record, watcher: Watcher) -> list[torch.Tensor]:
            """Return the gradients of the last layer's output, for the text's labels and for each draw."""
            leaf_gradients = []
            try:
                with bound(RECORD, record), watcher.watch():
                    hidden = self.hidden_states(batch)
                leaf = record.leaf.pop()
                for number, gradient in enumerate(self.loss_gradients(hidden.detach(), batch, draws, seed)):
                    hidden.backward(gradient, retain_graph=number < draws)
                    leaf_gradients.append(_take_gradient(leaf))
            finally:
                torch.set_grad_enabled(False)
            return leaf_gradients

        passes = [partial(forward, *arguments) for arguments in zip(batches, records, watchers, strict=True)]
        gradients = self._ready.run(passes)
        with self._ready.window(backwards=True) as window:
            for module in [layer.module for layer in reversed(layers)]:
                window.load(self._ready.index(module))
                for i, (record, watcher) in enumerate(zip(records, watchers, strict=True)):
                    with watcher.watch(), torch.enable_grad():
                        leaf, output = record.calls.pop(module).rerun(partial(self._ready.call, module))
                        for number, gradient in enumerate(gradients[i]):
                            output.backward(gradient, retain_graph=number < draws)
                            gradients[i][number] = _take_gradient(leaf)


def _take_gradient(leaf: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a leaf, and remove it there."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient
