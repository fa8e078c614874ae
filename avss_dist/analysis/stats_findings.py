"""Findings that follow from the statistics of a run, independent of AVSS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.core.text import describe_layers, describe_threshold
from avss_dist.stats.layer_stats import Float64, share_of_m2
from avss_dist.stats.scores import NOISY_BELOW, Threshold

DOMINANT = 0.5  # share of the variance that one unit, or the first tokens, carry
EXACT = 0.5  # share of exact zeros among near zeros
IDENTITY = 1e-4  # mean |out - in| / |in| of a layer that does nothing

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

STATS = (
    "run_id",
    "layer",
    "site",
    "count",
    "mean",
    "m2",
    "thresholds",
    "near_zero",
    "zero_count",
    "nonfinite_count",
    "max_abs",
    "unit_count",
    "unit_sum",
    "unit_sum_sq",
    "token_count",
    "relative_magnitude_sum",
    "first_count",
    "first_mean",
    "first_m2",
)


NONFINITE = ("run_id", "layer", "site", "count", "nonfinite_count")
"""Columns of `nonfinite_layers`."""


def read_stats(table: pa.Table) -> list[Row]:
    """Return the rows of ``layer_stats``, ordered by layer. Lists become arrays, since they can be long."""
    table = table.sort_by("layer")
    lists = {f.name for f in table.schema if pa.types.is_list(f.type)}
    rows: list[Row] = table.drop_columns(list(lists)).to_pylist()
    for name in lists:
        column = table[name].combine_chunks()
        starts, values = column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False)
        for row, start, stop in zip(rows, starts[:-1], starts[1:], strict=True):
            row[name] = values[start:stop]
    return rows


def grouped(rows: Rows, *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def finding(kind: str, severity: str, value: float, message: str, **place: Any) -> Row:
    return {"kind": kind, "severity": severity, "value": float(value), "message": message, **place}


def of_stats(stats: Rows, threshold: Threshold) -> Iterator[Row]:
    """Yield the findings of one run that follow from its statistics."""
    for (site,), rows in grouped(stats, "site").items():
        for row in (
            *_nonfinite(rows),
            *_exact_zeros(site, rows, threshold),
            *_dominant_units(rows),
            *_first_token(rows),
        ):
            yield {"site": site, **row}
    yield from _identity_layers(stats)


def nonfinite_layers(stats: Rows) -> Iterator[Row]:
    """Yield the findings of one run on NaN and infinite elements, from its statistics."""
    for (site,), rows in grouped(stats, "site").items():
        yield from ({"site": site, **one} for one in _nonfinite(rows))


def _nonfinite(rows: Rows) -> Iterator[Row]:
    """Yield a finding on layers with NaN or infinite elements, which every other statistic leaves out."""
    shares = {
        row["layer"]: row["nonfinite_count"] / (row["count"] + row["nonfinite_count"])
        for row in rows
        if row["nonfinite_count"]
    }
    if shares:
        largest = max(shares.values())
        have = "has" if len(shares) == 1 else "have"
        yield finding(
            "nonfinite",
            "warning",
            largest,
            f"{layers_in_words(list(shares)).capitalize()} {have} NaN or infinite activations (up to {largest:.2g} of "
            "the elements): AVSS ranks no such layer. Is the dtype wide enough?",
        )


def _exact_zeros(site: str, rows: Rows, threshold: Threshold) -> Iterator[Row]:
    if threshold.kind != "absolute":
        return
    near_zero = sum(int(row["near_zero"][row["thresholds"] == threshold.value].sum()) for row in rows)
    zeros = sum(row["zero_count"] or 0 for row in rows)
    if near_zero < NOISY_BELOW or zeros <= EXACT * near_zero:
        return
    share = zeros / near_zero
    message = f"{share:.0%} of the elements with |x| < {describe(threshold)} are exactly zero: "
    if site == "neuron":
        severity, message = "note", message + "the activation function cuts them off, and the threshold hardly matters."
    else:
        severity, message = "warning", message + "the count reflects rounding in this dtype, not the layer."
    at = {"threshold": threshold.value, "threshold_kind": threshold.kind}
    yield from (finding("exact_zeros", severity, share, message, recipe=r, **at) for r in ("pooled", "element"))


def _dominant_units(rows: Rows) -> Iterator[Row]:
    """Yield findings on layers in which one unit carries more than half of the variance.

    The variance is over elements, (x - mean)^2, or over unit means, (unit mean - mean)^2, depending on the recipe.
    """
    rows = [row for row in rows if row["unit_sum"].size and row["unit_count"]]
    of_means, of_elements = _largest_shares(rows, _shares_of_means), _largest_shares(rows, _shares_of_elements)
    for recipe, largest in (("pooled", of_means), ("element", of_elements), ("unit", of_means)):
        over = [found for found in largest if found[0] > DOMINANT]
        if not over:
            continue
        share, unit, layer = max(over)
        units = sorted({u for _, u, _ in over})
        message = (
            f"One unit carries more than half of the variance in {len(over)} of {len(largest)} layers "
            f"(unit {unit} carries {share:.0%} in layer {layer}"
            + (
                f"; units {', '.join(map(str, units[:5]))}{', ...' if len(units) > 5 else ''})"
                if len(units) > 1
                else ")"
            )
            + ": the score is that unit's."
        )
        severity = "warning" if len(over) > len(largest) / 2 else "note"
        yield finding("dominant_unit", severity, share, message, recipe=recipe)


def _first_token(rows: Rows) -> Iterator[Row]:
    """Yield a finding if the first token of each row carries more than half of the variance over elements."""
    shares = {
        row["layer"]: share_of_m2((row["first_count"], row["first_mean"], row["first_m2"]), row["mean"], row["m2"])
        for row in rows
        if row["first_count"] and row["m2"] and row["count"] > row["first_count"]
    }
    dominated = [layer for layer, share in shares.items() if share > DOMINANT]
    if dominated:
        layer = max(dominated, key=lambda layer: shares[layer])
        yield finding(
            "first_token",
            "warning" if len(dominated) > len(shares) / 2 else "note",
            shares[layer],
            f"The first token that counts in each row carries more than half of the variance in {len(dominated)} of "
            f"{len(shares)} layers ({shares[layer]:.1%} in layer {layer}): it is an attention sink. To see the other "
            "tokens, leave it out with `skip_first_tokens`.",
            recipe="element",
        )


def _largest_shares(rows: Rows, shares_of: Callable[..., Float64]) -> list[tuple[float, int, int]]:
    """Return (share, unit, layer) of the largest unit of each layer whose shares are defined."""
    result = []
    for size in sorted({row["unit_sum"].size for row in rows}):
        of_size = [row for row in rows if row["unit_sum"].size == size]
        sums, squares = (np.stack([row[name] for row in of_size]) for name in ("unit_sum", "unit_sum_sq"))
        shares = shares_of(sums, squares, np.array([[row["unit_count"]] for row in of_size]))
        largest = zip(shares.max(axis=1).tolist(), shares.argmax(axis=1).tolist(), of_size, strict=True)
        result += [(share, unit, row["layer"]) for share, unit, row in largest if np.isfinite(share)]
    return result


def _shares_of_elements(sums: Float64, squares: Float64, count: Float64) -> Float64:
    """Return each unit's share of the variance over elements, float64[layers, units]. ``count`` is [layers, 1]."""
    mean = sums.sum(axis=1, keepdims=True) / (count * sums.shape[1])
    return _shares(np.maximum(squares - 2 * mean * sums + count * mean**2, 0))


def _shares_of_means(sums: Float64, _squares: Float64, count: Float64) -> Float64:
    means = sums / count
    return _shares((means - means.mean(axis=1, keepdims=True)) ** 2)


def _shares(values: Float64) -> Float64:
    total = values.sum(axis=1, keepdims=True)
    return np.divide(values, total, out=np.full(values.shape, np.nan), where=total > 0)


def _identity_layers(stats: Rows) -> Iterator[Row]:
    """Yield a finding on layers whose update is zero, or negligible relative to their input."""
    still = {row["layer"] for row in stats if row["site"] == "update" and row["count"] and row["max_abs"] == 0}
    known = [row for row in stats if row["token_count"] and row["relative_magnitude_sum"] is not None]
    moved = {row["layer"]: row["relative_magnitude_sum"] / row["token_count"] for row in known}
    still |= {layer for layer, size in moved.items() if size < IDENTITY}
    if still:
        value = max((moved.get(layer, 0.0) for layer in still), default=0.0)
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
