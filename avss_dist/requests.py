"""Requests of commands that measure or change something: checked values, of which options and keywords are made.

The docstring of the request of a command is the start of its help, and the docstrings of the fields are those of its
options.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, ClassVar

from pydantic import Field

from avss_dist.core.endings import PLAN_FILES, require_ending
from avss_dist.core.errors import ConfigError, require_known
from avss_dist.core.intervention import SPARSITY_RULES
from avss_dist.core.request import Request
from avss_dist.core.settings import BatchOptions, ModelOptions, Settings, TextOptions
from avss_dist.core.text import RedactedURI
from avss_dist.core.validation import (
    MAX_SHOWN,
    RARE,
    Accepts,
    Bytes,
    Count,
    OneOf,
    Option,
    PathOrText,
    Positive,
    Seconds,
    Share,
    Text,
    Texts,
    as_text,
    check,
    checked,
)
from avss_dist.core.watch_end import WatchEndText
from avss_dist.corpus.seen import SELF
from avss_dist.models.change.number_formats import format_names, number_format
from avss_dist.partition.catalog import PARTITIONS, SHARDINGS
from avss_dist.partition.execution import EXECUTORS, ClusterOptions, Execution, ReplicaRange, Sizes
from avss_dist.plans.catalog import PRECISION_FILES, PRECISION_METHODS, SECOND_ORDER, SPARSITY_METHODS
from avss_dist.pruning.repair.registry import (
    DEFAULT_REPAIR,
    NO_REPAIR,
    OptionalRepairName,
    split_weight,
)
from avss_dist.read_requests import (
    WAREHOUSE,
    OptionalOutput,
    Output,
    PlaceRequest,
    RunRequest,
    WarehouseRequest,
)
from avss_dist.stats.catalog import EXPERT_SCORES, GREEDY, SCORES, is_own, name_values

RANKED_BY = tuple(name for name, score in SCORES.items() if not score.of_sets)
"""Scores of single layers, by which shrinking can rank them."""
TRAINED = ("all", "lora")
"""Weights that distillation trains: see `distillation.pair`."""
IN_PROCESS = tuple(name for name, info in PARTITIONS.items() if not info.gang)
"""Partitions of a model in one process."""
SERVERS = ("vllm", "sglang", "llama.cpp", "ollama")
"""Kinds of inference servers: see `serving.connect`."""

PLANS = "Plan | SparsityPlan | PrecisionPlan"
Follow = Annotated[bool, Option(short="-f")]
Model = Annotated[PathOrText, Option(argument=True, metavar="MODEL")]
PlanFile = Annotated[OptionalOutput, check(require_ending(PLAN_FILES, "a plan"))]
JobId = Annotated[str, Option(argument=True, metavar="JOB_ID")]
Tokens = Annotated[float, Field(ge=1, allow_inf_nan=False)]


def _path_or(value: object, attribute: str, expected: str) -> object:
    """Return a path as text, and an object that has an attribute as it is.

    Classes of plans and jobs are not imported here, so that wrong values of other options are refused sooner.
    """
    if hasattr(value, attribute):
        return value
    if not isinstance(value, str | Path):
        raise ConfigError(f"expected {expected}, not {shorten(repr(value), MAX_SHOWN)}.")
    return as_text(value)


def _model_or_plan(value: object) -> object:
    return _path_or(value, "intervention", "a model, a plan, or the file of a plan")


def _plan(value: object) -> object:
    return _path_or(value, "intervention", "a plan, or its file")


def _job(value: object) -> object:
    return _path_or(value, "specs", "a job file")


def group_values(request: Request, cls: type) -> dict[str, Any]:
    """Return the values of the groups of options that a request shares with a class."""
    groups = [base for base in type(request).__mro__ if base is not object and issubclass(cls, base)]
    return {f.name: getattr(request, f.name) for group in groups for f in fields(group)}


def refuse_unused(values: Mapping[str, object], reason: str, hint: str) -> None:
    """Raise ConfigError if an option without effect has another value than its default.

    Args:
        values: values by option. The default of an option that is no setting is empty, such as 0 or None.
        reason: end of the message, such as "without a search".
    """
    defaults = vars(Settings()) | vars(Execution())
    for name, value in values.items():
        if value and value != defaults.get(name):
            raise ConfigError(f"`{name}` has no effect {reason}.", hint)


@checked
class WorkRequest(Request):
    """A command that measures or changes something. It has some of the groups of `Settings` and `Execution`."""

    @property
    def settings(self) -> Settings:
        """Settings of the groups that the command has, and the defaults of the others."""
        return Settings(**group_values(self, Settings))

    @property
    def execution(self) -> Execution:
        """Execution of the groups that the command has, and the defaults of the others."""
        return Execution(**group_values(self, Execution))

    @property
    def options(self) -> dict[str, Any]:
        """Values of all groups that the command has, as keywords of another command."""
        return group_values(self, Settings) | group_values(self, Execution)


Subject = Annotated[Any, check(_model_or_plan, before=True), Accepts(f"str | Path | {PLANS}")]
Subjects = Annotated[tuple[Subject, ...], Field(strict=False), Option(argument=True, metavar="SUBJECT")]
SparsityFile = Annotated[Any, check(_plan, before=True), Accepts("str | Path | SparsityPlan")]
Criterion = Annotated[str, OneOf(tuple(SCORES | EXPERT_SCORES), accepts=is_own), check(RedactedURI)]
"""Criterion by which layers or experts are chosen: the name of a score, or of a file of people's own scores."""


