"""Distillation of a student from a teacher: checks, texts, training, and the written checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from safetensors import SafetensorError

from avss_dist.core.errors import ConfigError, ModelError, RunFailed, StorageFull, explain_unwritable, first_line
from avss_dist.core.extras import require_package
from avss_dist.core.files import write_file
from avss_dist.core.memory import free_cached_memory
from avss_dist.core.results import TabularResult
from avss_dist.core.values import JsonObject, NewObject, TableRow
from avss_dist.distillation.curve import (
    DIVERGED,
    CurvePoint,
    History,
    OnEvent,
    Preparing,
    Schedule,
    best,
    ending,
    evaluations,
    ignore,
    is_better,
)
from avss_dist.distillation.loss import LossSums, Predict, logits_of
from avss_dist.distillation.memory import Memory, estimate_memory, ranks_per_node, require_memory, require_room
from avss_dist.distillation.pair import (
    LORA,
    ModelPair,
    ancestry,
    autocast,
    default_learning_rate,
    load_trained,
    resolve_pair,
    round_to_stored_dtype,
    write_distilled,
)
from avss_dist.distillation.record import (
    FILE,
    DistillRecord,
    RecordedText,
    read_record,
)
from avss_dist.distillation.texts import DistillText, OpenWriter, read_texts
from avss_dist.models.checkpoint.loading import load_model, quiet
from avss_dist.models.checkpoint.weight_files import weight_files
from avss_dist.partition.group import rank_and_size, share
from avss_dist.pruning.checkpoint import require_free
from avss_dist.pruning.repair.registry import split_weight
from avss_dist.requests import refuse_unused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from avss_dist.distillation.trainer import Teacher
    from avss_dist.requests import DistillRequest
    from avss_dist.runs.ray.executor import RayExecutor


OPTIONS_OF_RESULT = (
    "tokens",
    "train",
    "lora_rank",
    "learning_rate",
    "warmup",
    "held_out",
    "self_texts",
    "evaluations",
    "seed",
)
"""Options of a request that change its result, apart from the models, the texts and the ranks."""
MOST_WARMUP = 20  # steps in which the learning rate rises, unless the request says how many
_REQUEST = "request.json"
UNWRITTEN = ("File too large", "iostream error", "failed writing", "I/O error")  # of torch and safetensors
LEAST_FREE_BYTES = 64 << 20  # with less free space, a failed write is taken to be for lack of it


class Distilled(TabularResult):
    """A written checkpoint, and the evaluations on the way to it.

    Attributes:
        folder: its folder.
        bytes: size of its weights.
        record: the record beside the weights.
        memory: the memory that was estimated.
        notes: remarks for people.
    """

    def __init__(self, folder: Path, record: DistillRecord, memory: Memory, notes: Sequence[str]) -> None:
        self.folder = str(folder)
        self.record = record
        self.memory = memory
        self.notes = tuple(notes)
        self.bytes = sum(file.stat().st_size for file in weight_files(folder))

    def table(self) -> pa.Table:
        """Return a table with a row for each evaluation and text. Those ``as_written`` are of the written files."""
        rows: list[TableRow] = []
        for point in self.record.curve:
            for text in self.record.texts:
                rows.append(self._row(point, text))
        return pa.Table.from_pylist(rows)

    def _row(self, point: CurvePoint, text: RecordedText) -> TableRow:
        """Return the row of an evaluation and a text."""
        return {
            "tokens": point.tokens,
            "as_written": point is self.record.after,
            "text": text.corpus,
            "trained_rows": text.trained_rows,
            "held_out_rows": text.held_out_rows,
            "perplexity": point.perplexity[text.label],
            "kept": point.kept[text.label],
            "divergence": point.divergence.get(text.label),
        }

    def summary(self) -> str:
        """Return the folder and the number of tokens, in a line."""
        return f"{self.folder}, {self.record.after.tokens:,} tokens"


def distill(request: DistillRequest, open_writer: OpenWriter) -> Distilled:
    """Train a student on the predictions of a teacher, and write it as a checkpoint.

    See `requests.DistillRequest`. The work so far is kept in a folder beside the output, from which the same request
    resumes.

    Args:
        open_writer: opens what writes text of the teacher, if some is to be trained on.

    Raises:
        ConfigError: the models have different vocabularies, there is too little memory, held-out text is trained on, or
            the folder beside the output is of another request.
        ModelError: a model predicts NaN or infinities.
        RunFailed: training diverged, or made the student no better.
        StorageFull: there is no space left.
    """
    with quiet(), warnings.catch_warnings(), open_ranks(request) as executor:
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        return _distill(request, open_writer, executor, request.on_event or ignore)


def open_ranks(request: DistillRequest) -> AbstractContextManager[RayExecutor | None]:
    """Return the context of the executor of the ranks of a distillation, or of None for one process.

    Raises:
        ConfigError: the cluster cannot be reached, or an option has no effect on one process.
    """
    if request.ranks == 1:
        hint = "Set `ranks` to 2 or more, or leave it out."
        names = ("address", "node_labels", "placement_seconds", "hang_seconds")
        refuse_unused({name: getattr(request.execution, name) for name in names}, "with one rank", hint)
        return nullcontext()
    from avss_dist.runs.ray.executor import RayExecutor

    return closing(RayExecutor(request.execution, request.settings))


def _distill(
    request: DistillRequest, open_writer: OpenWriter, executor: RayExecutor | None, on_event: OnEvent
) -> Distilled:
    output = Path(request.output)
    work = work_folder(output)
    is_written = was_written(output)
    models, memory = require_possible(request, executor)
    notes = ancestry(models)
    with explain_unwritable(output, "Name another folder with `output`, or free some space."):
        _begin_work(work, request, models)
        if not is_written:
            texts = read_texts(request, models, open_writer, on_event)
            _require_same_texts(work, texts)
            task = DistillTask(request, models, texts, work, output)
            if executor:
                _run_ranks(task, executor, on_event)
            else:
                task.train_and_write(on_event)
    shutil.rmtree(work)
    record = read_record(output)
    assert record is not None
    if record.ended == DIVERGED:
        raise RunFailed(
            f"Training diverged. The best checkpoint before that, of {record.after.tokens:,} tokens, is in {output}.",
            f"Lower `learning_rate`, which was {record.learning_rate:g}, and name another `output`.",
        )
    return Distilled(output, record, memory, notes)


def work_folder(output: Path) -> Path:
    """Return the folder of the work so far."""
    return output.with_name(output.name + ".part")


def was_written(output: Path) -> bool:
    """Whether a distillation was stopped after its last step, which wrote the output."""
    return (work_folder(output) / _REQUEST).is_file() and (output / FILE).is_file()


def require_possible(request: DistillRequest, executor: RayExecutor | None) -> tuple[ModelPair, Memory]:
    """Return the models and the memory of a distillation. Refuse one that cannot be done, before texts are read.

    Raises:
        AvssError: the output is not free, the models do not fit each other, or there is too little memory.
    """
    output = Path(request.output)
    if not was_written(output):
        require_free(output)
    models = resolve_pair(request, executor.devices.kind if executor else None)
    memory = estimate_memory(
        models.student,
        models.teacher,
        models.settings,
        models.teacher_settings,
        train=request.train,
        rank=request.lora_rank,
        sharding=request.sharding,
        ranks=request.ranks,
    )
    if executor:
        require_room(request, executor.devices, memory, models)
    else:
        require_memory(memory, models.device.type, request.train)
    return models, memory


def require_same_request(request: DistillRequest, models: ModelPair) -> bool:
    """Refuse to go on from the work of another request. Nothing is written.

    Returns:
        Whether there is work of this request to go on from.

    Raises:
        ConfigError: the work was begun with other values.
    """
    work = work_folder(Path(request.output))
    file = work / _REQUEST
    if not file.is_file() or [*work.iterdir()] == [file]:
        return False
    _refuse_differing(work, _differing(file, _identity(request, models)))
    return True


def _refuse_differing(work: Path, differing: Sequence[str]) -> None:
    """Refuse a folder of work that was begun with other values of some options."""
    if differing:
        raise ConfigError(
            f"{work} was begun with other values of {', '.join(differing)}.",
            "Use the same ones to continue, delete the folder, or name another `output`.",
        )


def _begin_work(work: Path, request: DistillRequest, models: ModelPair) -> None:
    """Make the folder of the work so far, or refuse that of another request.

    Raises:
        ConfigError: the folder was begun with other values.
    """
    work.mkdir(parents=True, exist_ok=True)
    if [*work.iterdir()] == [work / _REQUEST]:
        # It is of a request that was refused.
        (work / _REQUEST).unlink()
    _refuse_differing(work, _differing(work / _REQUEST, _identity(request, models)))


def _require_same_texts(work: Path, texts: Sequence[DistillText]) -> None:
    """Refuse texts that have changed since a folder of work was begun.

    Raises:
        ConfigError: a text has changed.
    """
    fingerprints: dict[str, list[str]] = {}
    for text in texts:
        parts = [text.held_out] if text.trained is None else [text.trained, text.held_out]
        fingerprints[text.label] = [part.tokens_fingerprint for part in parts]
    differing = _differing(work / "texts.json", fingerprints)
    if differing:
        raise ConfigError(
            f"The text of {', '.join(differing)} has changed since {work} was begun.",
            f"Put it back to continue, or delete {work}.",
        )


def _run_ranks(task: DistillTask, executor: RayExecutor, on_event: OnEvent) -> None:
    """Train and write a student on all ranks."""
    on_event(Preparing("starting the ranks"))
    # Workers have working directories of their own.
    task = replace(task, work=task.work.absolute(), output=task.output.absolute())
    devices = executor.devices
    threads = 1
    if devices.kind != "cuda":
        threads = max(1, devices.cpus_of_largest_node // ranks_per_node(task.request, devices))
    executor.run_ranks(task, task.request.ranks, threads=threads, on_event=on_event)


def _identity(request: DistillRequest, models: ModelPair) -> NewObject:
    """Return all that determines the result, to tell whether work in a folder can be resumed."""
    corpora = [split_weight(corpus) for corpus in request.corpora]
    watched = [split_weight(corpus) for corpus in request.watch]
    identity: NewObject = {
        "student": models.student.revision,
        "teacher": models.teacher.revision,
        "corpora": [str(name) for name, _ in corpora],
        "watch": [str(name) for name, _ in watched],
        "weights": [weight for _, weight in corpora],
    }
    names = [*OPTIONS_OF_RESULT]
    if request.ranks > 1:
        names += ["ranks", "sharding"]
    for name in names:
        identity[name] = getattr(request, name)
    identity["settings"] = models.settings.as_dict()
    identity["bfloat16"] = models.bfloat16
    return identity


def _differing(file: Path, values: JsonObject) -> list[str]:
    """Write values into a file that does not exist, or return the names of those that differ from the file's."""
    text = json.dumps(values, indent=2, default=str) + "\n"
    if not file.is_file():
        write_file(file, text)
        return []
    stored = json.loads(file.read_text(encoding="utf-8"))
    return sorted(_differing_names(stored, json.loads(text)))


