"""Declarations of the commands: where the help lists each, the class of its values, formats, and examples.

A command is three things beside its declaration: its request, whose docstring is its summary and whose fields are its
options, the Python function that does it, and the function of this package that prints what was done.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avss_dist.core.request import Request


@dataclass(frozen=True)
class Panel:
    """A group of commands in the help.

    Args:
        title: heading.
        module: module of this package that has a function for each command of the group.
    """

    title: str
    module: str


@dataclass(frozen=True)
class Command:
    """A command, of which nothing is imported yet.

    Args:
        name: its words. Its function has the same name, with underscores for spaces.
        panel: group of commands to which it belongs.
        request: module and class of its values. The docstring of the class is the start of the command's help.
        formats: formats of what it prints, the default first.
        examples: examples of its help. A test checks that every option in them exists.
    """

    name: str
    panel: Panel
    request: str
    formats: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    def load_request(self) -> type[Request]:
        """Import the class of the values, and pydantic with it."""
        module, _, name = self.request.rpartition(".")
        request: type[Request] = getattr(import_module(f"avss_dist.{module}"), name)
        return request

    def load_function(self) -> Callable[..., int | None]:
        """Import the function that does the command and prints the result. It returns the exit code."""
        module = import_module(f"avss_dist.cli.{self.panel.module}")
        function: Callable[..., int | None] = getattr(module, self.name.replace(" ", "_"))
        return function

    @property
    def help(self) -> str:
        """Summary, and below it what else the docstring of the request says."""
        module, _, name = self.request.rpartition(".")
        paragraphs = class_docstrings(f"avss_dist.{module}")[name].split("\n\n")
        return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)

    @property
    def summary(self) -> str:
        """First paragraph of the help."""
        return self.help.partition("\n\n")[0]

    @property
    def epilog(self) -> str:
        """Examples, whose lines are not wrapped, and what holds for every command."""
        lines = "\n".join(f"  {line}" for line in self.examples)
        return f"\b\nExamples:\n{lines}\n{FOR_EVERY_COMMAND}"


_CLASS = re.compile(r'^class (\w+)[^\n]*:\n    """(.*?)"""', re.MULTILINE | re.DOTALL)
"""The start of a class, up to the end of its docstring."""


@cache
def class_docstrings(module: str) -> dict[str, str]:
    """Return the docstrings of a module's classes, by name.

    Its source is searched, as a list of commands need not wait for pydantic: to import all requests takes as long as
    the rest of ``avss --help``, to parse them a tenth of it, and to search them nearly nothing.
    """
    spec = find_spec(module)
    loader: Any = spec.loader if spec else None
    source = loader.get_source(module) if loader else None
    if source is None:  # an installation without sources
        classes = inspect.getmembers(import_module(module), inspect.isclass)
        return {name: inspect.cleandoc(vars(cls).get("__doc__") or "") for name, cls in classes}
    return {name: inspect.cleandoc(docstring) for name, docstring in _CLASS.findall(source)}


FOR_EVERY_COMMAND = "--help-all lists all options. Every command takes --quiet and --verbose."
MEASURE = Panel("Measure", "measure")
READ = Panel("Read", "read")
CHANGE = Panel("Change a model", "change")
ELSEWHERE = Panel("Run elsewhere", "jobs")
JOBS = "Jobs on a Ray cluster."
"""Summary of the commands whose names begin with ``jobs``."""
TABLES = ("table", "csv", "json")
TEXT = ("text", "json")
QUERIES = (*TABLES, "markdown", "parquet")
_DECLARED = (
    Command(
        "score",
        MEASURE,
        "requests.ScoreAllRequest",
        formats=TEXT,
        examples=(
            "avss score org/name --corpus your.jsonl:text",
            "avss score model-a model-b --corpus hf:wikitext:wikitext-2-raw-v1 --replicas 4 -w s3://bucket/warehouse",
        ),
    ),
    Command(
        "ablate",
        MEASURE,
        "requests.AblateCommandRequest",
        formats=TABLES,
        examples=(
            "avss ablate org/name --corpus your.txt",
            "avss ablate org/name --corpus your.txt --no-leave-one-out --damage",
        ),
    ),
    Command(
        "evaluate",
        MEASURE,
        "requests.EvaluateCommandRequest",
        formats=TABLES,
        examples=("avss evaluate org/name plan.yaml --tasks perplexity:heldout.txt --tasks hellaswag --limit 200",),
    ),
    Command(
        "shrink",
        MEASURE,
        "requests.ShrinkCommandRequest",
        formats=TEXT,
        examples=(
            "avss shrink org/name --corpus your.txt --share 0.25 -o smaller",
            "avss shrink org/name --corpus your.txt --keep 0.9 -o smaller",
        ),
    ),
    Command(
        "run",
        MEASURE,
        "requests.RunCommandRequest",
        formats=TABLES,
        examples=(
            "avss run jobs/paper_claim.yaml --dry-run",
            "avss run jobs/paper_claim.yaml",
        ),
    ),
    Command(
        "estimate",
        MEASURE,
        "requests.EstimateRequest",
        formats=("table", "json"),
        examples=(
            "avss estimate org/name --max-memory cpu=16GB",
            "avss estimate org/name --ranks 8",
        ),
    ),
    Command(
        "ls",
        READ,
        "read_requests.ListRequest",
        formats=TABLES,
        examples=(
            "avss ls",
            "avss ls evaluations -w s3://bucket/warehouse",
        ),
    ),
    Command(
        "show",
        READ,
        "read_requests.ShowRequest",
        formats=TABLES,
        examples=(
            "avss show --run smollm2 --site update --threshold 0.1rms",
            "avss show --run 'smollm2-*' --format csv -o scores.csv",
            "avss show -o layers.png",
        ),
    ),
    Command(
        "compare",
        READ,
        "read_requests.CompareRequest",
        formats=TABLES,
        examples=(
            "avss compare --by family",
            "avss compare --along step -o ranks.png",
        ),
    ),
    Command(
        "contrast",
        READ,
        "read_requests.ContrastCommandRequest",
        formats=TABLES,
        examples=("avss contrast -w paired --format csv",),
    ),
    Command(
        "findings",
        READ,
        "read_requests.FindingsRequest",
        formats=TABLES,
        examples=(
            "avss findings --every",
            "avss findings --run smollm2 --truth",
        ),
    ),
    Command(
        "report",
        READ,
        "read_requests.ReportRequest",
        examples=("avss report -o report.html",),
    ),
    Command(
        "publish",
        READ,
        "read_requests.PublishRequest",
        examples=("avss publish published",),
    ),
    Command(
        "compact",
        READ,
        "read_requests.CompactRequest",
        examples=("avss compact -w s3://bucket/warehouse",),
    ),
    Command(
        "rm",
        READ,
        "read_requests.RemoveCommandRequest",
        formats=TABLES,
        examples=(
            "avss rm smollm2-1f1353f006 --dry-run",
            "avss rm --unused -w s3://bucket/warehouse",
        ),
    ),
    Command(
        "query",
        READ,
        "read_requests.QueryCommandRequest",
        formats=QUERIES,
        examples=(
            "avss query --schema",
            "avss query 'SELECT model, layer, rank FROM scores_at(0.01) WHERE rank < 4'",
            "avss query @drift --format csv -o drift.csv",
        ),
    ),
    Command(
        "plan",
        CHANGE,
        "requests.PlanRequest",
        examples=(
            "avss plan --by damage --share 0.25 -o plan.yaml",
            "avss plan --by greedy --corpus your.txt --count 4 -o plan.yaml",
            "avss plan --memory 12GB --by damage -o plan.yaml",
        ),
    ),
    Command(
        "sparsify",
        CHANGE,
        "requests.SparsifyRequest",
        examples=(
            "avss sparsify 0.5 -o sparse.yaml",
            "avss sparsify 0.5 --method loss -o sparse.yaml",
        ),
    ),
    Command(
        "quantize",
        CHANGE,
        "requests.PrecisionRequest",
        examples=(
            "avss quantize --bits 4.5 -o bits.yaml",
            "avss quantize --memory 2.5GB --by uniform -o bits.yaml",
        ),
    ),
    Command(
        "prune",
        CHANGE,
        "requests.PruneRequest",
        formats=TEXT,
        examples=("avss prune org/name plan.yaml --repair-corpora your.txt -o pruned",),
    ),
    Command(
        "distill",
        CHANGE,
        "requests.DistillCommandRequest",
        formats=TEXT,
        examples=(
            "avss distill smaller --teacher org/name --corpora your.txt --tokens 1e6 -o distilled",
            "avss distill smaller --teacher org/name --corpora your.txt=3 --watch other.txt --train lora -o distilled",
        ),
    ),
    Command(
        "verify",
        CHANGE,
        "requests.VerifyRequest",
        formats=TEXT,
        examples=(
            "avss verify pruned --server http://localhost:8000",
            "avss verify pruned --server http://localhost:8080 --original http://localhost:8081",
        ),
    ),
    Command(
        "doctor",
        ELSEWHERE,
        "requests.DoctorRequest",
        formats=TEXT,
        examples=("avss doctor --format json",),
    ),
    Command(
        "jobs submit",
        ELSEWHERE,
        "requests.SubmitRequest",
        formats=TEXT,
        examples=("avss jobs submit JOB.yaml --address http://HEAD:8265 --follow",),
    ),
    Command(
        "jobs list",
        ELSEWHERE,
        "requests.ListJobsRequest",
        formats=TABLES,
        examples=("avss jobs list --address http://HEAD:8265 --format json",),
    ),
    Command(
        "jobs logs",
        ELSEWHERE,
        "requests.LogsRequest",
        examples=("avss jobs logs JOB_ID --address http://HEAD:8265 --follow",),
    ),
    Command(
        "jobs stop",
        ELSEWHERE,
        "requests.StopRequest",
        formats=TEXT,
        examples=("avss jobs stop JOB_ID --address http://HEAD:8265",),
    ),
)
COMMANDS = {command.name: command for command in _DECLARED}
"""All commands by name, in the order of the help."""
