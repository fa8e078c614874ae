"""Signatures of the public functions, made of their requests by ``tests/support/reference.py``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from avss_dist.analysis.comparison import RankingComparison
from avss_dist.analysis.contrast import Contrast
from avss_dist.analysis.curves import RankingCurves
from avss_dist.commands import Pruned as Pruned
from avss_dist.commands import Runs as Runs
from avss_dist.core.errors import AvssError as AvssError
from avss_dist.core.errors import ConfigError as ConfigError
from avss_dist.core.errors import CorpusError as CorpusError
from avss_dist.core.errors import ModelError as ModelError
from avss_dist.core.errors import QueryError as QueryError
from avss_dist.core.errors import RunFailed as RunFailed
from avss_dist.core.errors import TaskError as TaskError
from avss_dist.core.errors import WarehouseError as WarehouseError
from avss_dist.core.results import Table as Table
from avss_dist.core.settings import Settings as Settings
from avss_dist.distillation.distill import Distilled as Distilled
from avss_dist.estimation import Estimate as Estimate
from avss_dist.evaluation.session import EvaluationSession as EvaluationSession
from avss_dist.partition.execution import Execution as Execution
from avss_dist.plans.map_plans import PrecisionPlan
from avss_dist.plans.map_plans import SparsityPlan
from avss_dist.plans.plan import Plan as Plan
from avss_dist.read_commands import doctor as doctor
from avss_dist.reports.terminal.progress import Progress as Progress
from avss_dist.runs.job_file import JobFile
from avss_dist.runs.result import Run as Run
from avss_dist.serving.verify import Verified as Verified
from avss_dist.studies.ablate import Ablation as Ablation
from avss_dist.studies.evaluate import Evaluations as Evaluations
from avss_dist.studies.shrunk import Shrunk as Shrunk
from avss_dist.warehouse.reader import Warehouse as Warehouse

__version__: str

def ablate(
    model: str | Path,
    *,
    leave_one_out: bool = True,
    sublayers: bool = False,
    shapley: int = 0,
    truncation: bool = True,
    seed: int = 0,
    gradients: bool = False,
    damage: bool = False,
    quantize: Sequence[str | Path] = ...,
    rounded_layers: bool = True,
    allow_many: bool = False,
    corpus: str | Path,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
    batch_size: int = 8,
    sequences_per_shard: int | None = None,
    dequantize: bool = False,
    threads: int = 1,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    executor: Literal['auto', 'local', 'ray'] = 'auto',
    replicas: int | str | None = None,
    fresh: bool = False,
    partition: Literal['auto', 'single', 'device_map', 'streaming', 'fsdp', 'zero3', 'tensor_parallel', 'expert_parallel'] = 'auto',
    ranks: int | None = None,
    gpus_per_replica: int | None = None,
    max_memory: Mapping[str, int | str] = ...,
    address: str | None = None,
    node_labels: Sequence[str] = ...,
    placement_seconds: float = 300.0,
    hang_seconds: float = 600.0,
) -> Ablation:
    """Measure the effect of each layer of a model on its loss. Cells that the warehouse has are not measured again."""

def compact(
    *,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> Table:
    """Copy many finished runs into few large files, and return the number of runs copied of each table."""

def compare(
    *,
    by: Literal['run', 'family', 'size', 'revision', 'seed', 'corpus', 'dtype', 'recipe', 'threshold', 'site', 'score'] = 'run',
    along: Literal['step', 'tokens', 'size', 'sequence_length'] | None = None,
    score: str | Mapping[int, float] = 'avss',
    share: float = 0.25,
    allow_mismatch: bool = False,
    output: str | Path | None = None,
    threshold: str | float = 1e-05,
    site: Literal['block', 'update', 'attention', 'mlp', 'neuron', 'query_input', 'output_input', 'up_input'] = 'block',
    recipe: Literal['pooled', 'element', 'unit'] = 'pooled',
    run: str | Run | Sequence[str | Run] | None = ...,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> RankingComparison | RankingCurves:
    """Compare the layer rankings of runs, by default of all finished ones, by pairs or ``along`` an axis."""

def contrast(
    *,
    threshold: str | float = 1e-05,
    hallucinated: str | None = None,
    truthful: str | None = None,
    site: Literal['block', 'update', 'attention', 'mlp', 'neuron', 'query_input', 'output_input', 'up_input'] = 'block',
    recipe: Literal['pooled', 'element', 'unit'] = 'pooled',
    run: str | Run | None = None,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> Contrast:
    """Return the contrast of a run on paired text: of each layer, by label of the answers, with controls."""

def distill(
    student: str | Path,
    *,
    teacher: str | Path,
    output: str | Path,
    corpora: Sequence[str | Path] = ...,
    self_texts: int | None = None,
    watch: Sequence[str | Path] = ...,
    held_out: int = 16,
    allow_overlap: bool = False,
    tokens: float = 1000000.0,
    train: Literal['all', 'lora'] = 'all',
    lora_rank: int = 16,
    learning_rate: float | None = None,
    warmup: int | None = None,
    batch_size: int | None = None,
    evaluations: int = 8,
    seed: int = 0,
    ranks: int = 1,
    sharding: Literal['ddp', 'zero1', 'zero2', 'zero3', 'fsdp'] = 'ddp',
    report_to: Literal['trackio', 'wandb', 'mlflow'] | None = None,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    address: str | None = None,
    node_labels: Sequence[str] = ...,
    placement_seconds: float = 300.0,
    hang_seconds: float = 600.0,
    on_event: Callable[[Any], object] | None = None,
) -> Distilled:
    """Train a student on the predictions of a teacher, and write it as a checkpoint."""

def estimate(
    model: str | Path,
    *,
    ranks: int | None = None,
    teacher: str | Path | None = None,
    repair: Literal['none', 'channel', 'map', 'refit', 'borrow', 'refit_all'] = 'none',
    max_memory: Mapping[str, int | str] = ...,
    on_event: Callable[[Any], object] | None = None,
    batch_size: int = 8,
    sequences_per_shard: int | None = None,
    dequantize: bool = False,
    threads: int = 1,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
) -> Estimate:
    """Estimate the memory of a replica with every partition, from a checkpoint's configuration and headers."""