@checked
class EvaluationOptions(BatchOptions, ModelOptions, TextOptions, Execution):
    """Settings of work that measures nothing inside of layers, and its execution."""


@checked
class ModelRequest(WorkRequest):
    """A command about a model."""

    model: Model = field(kw_only=False)
    """Hub id (org/name@revision), folder, or .gguf file."""


@checked
class CorpusRequest(WorkRequest):
    """A command that reads a text."""

    corpus: Text
    """file.txt, .jsonl[:field], .csv[:column], .parquet[:column], hf:NAME, wikitext2, builtin:pydoc; of paired text
    file.jsonl:prompt+answer[:label], truthfulqa:file.jsonl[:seed]."""


@checked
class ScoreRequest(ModelRequest, CorpusRequest, WarehouseRequest, Settings, Execution):
    """Score every layer of a model on a corpus."""


@checked
class ScoreAllRequest(CorpusRequest, WarehouseRequest, Settings, Execution):
    """Score every layer of one or more models on a corpus, and keep the result as Parquet."""

    models: Annotated[Texts, Option(argument=True, metavar="MODEL")] = field(kw_only=False)
    """Hub id (org/name@revision), folder, or .gguf file."""

    def __post_init__(self) -> None:
        if repeated := [model for model, times in Counter(self.models).items() if times > 1]:
            raise ConfigError(f"The model '{repeated[0]}' is named twice.", "Name each model once.")


@checked
class EstimateRequest(ModelRequest, BatchOptions, ModelOptions, TextOptions):
    """Estimate the memory of a run with every partition, before loading any weights."""

    ranks: Positive | None = None
    """Processes of a replica, where a partition has several, and of a distillation; by default as few as have room."""
    teacher: Annotated[PathOrText | None, Option(metavar="MODEL")] = None
    """Also estimate the memory of distilling MODEL from this model, with `batch_size` rows in a step on each rank."""
    repair: OptionalRepairName = NO_REPAIR
    """Also estimate the text and the memory that the fit of this repair takes."""
    max_memory: Sizes = field(default_factory=dict)
    """Maximum memory of a replica on a device: cpu=20GB, 0=40GB, ..."""


