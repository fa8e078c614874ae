"""Links, commands, options, queries and code names in the documentation are valid."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import commands as registered
from support.documentation import DOCS, OWN, PAGES, ROOT, code_blocks, commands, read
from support.warehouses import unpack_released

from avss_dist.cli.reference import reference_markdown
from avss_dist.warehouse.reader import Warehouse

OPTIONS = {
    name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    for name, command in registered().items()
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(read(there)), target


@pytest.mark.parametrize("page", OWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_in_a_sentence_exists(page: Path) -> None:
    known = set().union(*OPTIONS.values()) | {"--install-completion", "--help", "--version"}
    prose = re.sub(r"```.*?```|^    .*$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", prose):
        if code.split()[0] in ("pip", "ray", "python"):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert option in known, (option, code)


def test_every_option_is_documented() -> None:
    assert reference_markdown() in read(DOCS / "reference" / "commands.md")


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", read(DOCS / "index.md")))
    assert linked == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"index.md"}


def test_every_page_that_the_sources_name_is_there() -> None:
    sources = [path for folder in ("avss_dist", "cluster", "jobs", "tests") for path in (ROOT / folder).rglob("*.*")]
    texts = [read(path) for path in sources if path.suffix in (".ipynb", ".md", ".py", ".sh", ".yaml")]
    named = {name for text in texts for name in re.findall(r"(?<![\w.])(?:avss_dist/)?docs/([\w/-]+\.md)", text)}
    named |= {f"{name}.md" for text in texts for name in re.findall(r"""docs_page\(["']([\w/-]+)["']\)""", text)}
    assert "reference/commands.md" in named
    assert not [name for name in sorted(named) if not (DOCS / name).is_file()]


def test_every_page_is_of_one_kind() -> None:
    folders = {page.parent.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert folders == {".", "guides", "reference", "explanations", "results"}
    assert {page.name for page in DOCS.glob("*.md")} == {"index.md", "architecture.md"}


@pytest.mark.parametrize("page", sorted((DOCS / "results").glob("*.md")), ids=lambda page: page.stem)
def test_results_name_the_machine_the_date_and_the_command(page: Path) -> None:
    for fact in ("machines?", "date", "command"):
        assert re.search(rf"^\| {fact} \| .", read(page), re.MULTILINE), fact


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    return Warehouse(unpack_released(tmp_path_factory.mktemp("released")))


@each_page
def test_every_query_runs(page: Path, warehouse: Warehouse) -> None:
    for words in commands(read(page)):
        if words[0] == "query" and len(words) > 1 and not words[1].startswith(("@", "-")):
            warehouse.sql(words[1])


@each_page
def test_every_block_of_yaml_and_python_is_one(page: Path) -> None:
    for block in code_blocks(read(page), "yaml"):
        yaml.safe_load(block)
    for block in code_blocks(read(page), "python"):
        ast.parse(block)


def _named_code(text: str) -> set[str]:
    return set(re.findall(r"`(avss_dist(?:\.\w+)+)`", text))


@each_page
def test_code_that_is_named_is_there(page: Path) -> None:
    for name in sorted(_named_code(read(page))):
        _resolve(name)


def _resolve(name: str) -> Any:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_the_walks_name_their_functions_in_full() -> None:
    walks = re.findall(r"^## Walk .*?(?=^## |\Z)", read(DOCS / "architecture.md"), re.DOTALL | re.MULTILINE)
    assert len(walks) == 2
    for walk in walks:
        assert len(_named_code(walk)) >= 10
