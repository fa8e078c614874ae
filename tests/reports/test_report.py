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
from itertools import combinations, combinations_with_replacement, compress
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pytest
import vl_convert
from rich.console import Console
from support.command_line import succeed
from support.pages import measured, write_failed, write_many, write_removals, write_run
from support.rows import column, columns, mapping, where
from support.warehouses import PUBLISHED, unpack_released, write_measured, write_scores

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
        (policy,) = [a["content"] for a in self.attributes() if a.get("http-equiv") == "Content-Security-Policy"]
        return policy or ""

    @property
    def data(self) -> dict[str, Any]:
        compressed = base64.b64decode(self.raw["script"][0])
        data: dict[str, Any] = json.loads(gzip.decompress(compressed))
        return data

    def attributes(self, tag: str | None = None) -> list[dict[str, str | None]]:
        """Return the attributes of every element, or of the elements of a tag."""
        return [attributes for name, attributes in self.elements if tag in (None, name)]

    def values(self, name: str) -> list[str]:
        """Return the values of an attribute."""
        return [attributes[name] or "" for attributes in self.attributes() if name in attributes]

    @property
    def text(self) -> str:
        """The words of the page, in one line."""
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """Two models of different depth, one of them twice, and a run that failed."""
    store = Warehouse(tmp_path_factory.mktemp("warehouse"))
    alpha = write_run(store, "alpha", layers=6, revision="r1")
    write_removals(store, alpha, "r1", layers=6)
    write_run(store, "alpha-wiki", layers=6, seed=1, model="org/alpha", corpus="texts/wiki.txt")
    write_run(store, "beta", layers=9, seed=2, family="gemma")
    write_failed(store, "gone", "out of memory")
    return store


@pytest.fixture(scope="module")
def page(store: Warehouse) -> Page:
    return Page(report_page(store))


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    links = []
    for name in ("src", "href", "srcset", "action", "data"):
        links += page.values(name)
    assert links
    for link in links:
        assert link.startswith(("#", "data:"))
    for style in page.raw["style"]:
        assert "@import" not in style
        assert "url(" not in style


def sources(texts: list[str]) -> set[str]:
    """Return texts as a policy names them, by their hashes."""
    names = set()
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        names.add(f"'sha256-{base64.b64encode(digest).decode()}'")
    assert len(names) == len(texts)
    return names


def test_the_policy_allows_this_page_and_no_more(page: Page) -> None:
    policy = {}
    for part in page.policy.split(";"):
        name, _, allowed = part.strip().partition(" ")
        policy[name] = allowed.split()
    assert policy["default-src"] == ["'none'"]
    assert "unsafe" not in page.policy
    _, *scripts = page.raw["script"]  # the first is data
    assert sorted(policy["script-src"]) == sorted(sources(scripts))
    assert sorted(policy["style-src"]) == sorted(sources(page.raw["style"]))
    for attributes in page.attributes():
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)


def test_the_published_reading_comes_first(page: Page) -> None:
    first = page.data["choices"][page.data["first"]]
    assert first == {"site": "block", "recipe": "pooled", "threshold": "1e-05"}


DIGITS = {"avss": 4, "low": 3, "high": 3, "rank": 4, "near_zero": 4}
"""Significant digits of the columns of a page."""
STORED = {"avss": "avss_smoothed", "low": "avss_low", "high": "avss_high", "rank": "rank"}
STORED["near_zero"] = "near_zero_count"


def test_the_scores_are_the_warehouses(page: Page, store: Warehouse) -> None:
    data = page.data
    expected = {}
    for row in store.table("scores").to_pylist():
        threshold = describe_threshold(row["threshold"], row["threshold_kind"])
        expected[row["run_id"], row["site"], row["recipe"], threshold, row["layer"]] = row
    ids = _run_ids(data, store)
    for run, choice, start, end, lowest in data["blocks"]:
        about = data["runs"][run]
        reading = data["choices"][choice]
        assert lowest == max(1, round((end - start) / 4))
        for i in range(start, end):
            layer = data["columns"]["layer"][i]
            key = (ids[about["label"]], reading["site"], reading["recipe"], reading["threshold"], layer)
            row = expected.pop(key)
            for name, digits in DIGITS.items():
                value = row[STORED[name]]  # the ends of an interval are null where there is none
                rounded = None if value is None else pytest.approx(value, rel=6 * 0.1**digits)
                assert data["columns"][name][i] == rounded, (key, name)
            assert about["layer_name"][layer] == row["layer_name"]
            assert about["block_influence"][layer] == pytest.approx(row["block_influence"], rel=1e-3)
    assert not expected


