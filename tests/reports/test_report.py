"""The report's page as a file: whole, small, true to the warehouse, harmless; and sections, as a terminal has them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pytest
import vl_convert
from rich.console import Console
from support.command_line import avss
from support.pages import write_failed, write_many, write_removals, write_run
from support.rows import column, columns, mapping, where
from support.warehouses import PUBLISHED, unpack_released, write_scores

from avss_dist.analysis.agreement import correlate_pairs
from avss_dist.analysis.chosen import run_labels
from avss_dist.analysis.comparison import compare
from avss_dist.analysis.experts import LayerExperts, experts_section
from avss_dist.analysis.findings import findings
from avss_dist.analysis.scorecard import KINDS, score_cards
from avss_dist.analysis.section import (
    BarColumn,
    ReportColumn,
    ReportRow,
    ReportTable,
    Section,
    interval,
    known_interval,
    p_value,
)
from avss_dist.analysis.verdict import experiment_sections
from avss_dist.core.thresholds import describe_threshold
from avss_dist.reports.page.charts import section_chart
from avss_dist.reports.page.data import page_data, run_agreement
from avss_dist.reports.page.page import is_published, report_page, templates
from avss_dist.reports.terminal.scores import summary
from avss_dist.reports.terminal.tables import FittedTable, rendered
from avss_dist.warehouse.reader import Warehouse

HOSTILE = "org/\"'><script>window.hacked = 1; alert(1)</script><img src=x onerror=alert(2)>{{ 7919 * 7907 }}&amp;"
EVERY_CHART = {
    *("avss", "block_influence", "angular_distance", "relative_magnitude", "update_variance_ratio"),
    *("heat", "lowest", "correlation", "blocks", "kept"),
}


class Page(HTMLParser):
    """Elements of a page, the texts of its tables by row, and the text of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._cell = False
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else None
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._cell = tag in ("td", "th") or (self._cell and tag in ("span", "button"))

    def handle_endtag(self, tag: str) -> None:
        self._inside = None
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside].append(data)
        else:
            self.words.append(data)
        if self._cell:
            self.tables[-1][-1][-1] += data

    @property
    def policy(self) -> str:
        return next(a["content"] or "" for t, a in self.elements if a.get("http-equiv") == "Content-Security-Policy")

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(self.raw["script"][0])))
        return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """Two models of different depth, one of them twice, and a run that failed."""
    store = Warehouse(tmp_path_factory.mktemp("warehouse"))
    write_removals(store, write_run(store, "alpha", layers=6, revision="r1"), "r1", layers=6)
    write_run(store, "alpha-wiki", layers=6, seed=1, model="org/alpha", corpus="texts/wiki.txt")
    write_run(store, "beta", layers=9, seed=2, family="gemma")
    write_failed(store, "gone", "out of memory")
    return store


@pytest.fixture(scope="module")
def page(store: Warehouse) -> Page:
    return Page(report_page(store))


def test_nothing_is_loaded_from_anywhere_and_the_policy_allows_this_page_and_no_more(page: Page) -> None:
    links = [a.get(name) for _, a in page.elements for name in ("src", "href", "srcset", "action", "data") if name in a]
    assert links
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    assert not any("@import" in style or "url(" in style for style in page.raw["style"])
    policy = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in page.policy
    _, *scripts = page.raw["script"]  # the first is data
    for name, texts in (("script-src", scripts), ("style-src", page.raw["style"])):
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert sorted(policy[name].split()) == sorted(f"'sha256-{digest}'" for digest in digests)
    assert not any(name.startswith("on") or name == "style" for _, a in page.elements for name in a)


