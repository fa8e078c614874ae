"""Links, options, queries and names of code in the documentation are valid; its site and its tutorial are whole."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs.outputs import GUIDES, WIDTH, differences, guide, record
from support.command_line import commands as registered
from support.documentation import DOCS, LEFT_OUT, OWN, PAGES, ROOT, abridged, code_blocks, commands, examples, read
from support.reference import reference_markdown
from support.warehouses import unpack_released

import avss_dist
from avss_dist.core.results import TabularResult
from avss_dist.warehouse.reader import Warehouse

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


def known_options() -> set[str]:
    """Return the options of every command."""
    options = {"--install-completion", "--help", "--version"}
    for command in registered().values():
        for parameter in command.params:
            options.update(parameter.opts, parameter.secondary_opts)
    return options


@pytest.mark.parametrize("page", OWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_in_a_sentence_exists(page: Path) -> None:
    known = known_options()
    prose = re.sub(r"```.*?```|^    .*$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", prose):
        if code.split()[0] in ("pip", "ray", "python"):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert option in known, (option, code)


def test_every_option_is_documented() -> None:
    assert reference_markdown() in read(DOCS / "reference" / "commands.md")


def test_every_page_is_in_the_index() -> None:
    linked = re.findall(r"\]\(([\w/-]+\.md)\)", read(DOCS / "index.md"))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert {"index.md", *linked} == pages


def sources() -> Iterator[str]:
    """Yield the text of each file of the project that may name a page."""
    for folder in ("avss_dist", "cluster", "jobs", "tests"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".ipynb", ".md", ".py", ".sh", ".yaml"):
                yield read(path)


def test_every_page_that_the_sources_name_is_there() -> None:
    named = set()
    for text in sources():
        named.update(re.findall(r"(?<![\w.])(?:avss_dist/)?docs/([\w/-]+\.md)", text))
        for name in re.findall(r"""docs_page\(["']([\w/-]+)["']\)""", text):
            named.add(f"{name}.md")
    assert "reference/commands.md" in named
    for name in named:
        assert (DOCS / name).is_file(), name


def test_every_page_is_of_one_kind() -> None:
    pages = [page.relative_to(DOCS) for page in DOCS.rglob("*.md")]
    folders = {page.parent.as_posix() for page in pages}
    assert folders == {".", "guides", "reference", "explanations", "results"}


def test_two_pages_are_of_no_kind() -> None:
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


def test_only_guides_that_the_script_knows_show_outputs() -> None:
    showing = {page for page in DOCS.rglob("*.md") if code_blocks(read(page), "text")}
    assert showing == {guide(name) for name in GUIDES}


@pytest.mark.parametrize("name", GUIDES)
def test_every_output_is_of_the_run_that_the_script_has_kept(name: str) -> None:
    text = read(guide(name))
    outputs = record()
    shown = list(examples(text))
    assert [example.output for example in shown] == code_blocks(text, "text")
    for example in shown:
        assert example.output == abridged(example.output, outputs[example.block]), example.block


def test_no_output_is_kept_that_no_guide_shows() -> None:
    shown = set()
    for name in GUIDES:
        shown.update(example.block for example in examples(read(guide(name))))
    assert record().keys() == shown


def test_outputs_fit_a_terminal() -> None:
    for block, output in record().items():
        for line in output.splitlines():
            assert len(line) <= WIDTH or ": avss " in line, block


def test_prose_names_only_runs_of_the_outputs() -> None:
    printed = "".join(record().values())
    for name in GUIDES:
        for run_id in re.findall(r"\b[\w.-]+-[0-9a-f]{10}\b", read(guide(name))):
            assert run_id in printed, (name, run_id)


def test_a_run_of_another_speed_has_the_same_outputs() -> None:
    slow = {"avss run": "┏━━━━━━━━━━━━┓\n│ 1 min 39 s │\n└────────────┘\n"}
    fast = {"avss run": "┏━━━━━━━━┓\n│ 40.0 s │\n└────────┘\n"}
    assert list(differences(slow, fast)) == []


def test_other_numbers_of_an_output_differ() -> None:
    *_, before, after = differences({"avss show": "rank 1\n"}, {"avss show": "rank 2\n"})
    assert before == "-rank 1"
    assert after == "+rank 2"


PRINTED = """before
┏━━━━━━━┳━━━━━━━┓
┃ layer ┃ value ┃
┡━━━━━━━╇━━━━━━━┩
│   0 * │     1 │
│     1 │     2 │
│       │  more │
│     2 │     3 │
│    29 │     4 │
└───────┴───────┘
some 12 words after
more
"""


def test_an_output_that_leaves_out_nothing_is_whole() -> None:
    assert abridged("│ 0 │ 9 │\n", PRINTED) == PRINTED


def test_rows_of_a_table_are_left_out() -> None:
    lines = PRINTED.splitlines()
    shown = abridged("│ 0 │ 9 │\n...\n│ 29 * │ 9 │\n", PRINTED)
    assert shown.splitlines() == [*lines[:5], LEFT_OUT, *lines[8:]]


def test_lines_before_and_after_are_left_out() -> None:
    shown = abridged("...\n└──┘\nsome 9 words\n...\n", PRINTED)
    assert shown.splitlines() == [LEFT_OUT, *PRINTED.splitlines()[9:11], LEFT_OUT]


def test_a_gap_beside_a_line_that_is_no_longer_printed_is_an_error() -> None:
    with pytest.raises(ValueError, match="│ 30 │"):
        abridged("...\n│ 30 │\n", PRINTED)


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
    assert len(walks) == 3
    for walk in walks:
        assert len(_named_code(walk)) >= 10


PACKAGE = Path(avss_dist.__file__).parent
QUOTED = re.compile(r"``([^`\n]+)``|`([^`\n]+)`")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
FILES = (".json", ".yaml", ".txt", ".cu", ".md")
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def inside(node: ast.AST) -> set[str]:
    """Return the names that a module or class defines, imports or assigns, also to attributes."""
    names: set[str] = set()
    for child in ast.walk(node):
        match child:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.alias(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return names


@cache
def names_by_owner() -> dict[str, set[str]]:
    """Return the names inside of each module, package and class, by its own name. Classes have those of their bases."""
    owners: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path, tree in TREES.items():
        parts = ("avss_dist", *path.with_suffix("").parts)
        for parent, child in itertools.pairwise(parts):
            owners.setdefault(parent, set()).add(child)
        owner = parts[-2] if parts[-1] == "__init__" else parts[-1]
        owners.setdefault(owner, set()).update(inside(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, set()).update(inside(node))
                names_of_bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
                bases.setdefault(node.name, set()).update(names_of_bases)
    for _ in range(4):  # levels of inheritance
        for name, parents in bases.items():
            for parent in parents:
                owners[name].update(owners.get(parent, ()))
    return owners


def exists(name: str) -> bool:
    """Return whether each part of a name is inside of the part before it. An argument may stand for its class."""
    first, *others = name.split(".")
    class_name = first.title().replace("_", "")
    return are_nested([first, *others]) or are_nested([class_name, *others])


def are_nested(parts: list[str]) -> bool:
    """Return whether each name is inside of the one before it."""
    owners = names_by_owner()
    return all(part in owners.get(owner, ()) for owner, part in itertools.pairwise(parts))


def references(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of every dotted name in backticks, in strings that are statements."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for double, single in QUOTED.findall(node.value.value):
                name = double or single
                if DOTTED.fullmatch(name) and not name.endswith(FILES):
                    yield node.lineno, name


def is_elsewhere(name: str) -> bool:
    """Return whether a name may be another package's, installed or an extra, such as ``torch.Tensor``."""
    root = name.partition(".")[0]
    return root in (*sys.stdlib_module_names, "datasets", "lm_eval") or importlib.util.find_spec(root) is not None


def test_every_dotted_name_in_a_docstring_exists() -> None:
    missing = []
    for path, tree in TREES.items():
        for line, name in references(tree):
            is_own = name.startswith("avss_dist.") or not is_elsewhere(name)
            if is_own and not exists(name):
                missing.append(f"{path}:{line}: {name}")
    assert not missing, "\n".join(["These names do not exist:", *missing])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("avss_dist.partition.replica.Replica", True),
        ("replica.Replica.forward", True),
        ("placement.ranks", True),
        ("errors.AvssError", True),
        ("config.SCORES", False),
        ("partition.replica.Replicas", False),
        ("replica.Replica.forwards", False),
    ],
)
def test_a_stale_name_is_noticed(name: str, expected: bool) -> None:
    assert exists(name) is expected


LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Attributes of elements that a browser fetches without a click."""
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


class Fetched(HTMLParser):
    """The addresses that a browser fetches for a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get(LOADED.get(tag, ""))
        if address and values.get("rel") not in ("canonical", "next", "prev", "edit"):
            self.addresses.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link or anchor, or a page that the navigation lacks, is an error."""
    pytest.importorskip("material", reason="no mkdocs-material: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    words += ["-f", str(ROOT / ".mkdocs.yml"), "-d", str(folder)]
    done = subprocess.run(words, env=os.environ | NO_NETWORK, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.nightly
def test_every_page_is_built(site: Path) -> None:
    sources = [page.relative_to(DOCS) for page in DOCS.rglob("*.md")]
    expected = {page.with_suffix(".html") for page in sources}
    built = {page.relative_to(site) for page in site.rglob("*.html")}
    assert built == expected | {Path("404.html")}


@pytest.mark.nightly
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        addresses = Fetched(read(page)).addresses
        assert addresses, page
        for address in addresses:
            assert not re.match(r"(https?:)?//", address), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", read(sheet)), sheet


@pytest.mark.nightly
def test_tables_and_lists_are_no_paragraphs(site: Path) -> None:
    """A table or a list that follows a line without an empty one between is text in the site, though not on GitHub."""
    for page in site.rglob("*.html"):
        for paragraph in re.findall(r"<p>(.*?)</p>", read(page), re.DOTALL):
            assert not re.search(r"^(\||- |\d+\. )", paragraph, re.MULTILINE), page


NOTEBOOK = json.loads(read(ROOT / "jobs" / "tutorial.ipynb"))


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, if that is an expression, as a notebook shows it."""
    *before, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        exec(source, names)
        return None
    exec(compile(ast.Module(before, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.nightly
def test_the_tutorial_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = []
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs"), "what is stored runs anew"
        if cell["cell_type"] == "code":
            shown.append(run_cell("".join(cell["source"]), names))
            if "MODEL" in names:  # the first cell says what is read
                names |= {"MODEL": str(tiny_llama), "READ": {"max_sequences": 16, "sequence_length": 32}}
                names["READ"] |= {"executor": "local", "sequences_per_shard": 2}
    results = [value for value in shown if isinstance(value, TabularResult)]
    assert [type(value).__name__ for value in results] == ["Run", "Table", "Ablation", "Evaluations"]
    for value in results:
        assert "<table>" in value._repr_html_()
    assert set(names["kept"].table()["subject"].to_pylist()) >= {"damage.yaml", "avss.yaml"}