def _run_ids(data: dict[str, Any], store: Warehouse) -> dict[str, str]:
    """Return the ids of the runs of a page by their labels: beta, and alpha on two texts."""
    (beta,) = [run["label"] for run in data["runs"] if "beta" in run["label"]]
    (wiki,) = [run["label"] for run in data["runs"] if "wiki" in run["label"]]
    (alpha,) = set(column(data["runs"], "label")) - {beta, wiki}
    ids = {beta: "beta-0123456789", wiki: "alpha-wiki-0123456789", alpha: "alpha-0123456789"}
    done = where(store.runs().to_pylist(maps_as_pydicts="lossy"), status="done")
    assert sorted(column(done, "run_id")) == sorted(ids.values())
    return ids


def test_charts_are_vega_lite_with_names_for_people(page: Page) -> None:
    assert {name.partition(":")[0] for name in page.data["charts"]} == EVERY_CHART
    for name, spec in page.data["charts"].items():
        assert spec["$schema"].startswith("https://vega.github.io/schema/vega-lite/")
        assert "config" not in spec, name
        alt.TopLevelSpec.validate(spec)


def test_pictures_are_vega_lite_with_rows(page: Page) -> None:
    assert list(page.data["pictures"]) == ["scorecard-2"]
    for picture in page.data["pictures"].values():
        assert "config" not in picture["spec"]
        assert picture["rows"]
        alt.TopLevelSpec.validate(picture["spec"])


def test_every_chart_and_picture_has_a_figure(page: Page) -> None:
    assert set(page.values("data-chart")) == {"scorecard-2", *EVERY_CHART}


def in_words(kind: str) -> str:
    """Return the kind of a finding as a page has it."""
    return kind.replace("_", " ").capitalize()


def test_findings_come_first_and_in_words(page: Page, store: Warehouse) -> None:
    rows = sorted(findings(store).to_pylist(), key=lambda row: not is_published(row))
    kinds = list(dict.fromkeys(column(rows, "kind")))
    assert len(kinds) > 2
    places = [page.text.index(f" {in_words(kind)} ") for kind in kinds]
    assert places == sorted(places)
    assert places[-1] < page.text.index("Each run, failed ones too")
    first_of_kinds = {}
    for row in rows:
        first_of_kinds.setdefault((row["run_id"], row["kind"]), row)
    for row in first_of_kinds.values():
        assert row["message"] in page.text


@pytest.mark.parametrize("words", ["org/alpha", "beta", "gone", "out of memory", "3 runs and 1 that failed", "1,234"])
def test_every_run_is_in_the_overview_and_failures_say_why(page: Page, words: str) -> None:
    assert words in page.text or words in page.values("title")


def test_the_overview_says_that_runs_differ(page: Page) -> None:
    assert "These runs differ in corpus: a low coefficient need not be the models'." in page.text


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
    assert rho[2] < median < rho[3]
    assert rho[3] == pytest.approx(1)
    assert agreement["summary"].startswith(f"The median of 6 pairs is {median:.3f}")
    assert f"Spearman {median:.3f} at the median" in summary(comparison)
    correlations = {(a, b): correlation for a, b, correlation, _ in agreement["pairs"]}
    assert sorted(correlations) == list(combinations_with_replacement(range(4), 2))
    of_pairs = [correlations[pair] for pair in combinations(range(4), 2)]
    assert sorted(of_pairs) == pytest.approx(rho, abs=6e-4)


def test_a_correlation_of_nearly_zero_has_no_sign() -> None:
    """Six layers cannot have a correlation that close to zero, 2,000 can."""
    rng = np.random.default_rng(0)
    depth = (np.arange(2000) + 0.5) / 2000
    scores = [(depth, rng.permutation(2000).astype(float)) for _ in range(60)]
    with_first = correlate_pairs(scores, np.zeros(60, np.int64), np.arange(60))["spearman"]
    closest = np.argmax(np.where(with_first < 0, with_first, -1))
    assert -0.0005 < with_first[closest] < 0
    text = run_agreement({0: scores[0], 1: scores[closest]})
    assert "of 1 pair is 0.000" in text["summary"]
    assert "-0.000" not in str(text)
    assert json.dumps(text["pairs"][-1]) == "[0, 1, 0.0, 0.0]"


