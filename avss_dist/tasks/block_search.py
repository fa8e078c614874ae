"""TEAL's greedy allocation of sparsity inside one block, and the spectra of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.values import NewObject
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.forward import Arguments, CallBefore, Keywords, changing
from avss_dist.models.structure.layers import Layer, LayerCall, as_rows, output_tensor
from avss_dist.models.structure.linear_maps import weight_of
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.task import Measure, MetricRow

GREEDY_STEPS = "greedy:"  # before the path of a map: its sparsity after each round
GREEDY_ERROR = "greedy_error"
HILL = "hill:"  # before the path of a map: the exponent of its spectrum
JUDGED = 4  # the error is measured on the last 1 / 4 of a row's tokens, as in TEAL
ENOUGH = 0.9  # sparsity of the block at which it ends: TEAL's


@dataclass(frozen=True, eq=False, kw_only=True)
class GreedyBlock(Measure):
    """Greedy search of TEAL (arXiv 2408.14690, algorithm 1): each round, one map of a block becomes a step sparser.

    It is the map whose step changes the block's output least, in the L2 norm over the last quarter of each row's
    tokens.

    Rows: `GREEDY_STEPS` of each map, its sparsity after each round, from 0; and `GREEDY_ERROR`, the norm after each
    round.

    Attributes:
        layer: index of the block.
        thresholds: thresholds of each map, by path, after one step, two steps, and so on, below sparsity 1.
        steps: sparsity of a step, by path, inversely proportional to the map's number of weights.
        sizes: number of weights of each map, by path.
    """

    layer: int
    shards: tuple[Shard, ...] = field(repr=False)
    thresholds: Mapping[str, tuple[float, ...]] = field(repr=False)
    steps: Mapping[str, float]
    sizes: Mapping[str, int]

    def identity(self) -> NewObject:
        """Return the values that the key is made of."""
        maps: dict[str, list[float]] = {}
        for name in sorted(self.steps):
            maps[name] = [self.steps[name], self.sizes[name], *self.thresholds[name]]
        return {
            "measure": "greedy block",
            "shards": [shard.content_hash for shard in self.shards],
            "layer": self.layer,
            "maps": maps,
        }

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return the sparsity of each map of the block after each round, and the error after each round, as rows."""
        layer = model.layers[self.layer]
        batches: list[Batch] = []
        for shard in self.shards:
            batches += shard.batches(model.settings.batch_size)
        calls = dense_calls(model, layer, batches)
        with model.running(layer) as run, torch.no_grad():

            def judged_outputs() -> Iterator[torch.Tensor]:
                """Yield the block's output at the last quarter of each row's tokens, batch by batch."""
                for call, batch in zip(calls, batches, strict=True):
                    copied = call.with_hidden(call.hidden.clone())  # a layer may change its input
                    output = output_tensor(layer, run(*copied.args, **copied.kwargs), call.hidden)
                    rows = as_rows(output, layer.axes, *batch.attention_mask.shape, place=layer)
                    judged = torch.from_numpy(_last_tokens(batch.attention_mask))
                    yield rows[judged.to(rows.device)].float()

            dense = list(judged_outputs())

            def error(cuts: Mapping[str, float]) -> float:
                """Return the L2 norm of the change of the judged output, with zeroed inputs of maps."""
                squares = 0.0
                with _zeroing_inputs(layer, cuts):
                    for output, whole in zip(judged_outputs(), dense, strict=True):
                        squares += float((output - whole).double().square().sum())
                return float(np.sqrt(squares))

            path = self._search(error)
        errors = np.array([step.error for step in path])
        ones = np.ones(len(path))
        rows = []
        for name in self.steps:
            sparsities = np.array([step.sparsity[name] for step in path])
            rows.append(MetricRow(metric=f"{GREEDY_STEPS}{name}", samples=sparsities, weights=ones, layer=self.layer))
        rows.append(MetricRow(metric=GREEDY_ERROR, samples=errors, weights=ones, layer=self.layer))
        return rows

    def _search(self, error: Callable[[Mapping[str, float]], float]) -> list[GreedyStep]:
        """Return the state at the start and after each round.

        Args:
            error: returns the error with a threshold for some of the maps, by path.
        """
        taken = dict.fromkeys(self.steps, 0)  # steps of each map
        path = [self._step(taken, 0.0)]
        while self._zeroed_share(path[-1]) < ENOUGH:
            cuts = {name: self.thresholds[name][steps - 1] for name, steps in taken.items() if steps}
            error_by_map = {}
            for name, steps in taken.items():
                if steps < len(self.thresholds[name]):
                    error_by_map[name] = error({**cuts, name: self.thresholds[name][steps]})
            if not error_by_map:
                break
            best = min(error_by_map, key=error_by_map.__getitem__)
            taken[best] += 1
            path.append(self._step(taken, error_by_map[best]))
        return path

    def _step(self, taken: Mapping[str, int], error: float) -> GreedyStep:
        sparsity = {name: steps * self.steps[name] for name, steps in taken.items()}
        return GreedyStep(sparsity=sparsity, error=error)

    def _zeroed_share(self, step: GreedyStep) -> float:
        """Return the share of the block's weights whose inputs are zero."""
        zeroed = sum(step.sparsity[name] * size for name, size in self.sizes.items())
        return zeroed / sum(self.sizes.values())