def _differing_names(stored: JsonObject, given: JsonObject) -> Iterator[str]:
    """Yield the names of the values that differ. Objects are compared value by value."""
    for name in {**stored, **given}:
        before = stored.get(name)
        now = given.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differing_names(before, now)
        elif before != now:
            yield name


@dataclass(frozen=True)
class DistillTask:
    """Training and writing of a student, in one process or on every rank.

    See `runs.work.RankTask`.

    Attributes:
        work: folder of the work so far. All ranks reach it.
        output: folder of the result.
    """

    request: DistillRequest
    models: ModelPair
    texts: Sequence[DistillText]
    work: Path
    output: Path

    @property
    def device(self) -> str:
        """Kind of device."""
        return self.models.device.type

    def run(self, heartbeat: Callable[[], None], on_event: OnEvent) -> None:
        """Do the part of this process's rank."""
        from avss_dist.runs.ray.worker import resolve_on_node

        student = resolve_on_node(self.models.student)
        teacher = resolve_on_node(self.models.teacher)
        models = replace(self.models, student=student, teacher=teacher)
        if not (self.work / _REQUEST).is_file():
            raise ConfigError(
                f"{self.work} does not exist on the worker node {socket.gethostname()}.",
                "Name an `output` on a disk that all nodes mount under the same path.",
            )
        rank, _ = rank_and_size()
        if rank:
            on_event = ignore
        with (
            quiet(),
            warnings.catch_warnings(),
            explain_unwritable(self.output, "Free some space, and run the same command again."),
        ):
            warnings.simplefilter("ignore", FutureWarning)
            replace(self, models=models).train_and_write(on_event, heartbeat)

    def train_and_write(self, on_event: OnEvent, heartbeat: Callable[[], None] | None = None) -> None:
        """Train the student, and write it on the first rank."""
        record, model = _trained(self, on_event, heartbeat)
        rank, _ = rank_and_size()
        if rank == 0:
            with _explained(self.work):
                write_distilled(self.models.student, model, self.output, record)