def test_the_scores_are_the_warehouses_and_the_published_reading_comes_first(page: Page, store: Warehouse) -> None:
    data = page.data
    assert data["choices"][data["first"]] == {"site": "block", "recipe": "pooled", "threshold": "1e-05"}
    done = where(store.runs().to_pylist(maps_as_pydicts="lossy"), status="done")
    ids = {label.partition(". ")[2]: run["run_id"] for run in done for label in [_label(data, run)]}
    assert len(ids) == 3
    expected = {
        (
            *(row[name] for name in ("run_id", "site", "recipe", "layer")),
            describe_threshold(row["threshold"], row["threshold_kind"]),
        ): row
        for row in store.table("scores").to_pylist()
    }
    names = {"avss": "avss_smoothed", "low": "avss_low", "high": "avss_high", "rank": "rank"}
    names["near_zero"] = "near_zero_count"
    seen = 0
    for run, choice, start, end, lowest in data["blocks"]:
        about = data["runs"][run]
        at = data["choices"][choice]
        assert lowest == max(1, round((end - start) / 4))
        for i in range(start, end):
            layer = data["columns"]["layer"][i]
            key = (ids[about["label"].partition(". ")[2]], at["site"], at["recipe"], layer, at["threshold"])
            row = expected[key]
            for ours, theirs in names.items():
                digits = 3 if ours in ("low", "high") else 4
                value = row[theirs]  # the ends of an interval are null where there is none
                expected_value = None if value is None else pytest.approx(value, rel=6 * 0.1**digits)
                assert data["columns"][ours][i] == expected_value, (key, ours)
            assert about["layer_name"][layer] == row["layer_name"]
            assert about["block_influence"][layer] == pytest.approx(row["block_influence"], rel=1e-3)
            seen += 1
    assert seen == len(expected)


def _label(data: dict[str, Any], run: dict[str, Any]) -> str:
    """The label of a run, found by its number of layers and what tells it apart."""
    labels = [r["label"] for r in data["runs"] if len(r["layer_name"]) == run["num_layers"]]
    return next(label for label in labels if len(labels) == 1 or run["corpus"].rpartition("/")[2] in label)


def test_charts_are_vega_lite_with_names_for_people(page: Page) -> None:
    assert {name.partition(":")[0] for name in page.data["charts"]} == EVERY_CHART
    for name, spec in page.data["charts"].items():
        assert spec["$schema"].startswith("https://vega.github.io/schema/vega-lite/")
        assert "config" not in spec, name
        alt.TopLevelSpec.validate(spec)
    pictures = ["scorecard-2"]
    assert list(page.data["pictures"]) == pictures
    for picture in page.data["pictures"].values():
        assert "config" not in picture["spec"]
        assert picture["rows"]
        alt.TopLevelSpec.validate(picture["spec"])
    figures = {a["data-chart"] for _, a in page.elements if "data-chart" in a}
    assert figures == {*pictures} | EVERY_CHART


def test_findings_come_first_and_in_words(page: Page, store: Warehouse) -> None:
    rows = sorted(findings(store).to_pylist(), key=lambda row: not is_published(row))
    text = re.sub(r"\s+", " ", " ".join(page.words))
    kinds = [kind.replace("_", " ").capitalize() for kind in dict.fromkeys(column(rows, "kind"))]
    places = [text.index(f" {kind} ") for kind in kinds]
    assert len(kinds) > 2
    assert places == sorted(places)
    assert places[-1] < text.index("Each run, failed ones too")
    told = {(row["run_id"], row["kind"]): row["message"] for row in reversed(rows)}
    for message in told.values():  # of each run and kind, the first
        assert message in text


def test_every_run_is_in_the_overview_and_failures_say_why(page: Page) -> None:
    text = " ".join(page.words)
    for word in ("org/alpha", "beta", "gone", "out of memory", "3 runs and 1 that failed", "1,234"):
        assert word in text or any(a.get("title") == word for _, a in page.elements)
    assert "These runs differ in corpus: a low coefficient need not be the models'." in text


def test_the_page_says_what_compare_says(tmp_path: Path) -> None:
    """Of four runs, three alike: half of the six pairs agree wholly, and the median is between the halves."""
    up = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    mixed = [3.0, 4.0, 5.0, 6.0, 1.0, 2.0]
    for name, scores in (("a", up), ("b", up), ("c", up), ("d", mixed)):
        write_scores(tmp_path, name, scores)
    warehouse = Warehouse(tmp_path)
    runs = warehouse.runs().to_pylist(maps_as_pydicts="lossy")
    (agreement,) = page_data(warehouse, runs, [{"blocks": [], "sets": []}] * 4)["correlations"]
    comparison = compare(warehouse, column(runs, "run_id"), threshold=PUBLISHED)
    rho = sorted(comparison.pairs["spearman"].to_pylist())
    median = (rho[2] + rho[3]) / 2
    assert rho[2] < median < rho[3] == pytest.approx(1)
    assert agreement["summary"].startswith(f"The median of 6 pairs is {median:.3f}")
    assert f"Spearman {median:.3f} at the median" in summary(comparison)
    order = [[0, 0], [0, 1], [0, 2], [0, 3], [1, 1], [1, 2], [1, 3], [2, 2], [2, 3], [3, 3]]
    assert sorted(pair[:2] for pair in agreement["pairs"]) == order
    assert sorted(pair[2] for pair in agreement["pairs"] if pair[0] != pair[1]) == pytest.approx(rho, abs=6e-4)


