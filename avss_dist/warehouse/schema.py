"""The tables: every column's name, type, unit and meaning, in one place.

The schemas of the Parquet files, ``avss query --schema`` and the tables of the documentation are made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from avss_dist.core.intervention import PART_NAMES
from avss_dist.core.sites import EVERY_SITE
from avss_dist.core.values import TableRow
from avss_dist.stats.catalog import BASELINES, RECIPES, SCORES
from avss_dist.stats.layer_stats import (
    HISTOGRAM_BINS,
    ROW_FIELDS,
    ExpertStats,
    Float32,
    Float64,
    Int64,
    LayerStats,
    annotations_of,
)

SCHEMA_VERSION = 4
"""Version of the files. Earlier versions of this package refuse files of a later one.

A change that makes them misread new files raises it. A new column does not: they ignore it. In old files it is null.
"""

STRING = pa.string()
BOOL = pa.bool_()
INT32 = pa.int32()
INT64 = pa.int64()
FLOAT32 = pa.float32()
FLOAT64 = pa.float64()
INT16_LIST = pa.list_(pa.int16())
INT32_LIST = pa.list_(INT32)
INT64_LIST = pa.list_(INT64)
FLOAT32_LIST = pa.list_(FLOAT32)
FLOAT64_LIST = pa.list_(FLOAT64)
STRING_LIST = pa.list_(STRING)
MAP = pa.map_(STRING, STRING)
TIME = pa.timestamp("us", "UTC")

MAX_INDEX = 100_000
# Bounds of columns
COUNT = (0, 2**62)
INDEX = (0, MAX_INDEX)
SHARE = (0, 1)
SIZE = (0, 1e300)
THRESHOLD_KINDS = ("absolute", "rms")
_TIMES = (-62_135_596_800_000_000, 253_402_300_799_999_999)  # microseconds of the years 1 to 9999, which Python has


@dataclass(frozen=True)
class Column:
    """A column of a table, with the values that it may hold. `checks` compares the rows of every file with them.

    Attributes:
        type: type of its values; each may be null unless its table requires the column.
        meaning: description in one line.
        unit: unit of a number that has one.
        bounds: minimum and maximum, of the column or of the elements of its lists.
        choices: allowed values of a column of names.
        pattern: regular expression (RE2) of the names in the lists of a column.
        as_long_as: another column of lists, whose lists have the same lengths.
    """

    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""
    bounds: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""
    as_long_as: str = ""

    @property
    def description(self) -> str:
        """The meaning, with the unit in brackets."""
        if not self.unit:
            return self.meaning
        return f"{self.meaning} [{self.unit}]"


SCORE_AGAIN = "avss score --fresh replaces a damaged file; avss rm removes its run."


@dataclass(frozen=True)
class TableInfo:
    """A table of the warehouse.

    Attributes:
        meaning: meaning of a row, in one line.
        columns: columns, in order.
        required: names of the columns that are never null.
        replaced_by: sentence with the command that replaces a damaged file of the table.
    """

    meaning: str
    columns: tuple[Column, ...]
    required: frozenset[str]
    replaced_by: str = SCORE_AGAIN


_ARROW = {
    int: INT64,
    float: FLOAT64,
    bool: BOOL,
    Int64: INT64_LIST,
    Float32: FLOAT32_LIST,
    Float64: FLOAT64_LIST,
}


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The columns that identify a run. Every table repeats them."""

    run_id: str
    model: str
    revision: str | None
    family: str


_COUNTS = (
    *("count", "zero_count", "nonfinite_count", "token_count", "unit_count", "sequence_count"),
    *("routed_tokens", "output_count"),
)
"""Fields of LayerStats and ExpertStats and of row statistics that count."""


def _field_column(name: str, kind: pa.DataType, meaning: str, unit: str = "") -> Column:
    """Return the column of a field of LayerStats or ExpertStats, or of a row statistic."""
    if name in _COUNTS:
        return Column(name, kind, meaning, unit, bounds=COUNT)
    if name == "thresholds":
        return Column(name, kind, meaning, unit, bounds=SIZE)
    if name == "near_zero":
        return Column(name, kind, meaning, unit, bounds=COUNT, as_long_as="thresholds")
    return Column(name, kind, meaning, unit)