@checked
class AblateRequest(ModelRequest, CorpusRequest, WarehouseRequest, EvaluationOptions):
    """Leave layers out, or round their weights, and measure the loss: the ground truth for scores.

    With --quantize, csv and json have a row for each number format, layer and linear map.
    """

    leave_one_out: bool = True
    """Measure the loss without each layer."""
    sublayers: bool = False
    """Measure the loss without each layer's attention, and without its MLP."""
    shapley: Count = 0
    """Permutations to sample for layer Shapley values."""
    truncation: Annotated[bool, RARE] = True
    """End a permutation once the loss is that of uniform guessing: what follows adds nothing."""
    seed: Annotated[Count, RARE] = 0
    """Seed for the permutations."""
    gradients: bool = False
    """Run a backward pass: first-order estimates of removal, and norms."""
    damage: bool = False
    """Estimate the effect of leaving layers out, at the cost of about 8 passes."""
    quantize: Annotated[Texts, Option(metavar="FORMAT")] = ()
    """Predict the change of the loss if weights are rounded to this format: int4, int4-g64, fp8, nvfp4, q4_0, ..."""
    rounded_layers: Annotated[bool, RARE] = True
    """Measure the loss with the weights of each layer rounded to each format of `quantize`, too."""
    allow_many: Annotated[bool, RARE] = False
    """Continue even if it takes more than 100,000 passes of a batch, which is refused otherwise."""

    def __post_init__(self) -> None:
        for name in self.quantize:
            number_format(name).require_package()
        measures = ("leave_one_out", "sublayers", "shapley", "gradients", "damage", "quantize")
        if not any(getattr(self, name) for name in measures):
            first = ", ".join(f"`{name}`" for name in measures[:-1])
            raise ConfigError("Nothing would be measured.", f"Choose {first} or `{measures[-1]}`.")

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the number formats, each once."""
        return format_names(self.quantize)


@checked
class AblateCommandRequest(AblateRequest):
    """Leave layers out, or round their weights, and measure the loss: the ground truth for scores.

    With --quantize, csv and json have a row for each number format, layer and linear map.
    """

    dry_run: bool = False
    """Only show what would be done, and how long it takes."""


@checked
class EvaluateRequest(WorkRequest, WarehouseRequest, EvaluationOptions):
    """Evaluate models and plans; a plan skips its layers in place and is compared with the whole model."""

    subjects: Subjects = field(kw_only=False)
    """Models, or plans (PLAN.yaml); the others are also compared with the first."""
    tasks: Texts
    """perplexity:CORPUS, or a task of lm-evaluation-harness by name or YAML file."""
    skip_questions: Annotated[Count, RARE] = 0
    """Skip this many questions at the start of TruthfulQA."""
    limit: Positive | None = None
    """Maximum number of questions per task."""
    num_fewshot: Count | None = None
    """Examples before each question of a harness task."""
    sparse: Annotated[SparsityFile | None, Option(metavar="SPARSE.yaml")] = None
    """A sparsity plan, SPARSE.yaml, to evaluate every subject with as well."""
    base: Annotated[PathOrText | None, Option(metavar="MODEL", rare=True)] = None
    """The model that a pruned checkpoint was made of, to compare with; by default that of its model card."""
    speed: bool = False
    """Also measure how fast smaller models generate on this machine, in turn with their whole model, and their size."""
    allow_overlap: Annotated[bool, RARE] = False
    """Allow evaluation on text that scores or repairs were made on."""


@checked
class EvaluateCommandRequest(EvaluateRequest):
    """Evaluate models and plans; a plan skips its layers in place and is compared with the whole model."""

    dry_run: bool = False
    """Only show what would be done, and how long it takes."""


@checked
class ShrinkRequest(ModelRequest, EvaluationOptions):
    """Score a model, drop layers, repair and evaluate the rest, and write it; resumes if stopped."""

    output: Output
    """Folder of the new checkpoint."""
    corpus: Text
    """Text to score the layers on."""
    warehouse: Annotated[PathOrText | None, WAREHOUSE] = None
    """Warehouse for the measurements; OUTPUT-warehouse by default."""
    share: Share | None = None
    """Drop this share of the layers; 0.25 by default."""
    keep: Share | None = None
    """Drop all layers without which every task keeps this share: 0.9."""
    by: Annotated[str, OneOf((*RANKED_BY, GREEDY))] = "damage"
    """Score that chooses the layers, or greedy (the repaired loss)."""
    repair: OptionalRepairName = DEFAULT_REPAIR
    """Repair to fit at each cut."""
    repair_corpora: Texts = ()
    """Text to fit it on: CORPUS[=WEIGHT], or self; by default both."""
    tasks: Texts = ()
    """Tasks, as for avss evaluate. By default, part of every text."""
    first: Annotated[Count, RARE] = 0
    """Layers at the start that are never dropped."""
    last: Annotated[Count, RARE] = 0
    """Layers at the end that are never dropped."""
    keep_pattern: Annotated[bool, RARE] = False
    """Drop only layers after which llama.cpp and others read the rest as it is."""
    limit: Annotated[Positive | None, RARE] = None
    """Maximum number of questions per task."""
    allow_overlap: Annotated[bool, RARE] = False
    """Allow evaluation on text that scores or repairs were made on."""
    distill_tokens: Tokens | None = None
    """Also distill the model from the whole one on so many tokens: 1e6."""
    speed: Annotated[bool, RARE] = True
    """Measure how fast it generates on this machine, in turn with the whole model."""

    def __post_init__(self) -> None:
        problems = []
        if self.share and self.keep:
            problems.append(ConfigError("`share` and `keep` are mutually exclusive.", "Keep one of them."))
        if self.skip_sequences:
            problems.append(
                ConfigError("`skip_sequences` has no effect: each text is divided into parts.", "Leave it out.")
            )
        if problems:
            raise ConfigError.combine(problems)

    @property
    def ranked_by(self) -> str:
        """Score that orders the layers, or from which a search begins."""
        return "damage" if self.by == GREEDY else self.by

    @property
    def weighted_repair_texts(self) -> tuple[str, ...]:
        """Texts that a repair is fitted on, with their weights, and that of the model itself among them."""
        return tuple(self.repair_corpora) or (self.corpus, SELF)

    @property
    def repair_texts(self) -> list[RedactedURI]:
        """Texts that a repair is fitted on, without their weights and without text that the model writes itself."""
        if not self.repair_corpora:
            return [RedactedURI(self.corpus)]
        named = [split_weight(text)[0] for text in self.repair_corpora]
        return [text for text in named if text != SELF]

    @property
    def texts(self) -> list[RedactedURI]:
        """All texts that are divided into parts, each once. Text that the model writes itself is none of them."""
        return list(dict.fromkeys([RedactedURI(self.corpus), *self.repair_texts]))


@checked
class ShrinkCommandRequest(ShrinkRequest):
    """Score a model, drop layers, repair and evaluate the rest, and write it; resumes if stopped."""

    dry_run: bool = False
    """Only show what would be done, and how long it takes."""


@checked
class PlanRequest(WorkRequest, PlaceRequest, RunRequest, EvaluationOptions):
    """Choose the layers or routed experts to drop, and write a plan with the reasons for and against."""

    output: PlanFile = None
    """The plan to write, PLAN.yaml."""
    by: Annotated[Criterion | None, check(name_values, before=True), Accepts("str | Mapping[int, float] | None")] = None
    """Score, greedy (the loss on `corpus`) or FILE.csv:COLUMN; of `experts`: reap, tokens, gate or random."""
    first: Count = 0
    """Layers at the start that are never dropped."""
    last: Count = 0
    """Layers at the end that are never dropped."""
    keep_pattern: Annotated[bool, RARE] = False
    """Drop only layers after which llama.cpp and others read the rest as it is."""
    share: Share | None = None
    """Drop this share of the layers; 0.25 by default."""
    count: Positive | None = None
    """Drop this many layers."""
    memory: Annotated[Bytes | None, Option(metavar="SIZE")] = None
    """Drop layers until this much weight memory is left: 12GB."""
    experts: Share | None = None
    """Drop this share of each layer's routed experts instead."""
    corpus: Text | None = None
    """Text on which greedy measures the loss."""
    seed: Annotated[Count, RARE] = 0
    """Seed for the choice by random."""

    def __post_init__(self) -> None:
        if self.by == GREEDY and self.corpus is None:
            raise ConfigError("`by` greedy needs text to measure losses on.", "Name it with `corpus`.")
        if self.experts is None:
            if self.by in EXPERT_SCORES.keys() - SCORES.keys():
                raise ConfigError(
                    f"`by` {self.by} is a score of routed experts.", "Set `experts` to the share to drop."
                )
            return
        if self.by is None:
            choices = "\n".join(f"  {name}: {meaning}" for name, meaning in EXPERT_SCORES.items())
            raise ConfigError("`experts` needs a score to choose by.", f"Name it with `by`:\n{choices}")
        require_known("`by` of `experts`", self.by, EXPERT_SCORES)
        unused = ("share", "count", "memory", "first", "last", "keep_pattern", "corpus")
        refuse_unused({name: getattr(self, name) for name in unused}, "on routed experts", "Leave it out.")


