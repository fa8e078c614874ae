"""Endings of files that are written: none holds what its name does not say."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import mistake, succeed
from support.warehouses import write_scores

import avss_dist
from avss_dist.core.endings import PAGES, PLAN_FILES, require_ending, require_picture, require_table_file
from avss_dist.core.errors import ConfigError, QueryError
from avss_dist.read_requests import ReportRequest
from avss_dist.requests import PlanRequest, PrecisionRequest, SparsifyRequest

FORMATS = ("table", "csv", "json")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_scores(tmp_path / "w", "a", [1.0, 2.0, 3.0])
    return tmp_path / "w"


@pytest.mark.parametrize("name", ["page.html", "page.HTM", "page", "page-1.5b", "/dev/stdout"])
def test_a_name_that_promises_nothing_else_is_taken(name: str) -> None:
    assert require_ending(PAGES, "a page")(name) == name


@pytest.mark.parametrize("name", ["x.png", "x.PDF", "x.csv", "x.html"])
def test_a_plan_is_not_written_to_a_file_of_other_content(name: str) -> None:
    with pytest.raises(ConfigError, match=f"expected a file for a plan, not '{name}'.\nName one that ends in .yaml"):
        require_ending(PLAN_FILES, "a plan")(name)


@pytest.mark.parametrize("name", ["x.pdf", "x.csv", "x"])
def test_a_picture_has_an_ending_that_can_be_drawn(name: str) -> None:
    with pytest.raises(QueryError, match="does not say what to draw"):
        require_picture(name)


@pytest.mark.parametrize(
    ("name", "format"), [("x.csv", "csv"), ("x.txt", "table"), ("x.txt", "csv"), ("x", "json"), ("x.jsonl", "json")]
)
def test_a_table_goes_where_its_format_belongs(name: str, format: str) -> None:
    require_table_file(name, format, FORMATS)


def test_a_table_of_another_format_names_the_format() -> None:
    with pytest.raises(QueryError, match=r"'x.csv' is no file of `format` table.\nAdd `format` csv."):
        require_table_file("x.csv", "table", FORMATS)


def test_a_table_is_not_written_into_a_picture() -> None:
    expected = r"'x.png' is no file of a table.\nName one that ends in .txt \(`format` table\), .csv \(`format` csv\)"
    with pytest.raises(QueryError, match=expected):
        require_table_file("x.png", "table", FORMATS)


@pytest.mark.parametrize(
    "words",
    [
        ("show", "--quantiles", "-o", "x.png"),
        ("show", "--sparsity", "0.5", "-o", "x.svg"),
        ("show", "--experts", "-o", "x.html"),
        ("show", "--format", "csv", "-o", "x.png"),
        ("show", "-o", "x.pdf"),
        ("query", "FROM runs", "-o", "x.png"),
        ("compare", "-o", "x.pdf"),
        ("report", "-o", "x.png"),
        ("plan", "--by", "avss", "-o", "x.png"),
    ],
)
def test_no_command_writes_what_its_file_does_not_say(
    words: tuple[str, ...], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    mistake(*words, "-w", root)
    assert [file.name for file in root.parent.iterdir()] == ["w"]


def test_a_refused_picture_of_scores_names_those_that_are_valid(root: Path) -> None:
    assert "Pictures of scores end in .png, .svg, .html." in mistake("show", "-w", root, "-o", "x.pdf")


def test_a_table_is_written_to_a_file_of_its_format(root: Path) -> None:
    file = root.parent / "x.csv"
    succeed("show", "-w", root, "--format", "csv", "-o", file)
    assert file.read_text().startswith("run_id,")


def test_python_draws_no_picture_of_quantiles(root: Path) -> None:
    with pytest.raises(QueryError, match="is a picture of scores"):
        avss_dist.show(warehouse=root, quantiles=True, output="x.png")


@pytest.mark.parametrize(
    ("request_type", "values"),
    [
        (ReportRequest, {"output": "x.png"}),
        (PlanRequest, {"output": "x.png"}),
        (SparsifyRequest, {"output": "x.png", "target": 0.5}),
        (PrecisionRequest, {"output": "x.png", "bits": 5.0}),
    ],
)
def test_files_are_checked_with_the_other_options(request_type: type, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="`output`: expected a file for"):
        request_type(**values)
