"""Cost of a job over many checkpoints of one shape, as a ratio to plain loads and bare forward passes over its text.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/many_checkpoints.py --model FOLDER
    python tests/benchmarks/many_checkpoints.py --model FOLDER --before CHECKOUT  # and the job of another checkout
    python tests/benchmarks/many_checkpoints.py --model FOLDER --sequences-per-shard 1 2 4  # and jobs of fewer shards

Without ``--model``, the checkpoints are tiny. With it, they are copies of the model, whose weights differ by small
random factors: 16 times the size of its files is taken in the folder for temporary files. Each part is a process of its
own: the loads and passes, the jobs, the job of another checkout, and the loads and passes again. A plain load is
`from_pretrained` of transformers. A bare pass runs the backbone, without its head, over the rows of the job in batches
of 8. The ratios are to the mean of both times, so that a machine whose speed drifts decides less. Processor time
includes that of the system.

- ``whole``: ratio of the processes, with their start.
- ``checkpoints``: ratio of the time after the imports, from the first load to the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
if __name__ == "__main__":
    # The part of another checkout finds that in PYTHONPATH, before this one.
    sys.path[:1] = [*os.environ.get("MEASURED_CHECKOUT", "").split(os.pathsep), str(REPOSITORY / "tests")]
    sys.path.append(str(REPOSITORY))

CORPUS = "builtin:pydoc"
BATCH = 8


@dataclass(frozen=True)
class Cost:
    """Seconds of a process.

    Attributes:
        wall, cpu: of the whole process.
        inner_wall, inner_cpu: after its imports.
    """

    wall: float
    cpu: float
    inner_wall: float
    inner_cpu: float


def write_tiny(folder: Path, number: int, tokens: int) -> None:
    """Write a small Llama with a tokenizer, whose weights depend on the number alone."""
    from support.checkpoints import llama, save_tokenizer

    llama(number, max_position_embeddings=max(128, tokens)).save_pretrained(folder)
    save_tokenizer(folder)


def write_alike(model: Path, folder: Path, number: int) -> None:
    """Write a copy of a checkpoint whose weights are multiplied by random factors around 1."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    generator = torch.Generator().manual_seed(number)
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            if tensor.is_floating_point():
                factors = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
                tensor.mul_(factors.mul_(0.02).add_(0.99).to(tensor.dtype))
        save_file(tensors, folder / file.name, {"format": "pt"})


def run_job(job: Path) -> None:
    """Run a job file."""
    import avss_dist

    runs = avss_dist.run(job, executor="local")
    assert all(run.status == "done" for run in runs)


def load_and_pass(job: Path) -> None:
    """Load the checkpoints of a job one after the other, and run each over the rows."""
    import torch
    from transformers import AutoModelForCausalLM

    plan = json.loads(job.read_text(encoding="utf-8"))
    rows = torch.load(job.with_name("rows.pt"))
    for folder in plan["models"]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        backbone = model.get_submodule(model.base_model_prefix)
        with torch.no_grad():
            for batch in rows.split(BATCH):
                backbone(input_ids=batch, use_cache=False)