@checked
class SparsifyRequest(WorkRequest, RunRequest, EvaluationOptions):
    """Choose the activations that become zero, and write a sparsity plan with the reason.

    The run must have measured the inputs of linear maps: avss score --sites inputs.
    """

    output: PlanFile = None
    """The sparsity plan to write, SPARSE.yaml."""
    target: Annotated[Share, Option(argument=True, metavar="SHARE")] = field(kw_only=False)
    """Share of the weights of all linear maps that meet a zero activation: above 0 and below 1."""
    method: Annotated[str, OneOf(tuple(SPARSITY_METHODS))] = "uniform"
    """Method that allocates the sparsity over the model."""
    rule: Annotated[str, OneOf(SPARSITY_RULES), RARE] = SPARSITY_RULES[0]
    """Tokens at which activations become zero."""
    corpus: Text | None = None
    """Text that loss and teal read; the text of the run by default."""


@checked
class PrecisionRequest(RunRequest):
    """Choose the number format of each linear map, and write a precision plan with the reason.

    avss ablate --quantize FORMAT... must have predicted the losses.
    """

    output: PlanFile = None
    """The precision plan to write, BITS.yaml, or the file of another program."""
    format: Annotated[str, OneOf(PRECISION_FILES)] = PRECISION_FILES[0]
    """Format of the file."""
    by: Annotated[str, OneOf(tuple(PRECISION_METHODS))] = SECOND_ORDER
    """Method that chooses the formats: an estimate of the damage, or a control."""
    bits: Annotated[float, Field(gt=0, le=32, allow_inf_nan=False)] | None = None
    """Mean bits per weight of the linear maps, scales included: 4.5."""
    memory: Annotated[Bytes | None, Option(metavar="SIZE")] = None
    """Bytes of all weights of the model; those outside of the linear maps stay as they are: 2.5GB."""
    quantize: Annotated[Texts, Option(metavar="FORMAT")] = ()
    """Number format to choose from: int4-g64, int8, q4_0, ...; by default all that the newest avss ablate --quantize
    predicted."""
    seed: Annotated[Count, RARE] = 0
    """Seed of random."""

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.memory is None):
            raise ConfigError("Expected one budget: `bits` or `memory`.", "Set `bits` to 4.5, or `memory` to 2.5GB.")
        _ = self.formats  # refuses unknown ones

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the number formats, each once."""
        return format_names(self.quantize)


@checked
class PruneRequest(ModelRequest, EvaluationOptions):
    """Write a checkpoint without the layers or experts of a plan, repaired on request; needs little memory."""

    plan: Annotated[
        Any, check(_plan, before=True), Accepts("str | Path | Plan"), Option(argument=True, metavar="PLAN.yaml")
    ] = field(kw_only=False)
    """A plan, written by avss plan or by hand."""
    output: Output = field(kw_only=False)
    """Folder of the new checkpoint; it must not exist, or be empty."""
    repair: OptionalRepairName | None = None
    """Repair to fit at each cut to make up for the removed layers or experts; borrow by default if there is text."""
    repair_corpora: Texts = ()
    """Text to fit the repair on: CORPUS or CORPUS=WEIGHT; self is text that the model writes."""
    warehouse: Annotated[PathOrText | None, WAREHOUSE] = None
    """Warehouse with the plan's evaluations, for the model card; the fit of a repair is kept in it."""

    def __post_init__(self) -> None:
        if self.repair not in (None, NO_REPAIR) and not self.repair_corpora:
            raise ConfigError(f"`repair` {self.repair} needs text to be fitted on.", "Name it with `repair_corpora`.")

    @property
    def fitted(self) -> str | None:
        """Repair that is fitted, or None without one."""
        if self.repair is not None:
            return None if self.repair == NO_REPAIR else self.repair
        return DEFAULT_REPAIR if self.repair_corpora else None