def test_a_correlation_of_nearly_zero_has_no_sign() -> None:
    """Six layers cannot have a correlation that close to zero, 2,000 can."""
    rng = np.random.default_rng(0)
    depth = (np.arange(2000) + 0.5) / 2000
    scores = [(depth, rng.permutation(2000).astype(float)) for _ in range(60)]
    rho = correlate_pairs(scores, np.zeros(59, np.int64), np.arange(1, 60))["spearman"]
    close = int(np.argmin(np.where(rho < 0, -rho, 1))) + 1
    assert -0.0005 < rho[close - 1] < 0
    text = run_agreement({0: scores[0], 1: scores[close]})
    assert "of 1 pair is 0.000" in text["summary"]
    assert "-0.000" not in str(text)
    assert json.dumps(text["pairs"][-1]) == "[0, 1, 0.0, 0.0]"


def test_what_is_known_without_layers_is_the_warehouses(page: Page, store: Warehouse) -> None:
    """Of the run's own checkpoint: every block, and the best set of each size, by repair."""
    alpha = next(i for i, run in enumerate(page.data["runs"]) if "alpha" in run["label"] and "wiki" not in run["label"])
    others = [one for i, one in enumerate(page.data["without"]) if i != alpha]
    assert others == [{"blocks": [], "kept": []}] * 2
    known = page.data["without"][alpha]
    damage = [row for row in store.table("evaluations").to_pylist() if "damage" in row["task"]]
    rows = {tuple(row["drop"]): row["value"] for row in damage}
    assert len(rows) == 21
    for block in known["blocks"]:
        layers = range(block["start"], block["start"] + block["length"])
        assert rows.pop(tuple(layers)) == pytest.approx(block["distance"], rel=1e-3)
    assert not rows
    plain = "perplexity: a.txt"
    repaired = "perplexity: a.txt, repaired by refit"
    assert columns(known["kept"], "series", "dropped", "share") == [
        *((plain, "2", 0.1667), (plain, "1-2", 0.3333)),
        *((repaired, "2", 0.1667), (repaired, "1-2", 0.3333)),
    ]
    assert column(known["kept"], "kept") == pytest.approx(np.exp([-0.2, -0.5, -0.02, -0.1]), rel=1e-3)


def test_it_begins_with_what_can_be_believed_what_can_go_and_what_is_kept(page: Page, store: Warehouse) -> None:
    text = re.sub(r"\s+", " ", " ".join(page.words))
    first = text[text.index(" In short 2.") : text.index("What a careful reader")]
    kinds = {
        row["kind"]
        for row in findings(store).to_pylist()
        if row["run_id"].startswith("alpha-0") and row["site"] == "block"
    }
    assert all(kind.replace("_", " ") in first for kind in kinds)
    alpha = next(part for part in re.split(r" (?=\d\. )", first) if "a.txt" in part)
    assert "alpha" in alpha
    assert "wiki" not in alpha
    for line in (
        "perplexity: a.txt: no set that was evaluated; without 2, 82% is kept.",
        "perplexity: a.txt, repaired by refit: 2 layers (1-2), 90% kept.",
        "perplexity: a.txt: 61% at best, without 1-2.",
        "perplexity: a.txt, repaired by refit: 90% at best, without 1-2.",
    ):
        assert line in alpha
    assert first.count("Nothing was left out and evaluated yet") == 2