def test_what_is_known_without_layers_is_the_warehouses(page: Page, store: Warehouse) -> None:
    """Of the run's own checkpoint: every block, and the best set of each size, by repair."""
    blocks = known_of_alpha(page)["blocks"]
    rows = where(store.table("evaluations").to_pylist(), task="damage:a.txt")
    distances = {tuple(row["drop"]): row["value"] for row in rows}
    assert len(distances) == 21
    for block in blocks:
        layers = range(block["start"], block["start"] + block["length"])
        assert distances.pop(tuple(layers)) == pytest.approx(block["distance"], rel=1e-3)
    assert not distances


def known_of_alpha(page: Page) -> dict[str, Any]:
    """Return what is known without layers of the first run of alpha; of the others nothing is."""
    known = dict(zip(column(page.data["runs"], "label"), page.data["without"], strict=True))
    (alpha,) = [label for label in known if "alpha" in label and "wiki" not in label]
    known_of_alpha = known.pop(alpha)
    assert list(known.values()) == [{"blocks": [], "kept": []}] * 2
    return known_of_alpha


PLAIN = "perplexity: a.txt"
REPAIRED = "perplexity: a.txt, repaired by refit"


def test_what_is_kept_is_the_best_set_of_each_size_by_repair(page: Page) -> None:
    kept = known_of_alpha(page)["kept"]
    assert columns(kept, "series", "dropped", "share") == [
        *((PLAIN, "2", 0.1667), (PLAIN, "1-2", 0.3333)),
        *((REPAIRED, "2", 0.1667), (REPAIRED, "1-2", 0.3333)),
    ]
    assert column(kept, "kept") == pytest.approx(np.exp([-0.2, -0.5, -0.02, -0.1]), rel=1e-3)


@pytest.fixture(scope="module")
def in_short(page: Page) -> str:
    """The beginning of the page."""
    _, _, begun = page.text.partition(" In short 2.")
    in_short, _, rest = begun.partition("What a careful reader")
    assert rest
    return f"2.{in_short}"


def test_it_begins_with_what_can_be_believed(in_short: str, store: Warehouse) -> None:
    rows = where(findings(store).to_pylist(), run_id="alpha-0123456789", site="block")
    assert rows
    for row in rows:
        assert row["kind"].replace("_", " ") in in_short


def test_it_begins_with_what_can_go_and_what_is_kept(in_short: str) -> None:
    (alpha,) = [part for part in re.split(r" (?=\d\. )", in_short) if "a.txt" in part]
    assert "alpha" in alpha
    assert "wiki" not in alpha
    assert "perplexity: a.txt: no set that was evaluated; without 2, 82% is kept." in alpha
    assert "perplexity: a.txt, repaired by refit: 2 layers (1-2), 90% kept." in alpha
    assert "perplexity: a.txt: 61% at best, without 1-2." in alpha
    assert "perplexity: a.txt, repaired by refit: 90% at best, without 1-2." in alpha
    assert in_short.count("Nothing was left out and evaluated yet") == 2


