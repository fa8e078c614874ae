"""Training of a student by transformers' Trainer: loss, schedule of evaluations and checkpoints."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from avss_dist.core.errors import first_line
from avss_dist.core.settings import Settings
from avss_dist.core.streams import complain
from avss_dist.distillation.curve import (
    DIVERGENCE,
    KEPT,
    LOSS,
    MOST_LOGGED,
    PERPLEXITY,
    History,
    OnEvent,
    Schedule,
    TrainingAdvanced,
    best,
    ending,
    evaluations,
    require_distance,
)
from avss_dist.distillation.loss import (
    LossSums,
    Predict,
    distillation_loss,
    logits_of,
    next_labels,
    predictions,
    text_loss,
)
from avss_dist.distillation.pair import ModelPair, choose_trained
from avss_dist.distillation.texts import DistillText, Example, Mix, as_examples
from avss_dist.models.checkpoint.loading import load_model
from avss_dist.models.checkpoint.size import find_layers, load_skeleton
from avss_dist.partition.group import all_gather, share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from avss_dist.requests import DistillRequest

SAVE_SECONDS = 300.0  # between two checkpoints, at most, beside those of evaluations
MAX_EXPONENT = 700.0  # near the largest one whose power of e is a double
_COMPLETE = "avss_complete"  # the file that a checkpoint has once all others are written


class _Arguments(TrainingArguments):
    """Arguments of a process that uses one GPU, however many it sees."""

    @property
    def n_gpu(self) -> int:
        """Number of GPUs, at most 1."""
        return min(1, int(super().n_gpu))


OPTIMIZER: Mapping[str, object] = {
    "optim": "adamw_torch",
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
}
"""Arguments of the Trainer that are the same for every distillation: those of the optimizer and its schedule.

