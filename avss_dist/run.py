"""The driver: plan, skip what is done, execute, merge, score, commit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Protocol

import pyarrow as pa

from avss_dist.checkpoints import Checkpoint, resolve, slug
from avss_dist.config import BOOTSTRAP_BLOCKS, DTYPES, SCHEMA_VERSION, Execution, Settings, fingerprint
from avss_dist.corpus import CorpusPlan, plan
from avss_dist.errors import AvssError, ConfigError, ModelError, RunFailed, require_known
from avss_dist.executors.base import Executor, Job, open_executor
from avss_dist.footprint import footprint
from avss_dist.models import load_tokenizer, text_config
from avss_dist.partition.base import Placement
from avss_dist.partition.choose import choose
from avss_dist.query import Warehouse
from avss_dist.scoring import score_run
from avss_dist.sources import documents
from avss_dist.stats import ShardResult, merge_blocks, merge_stats
from avss_dist.warehouse import RunIdentity


@dataclass(frozen=True, kw_only=True)
class Run:
    """One checkpoint scored on one corpus.

    Attributes:
        run_id: its name in the warehouse.
        model: as the user named it.
        warehouse: where its tables are.
        status: ``done``, ``skipped`` (it was done before) or ``failed``.
        num_shards, resumed_shards: shards in all, and those that an earlier attempt had measured.
        num_tokens: tokens that count in the statistics.
        seconds: wall time of this attempt.
        error: why it failed, or None.
    """

    run_id: str
    model: str
    warehouse: str
    status: str
    num_shards: int = 0
    resumed_shards: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    def scores(self, **equals: Any) -> pa.Table:
        """This run's rows of ``scores``, those whose columns equal the given values: ``run.scores(site="block")``."""
        return Warehouse(self.warehouse).scores(run_id=self.run_id, **equals)


class Reporter(Protocol):
    """Told how the work goes; the command line draws it."""

    def planning(self, model: str) -> None: ...
    def placed(self, model: str, placement: Placement) -> None: ...
    def started(self, model: str, num_tokens: int, done_tokens: int) -> None: ...
    def advanced(self, num_tokens: int) -> None: ...
    def finished(self, run: Run) -> None: ...


class Silent:
    """A Reporter that says nothing."""

    def planning(self, model: str) -> None: ...
    def placed(self, model: str, placement: Placement) -> None: ...
    def started(self, model: str, num_tokens: int, done_tokens: int) -> None: ...
    def advanced(self, num_tokens: int) -> None: ...
    def finished(self, run: Run) -> None: ...


def score(model: str | Path, *, corpus: str, out: str | Path, reporter: Reporter | None = None, **options: Any) -> Run:
    """Score one checkpoint and keep the result in a warehouse; a run that is done is not repeated.

    Args:
        model: hub id (``org/name@revision``), folder, or ``.gguf`` file.
        corpus: ``file.txt``, ``file.jsonl[:field]``, ``file.parquet[:column]``, ``hf:...`` or ``builtin:pydoc``.
        out: the warehouse, a folder or URI.
        reporter: told how the work goes.
        options: the fields of ``config.Settings`` and ``config.Execution``.

    Raises:
        AvssError: a mistake, or a failed run (`RunFailed`); what was measured is kept.
    """
    with _driver(corpus, out, reporter, options) as driver:
        return driver.run(str(model))


def score_all(
    models: Sequence[str], *, corpus: str, out: str | Path, reporter: Reporter | None = None, **options: Any
) -> list[Run]:
    """Score several checkpoints with one pool of workers; one that fails is recorded and does not stop the others.

    Raises:
        AvssError: a mistake that concerns all of them, such as an unknown setting or an unwritable warehouse.
    """
    runs = []
    with _driver(corpus, out, reporter, options) as driver:
        for model in models:
            try:
                runs.append(driver.run(model))
            except AvssError as error:
                runs.append(driver.record_failure(model, error))
    return runs


@contextmanager
def _driver(corpus: str, out: str | Path, reporter: Reporter | None, options: dict[str, Any]) -> Iterator[_Driver]:
    """What all models share: settings, corpus and warehouse, checked before any work; workers, closed after it."""
    settings, execution = split_options(options)
    _require_readable(corpus)
    store = Warehouse(out)
    store.create()
    with closing(open_executor(execution, settings)) as executor:
        yield _Driver(store, corpus, settings, execution, executor, reporter or Silent())


def _require_readable(corpus: str) -> None:
    """Fail now, not for every model, where the corpus cannot be read."""
    for _ in documents(corpus):
        break


def split_options(options: dict[str, Any]) -> tuple[Settings, Execution]:
    """Keyword options as Settings and Execution.

    Raises:
        ConfigError: an option does not exist (the nearest one is named), or has a value that it cannot have.
    """
    settings, execution = set(Settings.__dataclass_fields__), set(Execution.__dataclass_fields__)
    for name in options:
        require_known("option", name, sorted(settings | execution), ConfigError)
    return (
        Settings(**{name: value for name, value in options.items() if name in settings}),
        Execution(**{name: value for name, value in options.items() if name in execution}),
    )


