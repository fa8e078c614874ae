"""Findings that follow from the statistics of a run, independent of AVSS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from avss_dist.core.text import describe_layers, describe_threshold
from avss_dist.stats.layer_stats import share_of_m2
from avss_dist.stats.scores import NOISY_BELOW, Threshold
from avss_dist.warehouse.reader import slices_by

DOMINANT = 0.5  # share of the variance that one unit, or the first tokens, carry
EXACT = 0.5  # share of exact zeros among near zeros
NONFINITE = ("run_id", "site", "layer", "count", "nonfinite_count")
"""Columns of a digest that tell of NaN and infinite elements."""
IDENTITY = 1e-4  # mean |out - in| / |in| of a layer that does nothing

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

Columns = Mapping[str, NDArray[Any]]
"""Values of each layer by column; missing numbers are NaN."""


def as_columns(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Return the columns of numbers of a table."""
    numbers = [f.name for f in table.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    return {name: table[name].to_numpy() for name in numbers}


def grouped(rows: Rows, *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def finding(kind: str, severity: str, value: float, message: str, **place: Any) -> Row:
    return {"kind": kind, "severity": severity, "value": float(value), "message": message, **place}


def of_digests(digests: pa.Table, threshold: Threshold, site: str | None = None) -> Iterator[Row]:
    """Yield the findings that follow from the statistics of runs, in the order of run ids and sites.

    Args:
        digests: rows of `digest.DIGEST`.
        threshold: a threshold that was counted.
        site: where to look, by default everywhere. Layers that do nothing are reported in any case.
    """
    table = _in_order(digests)
    is_update = pc.equal(table["site"], "update").to_numpy()
    columns = as_columns(table) | {"near_zero": _near_zero(table, threshold), "is_update": is_update}
    columns["first_share"] = _first_shares(columns)
    shares = ("mean_unit_share", "element_unit_share", "first_share")
    notable = (columns["nonfinite_count"] > 0) | np.any([columns[name] > DOMINANT for name in shares], axis=0)
    groups = [group for group in slices_by(table, ["run_id", "site"]) if site in (None, group[0]["site"])]
    for key, start, stop in groups:
        zeros, near_zero = (int(np.nansum(columns[name][start:stop])) for name in ("zero_count", "near_zero"))
        yield from (key | row for row in _exact_zeros(key["site"], zeros, near_zero, threshold))
    for key, layers in _with_any(groups, notable, columns):
        checks = _nonfinite(layers), _dominant_units(layers), _first_token(layers)
        yield from (key | row for row in chain.from_iterable(checks))
    still = _still(columns)
    for key, layers in _with_any(slices_by(table, ["run_id"]), still, columns | {"is_still": still}):
        yield from (key | row for row in _identity_layers(layers))


def _with_any(
    groups: Sequence[tuple[Row, int, int]], mask: NDArray[np.bool_], columns: Columns
) -> Iterator[tuple[Row, Columns]]:
    """Yield key and columns of the groups of rows that have a row of a mask."""
    for key, start, stop in groups:
        if mask[start:stop].any():
            yield key, {name: values[start:stop] for name, values in columns.items()}


def nonfinite_layers(digests: pa.Table) -> Iterator[Row]:
    """Yield the findings on NaN and infinite elements of runs, in the order of run ids and sites.

    Args:
        digests: the columns `NONFINITE` of `digest.DIGEST`.
    """
    table = _in_order(digests.filter(pc.field("nonfinite_count") > 0))
    columns = as_columns(table)
    for key, start, stop in slices_by(table, ["run_id", "site"]):
        yield from (key | row for row in _nonfinite({name: cells[start:stop] for name, cells in columns.items()}))


def _in_order(digests: pa.Table) -> pa.Table:
    return digests.sort_by([(name, "ascending") for name in ("run_id", "site", "layer")])


def _near_zero(table: pa.Table, threshold: Threshold) -> NDArray[np.int64]:
    """Return the number of near-zero elements of each row at a threshold; 0 if it was not counted."""
    thresholds, counts = table["thresholds"].combine_chunks(), table["near_zero"].combine_chunks()
    at = pc.list_flatten(thresholds).to_numpy() == threshold.value
    row_of_count = pc.list_parent_indices(counts).to_numpy()
    return np.bincount(row_of_count[at], pc.list_flatten(counts).to_numpy()[at], len(table)).astype(np.int64)


def _nonfinite(layers: Columns) -> Iterator[Row]:
    """Yield a finding on layers with NaN or infinite elements, which every other statistic leaves out."""
    affected = layers["nonfinite_count"] > 0
    if affected.any():
        nonfinite, count = layers["nonfinite_count"][affected], layers["count"][affected]
        largest = (nonfinite / (count + nonfinite)).max()
        names = layers["layer"][affected].tolist()
        have = "has" if len(names) == 1 else "have"
        yield finding(
            "nonfinite",
            "warning",
            largest,
            f"{layers_in_words(names).capitalize()} {have} NaN or infinite activations (up to {largest:.2g} of "
            "the elements): AVSS ranks no such layer. Is the dtype wide enough?",
        )


def _exact_zeros(site: str, zeros: int, near_zero: int, threshold: Threshold) -> Iterator[Row]:
    """Yield a finding if most near-zero elements of a site are zeros."""
    if threshold.kind != "absolute" or near_zero < NOISY_BELOW or zeros <= EXACT * near_zero:
        return
    share = zeros / near_zero
    message = f"{share:.0%} of the elements with |x| < {describe(threshold)} are exactly zero: "
    if site == "neuron":
        severity, message = "note", message + "the activation function cuts them off, and the threshold hardly matters."
    else:
        severity, message = "warning", message + "the count reflects rounding in this dtype, not the layer."
    at = {"threshold": threshold.value, "threshold_kind": threshold.kind}
    yield from (finding("exact_zeros", severity, share, message, recipe=r, **at) for r in ("pooled", "element"))


def _dominant_units(layers: Columns) -> Iterator[Row]:
    """Yield findings on layers in which one unit carries more than half of the variance.

    The variance is over elements, (x - mean)^2, or over unit means, (unit mean - mean)^2, depending on the recipe.
    """
    for recipe, name in (("pooled", "mean_unit"), ("element", "element_unit"), ("unit", "mean_unit")):
        shares = layers[f"{name}_share"]
        dominated = np.flatnonzero(shares > DOMINANT)
        if not dominated.size:
            continue
        columns = (shares, layers[name], layers["layer"])
        share, unit, layer = max(zip(*(values[dominated].tolist() for values in columns), strict=True))
        units = sorted({int(number) for number in layers[name][dominated]})
        defined = int(np.isfinite(shares).sum())
        message = (
            f"One unit carries more than half of the variance in {len(dominated)} of {defined} layers "
            f"(unit {int(unit)} carries {share:.0%} in layer {layer}"
            + (
                f"; units {', '.join(map(str, units[:5]))}{', ...' if len(units) > 5 else ''})"
                if len(units) > 1
                else ")"
            )
            + ": the score is that unit's."
        )
        severity = "warning" if len(dominated) > defined / 2 else "note"
        yield finding("dominant_unit", severity, share, message, recipe=recipe)


def _first_shares(layers: Columns) -> NDArray[np.float64]:
    """Return the share of the variance over elements that the first token of each row carries, NaN if not known."""
    names = ("first_count", "first_mean", "first_m2", "mean", "m2")
    count, first_mean, first_m2, mean, m2 = (layers[name] for name in names)
    shares = share_of_m2((count, first_mean, first_m2), mean, m2)
    return np.where((m2 > 0) & (layers["count"] > count), shares, np.nan)


def _first_token(layers: Columns) -> Iterator[Row]:
    """Yield a finding if the first token of each row carries more than half of the variance over elements."""
    shares = layers["first_share"]
    known, dominated = int(np.isfinite(shares).sum()), np.flatnonzero(shares > DOMINANT)
    if dominated.size:
        largest = dominated[shares[dominated].argmax()]
        yield finding(
            "first_token",
            "warning" if len(dominated) > known / 2 else "note",
            shares[largest],
            f"The first token that counts in each row carries more than half of the variance in {len(dominated)} of "
            f"{known} layers ({shares[largest]:.1%} in layer {layers['layer'][largest]}): it is an "
            "attention sink. To see the other tokens, leave it out with `skip_first_tokens`.",
            recipe="element",
        )


def _magnitudes(layers: Columns) -> NDArray[np.float64]:
    """Return the mean of |out - in| / |in| over the tokens of each row, NaN if not known."""
    tokens, magnitude = layers["token_count"], layers["relative_magnitude_sum"]
    return np.divide(magnitude, tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)


def _still(layers: Columns) -> NDArray[np.bool_]:
    """Return a mask of the rows whose layer has a zero update, or one that is negligible relative to its input."""
    unmoved = layers["is_update"] & (layers["count"] > 0) & (layers["max_abs"] == 0)
    return unmoved | (_magnitudes(layers) < IDENTITY)


def _identity_layers(layers: Columns) -> Iterator[Row]:
    """Yield a finding on the layers that `_still` marks, which are one or more."""
    still = set(layers["layer"][layers["is_still"]].tolist())
    magnitudes = _magnitudes(layers)
    known = np.isfinite(magnitudes)
    moved = dict(zip(layers["layer"][known].tolist(), magnitudes[known].tolist(), strict=True))
    value = max(moved.get(name, 0.0) for name in still)
    are = "gives out what it takes" if len(still) == 1 else "give out what they take"
    yield finding(
        *("identity_layer", "warning", value),
        f"{layers_in_words(sorted(still)).capitalize()} {are} in (|out - in| / |in| is at most {value:.1g}): "
        "removing them would change nothing.",
    )


def describe(threshold: Threshold) -> str:
    return describe_threshold(threshold.value, threshold.kind)


def layers_in_words(layers: Sequence[int]) -> str:
    """Return layers in words, such as ``layers 0-3, 7``."""
    return f"layer{'s' if len(layers) != 1 else ''} {describe_layers(layers)}"