def test_scores_of_people_are_drawn_as_their_own(store: Warehouse, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("layer,guess\n" + "".join(f"{layer},{layer % 3}\n" for layer in range(6)))
    own = f"{file}:guess"
    picture = Page(report_page(store, own=[own])).data["pictures"]["scorecard-2"]
    kinds = mapping(picture["rows"], "score", "kind")
    assert {kinds[own], kinds["block influence"]} == {"of your own", "from the scoring pass"}
    legend = picture["spec"]["layer"][-1]["encoding"]["color"]["scale"]["domain"]
    assert legend == [kind for kind in KINDS if kind in kinds.values()]


def test_the_score_card_is_a_picture_a_sentence_and_a_table(page: Page, store: Warehouse) -> None:
    """Of the run whose layers were left out one by one: here the loss rises from layer to layer."""
    runs = where(store.runs().to_pylist(), revision="r1")
    cards = {
        row["score"]: row["spearman_loss"] for row in score_cards(store, runs).to_pylist() if row["score"] != "avss"
    }
    assert cards["last"] < 0 < cards["loss"] == pytest.approx(1)
    text = re.sub(r"\s+", " ", " ".join(page.words))
    card = text[text.index("Closest to the loss without each layer") : text.index("Each run, failed ones too")]
    assert f"The place alone: {cards['last']:.2f}" in card
    assert f"block influence {cards['block_influence']:.2f}" in card
    picture = page.data["pictures"]["scorecard-2"]
    drawn = mapping(picture["rows"], "score", "correlation")
    assert drawn["block influence"] == cards["block_influence"]
    assert "AVSS as published" in drawn
    (table,) = (a for tag, a in page.elements if tag == "table" and a["data-name"] == "scorecard-2")
    assert "sortable" in (table["class"] or "")
    assert "avss block / pooled / 1e-05" in card


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    store = Warehouse(tmp_path / HOSTILE.replace("/", ""))
    names = dict.fromkeys(("model", "family", "dtype", "corpus", "revision", "device"), HOSTILE)
    write_run(store, "hostile", layers=4, **names)
    write_failed(store, "failed", HOSTILE)
    page = Page(hostile := report_page(store))
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not [tag for tag, a in page.elements if tag == "img" or "onerror" in a]
    assert "<script>window" not in hostile
    assert str(7919 * 7907) not in hostile  # no template is evaluated
    assert any(HOSTILE in (a.get("title") or "") for _, a in page.elements)  # whole, as text
    assert page.data["runs"][0]["label"].startswith(f"1. {HOSTILE.rpartition('/')[2]}")


@pytest.mark.nightly
def test_forty_runs_are_under_five_megabytes(tmp_path: Path) -> None:
    """By what a run of 80 layers adds."""
    sizes = []
    for runs in (2, 4):
        page = report_page(write_many(tmp_path / f"{runs}", runs=runs, layers=80))
        assert len(Page(page).data["runs"]) == runs
        sizes.append(len(page.encode()))
    assert sizes[1] + 36 * (sizes[1] - sizes[0]) / 2 < 5_000_000


def test_of_more_runs_than_a_page_can_draw_the_newest_are_drawn(
    store: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avss_dist.reports.page.page.MAX_RUNS", 2)
    page = Page(report_page(store))
    assert "the 2 newest runs; 1 more are in the table of runs" in " ".join(page.words)
    assert column(page.data["runs"], "label") == ["1. beta", "2. alpha"]
    assert len([a for tag, a in page.elements if tag == "td" and a.get("class") == "run_id"]) == 4


def test_runs_that_all_failed_are_still_a_page(tmp_path: Path) -> None:
    store = Warehouse(tmp_path)
    write_failed(store, "gone", "out of memory")
    page = Page(report_page(store))
    assert "out of memory" in " ".join(page.words)
    assert "0 runs and 1 that failed" in " ".join(page.words)
    assert len(page.raw["script"]) == 1  # no data, nothing to draw with
    assert not [a for tag, a in page.elements if tag == "figure"]


def test_names_of_fields_are_in_no_backticks(tmp_path: Path) -> None:
    """They are in errors, which the command line spells as options."""
    store = Warehouse(tmp_path)
    write_failed(store, "gone", "Lower `batch_size`, or leave `x` out.")
    page = Page(report_page(store))
    shown = [*page.words, *(value or "" for _, attributes in page.elements for value in attributes.values())]
    assert any("Lower batch_size, or leave x out." in text for text in shown)
    assert not any("`" in text for text in shown)


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{}, {"model": "org/b/"}], ["a", "b"]),
        ([{}, {"dtype": "bfloat16"}], ["a · float32", "a · bfloat16"]),
        ([{}, {"corpus": "x/wiki.txt"}, {"model": "b"}], ["a · builtin:pydoc", "a · wiki.txt", "b"]),
        ([{}, {"settings": '{"skip_first_tokens": 1}'}], ["a", "a · skip_first_tokens=1"]),
        ([{}, {"run_id": "a-9876543210"}], ["a · 0123456789", "a · 9876543210"]),
    ],
)
def test_labels_tell_runs_apart_with_as_little_as_will_do(changes: list[dict[str, str]], labels: list[str]) -> None:
    run = {"run_id": "a-0123456789", "model": "org/a", "dtype": "float32", "corpus": "builtin:pydoc", "revision": None}
    assert run_labels([{**run, "settings": '{"skip_first_tokens": 0}', **change} for change in changes]) == labels


