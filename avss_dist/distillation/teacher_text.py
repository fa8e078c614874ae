"""Text that a model writes, sampled from its predictions once and kept in the user's cache."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from avss_dist.core.devices import free_memory, pick_device
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.files import cache_folder, write_file
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import Settings
from avss_dist.core.streams import progress_to, report, tracked
from avss_dist.corpus.documents import Tokenizer
from avss_dist.corpus.tokens import special_tokens_around
from avss_dist.distillation.curve import OnEvent, Preparing, ignore
from avss_dist.distillation.record import SELF
from avss_dist.models.checkpoint.loading import load_model, load_tokenizer, pin, text_config
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.size import footprint
from avss_dist.pruning.repair.registry import split_weight

ROWS = (128, 32)  # texts that are sampled at once, if there is memory for them, and otherwise
FREE_SHARE = 0.8  # of the memory that is free
LOGITS_BYTES = 4 * 4  # of each token of the vocabulary: logits, and what sampling makes of them
_FOLDER = "teacher_texts"  # in the cache
OWN_TEXTS = 256  # that a model writes for a repair of itself
_APART = 1_000_003  # seeds of batches, from one seed to the next


def teacher_text(
    teacher: Checkpoint, settings: Settings, *, count: int, seed: int, work: Path, on_event: OnEvent
) -> Path:
    """Return a file of ``count`` texts of the teacher, JSON lines with a field ``text``.

    Texts of the same teacher, settings and seed are sampled once. Sampling resumes after an interruption.

    Args:
        settings: dtype, device and length of the texts.
        work: folder for unfinished texts.

    Raises:
        ModelError: the teacher has no start token or predicts no next token.
        ConfigError: it wrote no text.
    """
    by_rows = {rows: _Sampling.of_rows(rows, teacher, settings, count, seed, work) for rows in ROWS}
    # Other rows at once give other texts, so that a sampling ends as it was begun.
    sampling = next((candidate for candidate in by_rows.values() if candidate.has_begun), None)
    if sampling is None:
        sampling = by_rows[rows_at_once(teacher, settings)]
    if sampling.file.is_file():
        return sampling.file
    batches: list[list[str]] = []
    if sampling.unfinished.is_file():
        batches = json.loads(sampling.unfinished.read_text(encoding="utf-8"))
    with progress_to(lambda _what, share: on_event(Preparing("the teacher writes text", share))):
        for batch in sample(teacher, sampling.settings, count=count, seed=seed, first=len(batches)):
            batches.append(batch)
            write_file(sampling.unfinished, json.dumps(batches))
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chain.from_iterable(batches)]
    if not lines:
        raise ConfigError(f"'{teacher.name}' wrote no text.", "Name other text, and leave out `self` or `self_texts`.")
    sampling.file.parent.mkdir(parents=True, exist_ok=True)
    write_file(sampling.file, "".join(lines))
    sampling.unfinished.unlink(missing_ok=True)
    return sampling.file


@dataclass(frozen=True)
class _Sampling:
    """Sampling of the texts of a teacher with a number of rows at once.

    Attributes:
        settings: settings of the model that decide what it writes.
        file: file of all texts, in the cache.
        unfinished: file of the batches so far.
    """

    settings: Settings
    file: Path
    unfinished: Path

    @classmethod
    def of_rows(
        cls, rows: int, teacher: Checkpoint, settings: Settings, count: int, seed: int, work: Path
    ) -> _Sampling:
        """Return the sampling with a number of rows at once."""
        sampled = Settings(
            batch_size=rows,
            sequence_length=settings.sequence_length,
            dtype=settings.dtype,
            device=settings.device,
            attention=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        )
        key = fingerprint(teacher=teacher.revision, count=count, seed=seed, **sampled.as_dict())[:32]
        return cls(sampled, cache_folder(_FOLDER, f"{key}.jsonl"), work / f"self-{key}.part")

    @property
    def has_begun(self) -> bool:
        """Whether some texts were written."""
        return self.file.is_file() or self.unfinished.is_file()


def rows_at_once(teacher: Checkpoint, settings: Settings) -> int:
    """Return the number of texts to sample at once: as many as there is memory for, of `ROWS`."""
    size = footprint(teacher, settings)
    free = FREE_SHARE * free_memory(pick_device(settings.device)) - size.weight_bytes
    row_bytes = settings.sequence_length * sum(size.cache_bytes) + LOGITS_BYTES * size.vocabulary
    for rows in ROWS:
        if rows * row_bytes <= free:
            return rows
    return ROWS[-1]


def with_own_text(
    corpora: Sequence[str], model: Checkpoint, settings: Settings, on_event: OnEvent | None = None
) -> tuple[str, ...]:
    """Return the texts of a repair, with a file of text that the whole model writes in place of `SELF`."""
    if not any(_is_own_text(corpus) for corpus in corpora):
        return tuple(corpora)
    work = cache_folder(_FOLDER, model.revision)
    work.mkdir(parents=True, exist_ok=True)
    on_this_machine = replace(settings, device=pick_device(settings.device).type)
    file = teacher_text(model, on_this_machine, count=OWN_TEXTS, seed=0, work=work, on_event=on_event or ignore)
    read: list[str] = []
    for corpus in corpora:
        if _is_own_text(corpus):
            weight = corpus.removeprefix(SELF)
            corpus = f"{file}:text{weight}"
        read.append(corpus)
    return tuple(read)


def _is_own_text(corpus: str) -> bool:
    """Whether a corpus, which may have a weight, is the text of the model."""
    name, _ = split_weight(corpus)
    return name == SELF


def has_own_text(corpora: Sequence[str]) -> bool:
    """Whether some of the texts are of `with_own_text`."""
    return any(str(corpus).startswith(str(cache_folder(_FOLDER))) for corpus in corpora)


def sample(
    checkpoint: Checkpoint, settings: Settings, *, count: int, seed: int = 0, first: int = 0
) -> Iterator[list[str]]:
    """Yield batches of sampled texts of at most ``sequence_length`` tokens, at temperature 1 without truncation.

    A text ends where the model ends it. Equal seeds, batch sizes, dtypes and devices give equal texts.

    Args:
        count: number of texts to sample; empty ones are left out of the result.
        first: index of the first batch to sample.

    Raises:
        ModelError: the model cannot be loaded or predicts no next token, or the tokenizer has no start token.
    """
    device = pick_device(settings.device)
    settings = pin(settings, checkpoint, text_config(checkpoint), device.type)
    tokenizer = load_tokenizer(checkpoint)
    start = _start_tokens(tokenizer)
    if not start:
        raise ModelError(f"The tokenizer of '{checkpoint.name}' has no token to begin with.", "Name other text.")
    model = load_model(checkpoint, replace(settings, layers=None), head=True).to(device)
    if not model.can_generate():
        raise ModelError(f"'{checkpoint.name}' predicts no next token.", "Name a causal language model.")
    padding = _first_id(tokenizer.pad_token_id, tokenizer.eos_token_id, start[0])
    num_batches = math.ceil(count / settings.batch_size)
    random_devices = [device] if device.type == "cuda" else []
    for number in tracked(range(first, num_batches), "Sampling"):
        size = min(settings.batch_size, count - number * settings.batch_size)
        prompts = torch.tensor([start] * size, device=device)
        reporting = partial(_report, first=len(start), batch=number, batches=num_batches, settings=settings)
        with torch.random.fork_rng(random_devices), torch.inference_mode():
            torch.manual_seed((_APART * seed + number) % 2**32)  # all that the generator of CPUs takes
            generated = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=settings.sequence_length,
                pad_token_id=padding,
                stopping_criteria=[reporting],
                **_AS_PREDICTED,
            )
        texts = tokenizer.batch_decode(generated[:, len(start) :], skip_special_tokens=True)
        yield [text for text in texts if text.strip()]


def _start_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens before a text. EOS stands between the texts of models without BOS."""
    prefix: list[int] = special_tokens_around(tokenizer).prefix.tolist()
    if prefix:
        return prefix
    start = _first_id(tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [] if start is None else [start]


def _first_id(*candidates: int | None) -> int | None:
    """Return the first token id that a tokenizer has."""
    return next((token for token in candidates if token is not None), None)


def _report(
    ids: torch.Tensor, _scores: object, *, first: int, batch: int, batches: int, settings: Settings, **_: object
) -> torch.Tensor:
    """Report the progress of a batch after each token, as a stopping criterion that stops no text."""
    report("Sampling", (batch + (ids.shape[1] - first) / settings.sequence_length) / batches)
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


_AS_PREDICTED: Mapping[str, object] = {  # whatever the checkpoint's own generation_config.json says
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "use_cache": True,
}
