"""The report's page in a real browser: every control, what it draws, and what it leaves alone."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from support.pages import write_failed, write_removals, write_run
from support.rows import column, columns, where
from support.warehouses import rewrite_file, unpack_released

from avss_dist.core.thresholds import describe_threshold
from avss_dist.reports.page.page import report_page
from avss_dist.stats.rankings import depth_correlation
from avss_dist.warehouse.reader import Warehouse

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[test]'")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium (or google-chrome)"),
]
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
HOSTILE = "org/<script>window.hacked = 1; alert(1)</script>\"'><img src=x onerror='window.hacked=1'>=cmd&amp;"
CHARTS = (
    *("avss", "block_influence", "angular_distance", "relative_magnitude", "update_variance_ratio"),
    *("heat", "lowest", "correlation"),
)
WITHOUT = ("blocks", "kept")
IDLE = "html:not([data-drawing])"
DRAWN_IN = (
    """theme => [...document.querySelectorAll(".sections [data-chart]")].every((f) => f.look?.startsWith(theme))"""
)
ROWS = "figure => figure.rows"
ALPHA = "2. alpha"
BETA = "1. beta"
NOISE = "3. noise"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """Three runs, one of another depth, and one that failed."""
    store = Warehouse(tmp_path_factory.mktemp("warehouse"))
    write_removals(store, write_run(store, "alpha", layers=8, revision="r1"), "r1", layers=8)
    write_run(store, "beta", layers=12, seed=1, family="gemma")
    write_run(store, "noise", layers=8, seed=2)
    write_failed(store, "gone", "out of memory")
    return store


@pytest.fixture(scope="module")
def file(store: Warehouse, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report_page(store), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with the tables and charts of experiments."""
    file = tmp_path_factory.mktemp("page") / "experiments.html"
    file.write_text(report_page(Warehouse(unpack_released(tmp_path_factory.mktemp("released")))), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a file in a new profile; in the end, nothing was complained of, asked for or run that should not be."""
    opened = []
    troubles = []

    def visit(file: Path, width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        opened.append(context)
        page = context.new_page()
        page.set_default_timeout(240_000)  # the hard timeout of a test ends what hangs
        page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url == file.as_uri() or troubles.append(f"request {request.url}"))
        page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("#status:not(:empty)", state="attached")
            page.wait_for_selector(IDLE)
        return page

    yield visit
    for context in opened:
        context.close()
    assert troubles == []


def saved(page: Any, button: Any, target: Path) -> Path:
    """Press a button that downloads a file, and return the file, which keeps the name that the page gave it."""
    with page.expect_download() as waiting:
        (page.locator(button) if isinstance(button, str) else button).click()
    waiting.value.save_as(target / waiting.value.suggested_filename)
    return target / str(waiting.value.suggested_filename)


def saved_rows(page: Any, button: Any, target: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file that a button downloads, by heading."""
    return list(csv.DictReader(saved(page, button, target).open(encoding="utf-8")))


def drawn(page: Any, chart: str) -> list[dict[str, Any]]:
    """The rows that a chart's view holds."""
    page.wait_for_selector(IDLE)
    rows = page.evaluate(
        "name => JSON.stringify(document.querySelector(`[data-chart=${name}]`).view.data('rows'))", chart
    )
    found: list[dict[str, Any]] = json.loads(rows)
    return found


def table(page: Any) -> list[dict[str, str]]:
    """The table of scores, as it is ordered, by heading."""
    page.wait_for_selector(IDLE)
    headings = page.locator("#table thead button").all_inner_texts()
    rows = page.evaluate(
        "[...document.querySelectorAll('#table tbody tr')].map(r => [...r.cells].map(c => c.dataset.value))"
    )
    return [dict(zip(headings, row, strict=True)) for row in rows]


def choose(page: Any, *, site: str | None = None, recipe: str | None = None, threshold: int | None = None) -> None:
    for name, value in (("site", site), ("recipe", recipe)):
        if value is not None:
            page.locator(f"input[name={name}][value={value}]").evaluate("input => input.click()")
            assert page.locator(f"input[name={name}]:checked").get_attribute("value") == value
    if threshold is not None:
        page.locator("#threshold").fill(str(threshold))
    page.wait_for_selector(IDLE)


def close(actual: list[Any], expected: list[Any], digits: int = 4) -> None:
    assert actual == pytest.approx(expected, rel=6 * 0.1**digits, nan_ok=True)


CHOICES = (("block", "unit", 5), ("update", "element", 7), ("neuron", "pooled", 0))


def test_site_recipe_and_threshold_drive_every_chart_and_the_table(
    visit: Callable[..., Any], file: Path, store: Warehouse
) -> None:
    page = visit(file)
    page.select_option("#run", label=ALPHA)
    every = store.table("scores").to_pylist()
    for site, recipe, position in CHOICES:
        choose(page, site=site, recipe=recipe, threshold=position)
        assert_chosen(page, every, site, recipe, position)


def assert_chosen(page: Any, every: list[dict[str, Any]], site: str, recipe: str, position: int) -> None:
    """The controls, every chart and the table show these scores."""
    rows = [r for r in every if (r["site"], r["recipe"]) == (site, recipe)]
    thresholds = sorted(set(columns(rows, "threshold_kind", "threshold")))
    kind, value = thresholds[position]
    rows = [r for r in rows if (r["threshold_kind"], r["threshold"]) == (kind, value)]
    mine = sorted(where(rows, model="org/alpha"), key=lambda r: r["layer"])
    written = f"{site} site, {recipe} recipe, |x| < {describe_threshold(value, kind)}"
    assert page.locator("#threshold-text").inner_text() == f"|x| < {describe_threshold(value, kind)}"
    assert page.locator("#threshold").get_attribute("aria-valuetext") == f"below {describe_threshold(value, kind)}"
    assert page.locator("#status").inner_text() == f"{written}: scored in 3 of 3 runs."

    shown = drawn(page, "avss")
    for ours, theirs in (("avss", "avss_smoothed"), ("rank", "rank")):
        close([row[ours] for row in shown], [row[theirs] for row in mine], 4)
    for ours, theirs in (("low", "avss_low"), ("high", "avss_high")):  # a layer without interval has no band
        ends = [row["avss_smoothed"] if row[theirs] is None else row[theirs] for row in mine]
        close([row[ours] for row in shown], ends, 3)
    assert all(row["low"] <= row["avss"] <= row["high"] for row in shown)
    assert column(shown, "lowest") == [row["rank"] <= 2 for row in mine]
    heat = drawn(page, "heat")
    assert len(heat) == 8 + 12 + 8
    close(column(where(heat, run=ALPHA), "share"), [(row["rank"] - 1) / 7 for row in mine])
    close([float(row["variance"]) for row in table(page)], column(mine, "variance"))
    close([float(row["smoothed AVSS"]) for row in table(page)], column(mine, "avss_smoothed"))
    assert written in page.locator("#table caption").inner_text()
    with_order = [r["correlation"] for r in drawn(page, "correlation") if r["run"] == r["other"] == ALPHA]
    close(with_order, [depth_correlation(column(mine, "avss_smoothed"))], 3)
    for chart in CHARTS:
        assert written in str(page.locator(f"[data-chart={chart}] .view").get_attribute("aria-label"))
        assert written in page.locator(f"[data-chart={chart}] svg").inner_html().replace("&lt;", "<")


def test_a_recipe_that_a_site_lacks_cannot_be_chosen(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file)
    choose(page, recipe="unit", threshold=3)
    choose(page, site="mlp")
    assert page.locator("input[name=recipe]:checked").get_attribute("value") == "pooled"
    assert page.locator("input[name=recipe][value=unit]").is_disabled()
    assert page.locator("#threshold-text").inner_text() == "|x| < 0.001"


def test_another_run_and_two_runs_side_by_side(visit: Callable[..., Any], file: Path, store: Warehouse) -> None:
    page = visit(file)
    assert set(column(drawn(page, "avss"), "run")) == {BETA}
    page.select_option("#run", label=ALPHA)
    assert set(column(drawn(page, "avss"), "run")) == {ALPHA}
    assert "layer (from 0)" in page.locator("[data-chart=avss] svg").inner_html()
    page.select_option("#other", label=BETA)
    assert set(columns(drawn(page, "avss"), "run", "which")) == {(ALPHA, 0), (BETA, 1)}
    svg = page.locator("[data-chart=avss] svg").inner_html()
    assert "relative depth" in svg
    assert ALPHA in svg
    assert BETA in svg
    assert column(table(page), "run") == [ALPHA] * 8 + [BETA] * 12
    influence = column(store.scores(model="org/beta", site="block").to_pylist()[:1], "block_influence")
    close(column(where(drawn(page, "block_influence"), run=BETA), "block_influence")[:1], influence)

    page.locator("input[name=score][value=block_influence]").check(force=True)
    heat = where(drawn(page, "heat"), run=BETA)
    assert heat[0]["value"] == heat[0]["block_influence"]
    assert column(sorted(heat, key=lambda row: row["value"]), "rank") == [*range(1, 13)]
    places = drawn(page, "lowest")
    lowest = {run: sum(column(where(drawn(page, "heat"), run=run), "lowest")) for run in (ALPHA, BETA, NOISE)}
    assert lowest == {ALPHA: 2, BETA: 3, NOISE: 2}
    # of 8 places, 25%
    assert len(places) == 8
    assert sum(column(places, "share")) == pytest.approx(2)


def test_a_heading_sorts_up_and_down_with_the_keyboard(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file)
    heading = page.locator("#table thead th", has_text="smoothed AVSS")
    heading.locator("button").focus()
    for order in ("ascending", "descending"):
        page.keyboard.press("Enter")
        assert heading.get_attribute("aria-sort") == order
        values = [float(row["smoothed AVSS"]) for row in table(page)]
        assert values == sorted(values, reverse=order == "descending")
    choose(page, threshold=4)  # the order outlives a change
    values = [float(row["smoothed AVSS"]) for row in table(page)]
    assert values == sorted(values, reverse=True)
    assert page.locator("#table [aria-sort]").count() == 1

    page.locator("#runs thead button", has_text="layers").click()
    layers = page.locator("#runs tbody tr").evaluate_all(
        "rows => rows.map(r => r.querySelectorAll('.number')[1].dataset.value)"
    )
    assert layers == ["8", "8", "12", ""]


def test_the_keyboard_reaches_and_moves_the_controls(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
        if page.evaluate("document.activeElement.id") == "threshold":
            break
    assert {"theme", "run", "other", "site", "recipe", "threshold"} <= reached
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(IDLE)
    assert page.locator("#threshold-text").inner_text() == "|x| < 0.0001"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_dark_and_light_follow_the_system_the_button_and_the_memory(visit: Callable[..., Any], file: Path) -> None:
    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    def chart() -> str:
        page.wait_for_selector(IDLE)
        return str(page.evaluate("document.querySelector('[data-chart=avss]').view.background()"))

    page = visit(file, color_scheme="dark")
    dark = background(), chart()
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.locator("#theme").click()
    assert page.locator("#theme").get_attribute("aria-pressed") == "false"
    light = background(), chart()
    assert light[0] != dark[0]
    assert light[1] == "#ffffff"
    assert dark[1] == "#161b22"
    page.reload()
    page.wait_for_selector(IDLE)
    assert background() == light[0]


def test_every_chart_downloads(visit: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    """As rows; every third, also as pictures."""
    page: Any = None
    pictures = (("png", b"\x89PNG\r\n\x1a\n"), ("svg", b"<svg"))
    for number, chart in enumerate(CHARTS):
        page = page if number % 6 else visit(file)  # chromium asks before a page saves more than ten files
        for kind, start in (*(() if number % 3 else pictures), ("csv", b"site,recipe,threshold,")):
            file_saved = saved(page, f"[data-chart={chart}] [data-save={kind}]", tmp_path)
            assert file_saved.name == f"{chart}.{kind}"
            assert file_saved.read_bytes().startswith(start)
        rows = list(csv.DictReader(file_saved.open(encoding="utf-8")))
        assert set(columns(rows, "site", "recipe", "threshold")) == {("block", "pooled", "1e-05")}
        assert [row.get("run") for row in rows] == [row.get("run") for row in drawn(page, chart)]


def test_what_is_known_without_layers_follows_the_run(visit: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    """Drawn and told of a run of which it is known; of the others, how it is measured."""
    page = visit(file)
    assert page.locator("#matrix").count() == 0, "few runs have none"
    assert said(page, "blocks") == "Not measured of this run: avss ablate --damage does it."
    assert said(page, "kept") == "Nothing was left out and evaluated."
    page.locator("#run").select_option(label=ALPHA)
    blocks = drawn(page, "blocks")
    assert len(blocks) == 36
    assert sum(column(blocks, "nearest")) == 8
    least = min(where(blocks, length=2), key=lambda row: row["distance"])
    assert f"Nearest of 2: from layer {least['start']} (" in said(page, "blocks")
    assert said(page, "kept") == "90% is kept up to 25.0% of the layers (perplexity: a.txt, repaired by refit)."
    for chart in WITHOUT:
        rows = saved_rows(page, f"[data-chart={chart}] [data-save=csv]", tmp_path)
        assert len(rows) == len(drawn(page, chart))
        assert rows[0]["run"] == ALPHA


def said(page: Any, chart: str) -> str:
    text: str = page.locator(f"[data-chart={chart}] .said").inner_text()
    return text


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_nothing_serious(visit: Callable[..., Any], file: Path, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(file, width, color_scheme=scheme)
    page.locator("#run").select_option(label=ALPHA)
    page.wait_for_selector(IDLE)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = axe.run(page).response["violations"]
    assert [(v["id"], column(v["nodes"], "html")) for v in found] == []


def test_a_phone_shows_all_of_it_without_scrolling_sideways(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file, 360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#run").select_option(label=ALPHA)
    for chart in (*CHARTS, *WITHOUT):
        page.wait_for_selector(IDLE)
        box = page.locator(f"[data-chart={chart}] svg").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["width"] > 280


@pytest.mark.parametrize(
    ("report", "subject", "width"), [("file", "scorecard", 1280), ("experiments", "experiment", 360)]
)
def test_the_charts_of_sections_are_drawn_in_the_colors_and_width_of_the_page(
    visit: Callable[..., Any], request: pytest.FixtureRequest, tmp_path: Path, report: str, subject: str, width: int
) -> None:
    page = visit(request.getfixturevalue(report), width, color_scheme="light")
    charts = page.locator(f"[data-chart^={subject}]")
    assert charts.count() > 0
    for place in range(charts.count()):
        chart = charts.nth(place)
        chart.locator("svg").wait_for()
        box = chart.locator("svg").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["width"] > 280
        assert "The CSV file has the numbers." in chart.locator(".view").get_attribute("aria-label")
    page.wait_for_function(DRAWN_IN, arg="light")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("#theme").click()
    page.wait_for_function(DRAWN_IN, arg="dark")
    assert charts.first.evaluate("figure => figure.view.background()") == "#161b22"
    rows = saved_rows(page, charts.first.locator("[data-save=csv]"), tmp_path)
    assert rows
    assert {"low", "high"} <= rows[0].keys()
    assert [row["low"] == "" for row in rows] == [row["low"] is None for row in charts.first.evaluate(ROWS)]


def test_a_table_of_a_section_sorts_and_downloads_whole_intervals(
    visit: Callable[..., Any], experiments: Path, tmp_path: Path
) -> None:
    page = visit(experiments)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    table = page.locator("table[data-name^=experiment]").first
    heading = table.locator("thead th", has_text="95% interval").first
    heading.locator("button").click()
    place = heading.evaluate("cell => cell.cellIndex")
    lows = table.evaluate(f"table => [...table.tBodies[0].rows].map(r => r.cells[{place}].dataset.value)")
    known = [float(low) for low in lows if low]
    assert known == sorted(known)
    assert lows[: len(known)] == [low for low in lows if low]
    rows = saved_rows(page, f"[data-csv={table.get_attribute('data-name')}]", tmp_path)
    assert sum(" to " in [*row.values()][place] for row in rows) == len(known)


def test_a_hostile_name_does_nothing(visit: Callable[..., Any], tmp_path: Path) -> None:
    store = Warehouse(tmp_path / "warehouse")
    names = dict.fromkeys(("model", "family", "dtype", "corpus", "revision"), HOSTILE)
    write_run(store, "hostile", layers=4, **names)
    write_run(store, "other", layers=4, seed=1, model="=SUM(1, 2)")
    write_failed(store, "failed", HOSTILE)
    (tmp_path / "report.html").write_text(report_page(store), encoding="utf-8")
    page = visit(tmp_path / "report.html")
    assert page.evaluate("window.hacked") is None
    page.select_option("#other", index=2)
    page.wait_for_selector(IDLE)
    page.locator("[data-chart=avss] svg .mark-symbol path[aria-label*=hacked]").last.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert page.locator("#vg-tooltip-element img, #vg-tooltip-element script").count() == 0
    models = column(saved_rows(page, "[data-csv=runs]", tmp_path), "model")
    assert HOSTILE in models
    assert "'=SUM(1, 2)" in models  # no formula to a spreadsheet
    picture = saved(page, "[data-chart=heat] [data-save=svg]", tmp_path)
    assert "<img" not in picture.read_text(encoding="utf-8")
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 3


def test_odd_runs_are_drawn_as_far_as_they_go(visit: Callable[..., Any], tmp_path: Path) -> None:
    store = Warehouse(tmp_path / "warehouse")
    write_run(store, "a" * 120, layers=4, shards=1, revision="r" * 200)  # no intervals
    write_run(store, "b-still", layers=5, still=2)  # a layer that adds nothing
    write_run(store, "c-partial", layers=3, sites=("mlp",))  # no block, no rivals
    write_run(store, "d-single", layers=1)
    for step in (1, 2, 3):
        of = {"model": "org/e", "series": "org/e@step*", "training_step": step, "revision": f"r{step}"}
        write_run(store, f"e-{step}", layers=4, seed=step, sites=("block",), **of)
    (tmp_path / "report.html").write_text(report_page(store), encoding="utf-8")
    page = visit(tmp_path / "report.html", 360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    ranks = drawn(page, "curve-1")
    assert list(dict.fromkeys(column(ranks, "point"))) == ["1", "2", "3"]
    assert sorted(column(ranks[:4], "rank")) == [1, 2, 3, 4]
    training = page.locator("#curves").inner_text()
    assert "org/e@step* along training step" in training
    assert "The lowest 25% are those of the last point from" in training
    assert column(page.evaluate("document.querySelector('[data-chart=avss]').rows"), "low") == [None] * 4
    page.select_option("#run", index=1)
    assert drawn(page, "relative_magnitude")[2]["relative_magnitude"] == 0
    assert "relative magnitude (log)" not in page.locator("[data-chart=relative_magnitude] svg").inner_html()
    page.select_option("#run", index=2)
    page.wait_for_selector(IDLE)
    for chart in ("avss", "block_influence"):
        figure = page.locator(f"[data-chart={chart}]")
        assert "not measured at this choice" in figure.locator(".said").inner_text()
        assert figure.locator(".view").is_hidden()
        assert figure.locator("[data-save=png]").is_disabled()
    assert table(page) == []
    assert page.locator("#status").inner_text().endswith("scored in 6 of 7 runs.")
    choose(page, site="mlp")
    assert len(drawn(page, "avss")) == 3
    page.select_option("#run", index=3)
    assert len(drawn(page, "avss")) == 1


def test_a_layer_without_an_interval_or_a_score_is_a_gap(visit: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path / "warehouse"
    write_run(Warehouse(root), "a", layers=8)
    (scores,) = (root / "scores").rglob("*.parquet")
    rows = pq.read_table(scores)
    for name, factor, gaps in (("avss_low", 0.8, [2, 5]), ("avss_high", 1.2, [2, 5]), ("avss_smoothed", 1.0, [5])):
        is_gap = pc.is_in(rows["layer"], pa.array(gaps))
        cells = pc.if_else(is_gap, None, pc.multiply(rows["avss_smoothed"], factor))
        rows = rows.set_column(rows.column_names.index(name), name, cells)
    rewrite_file(scores, rows)
    (tmp_path / "report.html").write_text(report_page(Warehouse(root)), encoding="utf-8")
    page = visit(tmp_path / "report.html")
    paths = page.evaluate(
        """() => ["area", "line"].map((kind) => document.querySelector(
            `[data-chart=avss] .mark-${kind} path`).getAttribute("d").match(/M/g).length)"""
    )
    assert paths == [3, 2]  # stretches of the band, and of the line


def test_one_run_has_nothing_to_correlate_with(visit: Callable[..., Any], tmp_path: Path) -> None:
    write_run(store := Warehouse(tmp_path / "warehouse"), "alone", layers=4)
    (tmp_path / "report.html").write_text(report_page(store), encoding="utf-8")
    page = visit(tmp_path / "report.html")
    assert "It takes two runs" in page.locator("[data-chart=correlation] .said").inner_text()
    assert len(drawn(page, "heat")) == 4


def test_without_scripts_findings_and_runs_are_there(visit: Callable[..., Any], file: Path) -> None:
    page = visit(file, java_script_enabled=False)
    text = page.locator("main").inner_text()
    assert "Tracks depth" in text
    assert "out of memory" in text
    assert "need JavaScript" in text


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of ten runs of two families, one of which has a hostile name."""
    store = Warehouse(tmp_path_factory.mktemp("many"))
    for number in range(9):
        family = "llama" if number % 2 else "gemma"
        write_run(store, f"m{number}", layers=4 + number % 3, seed=number, shards=1, sites=("block",), family=family)
    names = dict.fromkeys(("model", "family", "corpus"), HOSTILE)
    write_run(store, "hostile", layers=4, shards=1, sites=("block",), **names)
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report_page(store), encoding="utf-8")
    return file


def matrix_at(page: Any, row: int, depth: float) -> str:
    """Return the text on the cell of a row of the matrix, counted from the top of its view, at a relative depth."""
    box = page.locator("#matrix-view").bounding_box()
    left = min(box["width"] * 0.34, 300)
    page.locator("#matrix-view").hover(position={"x": left + depth * (box["width"] - left - 4), "y": 16 * row + 9})
    return str(page.inner_text("#matrix-at"))


def test_a_cell_of_the_matrix_tells_the_run_and_the_layer(visit: Callable[..., Any], many: Path) -> None:
    page = visit(many)
    assert page.locator("main > section").first.get_attribute("id") == "matrix"
    row = next(row for row in range(10) if "m5" in matrix_at(page, row, 0.1))
    places = [matrix_at(page, row, (layer + 0.5) / 6).partition(": ")[2] for layer in range(6)]
    assert [place.partition(" of 6, ")[0] for place in places] == [f"layer {layer}" for layer in range(6)]
    assert sum("the least important" in place for place in places) == 1
    assert page.evaluate("window.hacked") is None


def test_the_matrix_fits_a_narrow_page_and_draws_something(visit: Callable[..., Any], many: Path) -> None:
    page = visit(many, 390, color_scheme="dark")
    page.locator("#matrix-fit").evaluate("box => box.click()")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    colors = page.evaluate(
        """() => { const canvas = document.getElementById("matrix-canvas"); const { width, height } = canvas;
        const { data } = canvas.getContext("2d").getImageData(Math.round(width * 0.4), 0, 1, height);
        return new Set(Array.from({ length: height }, (_, i) => data.slice(4 * i, 4 * i + 3).join())).size; }"""
    )
    assert colors > 3


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a training of a hostile name, whose layers change before its last checkpoint."""
    folder = tmp_path_factory.mktemp("training")
    store = Warehouse(folder / "warehouse")
    about: dict[str, Any] = {"series": f"{HOSTILE}@step*", "tokens_fingerprint": "tokens", "shard_tokens": 16}
    for step, still in ((1, None), (2, None), (4, 2)):
        write_run(store, f"a-{step}", layers=4, still=still, training_step=step, revision=f"r{step}", **about)
    (folder / "report.html").write_text(report_page(store), encoding="utf-8")
    return folder / "report.html"


def test_a_map_marks_changes_and_tells_them_at_the_pointer(visit: Callable[..., Any], training: Path) -> None:
    page = visit(training)
    marked = [row for row in drawn(page, "curve-1") if row["changed"]]
    assert {row["point"] for row in marked} == {"4"}
    marks = page.locator("[data-chart=curve-1] svg .mark-symbol.role-mark path")
    assert marks.count() == len(marked)
    marks.first.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.locator("#vg-tooltip-element").inner_text().split()
    assert {"point", "layer", "rank", "changed", "change", "p"} <= {*told}
    assert page.evaluate("window.hacked") is None


def test_a_map_is_saved_as_a_picture_and_as_numbers(visit: Callable[..., Any], training: Path, tmp_path: Path) -> None:
    page = visit(training)
    rows = saved_rows(page, "[data-chart=curve-1] [data-save=csv]", tmp_path)
    assert [row["point"] for row in rows] == ["1"] * 4 + ["2"] * 4 + ["4"] * 4
    picture = saved(page, "[data-chart=curve-1] [data-save=png]", tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
