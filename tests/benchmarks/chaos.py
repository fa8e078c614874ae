"""A sweep on a real three-node cluster while processes are killed: is every table what it is undisturbed?

    python tests/benchmarks/chaos.py [--rounds 20] [--seed 0]

Each round starts a cluster (`cluster/local.sh 3`), submits a job of three tiny random models to it, and at random
moments, which the seed tells, kills a worker, a node with all that runs on it, and the driver; what broke off is
submitted again until it is done. Its tables are compared with those of a job in one process, byte by byte.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.checkpoints import llama, save_tokenizer  # noqa: E402
from support.tables import assert_same_tables  # noqa: E402

LOCAL = ROOT / "cluster" / "local.sh"
AVSS = [sys.executable, "-m", "avss_dist"]
MODELS, NODES, MOST_SUBMISSIONS = 3, 3, 8
JOB = """\
warehouse: {warehouse}
corpora: [builtin:pydoc]
models: [{models}]
settings: {{max_sequences: 240, sequence_length: 64, batch_size: 2, sequences_per_shard: 8}}
execution: {{replicas: 2, partition: single, placement_seconds: 120, hang_seconds: 60}}
"""


def save_models(folder: Path) -> list[Path]:
    saved = []
    for seed in range(MODELS):
        saved.append(save_tokenizer(folder / f"step-{seed}"))
        llama(seed, hidden_size=128, intermediate_size=384, num_hidden_layers=6).save_pretrained(saved[-1])
    return saved


def write_job(folder: Path, models: list[Path]) -> Path:
    folder.mkdir()
    text = JOB.format(warehouse=folder / "warehouse", models=", ".join(map(str, models)))
    (folder / "job.yaml").write_text(text, encoding="utf-8")
    return folder / "job.yaml"


class Cluster:
    """Three nodes, for a ``with`` block."""

    def __init__(self, home: Path) -> None:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env = {**plain, "XDG_STATE_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self._mark = str(home)

    def __enter__(self) -> Cluster:
        started = self.local(str(NODES))
        self.env |= dict(re.findall(r"export (\w+)='?([^'\n]+)'?", started.stdout))
        return self

    def __exit__(self, *_: object) -> None:
        self.local("stop")

    def local(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [LOCAL, *arguments], env=self.env, capture_output=True, text=True, timeout=180, check=True
        )

    def kill(self, what: str, dice: random.Random) -> bool:
        """Kill a ``worker``, a ``node`` or the ``driver``; False where there is none."""
        if what == "node":
            self.local("kill-node", str(dice.randint(1, NODES - 1)))
            return True
        wanted = "ray::Worker" if what == "worker" else "avss run"
        found = sorted(self._processes(wanted), key=lambda process: process.pid)
        if not found:
            return False
        for process in [dice.choice(found)] if what == "worker" else found:
            process.send_signal(signal.SIGKILL)
        return True

    def _processes(self, wanted: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("AVSS_LOCAL_CLUSTER", "").startswith(self._mark)
                if ours and wanted in " ".join(process.cmdline()).replace("/", " "):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def submit(cluster: Cluster, job: Path) -> subprocess.Popen[str]:
    command = [*AVSS, "submit", str(job), "--follow"]
    return subprocess.Popen(
        command, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=job.parent
    )


def one_round(folder: Path, models: list[Path], expected: Path, dice: random.Random, span: float) -> Counter[str]:
    """Kill, submit again, compare; what was killed before the end, and how often the job was submitted."""
    job = write_job(folder, models)
    told: Counter[str] = Counter()
    with Cluster(folder / "state") as cluster:
        todo = sorted((dice.uniform(0.2, 1.0) * span, what) for what in ("worker", "node", "driver"))
        start, running = time.monotonic(), submit(cluster, job)
        told["submitted"] = 1
        while True:
            if todo and time.monotonic() - start > todo[0][0]:
                at, what = todo.pop(0)
                if cluster.kill(what, dice):
                    told[what] += 1
                else:  # it has not begun
                    todo = sorted([(at + 0.3, what), *todo])
            code = running.poll()
            if code == 0:
                break
            if code is not None:
                if told["submitted"] == MOST_SUBMISSIONS:
                    raise SystemExit(f"It was submitted {MOST_SUBMISSIONS} times:\n{running.stdout.read()}")
                running = submit(cluster, job)
                told["submitted"] += 1
            time.sleep(0.05)
    assert_same_tables(folder / "warehouse", expected)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="avss-chaos-") as temporary:
        folder = Path(temporary)
        models = save_models(folder / "models")
        alone = write_job(folder / "alone", models)
        subprocess.run(
            [*AVSS, "run", str(alone), "--executor", "local", "--replicas", "1"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        expected = folder / "alone" / "warehouse"
        span = undisturbed(folder / "undisturbed", models, expected)
        print(f"undisturbed: {span:.1f} s from submission to the end, tables equal", flush=True)
        total: Counter[str] = Counter()
        for number in range(options.rounds):
            dice = random.Random(options.seed * 1000 + number)
            told = one_round(folder / f"round-{number}", models, expected, dice, span)
            total += told
            print(f"round {number:>2}: {_words(told)}; tables equal", flush=True)
        print(f"{options.rounds} rounds: {_words(total)}; every table equal to the undisturbed one")


def undisturbed(folder: Path, models: list[Path], expected: Path) -> float:
    """Seconds that a round takes without any harm."""
    job = write_job(folder, models)
    with Cluster(folder / "state") as cluster:
        start = time.monotonic()
        running = submit(cluster, job)
        output, _ = running.communicate()
        seconds = time.monotonic() - start
    if running.returncode:
        raise SystemExit(output)
    assert_same_tables(folder / "warehouse", expected)
    return seconds


def _words(told: Counter[str]) -> str:
    killed = ", ".join(f"{told[what]} {what}{'s' * (told[what] != 1)}" for what in ("worker", "node", "driver"))
    return f"killed {killed}; submitted {told['submitted']} times"


if __name__ == "__main__":
    main()
