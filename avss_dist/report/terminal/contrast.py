"""A contrast of hallucinated and truthful answers, for the terminal."""

from __future__ import annotations

from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.contrast import FEATURES, LEVEL, Contrast
from avss_dist.report.terminal.scores import BAR_WIDTH, bar_cells
from avss_dist.report.terminal.tables import Column, FittedTable
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.text import printable


def contrast_tables(found: Contrast) -> RenderableType:
    """The layers with their controls, how well they predict, and the findings."""
    predictions = [_predictions(found)] if len(found.predictions) else []
    return Group(_layers(found), *predictions, *(Text(printable(line)) for line in found.findings))


def _layers(found: Contrast) -> FittedTable:
    rows = found.layers.to_pylist()
    title, caption = _described(found)
    return FittedTable(
        [
            Column(title="layer", cells=[str(row["layer"]) for row in rows]),
            Column(title="contrast", cells=[_number(row["eavss_contrast"]) for row in rows]),
            Column(title="95%", cells=[_interval(row, "eavss_contrast") for row in rows], priority=2),
            Column(title="rank", cells=[_whole(row["rank"]) for row in rows], priority=3),
            Column(title="in top 25%", cells=[_share(row["prone_probability"]) for row in rows], priority=4),
            Column(title="deviation", cells=[_number(row["deviation"]) for row in rows]),
            Column(title="", cells=_bars(rows), number=False, width=BAR_WIDTH, priority=1),
            Column(title="p", cells=[_p(row["p_holm"]) for row in rows]),
            Column(title="noise", cells=[_number(row["noise_floor"]) for row in rows], priority=1),
            Column(title="length-matched", cells=[_number(row["length_matched"]) for row in rows], priority=1),
            Column(title="its p", cells=[_p(row["length_matched_p"]) for row in rows], priority=1),
            Column(title="other prompt", cells=[_number(row["after_another"]) for row in rows], priority=1),
            Column(title="left", cells=["yes" if row["stands"] else "" for row in rows], number=False),
        ],
        title=printable(title),
        caption=Text(printable(caption)),
    )


def _bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The size of each deviation, red where it is more than noise by both labels and splits."""
    sizes = [abs(row["deviation"] or 0.0) for row in rows]
    seen = [
        (row["p_holm"] or 1) < LEVEL and size > (row["noise_floor"] or 0.0)
        for row, size in zip(rows, sizes, strict=True)
    ]
    return bar_cells(sizes, seen)


def _described(found: Contrast) -> tuple[str, str]:
    """What a contrast is of, and how to read its table."""
    rows, of = found.layers.to_pylist(), found.reading
    title = f"{of['model']}  ({of['run_id']}): {of['hallucinated']} against {of['truthful']}"
    title += f", {of['pairs']} pairs" if of["pairs"] else ""
    matched = f", the {rows[0]['length_matched_pairs']} pairs of about equal length" if of["pairs"] else ""
    caption = (
        f"{of['site']}, {of['recipe']}, below {of['threshold']}. Contrast: log(AVSS on {of['hallucinated']} / on "
        f"{of['truthful']} answers). The tests are of its deviation from the median layer: p by exchange of labels "
        f"inside {'pairs' if of['pairs'] else 'shards'} (Holm), noise between random halves of {of['truthful']} "
        f"answers{matched}, and the same answers after another prompt."
    )
    if rows[0]["eavss_contrast_low"] is None:
        units = "pairs" if of["pairs"] else "shards"
        caption += f" No interval: fewer than {MINIMUM_UNITS} {units}, or a contrast that is not defined."
    return title, caption


def _predictions(found: Contrast) -> FittedTable:
    """The best layer of each statistic, and the baselines."""
    rows = found.predictions.to_pylist()
    best = [row for row in rows if row["layer"] is None]
    for name in FEATURES:
        own = [row for row in rows if row["statistic"] == name and row["layer"] is not None]
        best += [max(own, key=lambda row: row["auroc"])] if own else []
    return FittedTable(
        [
            Column(title="predicts by", cells=[_source(row) for row in best], number=False),
            Column(title="AUROC", cells=[_number(row["auroc"]) for row in best]),
            Column(title="95%", cells=[_interval(row, "auroc") for row in best]),
            Column(title="other prompt", cells=[_number(row["after_another"]) for row in best], priority=1),
            Column(title="beats", cells=["yes" if row["beats_baselines"] else "" for row in best], number=False),
        ],
        caption=Text("Does it predict: folds over prompts; of each statistic, its best layer."),
    )


def _source(row: dict[str, Any]) -> str:
    if row["layer"] is None:
        return str(row["statistic"]).replace("_", "-")
    return f"{FEATURES[row['statistic']]}, layer {row['layer']}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:z.3f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:z.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:z.0%}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:z.3f}" if value >= 0.001 else "<0.001"


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "-" if low is None else f"{low:z.3f} to {high:z.3f}"