def _layer_columns() -> Iterator[Column]:
    """Yield a column for each field of LayerStats, with two lists in place of the histogram, at the end."""
    for name, (kind, texts, _) in annotations_of(LayerStats).items():
        if name != "histogram":
            yield _field_column(name, _ARROW[kind], *texts)
    yield Column(
        "histogram_bin",
        INT16_LIST,
        "bins of abs(x) that hold elements: 8 exponent and top 3 mantissa bits",
        bounds=(0, HISTOGRAM_BINS - 1),
    )
    yield Column(
        "histogram_count", INT64_LIST, "elements in each of those bins", bounds=COUNT, as_long_as="histogram_bin"
    )


def _expert_columns() -> Iterator[Column]:
    """Yield a column for each field of ExpertStats."""
    for name, (kind, texts, _) in annotations_of(ExpertStats).items():
        yield _field_column(name, INT64 if kind is Int64 else FLOAT64, *texts)


_SCORES = {name: Column(info.column, FLOAT64, info.definition, info.unit) for name, info in SCORES.items()}
_MODEL = (
    Column("model", STRING, "the checkpoint as it was named: hub id, folder or .gguf file"),
    Column("revision", STRING, "commit of a hub id, or hash of the files' content"),
    Column("family", STRING, "model_type of the checkpoint's configuration: llama, gemma3_text, bert, ..."),
)
_RUN_ID = Column("run_id", STRING, "name of the run: the model's, and the first 10 digits of the fingerprint")
_EVALUATION_ID = Column("run_id", STRING, "name of the evaluation: the model's, and 10 digits of the fingerprint")
_PLACE = (
    Column("layer", INT32, "index of the layer, from 0", bounds=INDEX),
    Column("layer_name", STRING, "module path of the layer"),
    Column("depth", FLOAT64, "(layer + 0.5) / number of layers: 0 at the input, 1 at the output", bounds=SHARE),
    Column(
        "site",
        STRING,
        "where in the layer: block, update, attention, mlp, neuron, query_input, ...",
        choices=EVERY_SITE,
    ),
)
_MAP = Column("map", STRING, "module path of the linear map, below the layer")
_STATS = tuple(_layer_columns())
_SHARD = Column("shard_id", INT64, "index of the shard in the corpus", bounds=COUNT)
_EXPERT = (
    *_PLACE[:3],
    Column("expert", INT32, "index of the expert in its layer, from 0", bounds=COUNT),
    *_expert_columns(),
)
_EXPERT_REQUIRED = frozenset({column.name for column in _EXPERT} - {"router_entropy_sum"})
_STRATUM = Column("stratum", STRING, "of paired text, the label of the answers, and whether they follow another prompt")
_ROW_TYPES = {"count": INT64, "near_zero": INT64_LIST}  # columns that are not floats
_TASK = Column(
    "task",
    STRING,
    "perplexity:TEXT, ablation:TEXT, sublayers:TEXT, shapley:TEXT, gradients:TEXT, damage:TEXT, repair:..., of lm-eval",
)
_METRIC = Column("metric", STRING, "what is measured: loss, perplexity, acc, shapley, ...")
_DROP = (
    Column("drop", INT32_LIST, "layers that were left out as a whole, ascending, from 0", bounds=INDEX),
    Column(
        "drop_parts",
        STRING_LIST,
        "parts of layers that were left out: attention.7 and mlp.7 of layer 7, expert.7.12 is its routed expert 12; "
        "the model is whole if this and drop are empty",
        pattern=PART_NAMES,
    ),
)
_PATCH = Column("patch", STRING, "the weights that repair the model: SHA-256, which names a file of patches; or null")
_SPARSITY_PLAN = Column("sparsity_plan", STRING, "what was zero of activations: SHA-256 of a plan's numbers; or null")
_FACTOR = Column("factor", FLOAT64, "of earlier versions: what was left of what the layers of drop add; or null")
_ROUNDING = Column(
    "rounding",
    STRING,
    "the weights that are rounded: FORMAT@LAYER, FORMAT@LAYER.MAP, SHA-256 of several places; or null",
)
_EVALUATION = (
    *(_EVALUATION_ID, *_MODEL, _TASK, _METRIC, *_DROP, _PATCH, _SPARSITY_PLAN, _FACTOR, _ROUNDING),
    Column("layer", INT32, "the layer that the value is about; null where it is about the whole", bounds=INDEX),
)
_VALUE = Column("value", FLOAT64, "the result")
_STDERR = Column("stderr", FLOAT64, "standard error of the value")
_SETTINGS = Column("settings", STRING, "every setting that can change a number, as JSON")
_VERSIONS = Column("versions", MAP, "versions of Python and of the packages")
_DEVICE = Column("device", STRING, "where it ran: cpu, or the name of a GPU")