@dataclass(frozen=True)
class _Driver:
    """Runs checkpoints one after the other with the same settings, corpus, warehouse and workers."""

    store: Warehouse
    corpus: str
    settings: Settings
    execution: Execution
    executor: Executor
    reporter: Reporter

    def run(self, model: str) -> Run:
        start = time.perf_counter()
        self.reporter.planning(model)
        checkpoint = resolve(model, trust_remote_code=self.settings.trust_remote_code)
        config = text_config(checkpoint, trust_remote_code=self.settings.trust_remote_code)
        settings = self._pin(checkpoint, config)
        placement = self._place(checkpoint, settings)
        corpus = self._plan(checkpoint, config, settings)
        print_ = run_fingerprint(checkpoint, corpus, settings, placement)
        run = Run(
            run_id=f"{checkpoint.slug}-{print_[:10]}",
            model=model,
            warehouse=self.store.root,
            status="skipped",
            num_shards=len(corpus.shards),
            num_tokens=corpus.num_tokens,
        )
        if not self.execution.fresh and (self.store.run(run.run_id) or {}).get("status") == "done":
            self.reporter.finished(run)
            return run
        self.reporter.placed(model, placement)
        attempt = _Attempt(self, checkpoint, settings, placement, corpus, print_, run, start)
        try:
            run = attempt.finish()
        except Exception as error:  # a model's own code can raise anything; it must not stop the other models
            failure = error if isinstance(error, AvssError) else RunFailed(f"{type(error).__name__}: {error}")
            attempt.record(status="failed", error=str(failure))
            failure.run_id = run.run_id
            raise failure from error
        self.reporter.finished(run)
        return run

    def record_failure(self, model: str, error: AvssError) -> Run:
        """A run that failed before or while it ran; one that got as far as a fingerprint is recorded already."""
        settings = self.settings.as_dict()
        print_ = fingerprint(model=model, corpus=self.corpus, settings=settings)
        run_id = error.run_id or f"{slug(Path(model).name)}-{print_[:10]}"
        run = Run(run_id=run_id, model=model, warehouse=self.store.root, status="failed", error=str(error))
        if error.run_id:
            self.reporter.finished(run)
            return run
        self.store.write_run(
            {
                "run_id": run_id,
                "fingerprint": print_,
                "status": "failed",
                "error": str(error),
                "created_at": datetime.now(UTC),
                "model": model,
                "corpus": self.corpus,
                "settings": json.dumps(settings),
            }
        )
        self.reporter.finished(run)
        return run

    def _pin(self, checkpoint: Checkpoint, config: Any) -> Settings:
        """Settings with every ``auto`` that changes numbers decided; refuses rows that the model cannot read."""
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < self.settings.sequence_length:
            raise ModelError(
                f"'{checkpoint.name}' reads at most {longest} tokens of the {self.settings.sequence_length} asked for.",
                f"Pass --sequence-length {longest} or less.",
            )
        stored = str(getattr(text, "dtype", None) or getattr(config, "dtype", None)).removeprefix("torch.")
        dtype = stored if self.settings.dtype == "auto" and stored in DTYPES else self.settings.dtype
        return replace(self.settings, device=self.executor.device, dtype=dtype)

    def _place(self, checkpoint: Checkpoint, settings: Settings) -> Placement:
        """How a replica is spread; refuses more than there is before anything is loaded."""
        size = None
        if self.execution.partition == "auto":
            with suppress(ModelError):  # what cannot be sized is opened as `single`, which says what is wrong with it
                size = footprint(checkpoint, settings)
        placement = choose(size, settings, self.execution, self.executor.devices)
        self.executor.replicas(placement)
        return placement

    def _plan(self, checkpoint: Checkpoint, config: Any, settings: Settings) -> CorpusPlan:
        """The corpus in the checkpoint's tokens; refuses tokens that the model does not have."""
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
        corpus = plan(self.corpus, tokenizer, settings)
        known = getattr(config.get_text_config(), "vocab_size", None)
        highest = max(int(b.input_ids.max()) for shard in corpus.shards for b in shard.batches(settings.batch_size))
        if isinstance(known, int) and 0 < known <= highest:
            raise ModelError(
                f"The tokenizer of '{checkpoint.name}' gives token {highest}; the model has {known}, from 0.",
                "Put the tokenizer that it was trained with into its folder.",
            )
        return corpus


def run_fingerprint(checkpoint: Checkpoint, corpus: CorpusPlan, settings: Settings, placement: Placement) -> str:
    """SHA-256 of all that can change a number: weights, tokens and their order, settings, kind of device, schema.

    The tokenizer and the packing count through the tokens that they give. Of the partitions only tensor parallel
    counts, which alone adds up in another order.
    """
    split = {"tensor_parallel": placement.ranks} if placement.partition == "tensor_parallel" else {}
    numbers = {k: v for k, v in settings.as_dict().items() if k not in ("max_sequences", "trust_remote_code", "layout")}
    tokens = corpus.tokens_fingerprint
    return fingerprint(schema=SCHEMA_VERSION, checkpoint=checkpoint.revision, tokens=tokens, settings=numbers, **split)


