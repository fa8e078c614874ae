"""Distribution of the input values of linear maps, in the dense model or under a sparsity plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.layers import Projection
from avss_dist.models.sparsifying import changing, is_counted, over_tokens, sparse_tokens
from avss_dist.stats.value_counts import EDGES
from avss_dist.system.context import bound
from avss_dist.tasks.base import Row

COUNTS = "counts:"  # before the path of a map
PATTERNS = 2**16  # of 16 bits

_SPARSE: ContextVar[torch.Tensor] = ContextVar("sparse")


@dataclass(frozen=True, eq=False, kw_only=True)
class MapInputs:
    """Cumulative counts of the inputs of linear maps: rows `COUNTS` with the number up to each `value_counts.EDGES`.

    For the gate of an MLP, its outputs are counted. Values are counted before any becomes zero in this map, at the
    tokens that a rule makes sparse.

    Attributes:
        rule: one of `intervention.SPARSITY_RULES`.
    """

    shard: Shard = field(repr=False)
    rule: str

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        return fingerprint(measure="map inputs", shard=self.shard.content_hash, rule=self.rule)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`."""
        maps = [
            (layer, projection)
            for layer in model.layers
            if layer.index not in intervention.removed
            for projection in layer.maps
        ]
        counts = [torch.zeros(len(EDGES), dtype=torch.int64) for _ in maps]
        batches = list(self.shard.batches(model.settings.batch_size))
        with model.applying(intervention), _counting([projection for _, projection in maps], counts), torch.no_grad():
            model.together([partial(self._run, model, batch) for batch in batches])
        totals = model.total([map_counts.tolist() for map_counts in counts])
        ones = np.ones(len(EDGES))
        return [
            Row(
                metric=f"{COUNTS}{projection.path}",
                samples=np.array(map_counts, float),
                weights=ones,
                layer=layer.index,
            )
            for (layer, projection), map_counts in zip(maps, totals, strict=True)
        ]

    def _run(self, model: LanguageModel, batch: Batch) -> None:
        mask = torch.from_numpy(batch.attention_mask)
        rows, tokens = mask.shape
        sparse = sparse_tokens(self.rule, rows, tokens, mask, mask.device)
        with bound(_SPARSE, mask if sparse is None else sparse):
            model.hidden_states(batch)


@contextmanager
def _counting(maps: Sequence[Projection], counts: list[torch.Tensor]) -> Iterator[None]:
    """Count the inputs of linear maps inside the context, before other hooks change them."""

    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def count(number: int, axes: str, _module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal last
        if is_counted():
            if last is None or last[0] is not x:  # maps often read one tensor
                last = x, count_upto(x.detach()[over_tokens(_SPARSE.get(), x, axes)].flatten())
            counts[number] = counts[number].to(x.device) + last[1]
        return x

    with ExitStack() as stack:
        for number, projection in enumerate(maps):
            stack.callback(changing(projection, partial(count, number, projection.axes), first=True).remove)
        yield
        last = None


def count_upto(values: torch.Tensor) -> torch.Tensor:
    """Return the number of values up to each of `EDGES`, int64[edges]. Bit patterns are counted in 16 bits."""
    edges = torch.from_numpy(EDGES).to(values.device, torch.float32)
    if values.element_size() != 2 or len(values) < PATTERNS:
        counts = torch.bincount(torch.bucketize(values.float(), edges), minlength=len(EDGES) + 1)
    else:
        pattern_counts = torch.bincount(values.view(torch.int16).int() + PATTERNS // 2, minlength=PATTERNS)
        patterns = torch.arange(-PATTERNS // 2, PATTERNS // 2, device=values.device).to(torch.int16)
        counts = pattern_counts.new_zeros(len(EDGES) + 1)
        counts.index_add_(0, torch.bucketize(patterns.view(values.dtype).float(), edges), pattern_counts)
    return counts[: len(EDGES)].cumsum(0)