_BASELINES = tuple(_SCORES[name] for name in BASELINES)
_ROW_STATISTICS = tuple(
    _field_column(name, _ROW_TYPES.get(name, FLOAT64), meaning) for name, meaning in ROW_FIELDS.items()
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TABLES: dict[str, TableInfo] = {
    "runs": TableInfo(
        "one row for each run: what ran, on what, with what, how fast",
        (
            _RUN_ID,
            Column("fingerprint", STRING, "SHA-256 of everything that can change a number: equal means the same run"),
            Column("status", STRING, "done or failed", choices=("done", "failed")),
            Column("error", STRING, "why the run failed"),
            Column("created_at", TIME, "when the run ended", "UTC", bounds=_TIMES),
            *_MODEL,
            Column("revision_name", STRING, "branch or tag of a hub id, as it was named"),
            Column("series", STRING, "the training: the name, with * for what tells its checkpoints apart"),
            Column("training_step", INT64, "optimizer step at which it was saved, by its name"),
            Column("training_tokens", INT64, "text that was read until then, by its name", "tokens"),
            Column("seed", INT64, "seed of the training, by the job file or its name; or null"),
            Column("seed_group", STRING, "trainings that differ in the seed alone: series, with * for it; or null"),
            Column("architecture", STRING, "class of the model"),
            Column("num_layers", INT64, "layers of the model", bounds=(1, MAX_INDEX)),
            Column("hidden_size", INT64, "width of the residual stream", "channels"),
            Column("num_parameters", INT64, "parameters of the model"),
            Column("dtype", STRING, "compute dtype: float32, bfloat16, float16"),
            Column(
                "quantization", STRING, "of the weights as stored: fp8, gguf Q4_K, ...; and if they were dequantized"
            ),
            Column(
                "quantized_modules",
                STRING,
                "modules that computed with quantized weights, and kernels of the hub; null if none did",
            ),
            Column("attention_implementation", STRING, "sdpa, eager, flash_attention_2"),
            Column("partition", STRING, "how one replica was spread: single, device_map, streaming, fsdp, ..."),
            Column("replicas", INT64, "copies of the model that worked in parallel"),
            Column("corpus", STRING, "the text as it was named, without keys"),
            Column("corpus_fingerprint", STRING, "hash of the text: equal means the same text"),
            Column("tokens_fingerprint", STRING, "hash of the tokens and their order"),
            Column("chat_template", STRING, "SHA-256 of the template that its conversations were put in; null without"),
            Column("shuffle_seed", INT64, "seed of the order in which its rows were taken; null is its own order"),
            Column("num_sequences", INT64, "rows of tokens", bounds=COUNT),
            Column("num_tokens", INT64, "tokens that were measured", "tokens", bounds=COUNT),
            Column("sequence_length", INT64, "length of a row", "tokens", bounds=COUNT),
            Column("batch_size", INT64, "rows in a forward pass"),
            Column("thresholds", FLOAT64_LIST, "absolute near-zero thresholds that were counted", bounds=SIZE),
            Column("sites", STRING_LIST, "sites that were measured"),
            Column("projections", STRING, "linear maps: layer, path, site, outputs, inputs of each, as JSON; or null"),
            Column("num_shards", INT64, "shards: units of work and of resampling", bounds=COUNT),
            _DEVICE,
            Column("threads", INT32, "CPU threads of a worker"),
            Column("wall_seconds", FLOAT64, "from start to end of the last attempt", "seconds"),
            Column("tokens_per_second", FLOAT64, "speed of all replicas together", "tokens / second"),
            Column(
                "peak_memory_bytes",
                INT64,
                "peak of a worker: of its GPUs, or of its process on a CPU",
                "bytes",
            ),
            _SETTINGS,
            Column("notes", STRING_LIST, "remarks for readers: sites that are absent, batches that were halved, ..."),
            _VERSIONS,
            Column("schema_version", INT32, "version of these tables"),
            Column(
                "numbers_version",
                INT32,
                "version of the numbers: with another one, the same request may give others; null is schema_version",
            ),
        ),
        _names("status model"),
    ),
    "scores": TableInfo(
        "one row for each layer, site, recipe and threshold of a run",
        (
            _RUN_ID,
            *_MODEL,
            *_PLACE,
            Column("recipe", STRING, "reading of AVSS: pooled, element, unit", choices=RECIPES),
            Column("threshold", FLOAT64, "near zero means abs(x) below this", bounds=SIZE),
            Column(
                "threshold_kind",
                STRING,
                "absolute, or rms: a multiple of the RMS of the layer and site",
                choices=THRESHOLD_KINDS,
            ),
            Column("count", INT64, "elements (recipe unit: channels) that could be near zero", bounds=COUNT),
            Column("near_zero_count", FLOAT64, "elements near zero; not a whole number where it is interpolated"),
            Column(
                "variance",
                FLOAT64,
                "variance of the activations, by recipe: pooled divides by n - 1, element and unit by n",
            ),
            Column("sparsity", FLOAT64, "near_zero_count / count"),
            Column("nav", FLOAT64, "variance / sum of it over layers"),
            Column("nas", FLOAT64, "sparsity / sum of it over layers"),
            Column("avss", FLOAT64, "nav / nas, as published; null where nothing was near zero"),
            _SCORES["avss"],
            Column("avss_normalized", FLOAT64, "avss / sum of it over layers"),
            Column("avss_cumulative", FLOAT64, "running sum of avss_normalized, in the order of layers"),
            Column("rank", INT32, "1 is the lowest avss_smoothed: the least important layer", bounds=INDEX),
            Column(
                "avss_low", FLOAT64, "lower end of the 95% interval of avss_smoothed, over shards; null below 8 shards"
            ),
            Column("avss_high", FLOAT64, "upper end of the interval of avss_smoothed; null below 8 shards"),
            Column(
                "lowest_set_probability",
                FLOAT64,
                "share of resamples of the shards with the layer among the lowest 25%; null below 8 shards",
            ),
            Column("quality", STRING, "ok, noisy_sparsity (fewer than 100 near zero) or zero_sparsity (none)"),
            *_BASELINES,
        ),
        _names("layer layer_name depth site recipe threshold threshold_kind"),
    ),
    "layer_stats": TableInfo(
        "one row for each layer and site of a run: the statistics that scores are computed from",
        (_RUN_ID, *_MODEL, *_PLACE, *_STATS),
        _names("layer layer_name depth site count mean m2 thresholds near_zero nonfinite_count max_abs")
        | _names("histogram_bin histogram_count"),
    ),
    "shard_stats": TableInfo(
        "the same for each shard, to resume and to resample",
        (
            _RUN_ID,
            *_MODEL,
            _SHARD,
            Column("content_hash", STRING, "hash of the shard's tokens"),
            *_PLACE,
            *_STATS,
            _STRATUM,
        ),
        _names("shard_id content_hash"),
    ),
    "evaluations": TableInfo(
        "one row for each metric of a task and a model, whole or without layers",
        (
            *_EVALUATION,
            _VALUE,
            _STDERR,
            Column("num_samples", INT64, "samples that the value is of", bounds=COUNT),
            _SETTINGS,
            _VERSIONS,
            Column("seconds", FLOAT64, "time of measuring, of all workers together", "seconds"),
            Column("created_at", TIME, "when it was written", "UTC", bounds=_TIMES),
        ),
        _names("task metric drop drop_parts"),
        "The command that measured it, such as avss evaluate or avss ablate, writes it again from its cells.",
    ),
    "cells": TableInfo(
        "what evaluations are combined from: one row for each part of a task",
        (
            *_EVALUATION,
            Column("part", INT32, "which part of the task, from 0", bounds=INDEX),
            Column("samples", FLOAT64_LIST, "a value for each sample: a sequence, a question, a permutation, a batch"),
            Column("weights", FLOAT64_LIST, "weight of each sample: predicted tokens, or 1", as_long_as="samples"),
            _DEVICE,
            Column("seconds", FLOAT64, "time of measuring", "seconds"),
            Column("created_at", TIME, "when it was measured", "UTC", bounds=_TIMES),
        ),
        _names("task metric drop drop_parts part samples weights"),
        "The command that measured it, such as avss evaluate or avss ablate, measures it again.",
    ),
    "experiments": TableInfo(
        "one row for each metric of a model without the layers that a method chose",
        (
            Column("run_id", STRING, "the run whose scores chose the layers"),
            *_MODEL,
            Column(
                "experiment_id",
                STRING,
                "20 digits of the hash of all that can change a number of the experiment; in old files, their name",
            ),
            Column("method", STRING, "how the layers were chosen, for people: avss, random 3, whole model, ..."),
            Column(
                "score", STRING, "the score that chose the layers; last; random; contrast; null for the whole model"
            ),
            Column(
                "site",
                STRING,
                "of the reading of AVSS or of the contrast that chose; null for other scores",
                choices=EVERY_SITE,
            ),
            Column("recipe", STRING, "recipe of that reading", choices=RECIPES),
            Column("threshold", FLOAT64, "threshold of that reading", bounds=SIZE),
            Column("threshold_kind", STRING, "kind of that threshold: absolute or rms", choices=THRESHOLD_KINDS),
            Column("control", STRING, "reversed (drops the highest), ends kept (the first and last stay), or null"),
            Column("share", FLOAT64, "share of the layers that was dropped", bounds=SHARE),
            _SPARSITY_PLAN,
            Column("seed", INT32, "of a random choice"),
            *_DROP,
            _FACTOR,
            _ROUNDING,
            Column("repair", STRING, "name of the repair; null without one"),
            _PATCH,
            _TASK,
            _METRIC,
            _VALUE,
            _STDERR,
            Column("retention", FLOAT64, "metric / that of the whole model; of a loss, perplexity before / after"),
            Column(
                "retention_low",
                FLOAT64,
                "lower end of its 95% interval, over paired samples; null where fewer than 8 differ",
            ),
            Column("retention_high", FLOAT64, "upper end of the interval of retention"),
            Column("created_at", TIME, "when it was written", "UTC", bounds=_TIMES),
        ),
        _names("method share task metric drop drop_parts"),
        "avss run with the same job file writes the experiment again. A file that remains damaged may be deleted.",
    ),
    "sparsity": TableInfo(
        "one row for each linear map of a sparsity plan: which of its inputs become zero",
        (
            Column("run_id", STRING, "the run that the plan was made of"),
            *_MODEL,
            Column("sparsity_plan", STRING, "SHA-256 of the plan's numbers, as in evaluations"),
            Column("method", STRING, "how the sparsity was spread: uniform, loss, teal, ..."),
            Column("target", FLOAT64, "share of the weights that was to meet a zero", bounds=SHARE),
            Column("rule", STRING, "at which tokens: all, last-half, ..."),
            Column("weighted", BOOL, "sizes are weighted by the norms of the columns that they meet"),
            _PLACE[0],
            _MAP,
            _PLACE[3],
            Column("outputs", INT64, "units that it gives", "units"),
            Column("inputs", INT64, "units that it takes", "units"),
            Column("by", STRING, "threshold or top_k"),
            Column("value", FLOAT64, "the threshold, or the share"),
            Column("sparsity", FLOAT64, "share of its inputs that is expected to be zero"),
            Column("created_at", TIME, "when it was made", "UTC", bounds=_TIMES),
        ),
        _names("sparsity_plan method target rule layer map site outputs inputs by value sparsity created_at"),
        "avss sparsify with the same options writes it again.",
    ),
    "precision": TableInfo(
        "one row for each linear map of a precision plan that was evaluated: the number format of its weights",
        (
            _EVALUATION_ID,
            *_MODEL,
            Column("rounding", STRING, "SHA-256 of the plan's formats, as in evaluations"),
            Column("method", STRING, "how the formats were chosen: predicted, uniform, random, ...; null if not known"),
            _PLACE[0],
            _MAP,
            Column("format", STRING, "number format of the weights: int4-g64, q4_0, ..."),
            Column("num_weights", INT64, "number of weights", "weights", bounds=COUNT),
            Column("bits_per_weight", FLOAT64, "size of a weight in the format, with its share of scales", "bits"),
            Column("created_at", TIME, "when it was written", "UTC", bounds=_TIMES),
        ),
        _names("rounding layer map format num_weights bits_per_weight"),
        "avss evaluate of the same precision plan writes it again.",
    ),
    "stratum_stats": TableInfo(
        "as layer_stats, for each stratum of paired text",
        (_RUN_ID, *_MODEL, _STRATUM, *_PLACE, *_STATS),
        _names("stratum layer site count thresholds near_zero nonfinite_count"),
    ),
    "row_stats": TableInfo(
        "one row for each answer of paired text, layer and site",
        (
            _RUN_ID,
            *_MODEL,
            Column("row", INT64, "index of the answer in the corpus", bounds=COUNT),
            Column("pair", INT64, "index of the prompt that the answer belongs to", bounds=COUNT),
            _STRATUM,
            Column("prompt_tokens", INT64, "tokens before the answer", "tokens", bounds=COUNT),
            Column("answer_tokens", INT64, "tokens of the answer that count", "tokens", bounds=COUNT),
            _PLACE[0],
            _PLACE[3],
            *_ROW_STATISTICS,
        ),
        _names("row pair stratum layer site answer_tokens count near_zero"),
    ),
    "expert_stats": TableInfo(
        "one row for each layer and routed expert of a run, of every token or of none",
        (_RUN_ID, *_MODEL, *_EXPERT),
        _EXPERT_REQUIRED,
    ),
    "shard_expert_stats": TableInfo(
        "the same for each shard",
        (_RUN_ID, *_MODEL, _SHARD, *_EXPERT),
        _EXPERT_REQUIRED | {"shard_id"},
    ),
}
SCHEMAS: dict[str, pa.Schema] = {
    name: pa.schema([(column.name, column.type) for column in table.columns]) for name, table in TABLES.items()
}
"""Schemas of the rows of tables. For a file, ``run_id`` is in the path alone."""
EVALUATION_TABLES = tuple(name for name, table in TABLES.items() if table.columns[0] is _EVALUATION_ID)
"""Tables whose run ids are those of evaluations, which are not in ``runs``."""


@dataclass(frozen=True)
class Damage:
    """The reason why a run or an evaluation is left out.

    Attributes:
        table: table of the file or the row that cannot be read.
        reason: what is wrong with it.
    """

    table: str
    reason: str

    def __str__(self) -> str:
        return f"{self.table}: {self.reason}"

    @property
    def subject(self) -> str:
        """Noun for what cannot be read."""
        return "evaluation" if self.table in EVALUATION_TABLES else "run"

    @property
    def hint(self) -> str:
        """Sentence with the command that replaces the file."""
        return TABLES[self.table].replaced_by


def columns_of(rows: Sequence[TableRow], schema: pa.Schema) -> dict[str, pa.Array]:
    """Return the columns of rows by name. What a row lacks is null, and so is NaN."""
    columns = {}
    for field in schema:
        values = [row.get(field.name) for row in rows]
        columns[field.name] = pa.array(values, field.type, from_pandas=True)
    return columns


UNFINISHED = "unfinished"  # in lists, the status of a run that has begun and has no row
UNFINISHED_RUNS = pa.schema(
    {
        "run_id": pa.string(),
        "model": pa.string(),
        "corpus": pa.string(),
        "dtype": pa.string(),
        "num_tokens": pa.int64(),
        "kept_shards": pa.int64(),
        "num_shards": pa.int64(),
        "started_at": pa.string(),
    }
)
"""Columns of the runs that have begun and have no row yet. ``started_at`` is UTC, in ISO 8601, of the last attempt."""