def evaluate(
    subjects: Sequence[str | Path | Plan | SparsityPlan | PrecisionPlan],
    *,
    tasks: Sequence[str | Path],
    skip_questions: int = 0,
    limit: int | None = None,
    num_fewshot: int | None = None,
    sparse: str | Path | SparsityPlan | None = None,
    base: str | Path | None = None,
    speed: bool = False,
    allow_overlap: bool = False,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
    batch_size: int = 8,
    sequences_per_shard: int | None = None,
    dequantize: bool = False,
    threads: int = 1,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    executor: Literal['auto', 'local', 'ray'] = 'auto',
    replicas: int | str | None = None,
    fresh: bool = False,
    partition: Literal['auto', 'single', 'device_map', 'streaming', 'fsdp', 'zero3', 'tensor_parallel', 'expert_parallel'] = 'auto',
    ranks: int | None = None,
    gpus_per_replica: int | None = None,
    max_memory: Mapping[str, int | str] = ...,
    address: str | None = None,
    node_labels: Sequence[str] = ...,
    placement_seconds: float = 300.0,
    hang_seconds: float = 600.0,
) -> Evaluations:
    """Evaluate models and plans on tasks. Cells that the warehouse has are not measured again."""

def findings(
    *,
    every: bool = False,
    truth: bool = False,
    by: Sequence[str | Mapping[int, float]] = ...,
    threshold: str | float = 1e-05,
    site: Literal['block', 'update', 'attention', 'mlp', 'neuron', 'query_input', 'output_input', 'up_input'] = 'block',
    recipe: Literal['pooled', 'element', 'unit'] = 'pooled',
    run: str | Run | Sequence[str | Run] | None = ...,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> Table:
    """List findings that speak against the scores of runs, by default of all finished ones."""

def ls(
    what: Literal['runs', 'plans', 'evaluations'] = 'runs',
    *,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> Table:
    """Return the runs, the evaluated sets of layers, or the evaluations of a warehouse, newest first."""

def plan(
    *,
    output: str | Path | None = None,
    by: str | Mapping[int, float] | None = None,
    first: int = 0,
    last: int = 0,
    keep_pattern: bool = False,
    share: float | None = None,
    count: int | None = None,
    memory: int | str | None = None,
    experts: float | None = None,
    corpus: str | Path | None = None,
    seed: int = 0,
    threshold: str | float = 1e-05,
    site: Literal['block', 'update', 'attention', 'mlp', 'neuron', 'query_input', 'output_input', 'up_input'] = 'block',
    recipe: Literal['pooled', 'element', 'unit'] = 'pooled',
    run: str | Run | None = None,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
    batch_size: int = 8,
    sequences_per_shard: int | None = None,
    dequantize: bool = False,
    threads: int = 1,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    executor: Literal['auto', 'local', 'ray'] = 'auto',
    replicas: int | str | None = None,
    fresh: bool = False,
    partition: Literal['auto', 'single', 'device_map', 'streaming', 'fsdp', 'zero3', 'tensor_parallel', 'expert_parallel'] = 'auto',
    ranks: int | None = None,
    gpus_per_replica: int | None = None,
    max_memory: Mapping[str, int | str] = ...,
    address: str | None = None,
    node_labels: Sequence[str] = ...,
    placement_seconds: float = 300.0,
    hang_seconds: float = 600.0,
) -> Plan:
    """Choose the layers or routed experts of a run's model to drop, with the reason and the findings against it."""

def prune(
    model: str | Path,
    plan: str | Path | Plan,
    output: str | Path,
    *,
    repair: Literal['none', 'channel', 'map', 'refit', 'borrow', 'refit_all'] | None = None,
    repair_corpora: Sequence[str | Path] = ...,
    warehouse: str | Path | None = None,
    on_event: Callable[[Any], object] | None = None,
    batch_size: int = 8,
    sequences_per_shard: int | None = None,
    dequantize: bool = False,
    threads: int = 1,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    executor: Literal['auto', 'local', 'ray'] = 'auto',
    replicas: int | str | None = None,
    fresh: bool = False,
    partition: Literal['auto', 'single', 'device_map', 'streaming', 'fsdp', 'zero3', 'tensor_parallel', 'expert_parallel'] = 'auto',
    ranks: int | None = None,
    gpus_per_replica: int | None = None,
    max_memory: Mapping[str, int | str] = ...,
    address: str | None = None,
    node_labels: Sequence[str] = ...,
    placement_seconds: float = 300.0,
    hang_seconds: float = 600.0,
) -> Pruned:
    """Write a checkpoint without the layers and routed experts that a plan drops, repaired on request."""

def publish(
    folder: str | Path,
    *,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> Table:
    """Write the finished runs of a warehouse for others, and return the number of rows of each table."""

def quantize(
    *,
    output: str | Path | None = None,
    format: Literal['plan', 'llama-cpp', 'llm-compressor'] = 'plan',
    by: Literal['predicted', 'second_order', 'output_error', 'uniform', 'random'] = 'second_order',
    bits: float | None = None,
    memory: int | str | None = None,
    quantize: Sequence[str | Path] = ...,
    seed: int = 0,
    run: str | Run | None = None,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> PrecisionPlan:
    """Choose the number format of each linear map of a run's model under a budget of bits."""

def query(
    sql: str | None = None,
    *,
    schema: bool = False,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> Table:
    """Return the rows of a query in SQL (DuckDB) or, with ``schema``, every table and column of a warehouse."""

def report(
    *,
    output: str | Path = 'report.html',
    by: Sequence[str | Mapping[int, float]] = ...,
    run: str | Run | Sequence[str | Run] | None = ...,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> Path:
    """Write the page of a warehouse, and return its path."""

def rm(
    run: str | Run | Sequence[str | Run] | None = ...,
    *,
    unused: bool = False,
    keep_evaluations: bool = False,
    dry_run: bool = False,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> Table:
    """Remove runs and the evaluations that go with them, and return the number of files, rows and bytes of each table."""

def run(
    job: str | Path | JobFile,
    *,
    executor: Literal['auto', 'local', 'ray'] | None = None,
    address: str | None = None,
    allow_overlap: bool = False,
    allow_many: bool = False,
    replicas: int | str | None = None,
    fresh: bool | None = None,
    watch: bool = False,
    until: int | str | None = None,
    watch_seconds: float = 10.0,
    on_event: Callable[[Any], object] | None = None,
) -> Runs:
    """Execute a job file, its experiment included. Finished runs are not repeated."""

def score(
    model: str | Path,
    *,
    corpus: str | Path,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
    sites: Sequence[Literal['block', 'update', 'attention', 'mlp', 'neuron', 'query_input', 'output_input', 'up_input', 'inputs']] = ...,
    thresholds: Sequence[float | str] = ...,
    experts: bool = False,
    skip_first_tokens: int = 0,
    allow_pickle: bool = False,
    batch_size: int = 8,
    sequences_per_shard: int | None = None,
    dequantize: bool = False,
    threads: int = 1,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    executor: Literal['auto', 'local', 'ray'] = 'auto',
    replicas: int | str | None = None,
    fresh: bool = False,
    partition: Literal['auto', 'single', 'device_map', 'streaming', 'fsdp', 'zero3', 'tensor_parallel', 'expert_parallel'] = 'auto',
    ranks: int | None = None,
    gpus_per_replica: int | None = None,
    max_memory: Mapping[str, int | str] = ...,
    address: str | None = None,
    node_labels: Sequence[str] = ...,
    placement_seconds: float = 300.0,
    hang_seconds: float = 600.0,
) -> Run:
    """Score one checkpoint and store the result in a warehouse. A run that is done is not repeated."""

def score_all(
    models: Sequence[str | Path],
    *,
    corpus: str | Path,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
    sites: Sequence[Literal['block', 'update', 'attention', 'mlp', 'neuron', 'query_input', 'output_input', 'up_input', 'inputs']] = ...,
    thresholds: Sequence[float | str] = ...,
    experts: bool = False,
    skip_first_tokens: int = 0,
    allow_pickle: bool = False,
    batch_size: int = 8,
    sequences_per_shard: int | None = None,
    dequantize: bool = False,
    threads: int = 1,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    executor: Literal['auto', 'local', 'ray'] = 'auto',
    replicas: int | str | None = None,
    fresh: bool = False,
    partition: Literal['auto', 'single', 'device_map', 'streaming', 'fsdp', 'zero3', 'tensor_parallel', 'expert_parallel'] = 'auto',
    ranks: int | None = None,
    gpus_per_replica: int | None = None,
    max_memory: Mapping[str, int | str] = ...,
    address: str | None = None,
    node_labels: Sequence[str] = ...,
    placement_seconds: float = 300.0,
    hang_seconds: float = 600.0,
) -> list[Run]:
    """Score several checkpoints with one pool of workers. A failing run is recorded and does not stop the others."""

def show(
    *,
    run: str | Run | Sequence[str | Run] | None = ...,
    output: str | Path | None = None,
    experts: bool = False,
    quantiles: bool = False,
    sparsity: Sequence[float] = ...,
    by: Sequence[str | Mapping[int, float]] = ...,
    threshold: str | float = 1e-05,
    site: Literal['block', 'update', 'attention', 'mlp', 'neuron', 'query_input', 'output_input', 'up_input'] = 'block',
    recipe: Literal['pooled', 'element', 'unit'] = 'pooled',
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
) -> Table:
    """Return the scores of runs by layer, by default of the newest, with a column for each score of your own."""

def shrink(
    model: str | Path,
    *,
    output: str | Path,
    corpus: str | Path,
    warehouse: str | Path | None = None,
    share: float | None = None,
    keep: float | None = None,
    by: Literal['loss', 'shapley', 'taylor', 'damage', 'predicted', 'propagated', 'avss', 'block_influence', 'angular_distance', 'relative_magnitude', 'update_variance_ratio', 'last', 'random', 'greedy'] = 'damage',
    repair: Literal['none', 'channel', 'map', 'refit', 'borrow', 'refit_all'] = 'borrow',
    repair_corpora: Sequence[str | Path] = ...,
    tasks: Sequence[str | Path] = ...,
    first: int = 0,
    last: int = 0,
    keep_pattern: bool = False,
    limit: int | None = None,
    allow_overlap: bool = False,
    distill_tokens: float | None = None,
    speed: bool = True,
    on_event: Callable[[Any], object] | None = None,
    batch_size: int = 8,
    sequences_per_shard: int | None = None,
    dequantize: bool = False,
    threads: int = 1,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    executor: Literal['auto', 'local', 'ray'] = 'auto',
    replicas: int | str | None = None,
    fresh: bool = False,
    partition: Literal['auto', 'single', 'device_map', 'streaming', 'fsdp', 'zero3', 'tensor_parallel', 'expert_parallel'] = 'auto',
    ranks: int | None = None,
    gpus_per_replica: int | None = None,
    max_memory: Mapping[str, int | str] = ...,
    address: str | None = None,
    node_labels: Sequence[str] = ...,
    placement_seconds: float = 300.0,
    hang_seconds: float = 600.0,
) -> Shrunk:
    """Write a smaller checkpoint of a causal language model, and compare it with the model."""

def sparsify(
    target: float,
    *,
    output: str | Path | None = None,
    method: Literal['uniform', 'loss', 'teal', 'acttail', 'wina'] = 'uniform',
    rule: Literal['all', 'last-half'] = 'all',
    corpus: str | Path | None = None,
    run: str | Run | None = None,
    warehouse: str | Path = 'warehouse',
    on_event: Callable[[Any], object] | None = None,
    batch_size: int = 8,
    sequences_per_shard: int | None = None,
    dequantize: bool = False,
    threads: int = 1,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto',
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    max_sequences: int | None = None,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    executor: Literal['auto', 'local', 'ray'] = 'auto',
    replicas: int | str | None = None,
    fresh: bool = False,
    partition: Literal['auto', 'single', 'device_map', 'streaming', 'fsdp', 'zero3', 'tensor_parallel', 'expert_parallel'] = 'auto',
    ranks: int | None = None,
    gpus_per_replica: int | None = None,
    max_memory: Mapping[str, int | str] = ...,
    address: str | None = None,
    node_labels: Sequence[str] = ...,
    placement_seconds: float = 300.0,
    hang_seconds: float = 600.0,
) -> SparsityPlan:
    """Choose the activations of a run's model that become zero: thresholds of the inputs of its linear maps."""

def verify(
    model: str | Path,
    *,
    server: str,
    kind: Literal['vllm', 'sglang', 'llama.cpp', 'ollama'] | None = None,
    served_model: str | None = None,
    original: str | None = None,
    original_model: str | None = None,
    base: str | Path | None = None,
    corpus: str | Path = 'builtin:pydoc',
    max_sequences: int = 16,
    dtype: Literal['auto', 'bfloat16', 'float16'] = 'auto',
    timeout: float = 300.0,
    partition: Literal['auto', 'single', 'device_map', 'streaming'] = 'auto',
    max_memory: Mapping[str, int | str] = ...,
    layers: str | None = None,
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] | None = None,
    device: Literal['auto', 'cpu', 'cuda'] = 'auto',
    trust_remote_code: bool = False,
    skip_sequences: int = 0,
    sequence_length: int = 256,
    shuffle_seed: int | None = None,
    chat_template: bool = False,
    layout: Literal['packed', 'padded'] = 'packed',
    row_start: Literal['auto', 'none'] = 'auto',
    on_event: Callable[[Any], object] | None = None,
) -> Verified:
    """Compare a checkpoint, as transformers computes it, with a running inference server that serves it."""
