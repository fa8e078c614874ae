"""Scores by layer as tables for a paper: CSV, JSON, LaTeX (booktabs), Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from avss_dist.analysis.stats_findings import grouped
from avss_dist.core.registry import BASELINES, LOWEST_SHARE, SCORES
from avss_dist.core.text import describe_count, describe_threshold, escape_markdown, printable
from avss_dist.report.terminal.compare import short_name
from avss_dist.stats.intervals import why_no_interval
from avss_dist.stats.rankings import count_lowest

DIGITS = 3
COLUMNS = {
    "layer": "Layer",
    "avss_smoothed": "Smoothed AVSS",
    "avss_low": "2.5%",
    "avss_high": "97.5%",
    "rank": "Rank",
    "lowest_set_probability": "P(lowest)",
    "variance": "Variance",
    "sparsity": "Sparsity",
    **{name: SCORES[name].title.capitalize() for name in BASELINES if SCORES[name].exported},
}
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\n": " ",
}


def export_text(runs: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Return a table for each run, with scores of three significant digits and the lowest 25% of layers in bold.

    Args:
        runs: rows of ``runs``.
        scores: rows of ``scores`` of these runs at one site, recipe and threshold, by layer.
        kind: ``latex`` or ``markdown``.
    """
    write = latex_table if kind == "latex" else markdown_table
    by_run = grouped(scores, "run_id")
    return "\n".join(write(run, by_run[run["run_id"],]) for run in runs)


def latex_table(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> str:
    """Return one run as a LaTeX table, which needs the package booktabs."""
    body = _body(scores, _latex_number, lambda cell: rf"\textbf{{\boldmath {cell}}}")
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption(run, scores))}}}",
        rf"\begin{{tabular}}{{{'r' * len(COLUMNS)}}}",
        r"\toprule",
        " & ".join(escape_latex(name) for name in COLUMNS.values()) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def markdown_table(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> str:
    """Return one run as a Markdown table below its caption."""
    body = _body(scores, _number, lambda cell: f"**{cell}**")
    lines = [
        escape_markdown(caption(run, scores)),
        "",
        f"| {' | '.join(COLUMNS.values())} |",
        f"|{'---:|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in body),
    ]
    return "\n".join(lines) + "\n"


def caption(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> str:
    """Return the caption of a table of scores: model, reading of AVSS, text, and interval."""
    first = scores[0]
    threshold = describe_threshold(first["threshold"], first["threshold_kind"])
    what = f"{first['site']} site, {first['recipe']} recipe, |x| < {threshold}"
    corpus = f"{describe_count(run['num_tokens'])} tokens of {short_name(str(run['corpus']))}, {run['dtype']}"
    return printable(
        f"Layer scores of {short_name(run['model'])} ({what}; {corpus}). Layers count from 0; rank 1 is the least "
        f"important; bold: the {LOWEST_SHARE:.0%} with the lowest smoothed AVSS. "
        + (why_no_interval(run["num_shards"] or 0) or f"95% interval over {run['num_shards']} shards.")
    )


def escape_latex(text: str) -> str:
    """Return a text with the characters escaped that are special to LaTeX."""
    return "".join(_LATEX.get(c, c) for c in text)


def _body(
    scores: Sequence[Mapping[str, Any]], write: Callable[[Any], str], bold: Callable[[str], str]
) -> list[list[str]]:
    lowest = count_lowest(len(scores))
    rows = []
    for s in scores:
        cells = [write(s[name]) for name in COLUMNS]
        rows.append([bold(cell) for cell in cells] if s["rank"] is not None and s["rank"] <= lowest else cells)
    return rows


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:z.{DIGITS}g}" if isinstance(value, float) else str(value)


def _latex_number(value: Any) -> str:
    text = _number(value)
    digits, exponent, power = text.partition("e")
    if exponent:
        return rf"${digits} \times 10^{{{int(power)}}}$"
    return "--" if text == "-" else f"${text}$" if text.startswith("-") else text