The learning rate falls to zero along a line (Bergsma et al. 2025, arXiv 2502.15938).
"""
UNATTENDED: Mapping[str, object] = {
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
    "log_level": "error",
}
"""Arguments that leave the order of rows, evaluation, saving and progress to this module."""


def arguments(
    request: DistillRequest, models: ModelPair, schedule: Schedule, folder: Path, more: Mapping[str, object]
) -> TrainingArguments:
    """Return the arguments of the Trainer.

    Args:
        more: further arguments, such as those of ranks.
    """
    options: dict[str, Any] = {**OPTIMIZER, **UNATTENDED}
    options["learning_rate"] = schedule.learning_rate
    options["warmup_steps"] = schedule.warmup
    options["max_steps"] = schedule.steps
    options["per_device_train_batch_size"] = request.rows
    options["seed"] = request.seed
    options["bf16"] = models.bfloat16
    options["output_dir"] = str(folder)
    options["use_cpu"] = models.device.type == "cpu"
    options["dataloader_pin_memory"] = models.device.type == "cuda"
    options["logging_steps"] = math.ceil(schedule.steps / MOST_LOGGED)
    options["report_to"] = request.report_to or "none"
    options["run_name"] = Path(request.output).name
    options.update(more)
    return _Arguments(**options)


@dataclass(frozen=True)
class Teacher:
    """A teacher and its losses.

    Attributes:
        predict: its predictions.
        losses: its loss on the held-out rows of each text.
    """

    predict: Predict
    losses: Sequence[LossSums]


class DistillationTrainer(Trainer):
    """Trainer whose loss is the divergence from a teacher, evaluated on held-out text.

    Args:
        teacher: the teacher, with its losses on the texts.
        texts: texts with held-out rows.
        options: arguments of `transformers.Trainer`.
    """

    def __init__(self, *, teacher: Teacher, texts: Sequence[DistillText], **options: Any) -> None:
        super().__init__(**options)
        self._teacher = teacher
        self._texts = texts
        self.model_accepts_loss_kwargs = True  # has it count the labels of all ranks and accumulated batches
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Example,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the mean divergence over the counted tokens of a batch."""
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"]
        labels = next_labels(inputs["labels"])
        with torch.no_grad():
            expected = predictions(self._teacher.predict, ids, mask)
        total = distillation_loss(predictions(logits_of(model), ids, mask), expected, labels)
        return total * self.accelerator.num_processes / num_items_in_batch

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Measure the held-out rows of all texts, and log the result."""
        self.model_wrapped.eval()
        metrics = held_out_metrics(
            logits_of(self.model_wrapped),
            self._teacher,
            self._texts,
            self.args.per_device_train_batch_size,
            self.args.device,
        )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def held_out_metrics(
    student: Predict, teacher: Teacher, texts: Sequence[DistillText], batch_size: int, device: torch.device
) -> dict[str, float]:
    """Return the metrics of the held-out rows of all texts, by the names of `curve`.

    The weighted loss is always among them; without texts it is 0.
    """
    metrics = {LOSS: 0.0}
    sum_of_weights = sum(text.weight for text in texts)
    for text, teacher_loss in zip(texts, teacher.losses, strict=True):
        # Of a text that is only watched, the divergence is not measured.
        teacher_of_text = None if text.trained is None else teacher.predict
        measured = measure(student, teacher_of_text, text, batch_size, device)
        surprise = measured.surprise / measured.tokens
        metrics[f"{PERPLEXITY}{text.label}"] = _exp(surprise)
        metrics[f"{KEPT}{text.label}"] = _exp(teacher_loss.surprise / teacher_loss.tokens - surprise)
        if text.trained:
            divergence = measured.divergence / measured.tokens
            metrics[f"{DIVERGENCE}{text.label}"] = divergence
            metrics[LOSS] += divergence * text.weight / sum_of_weights
    return metrics


def _exp(value: float) -> float:
    """Return e to the power of a value, or a very large number where that has no double."""
    return math.exp(min(value, MAX_EXPONENT))


def measure(
    student: Predict, teacher: Predict | None, text: DistillText, batch_size: int, device: torch.device
) -> LossSums:
    """Return the loss of a model on the held-out rows of a text, and its divergence from a teacher.

    The ranks of a group share the batches, and all of them call this and return the same.
    """

    def loss(batch: Example) -> LossSums:
        on_device = {name: values.to(device) for name, values in batch.items()}
        return text_loss(student, teacher, on_device)

    examples = []
    for shard in text.held_out.shards:
        examples += [as_examples(batch) for batch in shard.batches(batch_size)]
    return sum(share(loss, examples), LossSums())


class ScheduleCallback(TrainerCallback):
    """Callback that decides when to evaluate, save and end, and reports the progress.

    Args:
        folder: folder of the checkpoints.
    """

    def __init__(self, schedule: Schedule, folder: Path, on_event: OnEvent) -> None:
        self._schedule = schedule
        self._folder = folder
        self._on_event = on_event
        self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Evaluate and save at regular intervals and at the end. Save also at times."""
        step = state.global_step
        steps_between = math.ceil(self._schedule.steps / self._schedule.evaluations)
        if step % steps_between == 0 or step >= self._schedule.steps:
            control.should_log = True
            control.should_evaluate = True
            control.should_save = True
        elif control.should_log:
            ages = all_gather(time.monotonic() - self._saved)
            control.should_save = ages[0] > SAVE_SECONDS  # by the clock of rank 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        """Report a step, and end the training if its loss is not finite."""
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            tokens = state.global_step * self._schedule.step_tokens
            total = self._schedule.steps * self._schedule.step_tokens
            self._on_event(TrainingAdvanced(tokens=tokens, total=total, loss=loss))
            if not math.isfinite(loss):
                control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Report an evaluation, and end the training if a rule says so."""
        point = evaluations(state.log_history, self._schedule.step_tokens)[-1]
        if not point.step:
            require_distance(point, self._folder.parent)
        self._on_event(point)
        if ending(state.log_history, self._schedule.steps):
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Mark a checkpoint as complete, and delete all but it and the best one."""
        all_gather(0)  # returns when every rank has written its part
        self._saved = time.monotonic()
        if not state.is_world_process_zero:
            return
        last = checkpoint_folder(self._folder, state.global_step)
        (last / _COMPLETE).touch()
        needed = {last}
        lowest = best(evaluations(state.log_history))
        if lowest is not None:
            needed.add(checkpoint_folder(self._folder, lowest.step))
        for folder in self._folder.glob("checkpoint-*"):
            if folder not in needed:
                # The mark goes first, so that the remains of a folder after a kill are not resumed.
                (folder / _COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder)