@dataclass
class _Attempt:
    """One run on its way into the warehouse."""

    driver: _Driver
    checkpoint: Checkpoint
    settings: Settings
    placement: Placement
    corpus: CorpusPlan
    fingerprint: str
    run: Run
    start: float

    def finish(self) -> Run:
        """Measure what is missing, then merge, score and commit."""
        store, expected = self.driver.store, {s.shard_id: s.content_hash for s in self.corpus.shards}
        kept = set() if self.driver.execution.fresh else {s.shard_id for s in self._partials(expected)}
        missing = [shard for shard in self.corpus.shards if shard.shard_id not in kept]
        self.run = replace(self.run, resumed_shards=len(kept))
        measuring = time.perf_counter()
        num_measured = self._measure(missing)
        measuring = time.perf_counter() - measuring

        shards = _Facts(self._partials(expected))
        blocks = merge_blocks(shards, len(expected), BOOTSTRAP_BLOCKS)
        stats = merge_stats(blocks)
        layers = shards.layers
        identity = self._identity(shards.model["family"])
        store.write_layer_stats(identity, layers, stats)
        store.write_scores(identity, score_run(stats, layers, blocks))
        speed = num_measured / measuring if num_measured else self.corpus.num_tokens / max(shards.seconds, 1e-9)
        self.record(
            status="done",
            num_layers=len(layers),
            tokens_per_second=speed,
            device=shards.device,
            peak_memory_bytes=shards.peak_memory_bytes,
            **shards.model,
        )
        return replace(self.run, status="done", seconds=time.perf_counter() - self.start)

    def _partials(self, expected: dict[int, str]) -> Iterator[ShardResult]:
        """The partials in the warehouse, in order, a few in memory at a time."""
        ids = sorted(expected)
        for i in range(0, len(ids), 8):
            yield from self.driver.store.read_shards(self.run.run_id, {k: expected[k] for k in ids[i : i + 8]})

    def _measure(self, shards: Sequence[Any]) -> int:
        """Execute shards and commit each result as it arrives; returns the tokens measured."""
        driver = self.driver
        left = {shard.shard_id for shard in shards}
        measured = 0
        driver.reporter.started(
            self.run.model, self.corpus.num_tokens, self.corpus.num_tokens - sum(s.num_tokens for s in shards)
        )
        if not shards:
            return 0
        job = Job(checkpoint=self.checkpoint, settings=self.settings, placement=self.placement)
        with closing(driver.executor.run(job, shards)) as results:
            for result in results:
                if result.shard_id not in left:
                    continue
                left.discard(result.shard_id)
                driver.store.write_shard(self._identity(result.model["family"]), result)
                measured += result.num_tokens
                driver.reporter.advanced(result.num_tokens)
        return measured

    def _identity(self, family: str) -> RunIdentity:
        return RunIdentity(
            run_id=self.run.run_id, model=self.checkpoint.name, revision=self.checkpoint.revision, family=family
        )

    def record(self, *, status: str, **columns: Any) -> None:
        """Write the run's row."""
        settings, corpus = self.settings, self.corpus
        self.driver.store.write_run(
            {
                "run_id": self.run.run_id,
                "fingerprint": self.fingerprint,
                "status": status,
                "created_at": datetime.now(UTC),
                "model": self.checkpoint.name,
                "revision": self.checkpoint.revision,
                "replicas": self.driver.executor.replicas(self.placement),
                "corpus": corpus.source,
                "corpus_fingerprint": corpus.corpus_fingerprint,
                "tokens_fingerprint": corpus.tokens_fingerprint,
                "num_sequences": corpus.num_sequences,
                "num_tokens": corpus.num_tokens,
                "sequence_length": settings.sequence_length,
                "batch_size": settings.batch_size,
                "thresholds": list(settings.thresholds),
                "sites": list(settings.sites),
                "num_shards": len(corpus.shards),
                "wall_seconds": time.perf_counter() - self.start,
                "settings": json.dumps(settings.as_dict()),
                "versions": package_versions(),
                **columns,
            }
        )


class _Facts:
    """Passes shards on, and keeps what the run's row says of them."""

    def __init__(self, shards: Iterator[ShardResult]) -> None:
        self._shards = shards
        self.layers: tuple[str, ...] = ()
        self.model: dict[str, Any] = {}
        self.device = ""
        self.peak_memory_bytes = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[ShardResult]:
        for shard in self._shards:
            notes = list(dict.fromkeys([*self.model.get("notes", ()), *shard.model["notes"]]))
            self.layers, self.model, self.device = shard.layers, {**shard.model, "notes": notes}, shard.device
            self.peak_memory_bytes = max(self.peak_memory_bytes, shard.peak_memory_bytes)
            self.seconds += shard.seconds
            yield shard


PACKAGES = ("avss_dist", "torch", "transformers", "accelerate", "deepspeed", "ray", "numpy", "pyarrow", "numba")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number or a file."""
    versions = {"python": python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