def do_part(part: str, job: Path) -> None:
    """Do a part in this process, and print the seconds after its imports as JSON."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    if part == "job":
        import avss_dist.measure.kernels.cpu
        import avss_dist.runs.scoring  # noqa: F401

    disable_progress_bar()
    torch.set_num_threads(1)
    wall = time.perf_counter()
    cpu = time.process_time()
    if part == "job":
        run_job(job)
    else:
        load_and_pass(job)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))


def cost_of(part: str, job: Path, checkout: Path = REPOSITORY, *, sequences_per_shard: int = 1) -> Cost:
    """Return the cost of a part in a process of its own, with a warehouse and a cache of its own."""
    plan = json.loads(job.read_text(encoding="utf-8"))
    plan["settings"]["sequences_per_shard"] = sequences_per_shard
    with tempfile.TemporaryDirectory(dir=job.parent) as folder:
        copy = Path(folder, "job.yaml")
        copy.write_text(json.dumps(plan | {"warehouse": f"{folder}/w"}), encoding="utf-8")
        shutil.copyfile(job.with_name("rows.pt"), Path(folder, "rows.pt"))
        environment = {
            **os.environ,
            "MEASURED_CHECKOUT": str(checkout),
            "PYTHONPATH": str(checkout),
            "XDG_CACHE_HOME": f"{folder}/cache",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, __file__, "--part", part, "--job", str(copy)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    inner_wall, inner_cpu = json.loads(done.stdout.splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, inner_wall, inner_cpu)


def write_rows(folder: Path, job: Path, rows: int, tokens: int) -> None:
    """Write the token ids of the job's rows beside its file, int64[rows, tokens]."""
    import numpy as np
    import torch

    from avss_dist.core.settings import Settings
    from avss_dist.corpus.shards import tokenize_corpus
    from avss_dist.models.checkpoint.loading import load_tokenizer
    from avss_dist.models.checkpoint.locate import resolve

    settings = Settings(max_sequences=rows, sequence_length=tokens, batch_size=BATCH)
    plan = tokenize_corpus(CORPUS, load_tokenizer(resolve(str(folder))), settings)
    ids = []
    for shard in plan.shards:
        for batch in shard.batches(BATCH):
            ids.append(batch.input_ids)
    torch.save(torch.from_numpy(np.concatenate(ids)).to(torch.int64), job.with_name("rows.pt"))


def ratios(cost: Cost, first: Cost, second: Cost) -> str:
    """Return the columns of a line of the table: processor and wall time over the mean of two others."""
    values = []
    for name in ("cpu", "wall", "inner_cpu", "inner_wall"):
        both = asdict(first)[name] + asdict(second)[name]
        values.append(f"{asdict(cost)[name] / (both / 2):>12.2f}")
    return "".join(values)


def compare(options: Any, folder: Path) -> None:
    """Make the checkpoints, measure every part, and print the ratios."""
    models = []
    for number in range(options.checkpoints):
        model = folder / f"step{number + 1}"
        if options.model:
            write_alike(Path(options.model), model, number)
        else:
            write_tiny(model, number, options.tokens)
        models.append(str(model))
    job = folder / "job.yaml"
    settings = {"max_sequences": options.rows, "sequence_length": options.tokens, "device": "cpu"}
    job.write_text(json.dumps({"models": models, "corpora": [CORPUS], "settings": settings}), encoding="utf-8")
    write_rows(Path(models[0]), job, options.rows, options.tokens)

    first = cost_of("bare", job)
    costs = {}
    for sequences in options.sequences_per_shard:
        costs[sequences] = cost_of("job", job, sequences_per_shard=sequences)
    before = None
    if options.before:
        before = cost_of("job", job, Path(options.before), sequences_per_shard=options.sequences_per_shard[0])
    second = cost_of("bare", job)
    print(f"{options.checkpoints} checkpoints, {options.rows} rows of {options.tokens} tokens; ratio to bare")
    print(f"{'':<10}{'whole: cpu':>12}{'wall':>12}{'ckpts: cpu':>12}{'wall':>12}")
    if before is not None:
        print(f"{'before':<10}{ratios(before, first, second)}")
    for sequences, cost in costs.items():
        shards = math.ceil(options.rows / sequences)
        print(f"{f'shards: {shards}':<10}{ratios(cost, first, second)}")
    print(f"{'bare, 2nd':<10}{ratios(second, first, first)}  (of the first)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model; by default a tiny one is made")
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--sequences-per-shard", type=int, nargs="+", default=[1], help="one job for each number")
    parser.add_argument("--before", help="folder of another checkout, whose job of the first number is measured, too")
    parser.add_argument("--part", choices=("bare", "job"), help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        do_part(options.part, options.job)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
