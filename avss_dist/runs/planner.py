"""Planning of runs: checkpoint, placement, tokenized corpus, fingerprint. No weight is loaded."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from avss_dist.core.errors import ModelError, StorageFull
from avss_dist.core.fingerprint import NUMBERS_VERSION, fingerprint
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import USUAL_ROWS, CorpusPlan, tokenize_corpus
from avss_dist.corpus.sources import open_source
from avss_dist.models.checkpoint.loading import load_tokenizer, pin, text_config
from avss_dist.models.checkpoint.locate import Checkpoint, content_hash, convert_pickles, resolve
from avss_dist.models.checkpoint.size import Footprint, sharing_skeletons
from avss_dist.models.structure.additions import transforms_outputs
from avss_dist.partition.choose import choose, needs_size, require_ranks, size_of
from avss_dist.partition.placement import Placement, fingerprint_part
from avss_dist.runs.in_progress import RunInProgress
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.local import Executor
from avss_dist.runs.planned import PlannedRun
from avss_dist.runs.result import Run
from avss_dist.runs.work import ReplicaSpec
from avss_dist.warehouse.store import Store

# Changing one of these changes the shards, and so the id, of every run without an explicit size.
MOST_SECONDS = 60  # of a shard on a typical device; at least half of that, as sizes are doubled
FEWEST_SHARDS = 16  # for intervals over shards; a text of fewer rows has one shard a row
MOST_WAITING_BYTES = 4 << 30  # hidden states of a shard, which wait together where layers are streamed
FLOPS_OF_A_THREAD = {2: 150e9, 4: 75e9}  # a second, by the bytes of an element, with all that is measured
FLOPS_OF_A_GPU = {2: 200e12, 4: 20e12}

KEPT_PLANS = 4  # tokenized corpora that are remembered
_TOKENIZER_FILES = (".json", ".model", ".txt", ".jinja")
_OTHER_FILES = ("config.json", "generation_config.json", "trainer_state.json", "model.safetensors.index.json")


@dataclass
class Planner:
    """Planner of runs. Checkpoints, tokenized corpora and placements are cached. No weight is loaded.

    Args:
        fetch: whether to download the weights of hub checkpoints.
    """

    executor: Executor
    store: Store
    fetch: bool = True
    _opened: tuple[Any, ...] = ()
    _plans: OrderedDict[tuple[Any, ...], tuple[CorpusPlan, int]] = field(default_factory=OrderedDict)

    def prepare(self, spec: RunSpec) -> PlannedRun:
        """Plan a run.

        Raises:
            AvssError: the model, its tokenizer or its size is not one that can be run here.
        """
        checkpoint, config, settings, placement, size = self._open(spec)
        corpus = self._plan(spec, checkpoint, config, settings)
        if settings.sequences_per_shard is None:
            rows = rows_per_shard(size, settings, corpus.num_sequences)
            corpus, settings = corpus.recut(rows), replace(settings, sequences_per_shard=rows)
        print_ = run_fingerprint(checkpoint, config, corpus, settings, placement)
        return PlannedRun(
            replica_spec=ReplicaSpec(checkpoint=checkpoint, settings=settings, placement=placement),
            corpus=corpus,
            fingerprint=print_,
            result=Run(
                run_id=f"{checkpoint.slug}-{print_[:10]}",
                model=spec.model,
                warehouse=self.store.root,
                status="skipped",
                num_shards=len(corpus.shards),
                num_tokens=corpus.num_tokens,
            ),
            replicas=self.executor.replicas(placement),
        )

    def begin(self, planned: PlannedRun, *, fresh: bool, storage_is_full: bool) -> RunInProgress | None:
        """Look up what is stored of a planned run, and store that it begins. Returns None if it was done before.

        Args:
            fresh: measure it again, whatever is stored.
            storage_is_full: refuse a run that is not done.

        Raises:
            StorageFull: there is no space for its results.
        """
        run_id = planned.run_id
        row = None if fresh else self.store.reader.readable_run(run_id)
        if row is not None and row.get("status") == "done":
            return None
        if storage_is_full:
            error = StorageFull(
                f"Not begun: no space left on {self.store.root}.",
                "Free some space and run the same command again.",
            )
            error.run_id = run_id
            raise error
        return RunInProgress(planned, self.store, fresh=fresh)

    @sharing_skeletons()
    def _open(self, spec: RunSpec) -> tuple[Checkpoint, Any, Settings, Placement, Footprint | None]:
        """Return a model's checkpoint, configuration, settings, placement and, if needed, size. Caches the last one."""
        key = spec.model, spec.settings, spec.execution
        if not self._opened or self._opened[0] != key:
            if spec.settings.allow_pickle and self.fetch:
                convert_pickles(spec.model)
            checkpoint = resolve(spec.model, trust_remote_code=spec.settings.trust_remote_code, weights=self.fetch)
            config = text_config(checkpoint)
            settings = pin(spec.settings, checkpoint, config, self.executor.devices.kind)
            matters = settings.sequences_per_shard is None or needs_size(spec.execution)
            size = size_of(checkpoint, settings) if matters else None
            placement = choose(size, settings, spec.execution, self.executor.devices)
            require_ranks(checkpoint, settings, placement)
            self.executor.replicas(placement)  # refuses more than there is before anything is loaded
            self._opened = key, (checkpoint, config, settings, placement, size)
        return self._opened[1]

    def _plan(self, spec: RunSpec, checkpoint: Checkpoint, config: Any, settings: Settings) -> CorpusPlan:
        """Return the corpus in the checkpoint's tokens. Raises ModelError for tokens that the model lacks."""
        how = self._tokens_key(checkpoint, config, settings)
        key = (spec.corpus, *how)
        planned_alike = {plan.corpus_fingerprint: key for key, (plan, _) in self._plans.items() if key[1:] == how}
        if planned_alike and key not in self._plans:  # the same text may have another name
            key = planned_alike.get(open_source(spec.corpus).fingerprint(), key)
        if key not in self._plans:
            planned = tokenize_corpus(spec.corpus, load_tokenizer(checkpoint), settings)
            rows = (batch.input_ids for shard in planned.shards for batch in shard.batches(settings.batch_size))
            self._plans[key] = planned, max(int(np.max(ids)) for ids in rows)
            while len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        corpus, highest = self._plans[key]
        corpus = replace(corpus, source=spec.corpus)
        size = getattr(config.get_text_config(), "vocab_size", None)
        if isinstance(size, int) and 0 < size <= highest:
            raise ModelError(
                f"The tokenizer of '{checkpoint.name}' returned token {highest}; the model's vocabulary has {size}.",
                "Put the tokenizer that the model was trained with into its folder.",
            )
        return corpus

    @staticmethod
    def _tokens_key(checkpoint: Checkpoint, config: Any, settings: Settings) -> tuple[Any, ...]:
        """Return a key of the tokenizer, rows and shards. Equal keys give equal tokens for equal text."""
        if checkpoint.source == "gguf" or settings.trust_remote_code:
            tokenizer = checkpoint.revision
        else:
            files = sorted(f for f in checkpoint.folder.iterdir() if f.suffix in _TOKENIZER_FILES)
            tokenizer = content_hash(checkpoint.folder, [f for f in files if f.name not in _OTHER_FILES])
        family = config.model_type, getattr(config, "tokenizer_class", None)
        cut = settings.sequences_per_shard, settings.skip_first_tokens
        return tokenizer, family, cut, *settings.text_options().values()


def run_fingerprint(
    checkpoint: Checkpoint, config: Any, corpus: CorpusPlan, settings: Settings, placement: Placement
) -> str:
    """Return the SHA-256 of all inputs that can change a number: weights, tokens, settings, kind of device, version.

    The tokenizer and the packing count through their tokens. Among partitions only tensor parallelism counts, as it
    alone sums in another order.
    """
    return fingerprint(
        schema=NUMBERS_VERSION,
        checkpoint=checkpoint.revision,
        tokens=corpus.tokens_fingerprint,
        settings=settings.numbers(statistics=True),
        **fingerprint_part(placement),
        **_measured_place(config, settings),
    )


def _measured_place(config: Any, settings: Settings) -> dict[str, str]:
    """Return the part of a fingerprint that tells where sublayers are measured, where that once was elsewhere.

    Earlier versions measured them before the norm or the multiplication that follows them in some families.
    """
    measures_sublayers = not {"attention", "mlp"}.isdisjoint(settings.sites)
    return {"sublayers": "as added"} if measures_sublayers and transforms_outputs(config) else {}


def rows_per_shard(size: Footprint | None, settings: Settings, num_sequences: int) -> int:
    """Return the default number of rows in a shard: work for half a minute to a minute, in enough shards for intervals.

    It is a batch times a power of two. Only short texts have smaller shards. It depends on the model, the kind of
    device and the text, and neither on a timed benchmark nor on the workers, so that a run has the same shards
    wherever it is resumed.

    Args:
        size: size of the model; None if unknown.
        settings: pinned settings, without ``auto``.
    """
    limit = float(USUAL_ROWS)
    if size is not None:
        rates = FLOPS_OF_A_GPU if settings.device == "cuda" else FLOPS_OF_A_THREAD
        flops = rates[2 if size.element_bytes == 2 else 4] * (1 if settings.device == "cuda" else settings.threads)
        seconds = size.forward_flops(1, settings.sequence_length) / flops
        waiting = size.hidden_bytes(1, settings.sequence_length)
        limit = min(MOST_SECONDS / max(seconds, 1e-9), MOST_WAITING_BYTES / max(waiting, 1))
    enough = num_sequences // FEWEST_SHARDS
    if enough < settings.batch_size:
        return max(1, enough)
    doublings = int(max(1.0, min(limit, enough) / settings.batch_size)).bit_length() - 1
    return int(settings.batch_size << doublings)