@pytest.mark.nightly
def test_scores_of_people_are_drawn_as_their_own(store: Warehouse, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("layer,guess\n0,0\n1,1\n2,2\n3,0\n4,1\n5,2\n")
    own = f"{file}:guess"
    picture = Page(report_page(store, own=[own])).data["pictures"]["scorecard-2"]
    kinds = mapping(picture["rows"], "score", "kind")
    assert kinds[own] == "of your own"
    assert kinds["block influence"] == "from the scoring pass"
    legend = picture["spec"]["layer"][-1]["encoding"]["color"]["scale"]["domain"]
    assert legend == [kind for kind in KINDS if kind in kinds.values()]


def test_the_score_card_is_a_picture_a_sentence_and_a_table(page: Page, store: Warehouse) -> None:
    """Of the run whose layers were left out one by one: here the loss rises from layer to layer."""
    runs = where(store.runs().to_pylist(), revision="r1")
    correlations = mapping(score_cards(store, runs).to_pylist(), "score", "spearman_loss")
    assert correlations["last"] < 0
    assert correlations["loss"] == pytest.approx(1)
    _, _, card = page.text.partition("Closest to the loss without each layer")
    card, _, _ = card.partition("Each run, failed ones too")
    assert f"The place alone: {correlations['last']:.2f}" in card
    assert f"block influence {correlations['block_influence']:.2f}" in card
    assert "avss block / pooled / 1e-05" in card
    picture = page.data["pictures"]["scorecard-2"]
    drawn = mapping(picture["rows"], "score", "correlation")
    assert drawn["block influence"] == correlations["block_influence"]
    assert "AVSS as published" in drawn
    (table,) = where(page.attributes("table"), **{"data-name": "scorecard-2"})
    assert "sortable" in (table["class"] or "")


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    store = Warehouse(tmp_path / HOSTILE.replace("/", ""))
    names = dict.fromkeys(("model", "family", "dtype", "corpus", "revision", "device"), HOSTILE)
    write_run(store, "hostile", layers=4, **names)
    write_failed(store, "failed", HOSTILE)
    text = report_page(store)
    assert "<script>window" not in text
    assert str(7919 * 7907) not in text  # no template is evaluated
    page = Page(text)
    assert len(page.attributes("script")) == 3
    assert not page.attributes("img")
    assert not page.values("onerror")
    assert any(HOSTILE in title for title in page.values("title"))  # whole, as text
    name = HOSTILE.rpartition("/")[2]
    assert page.data["runs"][0]["label"].startswith(f"1. {name}")


@pytest.mark.nightly
def test_forty_runs_are_under_five_megabytes(tmp_path: Path) -> None:
    """By what a run of 80 layers adds."""
    sizes = []
    for runs in (2, 4):
        page = report_page(write_many(tmp_path / f"{runs}", runs=runs, layers=80))
        assert len(Page(page).data["runs"]) == runs
        sizes.append(len(page.encode()))
    size_of_run = (sizes[1] - sizes[0]) / 2
    assert sizes[1] + 36 * size_of_run < 5_000_000


@pytest.mark.nightly
def test_of_more_runs_than_a_page_can_draw_the_newest_are_drawn(
    store: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avss_dist.reports.page.page.MAX_RUNS", 2)
    page = Page(report_page(store))
    assert "the 2 newest runs; 1 more are in the table of runs" in page.text
    assert column(page.data["runs"], "label") == ["1. beta", "2. alpha"]
    classes = [cell.get("class") for cell in page.attributes("td")]
    assert classes.count("run_id") == 4


def test_runs_that_all_failed_are_still_a_page(tmp_path: Path) -> None:
    store = Warehouse(tmp_path)
    write_failed(store, "gone", "out of memory")
    page = Page(report_page(store))
    assert "out of memory" in page.text
    assert "0 runs and 1 that failed" in page.text
    assert len(page.raw["script"]) == 1  # no data, nothing to draw with
    assert not page.attributes("figure")


def test_names_of_fields_are_in_no_backticks(tmp_path: Path) -> None:
    """They are in errors, which the command line spells as options."""
    store = Warehouse(tmp_path)
    write_failed(store, "gone", "Lower `batch_size`, or leave `x` out.")
    page = Page(report_page(store))
    shown = list(page.words)
    for attributes in page.attributes():
        shown += [value or "" for value in attributes.values()]
    assert any("Lower batch_size, or leave x out." in text for text in shown)
    assert not any("`" in text for text in shown)


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{}, {"model": "org/b/"}], ["a", "b"]),
        ([{}, {"dtype": "bfloat16"}], ["a · float32", "a · bfloat16"]),
        ([{}, {"corpus": "x/wiki.txt"}, {"model": "b"}], ["a · builtin:pydoc", "a · wiki.txt", "b"]),
        ([{"seed": 1, "revision": "x"}, {"seed": 2, "revision": "y"}], ["a · seed 1", "a · seed 2"]),
        ([{}, {"settings": '{"skip_first_tokens": 1}'}], ["a", "a · skip_first_tokens=1"]),
        ([{}, {"run_id": "a-9876543210"}], ["a · 0123456789", "a · 9876543210"]),
    ],
)
def test_labels_tell_runs_apart_with_as_little_as_will_do(changes: list[dict[str, Any]], labels: list[str]) -> None:
    run = {"run_id": "a-0123456789", "model": "org/a", "dtype": "float32", "corpus": "builtin:pydoc"}
    run |= {"seed": None, "revision": None}
    run["settings"] = '{"skip_first_tokens": 0}'
    assert run_labels([run | change for change in changes]) == labels


# The command.


