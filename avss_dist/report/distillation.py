"""Chart of a distillation: perplexity kept and divergence by tokens, for each text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from avss_dist.core.text import basename, count_of
from avss_dist.report.chart import COLORS, PANEL

if TYPE_CHECKING:
    from avss_dist.distillation.record import DistillRecord


def distillation_chart(record: DistillRecord) -> Any:
    """Return a chart of the perplexity kept of each text by the tokens trained on, beside the divergence of its texts.

    Texts that are trained on are solid lines, watched ones dashed.
    """
    rows = [
        {
            "tokens": point.tokens,
            "text": text.label if text.trained_rows else f"{text.label}, never trained on",
            "is_trained": bool(text.trained_rows),
            "kept": point.kept[text.label],
            "divergence": point.divergence.get(text.label),
        }
        for point in record.curve[:-1] or record.curve
        for text in record.texts
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("tokens:Q", title="tokens trained on"),
        color=alt.Color("text:N", title=None, sort=None, scale=COLORS, legend=alt.Legend(orient="bottom", columns=2)),
        strokeDash=alt.StrokeDash("is_trained:N", sort=[True, False], legend=None),
        tooltip=["text:N", "tokens:Q", alt.Tooltip("kept:Q", format=".1%"), alt.Tooltip("divergence:Q", format=".4f")],
    )
    kept = alt.Y(
        "kept:Q", title="perplexity kept of the teacher's", scale=alt.Scale(zero=False), axis=alt.Axis(format="%")
    )
    divergence = alt.Y("divergence:Q", title="nats per token", scale=alt.Scale(zero=False))
    panels = [
        base.mark_line(point=True).encode(y=kept).properties(title="Kept", **PANEL),
        base.transform_filter("isValid(datum.divergence)")
        .mark_line(point=True)
        .encode(y=divergence)
        .properties(title="Divergence from the teacher", **PANEL),
    ]
    title = alt.TitleParams(
        f"{basename(record.student)}, distilled from {basename(record.teacher)}",
        subtitle=f"{count_of(record.after.tokens, 'token')}, weights trained: {record.train}; on held-out rows",
        anchor="start",
    )
    return alt.hconcat(*panels).properties(title=title, padding=12).configure_view(strokeOpacity=0.3)