@checked
class DistillRequest(ModelOptions, TextOptions, ClusterOptions, WorkRequest):
    """Train a smaller model on the predictions of the whole one, and write it; resumes if stopped."""

    student: Annotated[PathOrText, Option(argument=True, metavar="STUDENT")] = field(kw_only=False)
    """Checkpoint folder to train, such as avss shrink or avss prune writes."""
    teacher: Annotated[PathOrText, Option(metavar="MODEL")]
    """Model whose predictions are learned: hub id (org/name@revision) or folder; usually the one that was pruned."""
    output: Output
    """Folder of the new checkpoint; it must not exist, or be empty."""
    corpora: Texts = ()
    """Text to train on: CORPUS or CORPUS=WEIGHT. self=WEIGHT weights the teacher's own text, which has weight 1."""
    self_texts: Count | None = None
    """Number of texts that the teacher writes to train on; by default as many as `tokens` take, 0 for none."""
    watch: Annotated[Texts, RARE] = ()
    """Text that is measured and never trained on."""
    held_out: Annotated[Positive, RARE] = 16
    """Rows at the start of each text that are measured and never trained on."""
    allow_overlap: Annotated[bool, RARE] = False
    """Allow held-out text that the student is trained on, or was repaired on."""
    tokens: Tokens = 1e6
    """Tokens to train on."""
    train: Annotated[
        str,
        OneOf(
            TRAINED, {"near": "It was removed: `train` all keeps up to two points more, and lora takes less memory."}
        ),
    ] = TRAINED[0]
    """Weights that are trained: all but tied embeddings, or a LoRA adapter that is then merged."""
    lora_rank: Annotated[Positive, RARE] = 16
    """Rank of the LoRA adapter."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Highest learning rate; by default in proportion to the size of the weights, and to the root of `batch_size`."""
    warmup: Annotated[Count | None, RARE] = None
    """Steps in which the learning rate rises, by default a tenth of all and at most 20; then it falls to zero."""
    batch_size: Positive | None = None
    """Rows in a training step; by default one for each rank."""
    evaluations: Annotated[Positive, RARE] = 8
    """Number of evaluations on held-out text during training."""
    seed: Annotated[Count, RARE] = 0
    """Seed of the order of the text, and of the teacher's own text."""
    ranks: Positive = 1
    """Processes that share each training step, started by Ray, each with a GPU where there are GPUs."""
    sharding: Annotated[str, OneOf(tuple(SHARDINGS))] = next(iter(SHARDINGS))
    """Parts that are divided among ranks: none (ddp), optimizer (zero1), also gradients (zero2), all (zero3, fsdp)."""
    report_to: Annotated[Annotated[str, OneOf(("trackio", "wandb", "mlflow"))] | None, RARE] = None
    """Experiment tracker to which the Trainer reports; its environment variables name the project."""

    def __post_init__(self) -> None:
        if self.step_rows % self.ranks:
            next_multiple = math.ceil(self.step_rows / self.ranks) * self.ranks
            raise ConfigError(
                f"`batch_size` {self.step_rows} cannot be divided among {self.ranks} `ranks`.",
                f"Set `batch_size` to a multiple of {self.ranks}, such as {next_multiple}.",
            )
        if self.ranks == 1 and SHARDINGS[self.sharding].moments:
            raise ConfigError(f"`sharding` {self.sharding} divides nothing with one rank.", "Set `ranks` to 2 or more.")

    @property
    def step_rows(self) -> int:
        """Rows of a training step on all ranks together."""
        return self.batch_size or self.ranks

    @property
    def rows(self) -> int:
        """Rows of a training step on each rank."""
        return self.step_rows // self.ranks