@pytest.mark.nightly
def test_the_command_writes_the_runs_that_are_named(store: Warehouse, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    done = succeed("report", "-w", store.root, "-o", file, "--run", "alpha*", "--run", "gone-0123456789")
    assert done.stdout == f"{file}\n"
    assert done.stderr == ""
    page = Page(file.read_text(encoding="utf-8"))
    layers = column(page.data["runs"], "layer_name")
    assert [len(names) for names in layers] == [6, 6]
    assert "2 runs and 1 that failed" in page.text


# Sections: one description, of which the terminal and the page show the same texts.

html_table = templates().get_template("table.html").module.html_table  # type: ignore[attr-defined]
MARKUP = "<img src=x onerror=alert(1)>\x1b[31m"


NOT_SET = ("score", "control", "repair", "patch", "factor", "site", "recipe", "threshold", "threshold_kind")
NOT_SET += ("created_at",)


def row(method: str, share: float | None, value: float, **other: Any) -> dict[str, Any]:
    """A row of ``experiments`` on the loss of a text; the whole model's loss is 3."""
    values: dict[str, Any] = dict.fromkeys(NOT_SET)
    values |= {"run_id": "a-1", "model": "org/a", "experiment_id": "0" * 20}
    values |= {"task": "perplexity:x/text.txt", "metric": "loss", "drop": [], "drop_parts": []}
    values |= {"method": method, "share": share, "value": value}
    if method != "whole model":
        values["score"] = "avss"
    retention = float(np.exp(3 - value))
    values["retention"] = retention
    values["retention_low"] = retention - 0.01
    values["retention_high"] = retention + 0.01
    return values | other


def experiment(method: str = "avss") -> list[dict[str, Any]]:
    rows = [row("whole model", 0.0, 3.0)]
    rows.append(row(method, 0.25, 3.2, drop=[1, 2], drop_parts=["attention.3"]))
    rows.append(row(method, 0.5, 4.0, drop=[0, 1, 2, 3], retention_low=None, retention_high=None))
    return rows


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
    experiments, experts = sections()
    tables = (*experiments.tables, *experts.tables)
    assert len(tables) == 2
    for table, (headings, *rows) in zip(tables, page_tables(tables), strict=True):
        assert texts_in_a_terminal(table) == rows
        assert headings == [heading_of(shown) for shown in table.value_columns]


def heading_of(shown: ReportColumn) -> str:
    """Return the heading of a column of a page, with the group above it."""
    if shown.group:
        return f"{shown.group}: {shown.heading}"
    return shown.heading


def texts_in_a_terminal(table: ReportTable) -> list[list[str]]:
    """Return the texts of a table's rows, without its bars."""
    is_text = [not isinstance(shown, BarColumn) for shown in table.columns]
    rows = []
    for line in printed(FittedTable(table)).splitlines():
        if "│" in line:
            cells = re.split(" *[│┃] *", line)[1:-1]
            rows.append([cell.strip("- ") for cell in compress(cells, is_text)])
    return rows


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
    experiments, experts = sections()
    charts = [*experiments.charts, *experts.charts]
    assert [chart.name for chart in charts] == ["experiment-1-1", "experiment-1-2"]
    for chart in charts:
        rows = list(chart.rows)
        json.dumps(rows, allow_nan=False)
        spec = section_chart(chart) | {"datasets": {"rows": rows}, "width": 400}
        svg = vl_convert.vegalite_to_svg(spec)
        assert svg.count("<path") > len(rows), chart.name


def test_no_name_of_a_section_is_markup_or_steers_a_terminal() -> None:
    hostile = sections(MARKUP)
    text = printed(rendered(*hostile))
    assert "\x1b" not in text
    assert "\ufffd[31m" in text
    for section in hostile:
        for table in section.tables:
            html = html_table(table, section.label)
            assert "<img" not in html
            assert "\x1b" not in html
    (experiments,) = page_tables(hostile[0].tables)
    _, _, (method, *_), *_ = experiments
    assert "<img" in unescape(method)


def test_the_page_has_every_chart_and_table_of_its_sections(tmp_path: Path) -> None:
    warehouse = Warehouse(unpack_released(tmp_path))
    page = report_page(warehouse)
    named = re.findall(r'data-chart="(experiment[^"]*)"', page)
    assert named
    assert len(set(named)) == len(named)
    rows = warehouse.table("experiments").sort_by("created_at").to_pylist()
    (section,) = experiment_sections(where(rows, run_id=rows[0]["run_id"]))
    shown = [table for table in Page(page).tables if table[0][:1] == ["layers chosen by"]]
    _, *lines = shown[0]
    methods = [row.values["method"] for row in section.tables[0].rows]
    assert [line[0] for line in lines] == methods


def test_a_column_formats_intervals() -> None:
    ends = ReportColumn("x", "x", interval("{:z.0%}".format))
    known = known_interval(0.1, 0.2)
    assert ends.text(known) == "10% to 20%"
    assert ends.sort_key(known) == 0.1
    unknown = known_interval(None, 1)
    assert ends.text(unknown) == ""
    assert ends.sort_key(unknown) == ""
    assert known_interval(0.0, float("nan")) is None


def test_a_column_formats_numbers_and_missing_values() -> None:
    numbers = ReportColumn("y", "y", "{:z.3f}".format)
    assert numbers.text(-0.0001) == "0.000"
    assert numbers.text(float("nan")) == ""
    assert numbers.text(None) == ""
    assert numbers.sort_key(True) == 1


def test_small_p_values_are_bounds() -> None:
    assert p_value(0.0123) == "0.012"
    assert p_value(0.0001) == "<0.001"


def test_a_column_of_texts_is_sorted_by_them() -> None:
    pair = ReportColumn("z", "z", lambda value: f"{value[0]} ({value[1]:.0%})", number=False)
    assert pair.sort_key((2, 0.5)) == "2 (50%)"


def bars(mark: str) -> ReportTable:
    """A table whose first row is marked."""
    rows = [ReportRow({"layer": 0, "size": 1.0}, is_marked=True), ReportRow({"layer": 1, "size": 2.0})]
    return ReportTable(columns=[ReportColumn("layer", "layer"), BarColumn(key="size")], rows=rows, mark=mark)


@pytest.mark.parametrize(("mark", "stars"), [("lowest", 1), ("failed", 0), ("", 0)])
def test_a_terminal_has_a_star_at_the_lowest_rows_alone(mark: str, stars: int) -> None:
    text = printed(FittedTable(bars(mark)))
    assert text.count("*") == stars


@pytest.mark.parametrize(("mark", "classes"), [("failed", ["failed"]), ("", [])])
def test_rows_of_the_page_have_the_kind_of_their_mark_as_class(mark: str, classes: list[str]) -> None:
    html = html_table(bars(mark), "a run")
    assert re.findall('<tr class="(.*?)">', html) == classes


def test_a_row_without_the_value_of_a_column_is_refused() -> None:
    table = ReportTable(columns=[ReportColumn("layer", "layer")], rows=[ReportRow({"level": 0})])
    with pytest.raises(KeyError, match="layer"):
        printed(FittedTable(table))


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_narrow_terminal_leaves_out_what_matters_least(width: int) -> None:
    (table,) = sections()[0].tables
    text = printed(FittedTable(table), width)
    assert max(map(len, text.splitlines())) <= width
    assert "81.9%" in text
    assert ("No room for: dropped, text.txt perplexity" in " ".join(text.split("\n"))) == (width == 60)


def test_a_map_of_a_training_has_its_changes_and_hostile_names_as_data(tmp_path: Path) -> None:
    store = Warehouse(tmp_path)
    about: dict[str, Any] = {
        "model": "org/a",
        "series": f"{HOSTILE}@step*",
        "tokens_fingerprint": "tokens",
        "shard_tokens": 16,
    }
    for step in (1, 2, 4):
        write_run(store, f"a-{step}", layers=4, seed=step, training_step=step, revision=HOSTILE, **about)
    page = Page(report_page(store))
    picture = page.data["pictures"]["curve-1"]
    assert [row["p"] is None for row in picture["rows"]] == [True] * 4 + [False] * 8
    assert HOSTILE in picture["label"]
    assert len(page.attributes("script")) == 3
    assert not page.attributes("img")


@pytest.mark.nightly
def test_seeds_of_a_training_have_a_map_each_beside_that_of_their_mean(tmp_path: Path) -> None:
    for seed in (1, 2):
        for step in (1, 2, 4):
            about: dict[str, Any] = {"series": f"seed{seed}@step*", "seed": seed, "seed_group": "seed*@step*"}
            about |= {"training_step": step, "revision": f"r{seed}-{step}", "tokens_fingerprint": "tokens"}
            shards = measured(4, 10 * seed + step, 8, ("block",), None)
            write_measured(tmp_path, f"a-{seed}-{step}", shards, 4, 16, **about)
    page = Page(report_page(Warehouse(tmp_path)))
    titles = [picture["label"] for picture in page.data["pictures"].values()]
    assert titles == ["seed*@step* along training step, seeds 1, 2"] * 3
    assert page.data["pictures"].keys() == {"seeds-1", "seeds-1-1", "seeds-1-2"}
