"""The linear maps of a layer, by what they read: those behind a cut read a stream that no repair has made whole.

Each can be fitted again, to give of that stream what it gives in the whole model. The last map of the MLP is none of
them: it is fitted for the stream itself, at an outlet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from avss_dist.models.layers import PROBE_SHAPE, Layer, as_rows
from avss_dist.pruning.repair.outlet import captured, is_plain


def find_readers(layer: Layer, run: Callable[[], Any]) -> list[Sequence[str]]:
    """Paths below a layer, in the order in which the maps run; those that are given the same stand together.

    Maps that see some of the tokens alone, as routed experts do, are left out.

    Args:
        run: a forward pass of the model over ``PROBE_SHAPE`` tokens.
    """
    tap = layer.taps.get("neuron")
    plain = {
        path: module
        for path, module in layer.module.named_modules()
        if is_plain(module) and not (tap and module is tap.module)
    }
    with captured(plain) as seen:
        run()
    groups: list[list[str]] = []
    given: torch.Tensor | None = None
    for path, one in seen.items():
        if any(as_rows(tensor, "rows", *PROBE_SHAPE) is None for tensor in (one.input, one.output)):
            continue
        if given is None or given.shape != one.input.shape or not torch.equal(given, one.input):
            groups.append([])
        groups[-1].append(path)
        given = one.input
    return list(groups)