@checked
class DistillCommandRequest(DistillRequest):
    """Train a smaller model on the predictions of the whole one, and write it; resumes if stopped."""

    dry_run: bool = False
    """Only show what would be done, and the memory that it takes."""


@checked
class VerifyRequest(ModelOptions, TextOptions, WorkRequest):
    """Compare a checkpoint, as transformers computes it, with a running inference server that serves it.

    Programs may read a pruned checkpoint differently, without an error. The environment variable AVSS_SERVER_KEY has
    the API key of the server, if it needs one.
    """

    model: Annotated[PathOrText, Option(argument=True, metavar="CHECKPOINT")] = field(kw_only=False)
    """Folder or hub id of the checkpoint."""
    server: Annotated[str, Option(metavar="URL")]
    """Address of the server: http://localhost:8000."""
    kind: Annotated[str, OneOf(SERVERS)] | None = None
    """Program of the server; by default it is asked."""
    served_model: Annotated[str | None, Option(metavar="NAME")] = None
    """Name of the model on a server with several."""
    original: Annotated[str | None, Option(metavar="URL")] = None
    """Address of a server of the whole model, which is compared first, to tell the runtime's own differences apart."""
    original_model: Annotated[str | None, Option(metavar="NAME", rare=True)] = None
    """Name of the whole model on that server, if it has several."""
    base: Annotated[PathOrText | None, Option(metavar="MODEL", rare=True)] = None
    """The whole model of `original`; by default that of the model card."""
    corpus: Text = "builtin:pydoc"
    """Text to compare on, as for avss score."""
    max_sequences: Positive = 16
    """Rows to compare. One of them is longer than every window of the model's attention, if there are any."""
    dtype: Annotated[str, OneOf(("auto", "bfloat16", "float16"))] = "auto"
    """Dtype of the server, whose rounding is allowed for; auto is the checkpoint's, or float16 if it has 32 bits."""
    timeout: Annotated[Seconds, RARE] = 300.0
    """Seconds to wait for each answer of the server."""
    partition: Annotated[str, OneOf(("auto", *IN_PROCESS))] = "auto"
    """Distribution of the model over devices while transformers computes; auto chooses."""
    max_memory: Annotated[Sizes, RARE] = field(default_factory=dict)
    """Maximum memory of the model on a device: cpu=20GB, 0=40GB, ..."""

    def __post_init__(self) -> None:
        unused = [name for name in ("original_model", "base") if getattr(self, name) is not None]
        if unused and self.original is None:
            raise ConfigError(f"`{unused[0]}` has no effect without `original`.", "Name the server of the whole model.")