def _trained(
    task: DistillTask, on_event: OnEvent, heartbeat: Callable[[], None] | None
) -> tuple[DistillRecord, PreTrainedModel]:
    """Return the record of the training, and the model at its best in the dtype of the student's files.

    The ranks of a group all call this, and return the same.

    Args:
        heartbeat: called whenever a layer begins.
    """
    from avss_dist.distillation import trainer

    request = task.request
    models = task.models
    schedule = schedule_of(request, models)
    teacher_model = load_model(models.teacher, models.teacher_settings, head=True).to(models.device)
    trainer.call_at_layers(teacher_model, models.teacher_settings, heartbeat)
    predict = logits_of(teacher_model)
    teacher = trainer.Teacher(predict, _teacher_losses(task, predict, on_event))
    folder = task.work / "checkpoints"
    history = _finished_history(task, teacher, schedule, folder, on_event, heartbeat)
    ended = ending(history, schedule.steps)
    assert ended is not None
    points = evaluations(history, schedule.step_tokens)
    before = points[0]
    lowest = best(points)
    if lowest is None or not is_better(lowest, before):
        raise _no_better(points, ended, schedule.learning_rate, task.work)
    on_event(Preparing("writing"))
    model = load_trained(models, trainer.checkpoint_folder(folder, lowest.step), request.train)
    dtype = round_to_stored_dtype(model, models.student)
    student = autocast(logits_of(model.to(models.device)), models)
    metrics = trainer.held_out_metrics(student, teacher, task.texts, request.rows, models.device)
    (written,) = evaluations([{"step": lowest.step, **metrics}], schedule.step_tokens)
    if not is_better(written, before):
        raise _no_better([before, written], ended, schedule.learning_rate, task.work)
    curve = [point for point in points if point.step <= lowest.step]
    curve.append(written)
    record = _record(task, schedule, teacher.losses, curve, lowest.step, ended)
    return record, model.to(dtype)