class TrackerCallback(TrainerCallback):
    """Callback that passes events on to that of a tracker. If the tracker fails, training goes on without it.

    Args:
        callback: the tracker's callback.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        self._callback: TrainerCallback | None = callback

    def _pass(self, event: str, *state: object, **more: object) -> None:
        if self._callback is None:
            return
        try:
            getattr(self._callback, event)(*state, **more)
        except Exception as error:  # of a library, a server or a network: nothing of the training
            self._callback = None
            complain(f"No further reports to the tracker, training goes on: {first_line(error)}")

    on_train_begin = partialmethod(_pass, "on_train_begin")
    on_log = partialmethod(_pass, "on_log")
    on_save = partialmethod(_pass, "on_save")
    on_train_end = partialmethod(_pass, "on_train_end")


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after a step."""
    return folder / f"checkpoint-{step}"


def delete_incomplete(folder: Path) -> None:
    """Delete the checkpoints that a stopped training has not completed."""
    for path in folder.glob("checkpoint-*"):
        if not (path / _COMPLETE).is_file():
            shutil.rmtree(path)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint, or None."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / _COMPLETE).is_file()]
    return max(complete, key=_step_of_checkpoint, default=None)


def _step_of_checkpoint(folder: Path) -> int:
    """Return the step after which a checkpoint was written: the number in the name of its folder."""
    _, _, step = folder.name.rpartition("-")
    return int(step)


def _sharding_options(request: DistillRequest, models: ModelPair) -> AbstractContextManager[Mapping[str, object]]:
    """Return a context manager that gives the arguments of the Trainer for the ranks, or none for one process."""
    if request.ranks == 1:
        return nullcontext({})
    from avss_dist.partition.training import trainer_options

    skeleton, _ = load_skeleton(models.student, models.settings)
    layers = find_layers(skeleton, models.settings)
    return trainer_options(
        request.sharding,
        models.device.type,
        bfloat16=models.bfloat16,
        layers={type(layer).__name__ for layer in layers},
    )


def call_at_layers(model: PreTrainedModel, settings: Settings, heartbeat: Callable[[], None] | None) -> None:
    """Have a model call a function whenever a layer begins, unless it is None."""
    if heartbeat is not None:
        for layer in find_layers(model, settings):
            layer.register_forward_pre_hook(lambda *_: heartbeat())


def train(
    request: DistillRequest,
    models: ModelPair,
    teacher: Teacher,
    texts: Sequence[DistillText],
    schedule: Schedule,
    folder: Path,
    on_event: OnEvent,
    heartbeat: Callable[[], None] | None,
) -> History:
    """Train a model, from the last checkpoint in a folder if there is one, and return the whole history.

    The ranks of a group all call this.

    Args:
        folder: folder of the checkpoints. The best and the last one stay in it.
        heartbeat: called whenever a layer begins.
    """
    last = last_checkpoint(folder)
    with _sharding_options(request, models) as sharding:
        options = {**sharding, "eval_on_start": last is None}
        student = load_model(models.student, models.settings, head=True)
        call_at_layers(student, models.settings, heartbeat)
        torch.manual_seed(request.seed)  # of a new adapter, which is the same on all ranks
        trainer = DistillationTrainer(
            teacher=teacher,
            texts=texts,
            args=arguments(request, models, schedule, folder, options),
            model=choose_trained(student, request.train, request.lora_rank),
            train_dataset=Mix(texts, schedule.steps * request.step_rows, request.seed),
            callbacks=[ScheduleCallback(schedule, folder, on_event)],
        )
        _guard_trackers(trainer)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        if trainer.is_deepspeed_enabled:
            engine: Any = trainer.model_wrapped
            engine.destroy()  # it refers to itself
        return list(trainer.state.log_history)


def _guard_trackers(trainer: DistillationTrainer) -> None:
    """Put a `TrackerCallback` around each callback of a tracker, so that none ends the training."""
    of_trackers = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    callbacks = []
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, of_trackers):
            callback = TrackerCallback(callback)
        callbacks.append(callback)
    trainer.callback_handler.callbacks = callbacks
