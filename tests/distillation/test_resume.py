"""A killed distillation goes on, and writes the same bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import avss, files
from support.commands import Command

STEPS = 24
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the teacher writes": lambda part: (
        (part / "self.part").is_file() and (part / "self.part").read_bytes().count(b"\n") > 1
    ),
    "the teacher is measured": lambda part: (part / "checkpoints").is_dir(),
    "a checkpoint is being written": lambda part: (
        part / "checkpoints" / "checkpoint-6" / "model.safetensors"
    ).exists(),
    "a checkpoint is complete": lambda part: (part / "checkpoints" / "checkpoint-12" / "avss_complete").exists(),
    "the last checkpoint is being written": lambda part: (part / "checkpoints" / "checkpoint-24").exists(),
    "the output is being written": lambda part: bool([*part.parent.glob(".out.avss-*")]),
}


@pytest.mark.usefixtures("warm_workers")
def test_a_killed_distillation_writes_the_same_bytes(
    student: Path, teacher: Path, corpus: Path, other_corpus: Path, tmp_path: Path
) -> None:
    """One directory takes a SIGKILL at every moment, one after the other; another takes none."""
    arguments = ["distill", student, "--teacher", teacher, "--corpus", corpus, "--watch", other_corpus]
    arguments += ["--sequence-length", 32, "--tokens", STEPS * 128, "--self-texts", 70, "--held-out", 4]
    arguments += ["--evaluations", 4, "--warmup", 2, "--device", "cpu", "--learning-rate", "3e-3", "-q"]
    caches = {name: {"XDG_CACHE_HOME": str(tmp_path / f"cache-{name}")} for name in ("whole", "killed")}
    code, _, said = Command(*arguments, "-o", tmp_path / "whole", **caches["whole"]).wait()
    assert code == 0, said
    kills = []
    for moment, arrived in MOMENTS.items():
        command = Command(*arguments, "-o", tmp_path / "out", **caches["killed"])
        while command.running() and not arrived(tmp_path / "out.part"):
            time.sleep(0.001)
        if command.running():
            kills.append(moment)
            command.kill()
        else:
            assert command.wait()[0] == 0
            break
    assert len(kills) >= 4
    if not (tmp_path / "out").exists() or (tmp_path / "out.part").exists():
        code, _, said = Command(*arguments, "-o", tmp_path / "out", **caches["killed"]).wait()
        assert code == 0, said
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (
        not [name for name in os.listdir(tmp_path) if name.startswith(".out")] and not (tmp_path / "out.part").exists()
    )
    assert avss(*arguments, "-o", tmp_path / "out").exit_code == 2
