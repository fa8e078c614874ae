"""Distilled models of an experiment: each is a checkpoint in the warehouse's folder, made once.

A student is pruned and repaired as a plan and a patch say. It is deleted when its distilled checkpoint is complete.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.core.settings import Settings, fingerprint
from avss_dist.core.text import RedactedURI, basename
from avss_dist.distillation.curve import DIVERGED
from avss_dist.distillation.distill import distill
from avss_dist.distillation.events import OnEvent
from avss_dist.distillation.pair import resolve_pair
from avss_dist.distillation.record import read_record
from avss_dist.evaluation.distill import STUDENT
from avss_dist.evaluation.repairs import read_repaired
from avss_dist.evaluation.session import StoredPatch
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.methods import Experiment
from avss_dist.pruning.plan import Plan
from avss_dist.requests import DistillRequest
from avss_dist.warehouse.storage import Storage

FOLDER = "distilled"  # in the warehouse


@dataclass(frozen=True, kw_only=True)
class Distilling:
    """Distillation of models that are made of one checkpoint.

    Attributes:
        model: the whole model, as the user named it.
        teacher: its checkpoint.
        settings: settings of the run, as the user gave them.
        experiment: experiment with the options of the distillation.
        held_out: rows at the start of each text on which the best checkpoint is chosen.
    """

    model: str
    teacher: Checkpoint
    settings: Settings
    experiment: Experiment
    held_out: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the request that determine the result, but for the models."""
        assert self.experiment.distill_tokens is not None
        reading = {name: getattr(self.settings, name) for name in DistillRequest.shared if hasattr(self.settings, name)}
        return reading | {
            "corpora": self.experiment.repair_corpora,
            "tokens": self.experiment.distill_tokens,
            "train": self.experiment.distill_train,
            "learning_rate": self.experiment.distill_learning_rate,
            "self_texts": self.experiment.distill_self_texts,
            "skip_sequences": self.experiment.repair_skip_sequences,
            "max_sequences": self.experiment.repair_max_sequences,
            "held_out": self.held_out,
        }

    def require(self, storage: Storage) -> None:
        """Refuse what cannot be distilled, before anything is measured.

        Raises:
            ConfigError: the warehouse is not a local folder, or the model or the options do not allow training.
        """
        require_local(storage)
        resolve_pair(self._request(self.model, "student", None))

    def _request(
        self, student: str | Path, output: str | Path, on_event: OnEvent | None, **more: Any
    ) -> DistillRequest:
        options = {**self.options, **more, "on_event": on_event}
        return DistillRequest(str(student), teacher=self.model, output=output, **options)

    def checkpoint(
        self, storage: Storage, plan: Plan, patch: StoredPatch | None, *, allow_overlap: bool, on_event: OnEvent
    ) -> Checkpoint:
        """Return the distilled checkpoint of a plan and a repair. A stored one is reused, an unfinished one resumed.

        Args:
            patch: weights of the repair; None for the pruned model.

        Raises:
            RunFailed: training diverged, or made the student no better.
            AvssError: see `pruning.checkpoint.prune` and `distillation.distill.distill`.
        """
        folder = self._folder(storage, plan, patch)
        output, student = folder / basename(self.teacher.name), folder / STUDENT
        code = self.settings.trust_remote_code
        record = read_record(output) if output.is_dir() else None
        if record is None or record.ended == DIVERGED:
            shutil.rmtree(output, ignore_errors=True)
            if not student.exists():
                repaired = read_repaired(patch) if patch else None
                prune(self.model, plan, student, repair=repaired, trust_remote_code=code)
            try:
                distill(self._request(student, output, on_event, allow_overlap=allow_overlap))
            except RunFailed as error:
                raise RunFailed(f"{student}: {error.message}", "Set another `distill_learning_rate`.") from error
        for work in (student, output.with_name(f"{output.name}.part")):
            shutil.rmtree(work, ignore_errors=True)
        return resolve(str(output), trust_remote_code=code)

    def _folder(self, storage: Storage, plan: Plan, patch: StoredPatch | None) -> Path:
        """Return the folder of a student and its result, named by all that determines them."""
        values = {**self.options, "corpora": [RedactedURI(text) for text in self.experiment.repair_corpora]}
        values |= {"teacher": self.teacher.revision, "drop": [*plan.drop], "patch": patch.key if patch else None}
        return Path(storage.base) / FOLDER / fingerprint(**values)[:20]


def require_local(storage: Storage) -> None:
    """Raise ConfigError for a warehouse that is not a folder on a disk, where checkpoints are written."""
    if not storage.is_local:
        raise ConfigError(
            f"Distilled checkpoints are written into a folder, and the warehouse is {storage.root}.",
            "Use a warehouse on a disk, or leave out repairs that end in +distill.",
        )
