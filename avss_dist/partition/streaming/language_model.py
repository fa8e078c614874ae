"""What a streamed model predicts: every answer in passes that share one reading of the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from avss_dist.corpus.shards import Batch
from avss_dist.errors import ModelError
from avss_dist.intervention import Intervention, Removal, whole_layers
from avss_dist.models.causal_lm import LanguageModel, Watcher, begins_behind
from avss_dist.models.layers import Layer
from avss_dist.models.patching import Patch
from avss_dist.models.skipping import Skip, explaining, require_skippable
from avss_dist.models.sublayers import without_sublayers
from avss_dist.partition.streaming.passes import PLAN, Beginning, Passes, Record, planned
from avss_dist.stats.layer_stats import Float64

MOST_WAITING = 2 << 30  # bytes of hidden states of passes that wait at once, where no limit is given

T = TypeVar("T")


class StreamingLanguageModel(LanguageModel):
    """See `causal_lm.LanguageModel`. It is made while all layers have some numbers, and gets ``passes`` then."""

    keeps_hidden_states = False
    passes: Passes | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.resumes, self.obstacles  # noqa: B018  (while the layers have numbers)

    @property
    def _ready(self) -> Passes:
        assert self.passes is not None
        return self.passes

    def _some(self, batches: Sequence[Batch], passes: int) -> Iterator[range]:
        """Indices of batches whose hidden states fit, so many times each, one group after the other."""
        room = MOST_WAITING if self._ready.host_bytes is None else self._ready.host_bytes
        most = max((batch.input_ids.size for batch in batches), default=1) * self.token_bytes
        step = max(1, room // (passes * most))
        return (range(start, min(start + step, len(batches))) for start in range(0, len(batches), step))

    @contextmanager
    def without(self, removed: Collection[Removal], residual_scale: float = 0.0) -> Iterator[None]:
        """See `causal_lm.LanguageModel`."""
        self.require_layers(removed)
        call = self._ready.call
        skips = {
            layer.module: Skip(layer, partial(call, layer.module), self.forms.get(layer.index), residual_scale)
            for layer in require_skippable(self.layers, whole_layers(removed))
        }
        plan = replace(PLAN.get(), skips={**PLAN.get().skips, **skips})
        with planned(plan), without_sublayers(self.layers, removed), explaining(self.checkpoint.name, removed):
            yield

    @contextmanager
    def beginning(self, layer: int, hidden: torch.Tensor) -> Iterator[None]:
        """Inside, passes begin with what a layer gives; `resumes` says whether that may be."""
        forms = {one.module: self.forms[one.index] for one in self.layers}
        with planned(replace(PLAN.get(), begins=Beginning(layer, hidden, forms))):
            yield

    @contextmanager
    def patched(self, patch: Patch) -> Iterator[None]:
        """See `causal_lm.LanguageModel`. Backward passes take the weights as they were."""
        changes: dict[nn.Module, dict[str, torch.Tensor]] = {}
        for (layer, path), value in patch.items():
            changes.setdefault(self.layers[layer].module, {})[path] = value
        with planned(replace(PLAN.get(), changes=changes)):
            yield

    @contextmanager
    def running(self, layer: Layer) -> Iterator[Callable[..., Any]]:
        """See `causal_lm.LanguageModel`."""
        with self._ready.window() as window:
            window.load(self._ready.index(layer.module))
            yield partial(self._ready.call, layer.module)

    def value(self, layer: int, path: str) -> torch.Tensor:
        """A parameter of a layer, read."""
        with self._ready.window() as window:
            window.load(self._ready.index(self.layers[layer].module))
            return self.layers[layer].module.get_parameter(path).detach().clone()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """See `causal_lm.LanguageModel`."""
        return self._alone(partial(super().call, *args, **kwargs))

    def generate(self, **kwargs: Any) -> Any:
        """See `causal_lm.LanguageModel`. The weights are read for every token."""
        return self._alone(partial(super().generate, **kwargs))

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
        """See `causal_lm.LanguageModel`. A pass without more layers forks from the first one's, where they differ."""
        first, branches = interventions[0], self.branches(interventions)
        losses: dict[tuple[Intervention, int], Float64] = {}

        def ask(intervention: Intervention, i: int) -> None:
            with self.applying(intervention):
                losses[intervention, i] = self.losses(batches[i])

        def fork(intervention: Intervention, i: int, hidden: torch.Tensor) -> None:
            with self.beginning(begins_behind(intervention, branches[intervention]), hidden):
                ask(intervention, i)

        def ask_first(i: int) -> None:
            forks = {
                self.layers[layer].module: [partial(fork, one, i) for one, at in branches.items() if at == layer]
                for layer in set(branches.values())
            }
            with planned(replace(PLAN.get(), forks=forks)):
                ask(first, i)

        others = [one for one in dict.fromkeys(interventions[1:]) if one not in branches and one != first]
        for some in self._some(batches, 2 * len(interventions)):
            self._ready.run(
                [*(partial(ask_first, i) for i in some), *(partial(ask, one, i) for one in others for i in some)]
            )
        return [np.concatenate([losses[one, i] for i in range(len(batches))]) for one in interventions]

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[Watcher], *, draws: int = 0, seed: int = 0
    ) -> list[Watcher]:
        """See `causal_lm.LanguageModel`. Each layer runs again on the way back, when its weights are there again."""
        if not self.resumes:
            raise ModelError(
                f"`partition` streaming has no gradients of a {self.family} model: more than hidden states goes from "
                "layer to layer.",
                "Use `partition` single.",
            )
        keeps = max((watcher.keeps for watcher in watchers), default=0)
        for some in self._some(batches, len(self.layers) * (1 + keeps) + draws):
            self._backpropagate([batches[i] for i in some], [watchers[i] for i in some], draws, seed)
        return list(watchers)

    def _backpropagate(self, batches: Sequence[Batch], watchers: Sequence[Watcher], draws: int, seed: int) -> None:
        layers = [layer for layer in self.layers if layer.module not in PLAN.get().skips]
        records = [Record(layers[-1].module, self.forms[layers[-1].index]) for _ in batches]

        def forward(batch: Batch, record: Record, watcher: Watcher) -> list[torch.Tensor]:
            """The gradients of what the last layer gives, of the text's labels and of each draw's."""
            found = []
            try:
                with planned(replace(PLAN.get(), record=record)), watcher.watch():
                    hidden = self.hidden_states(batch)
                leaf = record.leaf.pop()
                for number, gradient in enumerate(self.loss_gradients(hidden.detach(), batch, draws, seed)):
                    hidden.backward(gradient, retain_graph=number < draws)
                    found.append(_taken(leaf))
            finally:
                torch.set_grad_enabled(False)
            return found

        passes = [partial(forward, *one) for one in zip(batches, records, watchers, strict=True)]
        gradients = self._ready.run(passes)
        with self._ready.window(backwards=True) as window:
            for module in [layer.module for layer in reversed(layers)]:
                window.load(self._ready.index(module))
                for i, (record, watcher) in enumerate(zip(records, watchers, strict=True)):
                    with watcher.watch(), torch.enable_grad():
                        leaf, output = record.calls.pop(module).rerun(partial(self._ready.call, module))
                        for number, gradient in enumerate(gradients[i]):
                            output.backward(gradient, retain_graph=number < draws)
                            gradients[i][number] = _taken(leaf)


def _taken(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient that a leaf has, which it has no more then."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient
