"""Planning of runs: checkpoint, placement, tokenized corpus, fingerprint. No weight is loaded."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avss_dist.core.devices import available_memory
from avss_dist.core.errors import ModelError, StorageFull
from avss_dist.core.fingerprint import NUMBERS_VERSION, fingerprint
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import USUAL_ROWS, CorpusPlan, tokenize_corpus
from avss_dist.corpus.sources import open_source
from avss_dist.models.checkpoint.convert import convert_pickles
from avss_dist.models.checkpoint.loading import load_tokenizer, pin, text_config
from avss_dist.models.checkpoint.locate import Checkpoint, content_hash, locate, resolve, stored_tensors
from avss_dist.models.checkpoint.reloading import config_without_names
from avss_dist.models.checkpoint.size import Footprint, sharing_skeletons
from avss_dist.models.checkpoint.training import training_point
from avss_dist.models.checkpoint.weight_files import weight_files
from avss_dist.models.checkpoint.written import FileState, file_states
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

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Changing one of these changes the shards, and so the id, of every run without an explicit size.
MOST_SECONDS = 60  # of a shard on a typical device; at least half of that, as sizes are doubled
FEWEST_SHARDS = 16  # for intervals over shards; a text of fewer rows has one shard a row
MOST_WAITING_BYTES = 4 << 30  # hidden states of a shard, which wait together where layers are streamed
FLOPS_OF_A_THREAD = {2: 150e9, 4: 75e9}  # a second, by the bytes of an element, with all that is measured
FLOPS_OF_A_GPU = {2: 200e12, 4: 20e12}

KEPT_CORPORA = 4  # tokenized corpora that are remembered
AHEAD_SHARE = 0.5  # of the available memory that weights may take which are read before they are needed
_TOKENIZER_FILES = (".json", ".model", ".txt", ".jinja")
_OTHER_FILES = ("config.json", "generation_config.json", "trainer_state.json", "model.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """Model of a run as it is known while it is planned, before a weight is loaded.

    Attributes:
        config: configuration of transformers.
        settings: pinned settings, without ``auto``.
        size: size of the model; None if it is not needed.
        files: states of the configuration and the weights in a local folder, from before its revision was computed.
    """

    checkpoint: Checkpoint
    config: PreTrainedConfig
    settings: Settings
    placement: Placement
    size: Footprint | None
    files: tuple[FileState, ...] = ()


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus in the tokens of a model.

    Attributes:
        highest_token: highest id of a token.
    """

    plan: CorpusPlan
    highest_token: int


@dataclass
class Planner:
    """Planner of runs. Checkpoints, tokenized corpora and placements are cached. No weight is loaded.

    Args:
        fetch: whether to download the weights of hub checkpoints.
    """

    executor: Executor
    store: Store
    fetch: bool = True
    _last_key: tuple[object, ...] = ()
    _last_opened: OpenedModel | None = None
    _last_shape: tuple[object, ...] = ()
    _last_size: Footprint | None = None
    _corpora: OrderedDict[tuple[object, ...], TokenizedCorpus] = field(default_factory=OrderedDict)

    def prepare(self, spec: RunSpec) -> PlannedRun:
        """Plan a run.

        Raises:
            AvssError: the model, its tokenizer or its size is not one that can be run here.
        """
        opened = self._open(spec)
        settings = opened.settings
        corpus = self._tokenize(spec, opened)
        if settings.sequences_per_shard is None:
            rows = rows_per_shard(opened.size, settings, corpus.num_sequences)
            corpus = corpus.recut(rows)
            settings = replace(settings, sequences_per_shard=rows)
        run_hash = run_fingerprint(opened.checkpoint, opened.config, corpus, settings, opened.placement)
        result = Run(
            run_id=f"{opened.checkpoint.slug}-{run_hash[:10]}",
            model=spec.model,
            warehouse=self.store.root,
            status="skipped",
            num_shards=len(corpus.shards),
            num_tokens=corpus.num_tokens,
        )
        return PlannedRun(
            replica_spec=ReplicaSpec(checkpoint=opened.checkpoint, settings=settings, placement=opened.placement),
            corpus=corpus,
            fingerprint=run_hash,
            result=result,
            replicas=self.executor.replicas(opened.placement),
            training=training_point(opened.checkpoint, spec.names),
            files=opened.files,
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

    def read_ahead(self, spec: RunSpec) -> None:
        """Fetch the files of a checkpoint, and have the system read its weights, before its run is planned.

        Their hash is remembered. Weights that would take more than `AHEAD_SHARE` of the memory are not read: those in
        use might be dropped for them. Nothing is raised.
        """
        with suppress(Exception):  # `prepare` meets the same error, and explains it.
            trusted = spec.settings.trust_remote_code
            checkpoint = locate(spec.model) or resolve(spec.model, trust_remote_code=trusted, weights=self.fetch)
            files = [Path(checkpoint.path)] if checkpoint.gguf else weight_files(checkpoint.folder)
            if sum(file.stat().st_size for file in files) > AHEAD_SHARE * available_memory():
                return
            for file in files:
                with file.open("rb", buffering=0) as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            if checkpoint.source != "hub":
                resolve(spec.model, trust_remote_code=trusted, weights=self.fetch)

    @sharing_skeletons()
    def _open(self, spec: RunSpec) -> OpenedModel:
        """Return what is known of the model of a run. The last one is remembered, until its files are written again."""
        states = _states_of(spec.model)
        key = (spec.model, spec.settings, spec.execution, states)
        if self._last_opened is not None and self._last_key == key:
            return self._last_opened
        trust = spec.settings.trust_remote_code
        if spec.settings.allow_pickle and self.fetch:
            convert_pickles(spec.model, trust_remote_code=trust)
        checkpoint = resolve(
            spec.model, trust_remote_code=trust, weights=self.fetch, unconverted=spec.settings.allow_pickle
        )
        config = text_config(checkpoint)
        settings = pin(spec.settings, checkpoint, config, self.executor.devices.kind)
        size = None
        if settings.sequences_per_shard is None or needs_size(spec.execution):
            size = self._size_of(checkpoint, settings)
        placement = choose(size, settings, spec.execution, self.executor.devices)
        require_ranks(checkpoint, settings, placement)
        self.executor.replicas(placement)  # refuses more than there is before anything is loaded
        opened = OpenedModel(
            checkpoint=checkpoint,
            config=config,
            settings=settings,
            placement=placement,
            size=size,
            files=_measured_files(states, checkpoint),
        )
        self._last_key = key
        self._last_opened = opened
        return opened

    def _size_of(self, checkpoint: Checkpoint, settings: Settings) -> Footprint | None:
        """Return a checkpoint's size. That of the last one is remembered for those of the same shape."""
        if checkpoint.gguf or checkpoint.trust_remote_code:
            return size_of(checkpoint, settings)
        try:
            stored = [(tensor.name, tensor.dtype, tensor.size) for tensor in stored_tensors(checkpoint)]
            key = (config_without_names(checkpoint), stored, settings)
        except ModelError:  # Loading it says what is wrong with it.
            return size_of(checkpoint, settings)
        if self._last_size is None or self._last_shape != key:
            self._last_shape = key
            self._last_size = size_of(checkpoint, settings)
        return self._last_size

    def _tokenize(self, spec: RunSpec, opened: OpenedModel) -> CorpusPlan:
        """Return the corpus of a run in the tokens of its model. The last `KEPT_CORPORA` are remembered.

        Raises:
            ModelError: there are tokens that the model lacks.
        """
        key = self._corpus_key(spec.corpus, self._tokens_key(opened))
        if key not in self._corpora:
            plan = tokenize_corpus(spec.corpus, load_tokenizer(opened.checkpoint), opened.settings)
            highest_token = _highest_token(plan, opened.settings.batch_size)
            self._corpora[key] = TokenizedCorpus(plan, highest_token)
            while len(self._corpora) > KEPT_CORPORA:
                self._corpora.popitem(last=False)
        self._corpora.move_to_end(key)
        tokenized = self._corpora[key]
        vocabulary = getattr(opened.config.get_text_config(), "vocab_size", None)
        if isinstance(vocabulary, int) and 0 < vocabulary <= tokenized.highest_token:
            raise ModelError(
                f"The tokenizer of '{opened.checkpoint.name}' returned token {tokenized.highest_token}; "
                f"the model's vocabulary has {vocabulary}.",
                "Put the tokenizer that the model was trained with into its folder.",
            )
        return replace(tokenized.plan, source=spec.corpus)

    def _corpus_key(self, corpus: str, tokens_key: tuple[object, ...]) -> tuple[object, ...]:
        """Return the key of a tokenized corpus. It is that of a remembered one with the same text and another name."""
        key = (corpus, *tokens_key)
        if key in self._corpora:
            return key
        keys_by_text: dict[str, tuple[object, ...]] = {}
        for remembered_key, remembered in self._corpora.items():
            if remembered_key[1:] == tokens_key:
                keys_by_text[remembered.plan.corpus_fingerprint] = remembered_key
        if not keys_by_text:
            return key  # The text is not read, as nothing can equal it.
        return keys_by_text.get(open_source(corpus).fingerprint(), key)

    @staticmethod
    def _tokens_key(opened: OpenedModel) -> tuple[object, ...]:
        """Return a key of the tokenizer, rows and shards. Equal keys give equal tokens for equal text."""
        checkpoint = opened.checkpoint
        settings = opened.settings
        if checkpoint.source == "gguf" or settings.trust_remote_code:
            tokenizer = checkpoint.revision
        else:
            files = sorted(file for file in checkpoint.folder.iterdir() if file.suffix in _TOKENIZER_FILES)
            tokenizer = content_hash(checkpoint.folder, [file for file in files if file.name not in _OTHER_FILES])
        return (
            tokenizer,
            opened.config.model_type,
            getattr(opened.config, "tokenizer_class", None),
            settings.sequences_per_shard,
            settings.skip_first_tokens,
            *settings.text_options().values(),
        )


def _states_of(model: str) -> tuple[FileState, ...]:
    """Return the states of the files in a folder. A hub id has none."""
    with suppress(OSError):
        return file_states(Path(os.path.expanduser(model)).resolve())
    return ()


def _measured_files(states: Iterable[FileState], checkpoint: Checkpoint) -> tuple[FileState, ...]:
    """Return the states of the configuration and the weights of a checkpoint, unless those that are read are copies."""
    measured = []
    for state in states:
        file = Path(state.path)
        if str(file.parent) != checkpoint.path:
            return ()
        if file.name == "config.json" or file.suffix == ".safetensors":
            measured.append(state)
    return tuple(measured)


def _highest_token(corpus: CorpusPlan, batch_size: int) -> int:
    """Return the highest id of a token in a corpus."""
    highest = 0
    for shard in corpus.shards:
        for batch in shard.batches(batch_size):
            highest = max(highest, int(np.max(batch.input_ids)))
    return highest


def run_fingerprint(
    checkpoint: Checkpoint, config: PreTrainedConfig, corpus: CorpusPlan, settings: Settings, placement: Placement
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


def _measured_place(config: PreTrainedConfig, settings: Settings) -> dict[str, str]:
    """Return the part of a fingerprint that tells where sublayers are measured, where that once was elsewhere.

    Earlier versions measured them before the norm or the multiplication that follows them in some families.
    """
    measures_sublayers = "attention" in settings.sites or "mlp" in settings.sites
    if measures_sublayers and transforms_outputs(config):
        return {"sublayers": "as added"}
    return {}


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
        seconds = size.forward_flops(1, settings.sequence_length) / _flops_per_second(size, settings)
        waiting_bytes = size.hidden_bytes(1, settings.sequence_length)
        limit = min(MOST_SECONDS / max(seconds, 1e-9), MOST_WAITING_BYTES / max(waiting_bytes, 1))
    enough = num_sequences // FEWEST_SHARDS
    if enough < settings.batch_size:
        return max(1, enough)
    batches = int(max(1.0, min(limit, enough) / settings.batch_size))
    doublings = batches.bit_length() - 1
    return int(settings.batch_size << doublings)


def _flops_per_second(size: Footprint, settings: Settings) -> float:
    """Return the speed of a typical device of the kind in the settings, with all that is measured."""
    element_bytes = 2 if size.element_bytes == 2 else 4
    if settings.device == "cuda":
        return FLOPS_OF_A_GPU[element_bytes]
    return FLOPS_OF_A_THREAD[element_bytes] * settings.threads