@dataclass(frozen=True, kw_only=True)
class GreedyStep:
    """State of a greedy search after a round.

    Attributes:
        sparsity: sparsity of each map, by path.
        error: L2 norm of the change of the block's judged output.
    """

    sparsity: Mapping[str, float]
    error: float


def _last_tokens(real: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask of the last quarter of each row's tokens, at least one, bool[rows, tokens].

    Args:
        real: bool[rows, tokens], true for tokens that are no padding.
    """
    place = real.cumsum(axis=1)
    length = real.sum(axis=1, keepdims=True)
    judged = np.maximum(1, length // JUDGED)
    return real & (place > length - judged)


def dense_calls(model: LanguageModel, layer: Layer, batches: Sequence[Batch]) -> list[LayerCall]:
    """Return the arguments of a layer's call in the whole model, for each batch, without running later layers."""

    def keep(calls: list[LayerCall], args: Arguments, kwargs: Keywords) -> None:
        call = LayerCall(args, kwargs)
        calls.append(call.with_hidden(call.hidden.detach().clone()))

    def run(batch: Batch) -> LayerCall:
        calls: list[LayerCall] = []
        with changing([CallBefore(layer.module, partial(keep, calls))]), torch.no_grad():
            model.hidden_states(batch)
        return calls[-1]

    later_layers = range(layer.index + 1, len(model.layers))
    with model.applying(Intervention(removed=tuple(later_layers))):
        return model.together([partial(run, batch) for batch in batches])


@contextmanager
def _zeroing_inputs(layer: Layer, cuts: Mapping[str, float]) -> Iterator[None]:
    """Zero the inputs of the layer's maps up to the thresholds in ``cuts`` inside the context."""

    def cut(threshold: float, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
        x, *others = args
        assert isinstance(x, torch.Tensor)
        is_small = x.abs() <= threshold
        return (x.masked_fill(is_small, 0), *others), kwargs

    hooks = []
    for projection in layer.projections:
        if projection.path in cuts:
            hooks.append(CallBefore(projection.module, partial(cut, cuts[projection.path])))
    with changing(hooks):
        yield


@dataclass(frozen=True, eq=False)
class Spectra(Measure):
    """Power-law exponent of the eigenvalues of W^T W for each linear map W of a layer."""

    layer: int
    measure = "spectra"

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return a row with the exponent of each linear map of the layer."""
        layer = model.layers[self.layer]
        rows = []
        with model.running(layer):
            for projection in layer.projections:
                singular_values = torch.linalg.svdvals(weight_of(projection.module).double())
                exponent = hill_exponent(singular_values.square().cpu().numpy())
                row = MetricRow(
                    metric=f"{HILL}{projection.path}",
                    samples=np.array([exponent]),
                    weights=np.ones(1),
                    layer=self.layer,
                )
                rows.append(row)
        return rows


def hill_exponent(eigenvalues: Sequence[float] | Float64) -> float:
    """Return the exponent of a power law by Hill's estimator over the larger half of the eigenvalues.

    The estimate is ``1 + m / sum(log(x_i / x_min))`` (Clauset, Shalizi and Newman, arXiv 0706.1062, equation 3.1).
    """
    values = np.sort(np.asarray(eigenvalues, np.float64))
    values = values[values > 0]
    chosen = values[-max(2, len(values) // 2) :]
    total = float(np.log(chosen / chosen[0]).sum())
    if not total > 0:
        return np.inf
    return 1 + len(chosen) / total