def schedule_of(request: DistillRequest, models: ModelPair) -> Schedule:
    """Return the length and the course of a training."""
    step_tokens = request.step_rows * models.settings.sequence_length
    steps = max(1, math.ceil(request.tokens / step_tokens))
    warmup = request.warmup
    if warmup is None:
        warmup = min(MOST_WARMUP, steps // 10)
    learning_rate = request.learning_rate
    if learning_rate is None:
        learning_rate = default_learning_rate(models.student, request.train, request.step_rows)
    return Schedule(
        steps=steps,
        step_tokens=step_tokens,
        evaluations=request.evaluations,
        learning_rate=learning_rate,
        warmup=min(warmup, steps - 1),
    )


def _teacher_losses(task: DistillTask, teacher: Predict, on_event: OnEvent) -> list[LossSums]:
    """Return the losses of the teacher on the held-out rows of each text.

    Raises:
        ModelError: it predicts NaN or infinities.
    """
    from avss_dist.distillation import trainer

    models = task.models
    losses = []
    for number, text in enumerate(task.texts):
        on_event(Preparing("measuring the teacher", number / len(task.texts)))
        loss = trainer.measure(teacher, None, text, models.settings.batch_size, models.device)
        if not math.isfinite(loss.surprise):
            raise ModelError(
                f"'{models.teacher.name}', the teacher, predicts NaN or infinities on {text.name}.",
                f"Check its weights, or name another `teacher`; first delete {task.work}.",
            )
        losses.append(loss)
    return losses


def _finished_history(
    task: DistillTask,
    teacher: Teacher,
    schedule: Schedule,
    folder: Path,
    on_event: OnEvent,
    heartbeat: Callable[[], None] | None,
) -> History:
    """Return the history of a training that has ended. It goes on from the last checkpoint in a folder.

    Args:
        folder: folder of the checkpoints.
        heartbeat: called whenever a layer begins.
    """
    from transformers.trainer import TRAINER_STATE_NAME, TrainerState

    from avss_dist.distillation import trainer

    folder.mkdir(exist_ok=True)
    share(trainer.delete_incomplete, [folder], idle=lambda: None)
    history: History = []
    last = trainer.last_checkpoint(folder)
    if last is not None:
        history = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME)).log_history
    if ending(history, schedule.steps) is not None:
        return history
    request = task.request
    if request.report_to:
        require_package(request.report_to, "`report_to`")
    on_event(Preparing(f"training, at a learning rate of {schedule.learning_rate:g}"))
    with _explained(folder):
        history = trainer.train(request, task.models, teacher, task.texts, schedule, folder, on_event, heartbeat)
    free_cached_memory()
    return history


