"""Progress of one run into the warehouse: results as they come, then merge, score, commit."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from avss_dist.core.errors import AvssError, ModelError, RunFailed
from avss_dist.core.process import package_versions
from avss_dist.core.settings import Settings
from avss_dist.core.values import NewRow
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.models.checkpoint.locate import CONVERTED, Checkpoint, resolve
from avss_dist.models.checkpoint.quantization import describe_quantization
from avss_dist.models.checkpoint.training import TrainingPoint
from avss_dist.models.checkpoint.written import is_written_to
from avss_dist.partition.placement import Placement
from avss_dist.runs.merging import Apply, ShardSummary, merge_partials
from avss_dist.runs.planned import PlannedRun
from avss_dist.runs.result import Run
from avss_dist.runs.work import Receipt, RunShards
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.stats.scores import score_run
from avss_dist.warehouse.encoding import encode_shard
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.shared import share
from avss_dist.warehouse.store import Store

CONVERTED_NOTE = "the weights were stored as pickles; they were converted to safetensors"


class RunInProgress:
    """Writer of a run that is being measured. It does not change.

    Attributes:
        result: the run, with the number of shards that earlier attempts have measured.
        shards: shards that no earlier attempt has measured.
    """

    def __init__(self, planned: PlannedRun, store: Store, *, fresh: bool) -> None:
        self._planned = planned
        self._store = store
        self._start = time.perf_counter()
        # The folder may be gone when the row is written.
        self._model_columns = _model_columns(
            planned.replica_spec.checkpoint, planned.replica_spec.settings, planned.training
        )
        stored: set[int] = set()
        if not fresh:
            stored = {shard.shard_id for shard in store.reader.each_shard(planned.run_id, planned.expected)}
        missing = [shard for shard in planned.corpus.shards if shard.shard_id not in stored]
        self.result = replace(planned.result, resumed_shards=len(stored))
        self._shared = share(
            store,
            planned.run_id,
            model=planned.replica_spec.checkpoint.name,
            corpus=planned.corpus.source,
            dtype=planned.replica_spec.settings.dtype,
            num_tokens=planned.result.num_tokens,
            num_shards=planned.result.num_shards,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.shards = RunShards(
            run_id=planned.run_id, replica_spec=planned.replica_spec, shards=missing, warehouse=self._shared
        )

    @property
    def run_id(self) -> str:
        """Id of the run in the warehouse."""
        return self._planned.run_id

    @property
    def done_tokens(self) -> int:
        """Tokens that an earlier attempt has measured."""
        return self._planned.corpus.num_tokens - self._new_tokens

    @property
    def _new_tokens(self) -> int:
        """Tokens that no earlier attempt has measured."""
        return sum(shard.num_tokens for shard in self.shards.shards)

    @property
    def placement(self) -> Placement:
        """Placement of the run's replicas on devices."""
        return self._planned.replica_spec.placement

    def store(self, result: ShardResult | Receipt) -> None:
        """Write a result, unless its worker has written it."""
        if isinstance(result, Receipt):
            files = result.files
        else:
            files = encode_shard(self._identity(result.model["family"]), result)
        self._store.write_shard_files(self.run_id, result.shard_id, files)

    def finish(self, apply: Apply, *, begun: float | None, notes: Sequence[str]) -> Run:
        """Merge, score and commit the run, after every shard was written.

        Args:
            apply: see `merge_partials`.
            begun: when the first shard of this attempt was begun, by ``time.perf_counter``. None if all were stored.
            notes: what happened while it was measured, for its row.
        """
        if self._is_written_again():
            raise RunFailed(
                f"'{self.result.model}' was written again while it was measured.",
                "Run the same command again, which measures the new weights.",
            )
        measured = time.perf_counter()
        expected = self._planned.expected
        merged, summary = merge_partials(self._store, self.run_id, expected, self._shared, apply)

        identity = self._identity(summary.model["family"])
        self._store.write_layer_stats(identity, summary.layers, merged.stats, merged.strata)
        if self._planned.replica_spec.settings.experts:
            self._store.merge_experts(identity, summary.layers, expected)
        self._store.write_rows("scores", identity, score_run(merged.stats, summary.layers, merged.blocks))

        if begun is None:
            tokens_per_second = self._planned.corpus.num_tokens / max(summary.seconds, 1e-9)
        else:
            tokens_per_second = self._new_tokens / (measured - begun)
        columns = {
            "num_layers": len(summary.layers),
            "tokens_per_second": tokens_per_second,
            "device": summary.device,
            "peak_memory_bytes": summary.peak_memory_bytes,
            **summary.model,
            "notes": self._all_notes(summary, notes),
        }
        self.record(status="done", **columns)
        return replace(self.result, status="done", seconds=time.perf_counter() - self._start)

    def _all_notes(self, summary: ShardSummary, notes: Sequence[str]) -> list[str]:
        """Return the notes of the shards, of the checkpoint, and of this attempt."""
        all_notes = list(summary.model["notes"])
        if (self._planned.replica_spec.checkpoint.folder / CONVERTED).is_file():
            all_notes.append(CONVERTED_NOTE)
        all_notes += notes
        return all_notes

    def record_failure(self, error: AvssError) -> None:
        """Write the row of the failed run. Shards that may have other weights than the run's revision are deleted."""
        if self._is_written_again():
            self._store.delete_shards(self.run_id, self._planned.expected)
        self.record(status="failed", error=str(error))

    def _is_written_again(self) -> bool:
        """Whether the files of a folder changed since its revision was computed. Files that are gone have not."""
        if not any(is_written_to(file) for file in self._planned.files):
            return False
        checkpoint = self._planned.replica_spec.checkpoint
        try:
            present = resolve(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code)
        except ModelError:  # Parts of it are missing.
            return True
        return present.revision != checkpoint.revision

    def _identity(self, family: str) -> RunIdentity:
        checkpoint = self._planned.replica_spec.checkpoint
        return RunIdentity(run_id=self.run_id, model=checkpoint.name, revision=checkpoint.revision, family=family)

    def record(self, *, status: str, **columns: object) -> None:
        """Write the run's row."""
        settings = self._planned.replica_spec.settings
        row = {
            "run_id": self.run_id,
            "fingerprint": self._planned.fingerprint,
            "status": status,
            "created_at": datetime.now(UTC),
            "replicas": self._planned.replicas,
            "wall_seconds": time.perf_counter() - self._start,
            "versions": package_versions(),
        }
        row |= self._model_columns
        row |= _text_columns(self._planned.corpus, settings)
        row |= {
            "batch_size": settings.batch_size,
            "thresholds": list(settings.thresholds),
            "sites": list(settings.sites),
            "settings": json.dumps(settings.as_dict()),
        }
        row |= columns
        self._store.write_run(row)
        self._store.delete_unfinished_run(self.run_id)


def _model_columns(checkpoint: Checkpoint, settings: Settings, training: TrainingPoint) -> NewRow:
    """Return the columns of ``runs`` that tell which model was measured."""
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "revision_name": checkpoint.revision_name or None,
        "series": training.series,
        "training_step": training.step,
        "training_tokens": training.tokens,
        "seed": training.seed,
        "seed_group": training.seed_group,
        "quantization": describe_quantization(checkpoint, settings),
    }


def _text_columns(corpus: CorpusPlan, settings: Settings) -> NewRow:
    """Return the columns of ``runs`` that tell which text was read, and how it was divided."""
    return {
        "corpus": corpus.source,
        "corpus_fingerprint": corpus.corpus_fingerprint,
        "tokens_fingerprint": corpus.tokens_fingerprint,
        "chat_template": corpus.chat_template,
        "shuffle_seed": settings.shuffle_seed,
        "num_sequences": corpus.num_sequences,
        "num_tokens": corpus.num_tokens,
        "sequence_length": settings.sequence_length,
        "num_shards": len(corpus.shards),
    }
