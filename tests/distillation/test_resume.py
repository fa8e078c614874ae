"""A killed distillation goes on, and writes the same bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import avss, files
from support.commands import Command

pytestmark = pytest.mark.nightly

STEPS = 24


def teacher_writes(part: Path) -> bool:
    texts = part.parent.parent / "cache-killed" / "avss_dist" / "own_texts"
    return any(texts.rglob("*.parquet"))


def checkpoint_is_being_written(part: Path) -> bool:
    return (part / "checkpoints" / "checkpoint-6" / "model.safetensors").exists()


def checkpoint_is_complete(part: Path) -> bool:
    return (part / "checkpoints" / "checkpoint-12" / "avss_complete").exists()


def output_is_being_written(part: Path) -> bool:
    return any(part.parent.glob(".out.avss-*"))


MOMENTS: list[Callable[[Path], bool]] = [
    teacher_writes,
    checkpoint_is_being_written,
    checkpoint_is_complete,
    output_is_being_written,
]
ARGUMENTS = ["--sequence-length", 32, "--batch-size", 4, "--tokens", STEPS * 128]
ARGUMENTS += ["--held-out", 4, "--evaluations", 4, "--warmup", 2]
ARGUMENTS += ["--device", "cpu", "--learning-rate", "3e-3", "--self-texts", 300, "-q"]


@pytest.mark.usefixtures("warm_workers")
def test_a_killed_distillation_writes_the_same_bytes(
    student: Path, teacher: Path, corpus: Path, other_corpus: Path, tmp_path: Path
) -> None:
    """One directory takes a SIGKILL at every moment, one after the other; another takes none."""
    arguments = ["distill", student, "--teacher", teacher, "--corpora", corpus, "--watch", other_corpus]
    arguments += ARGUMENTS
    outputs = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        outputs[name] = ["-o", folder / "out"]
    caches = {name: {"XDG_CACHE_HOME": str(tmp_path / f"cache-{name}")} for name in outputs}
    code, _, said = Command(*arguments, *outputs["whole"], **caches["whole"]).wait()
    assert code == 0, said
    kills = []
    folder = tmp_path / "killed"
    for has_come in MOMENTS:
        command = Command(*arguments, *outputs["killed"], **caches["killed"])
        while command.running() and not has_come(folder / "out.part"):
            time.sleep(0.001)
        if command.running():
            kills.append(has_come.__name__)
            command.kill()
        else:
            assert command.wait()[0] == 0
            break
    assert len(kills) >= len(MOMENTS) - 2
    if not (folder / "out").exists() or (folder / "out.part").exists():
        code, _, said = Command(*arguments, *outputs["killed"], **caches["killed"]).wait()
        assert code == 0, said
    assert files(folder / "out") == files(tmp_path / "whole" / "out")
    assert not [name for name in os.listdir(folder) if name.startswith(".out")]
    assert not (folder / "out.part").exists()
    assert avss(*arguments, *outputs["killed"]).exit_code == 2
