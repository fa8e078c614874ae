"""Make the values that this package computes, and print a digest of each class of them: a change must not move them.

    python tests/benchmarks/same_numbers.py > before.txt                    # minutes
    python tests/benchmarks/same_numbers.py --compare before.txt            # exit code 1 if anything differs
    python tests/benchmarks/same_numbers.py --quick --compare before.txt    # without SmolLM2 and Ray: a minute
    python tests/benchmarks/same_numbers.py --only zero3 contrast

A line has the name of a class (case, model, table, column), the number of its values, and the start of the SHA-256 of
them as JSON, in which each float is written so that it can be read back to the bit. Rows are in the order of their
keys. Times, folders and ids of runs are left out. The lines are those of one machine: another processor adds up in
another order. Columns without a value have no line, so a column that nothing writes can go unnoticed.

A comparison covers the cases that were made this time.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # the package beside this file, whichever is installed
    sys.path[:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the order of its sums depends on it

import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file
from support.checkpoints import llama, save_tokenizer
from support.command_line import json_rows, succeed
from support.families import lively, tiny_model
from support.pairs import write_pairs
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import avss_dist
from avss_dist import Warehouse
from avss_dist.core.intervention import removal_names, stored_removals
from avss_dist.reports.page.page import report_page

REPOSITORY = Path(__file__).parents[2]
TEXT = "builtin:pydoc"
CPU: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
LOCAL: dict[str, Any] = {"executor": "local", "partition": "single"}
ROWS: dict[str, Any] = {"max_sequences": 26, "sequence_length": 32, "batch_size": 2, **CPU}
SHARDS: dict[str, Any] = {**ROWS, "sequences_per_shard": 3}
"""Nine shards, the last of them shorter: intervals need eight."""
FEW: dict[str, Any] = {**ROWS, "max_sequences": 8}

KEYS: dict[str, Sequence[str]] = {
    "scores": ("site", "recipe", "threshold_kind", "threshold", "layer"),
    "layer_stats": ("site", "layer"),
    "stratum_stats": ("stratum", "site", "layer"),
    "row_stats": ("row", "site", "layer"),
    "expert_stats": ("layer", "expert"),
}
"""Columns that order the rows of a model in a table."""
OF_ROWS = {*chain(*KEYS.values()), "depth", "pair", "prompt_tokens", "answer_tokens"}
NO_VALUES = {"run_id", "model", "revision", "family", "layer_name", "a_run_id", "b_run_id"}
"""Columns that tell whose a row is."""
OF_EVALUATIONS = [
    "subject",
    "dropped",
    "task",
    "metric",
    "value",
    "stderr",
    "whole",
    "retention",
    "retention_low",
    "retention_high",
]
"""Columns of evaluations that compare each model with its whole model alone."""
STATISTICS = {
    "counts": "thresholds near_zero count zero_count nonfinite_count token_count unit_count sequence_count",
    "moments": "mean m2 min max max_abs pooled_variance_sum unit_sum unit_sum_sq",
    "updates": "cosine_sum angular_sum relative_magnitude_sum",
    "input": "input_count input_mean input_m2",
    "first": "first_count first_mean first_m2",
    "quantile": "abs_value abs_value_count abs_value_cut",
    "histogram": "histogram_bin histogram_count",
}
CLASSES: dict[str, Mapping[str, str]] = {
    "scores": {
        "avss": "nav nas avss avss_smoothed avss_normalized avss_cumulative rank",
        "counts": "count near_zero_count variance sparsity quality",
        "interval": "avss_low avss_high lowest_set_probability",
    },
    "layer_stats": STATISTICS,
    "stratum_stats": STATISTICS,
    "row_stats": {"statistics": "count near_zero mean m2 pooled_variance norm relative_magnitude"},
    "expert_stats": {
        "counts": "routed_tokens output_count token_count",
        "sums": "gate_sum gated_norm_sum output_sum output_sum_sq router_entropy_sum",
    },
}
"""Columns of a table that have a line together. Every other column has a line of its own, so that one that the package
no longer writes changes no other line."""
PASSING = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d|tokens/s|^[\d,.]+$")
"""Texts of a page that hold times or speeds, and numbers alone: those of tables, which have lines elsewhere."""
LINE = re.compile(r"(?P<name>\S+) +(?P<number>\d+) (?P<digest>[0-9a-f]{16})")
RUN_ID = re.compile(r"-[0-9a-f]{10}\b")


def count_values(value: Any) -> int:
    """Return the number of values in nested lists and mappings that are not null."""
    if isinstance(value, Mapping):
        return sum(map(count_values, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(count_values, value))
    return value is not None


class Goldens:
    """The lines of a case, and the folder in which all cases are made.

    Attributes:
        lines: number of values and digest, by name.
    """

    def __init__(self, folder: Path, case: str) -> None:
        self._root = folder
        self._case = case
        self.lines = dict[str, str]()

    def add(self, name: str, values: Any) -> None:
        """Add the line of a class, unless it has no values."""
        text = json.dumps(values, sort_keys=True, default=str).replace(str(self._root), "")
        name = f"{self._case}.{name}"
        assert name not in self.lines, name
        if number := count_values(values):
            digest = hashlib.sha256(RUN_ID.sub("", text).encode()).hexdigest()
            self.lines[name] = f"{number} {digest[:16]}"

    def add_table(self, name: str, table: pa.Table) -> None:
        """Add the line of a table, whose rows are in a stable order."""
        self.add(name, {column: table[column].to_pylist() for column in value_columns(table)})

    def add_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add the line of rows that are no table yet, unless there are none."""
        if rows:
            self.add_table(name, pa.Table.from_pylist(rows))

    def add_warehouse(self, warehouse: Path) -> None:
        """Add the lines of all tables of measurements and evaluations, for each model."""
        opened = Warehouse(warehouse)
        for table, keys in KEYS.items():
            order = [(key, "ascending") for key in keys]
            for model, rows in by_model(opened.table(table)).items():
                ordered = rows.sort_by(order)
                for kind, names in classes_of(table, with_values(rows)).items():
                    self.add_table(f"{model}.{table}.{kind}", ordered.select(names))
        evaluations = opened.table("evaluations")
        for model, rows in by_model(evaluations).items():
            self._add_evaluations(model, rows.to_pylist())

    def _add_evaluations(self, model: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add a line for each metric of each kind of task. Metrics of single maps are one: ``name:map``.

        The hash of a patch is left out: its file names the folder of the model.
        """
        values = defaultdict[str, list[Any]](list)
        for row in rows:
            task = kind_of(row["task"])
            metric = kind_of(row["metric"])
            about = [removed_parts(row), *values_of(row, "layer", "factor", "rounding", "sparsity_plan")]
            value = [row["metric"], about, *values_of(row, "value", "stderr", "num_samples")]
            values[f"{task}.{metric}"].append(value)
        self._add_sorted(f"{model}.", values)

    def add_experiments(self, warehouse: Path) -> None:
        """Add a line for the rows of each task and metric of an experiment, by method, share and repair."""
        values = defaultdict[str, list[Any]](list)
        rows = Warehouse(warehouse).table("experiments")
        for row in rows.to_pylist():
            task = kind_of(row["task"])
            about = values_of(row, "method", "share", "control", "seed", "repair")
            value = values_of(row, "value", "stderr", "retention", "retention_low", "retention_high")
            values[f"experiments.{task}.{row['metric']}"].append([about, removed_parts(row), value])
        self._add_sorted("", values)

    def _add_sorted(self, prefix: str, values: Mapping[str, list[Any]]) -> None:
        """Add a line for the values of each name, in an order that does not depend on that of the rows."""
        for name, unordered in values.items():
            self.add(f"{prefix}{name}", sorted(unordered, key=json.dumps))

    def add_page(self, warehouse: Path) -> None:
        """Add lines for the texts of the report page of a warehouse, and for the data that its charts draw.

        Texts in which times, folders and versions stand are left out.
        """
        page = report_page(Warehouse(warehouse))
        reader = PageReader()
        reader.feed(page)
        self.add("page.texts", [text for text in reader.texts if not PASSING.search(text)])
        packed = base64.b64decode(reader.data)
        data = json.loads(gzip.decompress(packed))
        for name, values in data.items():
            self.add(f"page.data.{name}", [values])

    def add_checkpoint(self, name: str, folder: Path) -> None:
        """Add a line for the weights of a checkpoint, as numbers of 8 bits."""
        tensors: dict[str, torch.Tensor] = {}
        files = sorted(folder.glob("*.safetensors"))
        for file in files:
            tensors |= load_file(file)
        self.add(name, {key: tensor.view(torch.uint8).tolist() for key, tensor in tensors.items()})

    def model(self, name: str) -> str:
        """Return the folder of a tiny checkpoint, which is written when it is first asked for."""
        folder = self._root / "models" / name
        if not folder.exists():
            model = MODELS[name]()
            model.save_pretrained(folder)
            save_tokenizer(folder)
        return str(folder)

    def models(self, *names: str) -> list[str]:
        """Return the folders of several tiny checkpoints."""
        return [self.model(name) for name in names]


class Inside(NamedTuple):
    """The element of a page that a text is in."""

    tag: str
    id: str


OUTSIDE = Inside("", "")


class PageReader(HTMLParser):
    """Reader of a report page.

    Attributes:
        texts: the visible texts, in order.
        data: the packed data of the charts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.texts = list[str]()
        self.data = ""
        self._inside = OUTSIDE

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note which element, of which id, the next text is in."""
        name = dict(attrs).get("id")
        self._inside = Inside(tag, name or "")

    def handle_endtag(self, tag: str) -> None:
        """Note that the next text is in no script or style."""
        self._inside = OUTSIDE

    def handle_data(self, data: str) -> None:
        """Take a text, unless it is a program or a style."""
        if self._inside.id == "data":
            self.data = data
            return
        if self._inside.tag in ("script", "style"):
            return
        text = " ".join(data.split())
        if text:
            self.texts.append(text)


def removed_parts(row: Mapping[str, Any]) -> list[int | str]:
    """Return the layers, sublayers and experts that a row is without, as plans name them."""
    if row.get("drop") is None:
        return []
    return removal_names(stored_removals(row))


def with_values(table: pa.Table) -> list[str]:
    """Return the names of the columns that are not null everywhere, in alphabetical order."""
    return [name for name in sorted(table.column_names) if table[name].null_count < len(table)]


def value_columns(table: pa.Table) -> list[str]:
    """Return the names of the columns with values, but those that tell whose a row is."""
    return [column for column in with_values(table) if column not in NO_VALUES]


def values_of(row: Mapping[str, Any], *columns: str) -> list[Any]:
    """Return the values of a row in some columns; None where the table lacks one."""
    return [row.get(column) for column in columns]


def fields_of(entry: object, *names: str) -> dict[str, Any]:
    """Return some fields of an entry of a plan by name."""
    return {name: getattr(entry, name) for name in names}


def names_of(removals: Iterable[object]) -> list[str]:
    """Return the layers, sublayers and experts that a plan drops as texts."""
    return [str(removal) for removal in removals]


def kind_of(name: str) -> str:
    """Return the part of a task's or a metric's name that says of which kind it is."""
    return name.partition(":")[0]


def class_of(table: str, column: str) -> str:
    """Return the name of the class that a column of a table belongs to: its own, if it belongs to no other."""
    if column in OF_ROWS:
        return "rows"
    for kind, names in CLASSES[table].items():
        if column in names.split():
            return kind
    return column


def classes_of(table: str, columns: Iterable[str]) -> dict[str, list[str]]:
    """Return the columns of a table that have a line together, by the name of their class."""
    classes = defaultdict[str, list[str]](list)
    for column in columns:
        classes[class_of(table, column)].append(column)
    return {kind: columns for kind, columns in classes.items() if not NO_VALUES.issuperset(columns)}


def by_model(table: pa.Table) -> dict[str, pa.Table]:
    """Return the rows of each model by the last part of its name."""
    rows = {}
    if len(table):
        for name in sorted(set(table["model"].to_pylist())):
            rows[Path(name).name] = table.filter(pc.equal(table["model"], name))
    return rows


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: lively(llama(num_hidden_layers=5)),
    "deep": lambda: llama(num_hidden_layers=12, initializer_range=0.3),
    "deep-other": lambda: llama(seed=1, num_hidden_layers=12, initializer_range=0.3),
    "llama-wide": lambda: llama(hidden_size=64, intermediate_size=128, num_hidden_layers=4, initializer_range=0.3),
    "mixture": lambda: lively(tiny_model("causal", "qwen3_moe")),
    "gpt2": lambda: lively(tiny_model("causal", "gpt2")),
    "bert": lambda: lively(tiny_model("masked", "bert")),
}


Case = Callable[[Goldens, Path], None]
"""A function that adds lines, and the folder that it may fill."""
Outcomes = dict[str, str]


class NotMadeError(Exception):
    """The reason why a case cannot be made on this machine."""


def smollm2(goldens: Goldens, folder: Path) -> None:
    """Score SmolLM2 at five sites."""
    script = REPOSITORY / "jobs" / "fetch_smollm2.py"
    fetched = subprocess.run([sys.executable, script], capture_output=True, text=True)
    if fetched.returncode:
        reason = fetched.stderr.strip()[-200:]
        raise NotMadeError(f"there is no checkpoint: {reason}")
    printed = fetched.stdout.strip()
    model = printed.splitlines()[-1]
    rows = {"max_sequences": 16, "sequence_length": 128, "batch_size": 2, "sequences_per_shard": 2, **CPU}
    avss_dist.score(model, corpus=TEXT, warehouse=folder, **rows, **LOCAL)
    goldens.add_warehouse(folder)


def measure(goldens: Goldens, folder: Path, *models: str, **place: Any) -> None:
    """Score models, and ask the first one for losses without layers, Shapley values and gradients."""
    names = goldens.models(*models)
    score_all(names, folder, experts="mixture" in models, **SHARDS, **place)
    options = {**FEW, "sequences_per_shard": 3, **place}
    avss_dist.ablate(names[0], corpus=TEXT, warehouse=folder, shapley=1, gradients=True, **options)
    goldens.add_warehouse(folder)


def score_all(models: Sequence[str], warehouse: Path, **options: Any) -> None:
    """Score models, none of which may fail."""
    for run in avss_dist.score_all(models, corpus=TEXT, warehouse=warehouse, **options):
        assert run.status == "done", run.error


def score(model: str, warehouse: Path, **options: Any) -> None:
    """Score a model in this process, in nine shards."""
    avss_dist.score(model, corpus=TEXT, warehouse=warehouse, **options, **SHARDS, **LOCAL)


def evaluate(warehouse: Path, *subjects: str | Path) -> avss_dist.Evaluations:
    """Evaluate models and plans on text that nothing was scored on."""
    tasks = [f"perplexity:{TEXT}"]
    return avss_dist.evaluate(subjects, tasks=tasks, warehouse=warehouse, skip_sequences=30, **FEW, **LOCAL)


def local(goldens: Goldens, folder: Path) -> None:
    """Measure models of four families in this process."""
    measure(goldens, folder, "llama", "mixture", "gpt2", "bert", **LOCAL)


def streaming(goldens: Goldens, folder: Path) -> None:
    """Measure models of which a few layers are in memory at a time."""
    measure(goldens, folder, "llama", "mixture", executor="local", partition="streaming")


def contrast(goldens: Goldens, folder: Path) -> None:
    """Contrast two labels of paired text, in each reading."""
    pairs = write_pairs(folder, 12)
    warehouse = folder / "w"
    options = {**SHARDS, "max_sequences": None, "sequence_length": 64, "sequences_per_shard": 4}
    avss_dist.score(goldens.model("llama"), corpus=pairs, warehouse=warehouse, **options, **LOCAL)
    goldens.add_warehouse(warehouse)
    labels = ("--hallucinated", "bad", "--truthful", "good", "--format", "json")
    for recipe in ("pooled", "element", "unit"):
        command = ("contrast", "-w", warehouse, "--recipe", recipe, "--threshold", "1e-2", *labels)
        goldens.add_rows(f"{recipe}.layers", printed_rows(*command))
        goldens.add_rows(f"{recipe}.predictions", printed_rows(*command, "--predictions"))


def printed_rows(*command: object) -> list[dict[str, Any]]:
    """Return the rows that a command prints as JSON."""
    done = succeed(*command)
    return json_rows(done.stdout)


def ablation(goldens: Goldens, folder: Path) -> None:
    """Ablate each layer and sublayer, with Shapley values, gradients and damage; choose layers by them."""
    model = goldens.model("llama")
    score(model, folder)
    measured = {"sublayers": True, "shapley": 4, "gradients": True, "damage": True}
    done = avss_dist.ablate(model, corpus=TEXT, warehouse=folder, **measured, **FEW, **LOCAL)
    goldens.add_table("table", done.table())
    goldens.add_warehouse(folder)
    for name in ("avss", "block_influence", "loss", "shapley", "damage"):
        plan = avss_dist.plan(warehouse=folder, by=name, count=2)
        goldens.add(f"plan.{name}", names_of(plan.drop))
    greedy = avss_dist.plan(warehouse=folder, by="greedy", count=2, corpus=TEXT, **FEW, **LOCAL)
    goldens.add("plan.greedy", names_of(greedy.drop))


def sparsity(goldens: Goldens, folder: Path) -> None:
    """Make sparsity plans by four methods, and evaluate two of them."""
    warehouse = folder / "w"
    score(goldens.model("llama"), warehouse, sites=("block", "inputs"))
    for method in ("loss", "teal", "acttail", "wina"):
        plan = avss_dist.sparsify(0.5, warehouse=warehouse, method=method, **FEW, **LOCAL)
        maps = [fields_of(entry, "layer", "map", "site", "by", "value", "sparsity") for entry in plan.projections]
        goldens.add_rows(method, maps)
        plan.write(folder / f"{method}.yaml")
    table = evaluate(warehouse, folder / "teal.yaml", folder / "wina.yaml").table()
    goldens.add_table("table", table.select(OF_EVALUATIONS))
    goldens.add_table("differences", table.drop_columns(OF_EVALUATIONS))
    goldens.add_warehouse(warehouse)


def repair(goldens: Goldens, folder: Path) -> None:
    """Prune a layer, repair the rest in two ways, and evaluate what is left."""
    model = goldens.model("llama-wide")
    warehouse = folder / "w"
    plan = plan_without_the_third(model)
    texts: dict[str, Any] = {"repair_corpora": [TEXT], "warehouse": warehouse, **ROWS, **LOCAL}
    written = []
    for name in ("none", "map", "refit"):
        options = {} if name == "none" else texts
        done = avss_dist.prune(model, plan, folder / f"pruned-{name}", repair=name, **options)
        goldens.add_checkpoint(f"weights.{name}", Path(done.folder))
        written.append(done.folder)
    evaluate(warehouse, model, *written)
    goldens.add_warehouse(warehouse)


def plan_without_the_third(model: str) -> avss_dist.Plan:
    """Return a plan that drops the third of four layers."""
    return avss_dist.Plan(model=model, num_layers=4, layers="layers", drop=(2,))


def distillation(goldens: Goldens, folder: Path) -> None:
    """Distill a pruned model in 32 steps."""
    teacher = goldens.model("llama-wide")
    student = folder / "student"
    avss_dist.prune(teacher, plan_without_the_third(teacher), student)
    options = {"tokens": 32 * 4 * 32, "sequence_length": 32, "batch_size": 4, "max_sequences": 64, "held_out": 4}
    options |= {"self_texts": 0, "learning_rate": 3e-4, "warmup": 2, "evaluations": 2, **CPU}
    for train in ("all", "lora"):
        out = folder / train
        done = avss_dist.distill(student, teacher=teacher, corpora=[TEXT], output=out, train=train, **options)
        goldens.add_checkpoint(f"weights.{train}", out)
        goldens.add_table(train, done.table())


def precision(goldens: Goldens, folder: Path) -> None:
    """Predict the losses of rounded weights, choose formats under a budget, and evaluate the choice."""
    model = goldens.model("llama-wide")
    warehouse = folder / "w"
    score(model, warehouse)
    formats = ("int4-g32", "int8")
    avss_dist.ablate(model, corpus=TEXT, warehouse=warehouse, quantize=formats, **FEW, **LOCAL)
    plan = avss_dist.quantize(bits=5.5, warehouse=warehouse, quantize=formats)
    maps = [fields_of(entry, "layer", "map", "format", "bits") for entry in plan.rounded]
    goldens.add_rows("plan", maps)
    plan_file = folder / "plan.yaml"
    plan.write(plan_file)
    evaluate(warehouse, plan_file)
    goldens.add_warehouse(warehouse)


def experts(goldens: Goldens, folder: Path) -> None:
    """Choose routed experts to remove, and write the mixture without them."""
    model = goldens.model("mixture")
    warehouse = folder / "w"
    score(model, warehouse, experts=True)
    for name in ("reap", "tokens", "gate"):
        plan = avss_dist.plan(warehouse=warehouse, by=name, experts=0.25)
        goldens.add(f"plan.{name}", names_of(plan.drop))
        done = avss_dist.prune(model, plan, folder / name, repair="refit", repair_corpora=[TEXT], **ROWS, **LOCAL)
        goldens.add_checkpoint(f"weights.{name}", Path(done.folder))


def sixteen_bits(goldens: Goldens, folder: Path) -> None:
    """Measure models in bfloat16 and float16, whose activations are counted by their bit patterns."""
    names = goldens.models("llama", "mixture")
    for dtype in ("bfloat16", "float16"):
        warehouse = folder / dtype
        shards = {**SHARDS, "dtype": dtype}
        score_all(names, warehouse, experts=True, **shards, **LOCAL)
        rows = {**FEW, "dtype": dtype}
        avss_dist.ablate(names[0], corpus=TEXT, warehouse=warehouse, damage=True, **rows, **LOCAL)
        part = Goldens(folder, f"sixteen_bits.{dtype}")
        part.add_warehouse(warehouse)
        goldens.lines |= part.lines


def experiment(goldens: Goldens, folder: Path) -> None:
    """Run a job with an experiment: every kind of method, control and repair; then write the page of its warehouse."""
    job_file = folder / "job.yaml"
    warehouse = folder / "w"
    scored = {"max_sequences": 16, "sequence_length": 32, "batch_size": 2, "sequences_per_shard": 2, **CPU}
    asked = {
        "tasks": [f"perplexity:{TEXT}"],
        "scores": ["avss", "avss:update:unit:0.1rms", "block_influence", "greedy"],
        "shares": [0.25, 0.5],
        "random": 2,
        "repairs": ["none", "refit"],
        "repair_corpora": [TEXT],
        "repair_skip_sequences": 40,
        "repair_max_sequences": 40,
        "search_max_sequences": 4,
        "skip_sequences": 20,
        "max_sequences": 8,
    }
    models = goldens.models("llama-wide", "llama")
    job = {"warehouse": str(warehouse), "models": models, "corpora": [TEXT], "settings": scored, "experiment": asked}
    job_file.write_text(json.dumps(job), encoding="utf-8")
    avss_dist.run(job_file, executor="local")
    goldens.add_experiments(warehouse)
    goldens.add_warehouse(warehouse)
    goldens.add_page(warehouse)


def shrink(goldens: Goldens, folder: Path) -> None:
    """Write smaller models: by damage with a repair, by greedy search without one, and as small as a quality allows."""
    model = goldens.model("llama-wide")
    rows = {**ROWS, "max_sequences": 96, "speed": False, "repair_corpora": [TEXT]}
    choices: dict[str, dict[str, Any]] = {
        "damage": {"share": 0.25, "repair": "refit"},
        "greedy": {"share": 0.5, "by": "greedy", "repair": "none"},
        "quality": {"keep": 0.5, "repair": "map"},
    }
    for name, choice in choices.items():
        output = folder / name / "smaller"
        options = {"warehouse": folder / name / "w", **choice, **rows, **LOCAL}
        done = avss_dist.shrink(model, corpus=TEXT, output=output, **options)
        goldens.add_checkpoint(f"{name}.weights", output)
        goldens.add(f"{name}.drop", removal_names(done.best.plan.drop))
        goldens.add(f"{name}.plans", [[removal_names(result.plan.drop), result.kept] for result in done.curve])
        goldens.add(f"{name}.tasks", [describe_results(task) for task in done.best.tasks])


def describe_results(task: Any) -> list[Any]:
    """Return the metrics of a task of a shrunk model, and what is kept of them, with intervals."""
    metrics = {name: result.metrics() for name, result in task.results.items()}
    kept = {name: [retention.value, retention.low, retention.high] for name, retention in task.retentions.items()}
    return [metrics, kept]


def compare(goldens: Goldens, folder: Path) -> None:
    """Compare the rankings of several models, and list the findings against them."""
    models = goldens.models("deep", "deep-other", "gpt2", "bert")
    avss_dist.score_all(models, corpus=TEXT, warehouse=folder, **SHARDS, **LOCAL)
    for recipe in ("pooled", "unit"):
        pairs = avss_dist.compare(warehouse=folder, recipe=recipe, threshold=1e-2).table()
        rows = sorted(pairs.to_pylist(), key=text_without_run_ids)
        for column in value_columns(pairs):
            goldens.add(f"{recipe}.{column}", [row[column] for row in rows])
    findings = avss_dist.findings(warehouse=folder, every=True).table()
    kinds = findings["kind"]
    for kind in sorted(set(kinds.to_pylist())):
        goldens.add_table(f"findings.{kind}", findings.filter(pc.equal(kinds, kind)))


def text_without_run_ids(row: Mapping[str, Any]) -> str:
    """Return a row as text that is the same in every run of this script."""
    text = json.dumps(row, sort_keys=True, default=str)
    return RUN_ID.sub("", text)


def start_ray() -> None:
    """Start a private Ray of four CPUs, unless it runs. It ends with this process."""
    import ray

    if ray.is_initialized():
        return
    logs = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112  (processes that no case uses)
    given = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{given}"
    ray.init(address="local", num_cpus=4, include_dashboard=False, **logs)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def on_ray(models: Sequence[str], **place: Any) -> Case:
    """Return a case that measures models on Ray."""

    def make(goldens: Goldens, folder: Path) -> None:
        start_ray()
        measure(goldens, folder, *models, executor="ray", **place)

    return make


ON_RAY = {
    "ray": on_ray(["llama", "mixture"], partition="single", replicas=2),
    "zero3": on_ray(["llama"], partition="zero3", ranks=2),
    "fsdp": on_ray(["llama"], partition="fsdp", ranks=2),
    "tensor_parallel": on_ray(["llama"], partition="tensor_parallel", ranks=2),
    "expert_parallel": on_ray(["mixture"], partition="expert_parallel", ranks=2),
}
IN_PROCESS = (
    *(smollm2, local, streaming, sixteen_bits, contrast, ablation, sparsity),
    *(repair, distillation, precision, experts, experiment, shrink, compare),
)
CASES: dict[str, Case] = {case.__name__: case for case in IN_PROCESS} | ON_RAY
SLOW = {"smollm2", *ON_RAY}


@dataclass(frozen=True)
class Made:
    """What cases gave.

    Attributes:
        lines: number of values and digest, by class.
        absent: reasons of cases that cannot be made here.
        failed: errors of cases that failed.
    """

    lines: Outcomes = field(default_factory=Outcomes)
    absent: Outcomes = field(default_factory=Outcomes)
    failed: Outcomes = field(default_factory=Outcomes)


def make(names: Sequence[str]) -> Made:
    """Make cases, one after the other. A failure ends its case alone."""
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    made = Made()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            start = time.monotonic()
            goldens = Goldens(Path(folder), name)
            case_folder = Path(folder, name)
            case_folder.mkdir()
            try:
                CASES[name](goldens, case_folder)
            except NotMadeError as reason:
                made.absent[name] = str(reason)
            except Exception as error:
                traceback.print_exc()
                made.failed[name] = f"{type(error).__name__}: {error}"
            made.lines.update(goldens.lines)
            seconds = time.monotonic() - start
            print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return made


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return a line for each class that differs, or that one side lacks."""
    notes = []
    for name in sorted(before.keys() | after.keys()):
        old = before.get(name, "no values")
        new = after.get(name, "no values")
        if old != new:
            notes.append(f"# differs: {name}: {old} before, {new} now")
    return notes


def notes_of(outcome: str, reasons: Mapping[str, str]) -> list[str]:
    """Return a line for each case that has an outcome, with the reason on one line."""
    notes = []
    for name, reason in reasons.items():
        one_line = " ".join(reason.split())
        notes.append(f"# {outcome}: {name}: {one_line}")
    return notes


def read_lines(file: Path) -> dict[str, str]:
    """Read the lines of an earlier run by name. Comments, and what libraries print, are left out."""
    lines = dict[str, str]()
    for line in file.read_text(encoding="utf-8").splitlines():
        if match := LINE.fullmatch(line):
            lines[match["name"]] = f"{match['number']} {match['digest']}"
    return lines


def main() -> int:
    """Print the lines, and the differences from an earlier run; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="lines of an earlier run")
    parser.add_argument("--quick", action="store_true", help="leave out SmolLM2 and everything on Ray")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=", ".join(CASES))
    options = parser.parse_args()
    before = read_lines(options.compare) if options.compare else {}
    chosen = set(options.only or CASES)
    if options.quick:
        chosen -= SLOW
    names = [name for name in CASES if name in chosen]
    made = make(names)
    for name, line in sorted(made.lines.items()):
        print(f"{name:<56} {line}")
    different = []
    if options.compare:
        compared = chosen - made.absent.keys()
        before = {name: line for name, line in before.items() if name.partition(".")[0] in compared}
        different = differences(before, made.lines)
    for note in (*notes_of("not made", made.absent), *notes_of("failed", made.failed), *different):
        print(note)
    return 1 if different or made.failed else 0


if __name__ == "__main__":
    sys.exit(main())