@checked
class JobFileRequest(Request):
    """A command about a job file."""

    job: Annotated[
        Any, check(_job, before=True), Accepts("str | Path | JobFile"), Option(argument=True, metavar="JOB.yaml")
    ] = field(kw_only=False)
    """A job file; avss run --schema lists its keys."""
    replicas: ReplicaRange | None = None
    """Model copies in parallel, 8 or 4..64, instead of the file's."""
    fresh: bool | None = None
    """Measure again what has already been measured."""
    watch: bool = False
    """Also measure the checkpoints that a training writes into the globs of folders, as they become complete."""
    until: WatchEndText | None = None
    """End of the watch: 20 for 20 checkpoints, 30m for 30 minutes in which nothing is written; otherwise Ctrl-C."""
    watch_seconds: Annotated[Seconds, RARE] = 10.0
    """Seconds between two looks at the folders that are watched."""
    replaceable: ClassVar[tuple[str, ...]] = ("replicas", "fresh")

    def __post_init__(self) -> None:
        if self.until is not None and not self.watch:
            raise ConfigError("`until` is the end of a watch.", "Set `watch`, too.")

    @property
    def replaced(self) -> dict[str, Any]:
        """Values that replace those of the file, by field of `Execution`."""
        values = {name: getattr(self, name) for name in self.replaceable}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def watching(self) -> dict[str, Any]:
        """Values of the options of a watch, if there is one."""
        if not self.watch:
            return {}
        values: dict[str, Any] = {"watch": True, "watch_seconds": self.watch_seconds}
        if self.until is not None:
            values["until"] = self.until
        return values


