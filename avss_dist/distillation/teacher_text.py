"""Text that a model writes, sampled from its predictions once and kept in the user's cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from avss_dist.core.devices import free_memory, pick_device
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.files import cache_folder, write_file
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import Settings
from avss_dist.core.streams import progress_to, report, tracked
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
    names = ("sequence_length", "dtype", "device", "attention", "trust_remote_code")
    choices: dict[int, tuple[Settings, Path, Path]] = {}
    for rows in ROWS:
        choice = Settings(batch_size=rows, **{name: getattr(settings, name) for name in names})
        key = fingerprint(teacher=teacher.revision, count=count, seed=seed, **choice.as_dict())[:32]
        choices[rows] = choice, cache_folder(_FOLDER, f"{key}.jsonl"), work / f"self-{key}.part"
    begun = (rows for rows, (_, *paths) in choices.items() if any(path.is_file() for path in paths))
    settings, file, unfinished = choices[next(begun, None) or rows_at_once(teacher, settings)]
    if file.is_file():
        return file
    batches = json.loads(unfinished.read_text(encoding="utf-8")) if unfinished.is_file() else []
    with progress_to(lambda _what, share: on_event(Preparing("the teacher writes text", share))):
        for batch in sample(teacher, settings, count=count, seed=seed, first=len(batches)):
            batches.append(batch)
            write_file(unfinished, json.dumps(batches))
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chain.from_iterable(batches)]
    if not lines:
        raise ConfigError(f"'{teacher.name}' wrote no text.", "Name other text, and leave out `self` or `self_texts`.")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, "".join(lines))
    unfinished.unlink(missing_ok=True)
    return file


def rows_at_once(teacher: Checkpoint, settings: Settings) -> int:
    """Return the number of texts to sample at once: as many as there is memory for, of `ROWS`."""
    size = footprint(teacher, settings)
    free = FREE_SHARE * free_memory(pick_device(settings.device)) - size.weight_bytes
    text = settings.sequence_length * sum(size.cache_bytes) + LOGITS_BYTES * size.vocabulary
    return next((rows for rows in ROWS if rows * text <= free), ROWS[-1])


def with_own_text(
    corpora: Sequence[str], model: Checkpoint, settings: Settings, on_event: OnEvent | None = None
) -> tuple[str, ...]:
    """Return the texts of a repair, with a file of text that the whole model writes in place of `SELF`."""
    if SELF not in [split_weight(corpus)[0] for corpus in corpora]:
        return tuple(corpora)
    work = cache_folder(_FOLDER, model.revision)
    work.mkdir(parents=True, exist_ok=True)
    here = replace(settings, device=pick_device(settings.device).type)
    file = teacher_text(model, here, count=OWN_TEXTS, seed=0, work=work, on_event=on_event or ignore)
    return tuple(
        f"{file}:text{corpus.removeprefix(SELF)}" if split_weight(corpus)[0] == SELF else corpus for corpus in corpora
    )


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
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id)  # EOS stands between texts of models without BOS
    start = special_tokens_around(tokenizer).prefix.tolist() or [i for i in candidates if i is not None][:1]
    if not start:
        raise ModelError(f"The tokenizer of '{checkpoint.name}' has no token to begin with.", "Name other text.")
    model = load_model(checkpoint, replace(settings, layers=None), head=True).to(device)
    if not model.can_generate():
        raise ModelError(f"'{checkpoint.name}' predicts no next token.", "Name a causal language model.")
    end = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, start[0]) if i is not None)
    sizes = [min(settings.batch_size, count - done) for done in range(0, count, settings.batch_size)]
    for number in tracked(range(first, len(sizes)), "Sampling"):
        prompts = torch.tensor([start] * sizes[number], device=device)
        reporting = partial(_report, first=len(start), batch=number, batches=len(sizes), settings=settings)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed((_APART * seed + number) % 2**32)  # all that the generator of CPUs takes
            generated = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=settings.sequence_length,
                pad_token_id=end,
                stopping_criteria=[reporting],
                **_AS_PREDICTED,
            )
        yield [
            text
            for text in tokenizer.batch_decode(generated[:, len(start) :], skip_special_tokens=True)
            if text.strip()
        ]


def _report(
    ids: torch.Tensor, _scores: Any, *, first: int, batch: int, batches: int, settings: Settings, **_: Any
) -> torch.Tensor:
    """Report the progress of a batch after each token, as a stopping criterion that stops no text."""
    report("Sampling", (batch + (ids.shape[1] - first) / settings.sequence_length) / batches)
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


_AS_PREDICTED: dict[str, Any] = {  # whatever the checkpoint's own generation_config.json says
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "use_cache": True,
}