def _record(
    task: DistillTask,
    schedule: Schedule,
    teacher_losses: Sequence[LossSums],
    curve: Sequence[CurvePoint],
    steps: int,
    ended: str,
) -> DistillRecord:
    """Return the record of a training.

    Args:
        steps: number of steps after which the student was at its best.
        ended: reason why the training ended.
    """
    request = task.request
    models = task.models
    texts = [_recorded(text, loss) for text, loss in zip(task.texts, teacher_losses, strict=True)]
    lora_rank = request.lora_rank if request.train == LORA else None
    reading = {**models.settings.text_options(), "dtype": models.settings.dtype}
    computed = "bfloat16" if models.bfloat16 else "float32"
    return DistillRecord(
        student=models.student.name,
        student_revision=models.student.revision,
        teacher=models.teacher.name,
        teacher_revision=models.teacher.revision,
        train=request.train,
        lora_rank=lora_rank,
        learning_rate=schedule.learning_rate,
        warmup=schedule.warmup,
        batch_size=request.step_rows,
        tokens=request.tokens,
        steps=steps,
        ended=ended,
        seed=request.seed,
        reading=reading,
        held_out=request.held_out,
        computed=computed,
        texts=tuple(texts),
        curve=tuple(curve),
    )


def _recorded(text: DistillText, teacher_loss: LossSums) -> RecordedText:
    """Return what the record says about a text."""
    read = text.trained or text.held_out
    return RecordedText(
        corpus=text.name,
        label=text.label,
        fingerprint=read.corpus_fingerprint,
        weight=text.weight,
        trained_rows=text.trained.num_sequences if text.trained else 0,
        held_out_rows=text.held_out.num_sequences,
        teacher_perplexity=math.exp(teacher_loss.surprise / teacher_loss.tokens),
    )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Convert errors of libraries that could not write a checkpoint, which they report in several ways.

    Raises:
        StorageFull: there is no space left.
        RunFailed: a file could not be written for another reason, such as a limit of its size.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        texts = f"{error} {error.__context__}"
        is_full = shutil.disk_usage(folder).free < LEAST_FREE_BYTES
        if "No space left" in texts or is_full:
            raise StorageFull(
                f"There is no space left for checkpoints in {folder}: {first_line(error)}",
                "Free some space and run the same command again; it goes on from the last complete checkpoint.",
            ) from error
        if any(words in texts for words in UNWRITTEN):
            raise RunFailed(
                f"A checkpoint in {folder} cannot be written: {first_line(error)}",
                "Look for a limit on the size of files (ulimit -f) and run the same command again; it goes on from the "
                "last complete checkpoint.",
            ) from error
        raise


def _no_better(points: Sequence[CurvePoint], ended: str, rate: float, work: Path) -> RunFailed:
    """Return the error of a training after which the student is no better than before."""
    measured = ", ".join(f"{point.loss:.4g} after {point.step} steps" for point in points)
    outcome = "Training diverged" if ended == DIVERGED else "Training made the student no better"
    after = best(points)
    if after is not None:
        shares = []
        for label, share_before in points[0].kept.items():
            shares.append(f"{share_before:.2%} and {after.kept[label]:.2%} of {label}")
        measured += (
            f". Kept of the teacher's perplexity before training and after {after.step} steps: {', '.join(shares)}"
        )
    return RunFailed(
        f"{outcome}: the divergence from the teacher on held-out text is {measured}. Nothing was written.",
        f"Lower `learning_rate`, which was {rate:g}, or name more text; first delete {work}, which holds the trained "
        "checkpoints.",
    )