@checked
class RunJobRequest(JobFileRequest):
    """Run a job file."""

    executor: Annotated[str, OneOf(EXECUTORS)] | None = None
    """Executor instead of the file's: this process (local) or Ray workers (ray)."""
    address: str | None = None
    """Address of a running Ray cluster."""
    allow_overlap: bool = False
    """Allow evaluation on text that scores or repairs were made on."""
    allow_many: bool = False
    """Continue even if it takes more than 10,000 evaluations, which is refused otherwise."""
    replaceable: ClassVar[tuple[str, ...]] = ("executor", "replicas", "address", "fresh")


@checked
class RunCommandRequest(RunJobRequest):
    """Run a job file, its experiment included: finished runs are skipped, interrupted ones resumed."""

    job: Annotated[Any, check(_job, before=True), Option(argument=True, metavar="JOB.yaml")] = field(
        default=None, kw_only=False
    )
    """A job file."""
    schema: bool = False
    """Print the JSON Schema of job files, for editors."""
    dry_run: bool = False
    """Only show what would be done."""

    def __post_init__(self) -> None:
        if self.job is None and not self.schema:
            raise ConfigError("`job` is missing.")

    @property
    def watches(self) -> bool:
        """Whether folders are watched. A dry run shows those that are there."""
        return self.watch and not self.dry_run


@checked
class ClusterRequest(Request):
    """A command about the jobs of a Ray cluster."""

    address: Annotated[str, Option(environment="RAY_API_SERVER_ADDRESS")]
    """The cluster's job server: http://HEAD:8265."""


@checked
class SubmitRequest(JobFileRequest, ClusterRequest):
    """Submit a job file to a Ray cluster, which runs it with avss run; it needs avss_dist and the models."""

    follow: Follow = False
    """Print the log until the job ends."""


@checked
class ListJobsRequest(ClusterRequest):
    """List submitted jobs and their status."""

    job_id: JobId | None = field(default=None, kw_only=False)
    """A job; all jobs by default."""


@checked
class JobIdRequest(ClusterRequest):
    """A command about one job of a Ray cluster."""

    job_id: JobId = field(kw_only=False)
    """Id of the job, from avss jobs list."""


@checked
class StopRequest(JobIdRequest):
    """Stop a submitted job; its measurements are kept, and submitting it again resumes it."""


@checked
class LogsRequest(JobIdRequest):
    """Print the log of a submitted job."""

    follow: Follow = False
    """Print the log until the job ends."""


@checked
class DoctorRequest(Request):
    """Check what works on this machine: devices, Ray, DeepSpeed, versions."""
