"""A distilled checkpoint: closer to its teacher, plain, recorded, and the same after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.command_line import avss

import avss_dist

SMALL: dict[str, Any] = {
    "sequence_length": 32,
    "tokens": 20 * 4 * 32,
    "self_texts": 40,
    "held_out": 4,
    "learning_rate": 3e-3,
    "warmup": 2,
    "evaluations": 4,
    "device": "cpu",
}


def test_a_student_comes_closer_to_its_teacher(
    student: Path, teacher: Path, corpus: Path, other_corpus: Path, tmp_path: Path
) -> None:
    done = avss_dist.distill(student, teacher=teacher, corpora=[corpus], watch=[other_corpus], output=tmp_path / "out", **SMALL)
    print(done.to_pandas())
    for line in done.record.describe(): print(line)
    print(done.notes, done.memory.describe())
    assert 0