# The command.


def test_the_command_writes_the_runs_that_are_named(store: Warehouse, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    done = avss("report", "-w", store.root, "-o", file, "--run", "alpha*", "--run", "gone-0123456789")
    assert done.exit_code == 0
    assert done.stdout == f"{file}\n"
    assert done.stderr == ""
    page = Page(file.read_text(encoding="utf-8"))
    assert [len(run["layer_name"]) for run in page.data["runs"]] == [6, 6]
    assert "2 runs and 1 that failed" in " ".join(page.words)


# Sections: one description, of which the terminal and the page show the same texts.

html_table = templates().get_template("table.html").module.html_table  # type: ignore[attr-defined]
MARKUP = "<img src=x onerror=alert(1)>\x1b[31m"


def row(method: str, share: float | None, value: float, **other: Any) -> dict[str, Any]:
    """A row of ``experiments`` on the loss of a text; the whole model's loss is 3."""
    columns = dict.fromkeys(("control", "repair", "patch", "factor", "site", "recipe", "threshold"))
    identity = {"run_id": "a-1", "model": "org/a", "experiment_id": "0" * 20, "created_at": None}
    about = {**identity, "task": "perplexity:x/text.txt", "metric": "loss", "drop": [], "drop_parts": []}
    retention = float(np.exp(3 - value))
    ends = {"retention_low": retention - 0.01, "retention_high": retention + 0.01}
    score = {"score": None if method == "whole model" else "avss", "method": method, "share": share, "value": value}
    return {**columns, "threshold_kind": None, **about, **score, "retention": retention, **ends, **other}


def experiment(method: str = "avss") -> list[dict[str, Any]]:
    return [
        row("whole model", 0.0, 3.0),
        row(method, 0.25, 3.2, drop=[1, 2], drop_parts=["attention.3"]),
        row(method, 0.5, 4.0, drop=[0, 1, 2, 3], retention_low=None, retention_high=None),
    ]


def sections(name: str = "avss") -> list[Section]:
    """An experiment, and routed experts."""
    (experiments,) = experiment_sections(experiment(name), {"a-1": "1. a"})
    load = np.array([0.5, 0.5, 0.0])
    layers = [LayerExperts(1, load, load, load, load, 0.6, float("nan"), 1)]
    return [experiments, experts_section("1. a", {"num_tokens": 64, "corpus": name}, layers)]


def page_tables(tables: tuple[ReportTable, ...]) -> list[list[list[str]]]:
    return Page("".join(html_table(table, "a run") for table in tables)).tables


def printed(renderable: Any, width: int = 400) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(renderable)
    return file.getvalue()


def test_a_terminal_and_a_page_show_the_same_texts() -> None:
    tables = tuple(table for section in sections() for table in section.tables)
    assert len(tables) == 2
    for table, (headings, *rows) in zip(tables, page_tables(tables), strict=True):
        lines = [re.split(" *[│┃] *", line)[1:-1] for line in printed(FittedTable(table)).splitlines() if "│" in line]
        bars = [i for i, column in enumerate(table.columns) if isinstance(column, BarColumn)]
        texts = [[text.strip("- ") for i, text in enumerate(line) if i not in bars] for line in lines]
        assert texts == rows
        assert headings == [f"{c.group}: {c.heading}" if c.group else c.heading for c in table.value_columns]


def test_a_table_of_an_experiment_names_sublayers_and_says_why_an_interval_is_missing() -> None:
    (table,) = sections()[0].tables
    (tables,) = page_tables((table,))
    assert tables[1:] == [
        ["whole model", "0%", "", "20.09", "", ""],
        ["avss", "25%", "1-2, attention.3", "24.53", "81.9%", "80.9% to 82.9%"],
        ["avss", "50%", "0-3", "54.6", "36.8%", ""],
    ]
    assert "No interval" in table.caption


def test_every_chart_of_a_section_can_be_drawn() -> None:
    charts = [chart for section in sections() for chart in section.charts]
    assert [chart.name for chart in charts] == ["experiment-1-1", "experiment-1-2"]
    for chart in charts:
        json.dumps(list(chart.rows), allow_nan=False)
        spec = section_chart(chart) | {"datasets": {"rows": list(chart.rows)}, "width": 400}
        svg = vl_convert.vegalite_to_svg(spec)
        assert svg.count("<path") > len(chart.rows), chart.name


def test_no_name_of_a_section_is_markup_or_steers_a_terminal() -> None:
    text = printed(rendered(*sections(MARKUP)))
    assert "\x1b" not in text
    assert "\ufffd[31m" in text
    for section in sections(MARKUP):
        page = "".join(html_table(table, section.label) for table in section.tables)
        assert "<img" not in page
        assert "\x1b" not in page
    assert "<img" in unescape(page_tables(tuple(sections(MARKUP)[0].tables))[0][2][0])


def test_the_page_has_every_chart_and_table_of_its_sections(tmp_path: Path) -> None:
    warehouse = Warehouse(unpack_released(tmp_path))
    page = report_page(warehouse)
    named = re.findall(r'data-chart="(experiment[^"]*)"', page)
    assert named
    assert len(set(named)) == len(named)
    rows = warehouse.table("experiments").sort_by("created_at").to_pylist()
    (section,) = experiment_sections(where(rows, run_id=rows[0]["run_id"]))
    shown = next(table for table in Page(page).tables if table[0][:1] == ["layers chosen by"])
    assert [line[0] for line in shown[1:]] == [row.values["method"] for row in section.tables[0].rows]


def test_columns_format_missing_values_intervals_and_booleans() -> None:
    ends = ReportColumn("x", "x", interval("{:z.0%}".format))
    known = known_interval(0.1, 0.2)
    assert ends.text(known) == "10% to 20%"
    assert ends.sort_key(known) == 0.1
    unknown = known_interval(None, 1)
    assert ends.text(unknown) == ""
    assert ends.sort_key(unknown) == ""
    assert known_interval(0.0, float("nan")) is None
    numbers = ReportColumn("y", "y", "{:z.3f}".format)
    assert [numbers.text(value) for value in (-0.0001, float("nan"), None)] == ["0.000", "", ""]
    assert numbers.sort_key(True) == 1
    assert [p_value(p) for p in (0.0123, 0.0001)] == ["0.012", "<0.001"]
    pair = ReportColumn("z", "z", lambda value: f"{value[0]} ({value[1]:.0%})", number=False)
    assert pair.sort_key((2, 0.5)) == "2 (50%)"


def bars(mark: str) -> ReportTable:
    """A table whose first row is marked."""
    rows = [ReportRow({"layer": 0, "size": 1.0}, is_marked=True), ReportRow({"layer": 1, "size": 2.0})]
    return ReportTable(columns=[ReportColumn("layer", "layer"), BarColumn(key="size")], rows=rows, mark=mark)


def test_a_terminal_has_a_star_at_the_lowest_rows_alone() -> None:
    stars = {mark: printed(FittedTable(bars(mark))).count("*") for mark in ("lowest", "failed", "")}
    assert stars == {"lowest": 1, "failed": 0, "": 0}


def test_rows_of_the_page_have_the_kind_of_their_mark_as_class() -> None:
    marked = {mark: re.findall('<tr class="(.*?)">', html_table(bars(mark), "a run")) for mark in ("failed", "")}
    assert marked == {"failed": ["failed"], "": []}


def test_a_row_without_the_value_of_a_column_is_refused() -> None:
    table = ReportTable(columns=[ReportColumn("layer", "layer")], rows=[ReportRow({"level": 0})])
    with pytest.raises(KeyError, match="layer"):
        printed(FittedTable(table))


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_narrow_terminal_leaves_out_what_matters_least(width: int) -> None:
    (table,) = sections()[0].tables
    lines = printed(FittedTable(table), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("81.9%" in line for line in lines)
    assert ("No room for: dropped, text.txt perplexity" in " ".join(lines)) == (width == 60)
