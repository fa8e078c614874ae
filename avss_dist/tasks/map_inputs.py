"""How the values are distributed that linear maps read: of the dense model, or with a sparsity plan on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from avss_dist.corpus.shards import Batch, Shard
from avss_dist.intervention import NO_INTERVENTION, Intervention
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.layers import Projection
from avss_dist.models.sparsifying import changing, is_counted, over_tokens, sparse_tokens
from avss_dist.settings import fingerprint
from avss_dist.stats.value_counts import EDGES
from avss_dist.system.context import bound
from avss_dist.tasks.base import Row

COUNTS = "counts:"  # before the path of a map
PATTERNS = 2**16  # of 16 bits

_SPARSE: ContextVar[torch.Tensor] = ContextVar("sparse")


@dataclass(frozen=True, eq=False, kw_only=True)
class MapInputs:
    """Of each linear map, `COUNTS`: how many values that it would read do not exceed each of `value_counts.EDGES`.

    So too of what gates an MLP, of the values that it would give.

    They are those before any becomes zero in this map, at the tokens that a rule makes sparse.
    """

    shard: Shard = field(repr=False)
    rule: str

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        return fingerprint(measure="map inputs", shard=self.shard.content_hash, rule=self.rule)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`."""
        maps = [(layer, one) for layer in model.layers if layer.index not in intervention.removed for one in layer.maps]
        counts = [torch.zeros(len(EDGES), dtype=torch.int64) for _ in maps]
        batches = list(self.shard.batches(model.settings.batch_size))
        with model.applying(intervention), _counting([one for _, one in maps], counts), torch.no_grad():
            model.together([partial(self._run, model, batch) for batch in batches])
        every = model.total([of_map.tolist() for of_map in counts])
        ones = np.ones(len(EDGES))
        return [
            Row(metric=f"{COUNTS}{one.path}", samples=np.array(of_map, float), weights=ones, layer=layer.index)
            for (layer, one), of_map in zip(maps, every, strict=True)
        ]

    def _run(self, model: LanguageModel, batch: Batch) -> None:
        mask = torch.from_numpy(batch.attention_mask)
        rows, tokens = mask.shape
        sparse = sparse_tokens(self.rule, rows, tokens, mask, mask.device)
        with bound(_SPARSE, mask if sparse is None else sparse):
            model.hidden_states(batch)


@contextmanager
def _counting(maps: Sequence[Projection], counts: list[torch.Tensor]) -> Iterator[None]:
    """Inside, what linear maps read is counted, before hooks that change it."""

    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def count(number: int, axes: str, _module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal last
        if is_counted():
            if last is None or last[0] is not x:  # maps often read one tensor
                last = x, count_upto(x.detach()[over_tokens(_SPARSE.get(), x, axes)].flatten())
            counts[number] = counts[number].to(x.device) + last[1]
        return x

    with ExitStack() as stack:
        for number, one in enumerate(maps):
            stack.callback(changing(one, partial(count, number, one.axes), first=True).remove)
        yield
        last = None


def count_upto(values: torch.Tensor) -> torch.Tensor:
    """int64[edges]: how many values do not exceed each of `EDGES`. Of 16 bits, each pattern is counted first."""
    edges = torch.from_numpy(EDGES).to(values.device, torch.float32)
    if values.element_size() != 2 or len(values) < PATTERNS:
        found = torch.bincount(torch.bucketize(values.float(), edges), minlength=len(EDGES) + 1)
    else:
        of_patterns = torch.bincount(values.view(torch.int16).int() + PATTERNS // 2, minlength=PATTERNS)
        patterns = torch.arange(-PATTERNS // 2, PATTERNS // 2, device=values.device).to(torch.int16)
        found = of_patterns.new_zeros(len(EDGES) + 1)
        found.index_add_(0, torch.bucketize(patterns.view(values.dtype).float(), edges), of_patterns)
    return found[: len(EDGES)].cumsum(0)
