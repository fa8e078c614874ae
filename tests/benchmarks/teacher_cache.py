"""Compare training beside the teacher with training from a cache of its predictions: tokens/s, size and error.

    python tests/benchmarks/teacher_cache.py STUDENT TEACHER CORPUS [--top 8 --top 64 --top 512] [--steps 8]

Each training has the same rows, in one process. Tokens/s are those from the first training step to the last, without
evaluations. Others: the probability of the tokens that are not in the cache. Divergence: of the student at the start,
on held-out rows, and what the cache makes it miss: as it is, and as `avss distill` estimates it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from support.benchmarking import TrainingClock

import avss_dist
from avss_dist.distillation.distill import Distilled
from avss_dist.warehouse.reader import Warehouse

TOPS = (8, 64, 512)


def trained(output: Path, options: dict[str, Any]) -> tuple[Distilled, TrainingClock, float]:
    """Return the result of a distillation, its clock, and the seconds until the evaluation before training ended."""
    clock, start = TrainingClock(), time.perf_counter()
    done = avss_dist.distill(output=output, on_event=clock, **options)
    return done, clock, clock.measured[0] - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for the teacher itself, and one for each size of the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("corpus")
    parser.add_argument("--top", action="append", type=int, help="tokens of a prediction; repeatable; 8, 64 and 512")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="avss-teacher-cache-"))
    options: dict[str, Any] = {
        "student": args.student,
        "teacher": args.teacher,
        "corpora": [args.corpus],
        "self_texts": 0,
        "tokens": args.steps * args.batch_size * args.sequence_length,
        "max_sequences": args.held_out + args.steps * args.batch_size,
        "evaluations": 1,
        **{name: getattr(args, name) for name in ("batch_size", "sequence_length", "held_out", "dtype", "device")},
    }
    try:
        done, clock, seconds = trained(folder / "beside", options)
        whole = done.record.before.loss
        print(f"{done.record.student}, {args.steps} steps of {args.batch_size} x {args.sequence_length} tokens")
        print("teacher   tokens/s   before training   bytes/token   others   divergence   misses   estimated")
        print(f"{'beside':9s} {clock.speed:8.1f} {seconds:15.0f} s {'':31s} {whole:12.4f}")
        for top in args.top or TOPS:
            warehouse = folder / f"warehouse-{top}"
            cached = {**options, "teacher_top": top, "warehouse": warehouse}
            done, clock, seconds = trained(folder / f"top-{top}", cached)
            positions = Warehouse(warehouse).table("predictions", columns=["part"]).num_rows
            size = sum(file.stat().st_size for file in (warehouse / "predictions").rglob("*.parquet"))
            before, (text,) = done.record.before, done.record.texts
            assert before.missed is not None and text.others is not None
            print(
                f"top {top:<5d} {clock.speed:8.1f} {seconds:15.0f} s {size / positions:13.0f} {text.others:8.2%} "
                f"{before.loss:12.4f} {whole - before.loss:8.4f} {before.missed[text.label]:11.4f}"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
