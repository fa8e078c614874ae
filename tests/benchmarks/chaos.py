"""A fault campaign: random faults at random moments of one job after another. Are all tables the same?

    python tests/benchmarks/chaos.py [--rounds 20] [--first 0] [--seed 0] [--faults FAULT ...] [--keep FOLDER]

Jobs score tiny random models (workers alone, ZeRO-3 or tensor parallel gangs of two ranks) or evaluate them (an
ablation, an experiment), on a Ray cluster of three nodes that lives on; what a fault has killed of it is replaced. Four
to eight faults come to each job, some of them while it copes with the last one; each is a round. A command that ends is
run again until it ends well. Then the tables are compared with undisturbed ones.

A job is lost where a table differs, a unit that was kept was measured again, a command ended with anything but one
plain error, or a deadline passed. Its logs are kept. The seed and the number of a job say what happens in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "20"  # noqa: SIM112

import support.benchmark_cluster  # noqa: F401  # isort: skip  (before Ray)
from support.checkpoints import llama, save_tokenizer
from support.disks import SmallDisk
from support.faults import FAULTS, GANGS, Scene
from support.ray_cluster import Cluster
from support.tables import assert_same_evaluations, assert_same_tables, unit_times

ENDED_BY = {-signal.SIGKILL: "driver killed", 130: "driver interrupted"}
COMMAND_SECONDS = 240.0  # before a command is taken to hang
MOST_COMMANDS = 8
JOBS = {"score": 2, "ablate": 2, "experiment": 2, "zero3": 1, "tensor_parallel": 1}  # times in each eight
SIZES = ["--max-sequences", "128", "--sequence-length", "32", "--batch-size", "4", "--sequences-per-shard", "4"]
EXPERIMENT = """\
warehouse: {warehouse}
corpora: [builtin:pydoc]
models: [{model}]
settings: {{max_sequences: 48, sequence_length: 32, batch_size: 4, sequences_per_shard: 4}}
execution: {{partition: single, hang_seconds: 10}}
experiment:
  tasks: ["perplexity:builtin:pydoc"]
  scores: [avss, block_influence]
  shares: [0.25]
  random: 1
  skip_sequences: 48
  max_sequences: 48
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command that measures units of work into a warehouse.

    Attributes:
        kind: ``score``, ``zero3``, ``tensor_parallel``, ``ablate`` or ``experiment``.
        expected: the warehouse of the same command, undisturbed.
        num_units: the files of its units.
    """

    kind: str
    model: Path
    expected: Path
    num_units: int = 0

    def arguments(self, warehouse: Path, address: str | None) -> list[str]:
        """The words after ``avss``; without an address, for one process."""
        replicas = 1 if self.kind in GANGS else 2
        where = ["--executor", "local"] if address is None else ["--executor", "ray", "--address", address]
        where += [] if address is None else ["--replicas", str(replicas)]
        corpus = ["--corpus", "builtin:pydoc"]
        if self.kind == "ablate":
            return ["ablate", str(self.model), *corpus, "--warehouse", str(warehouse), *SIZES, *where]
        if self.kind == "experiment":
            job = self.model.parent / "experiment.yaml"
            job.write_text(EXPERIMENT.format(warehouse=warehouse, model=self.model), encoding="utf-8")
            return ["run", str(job), *where]
        partition = ["--partition", "single" if self.kind == "score" or address is None else self.kind]
        return [
            *("score", str(self.model), *corpus, "-w", str(warehouse)),
            *(*SIZES, *where, *partition, "--hang-seconds", "10"),
        ]


def avss(arguments: list[str], log: Path, begun: Any) -> None:
    """The command line, in a process of its own. It has begun when an interruption is its own to handle."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["avss", *arguments]
    from avss_dist.__main__ import main

    begun.set()
    main()


class Lost(Exception):
    """What a job shows to be wrong."""


@dataclass(kw_only=True)
class Round:
    """A fault that came.

    Attributes:
        units: that were kept when it came.
        code: with which the command ended before the next fault came; None where it went on.
        seconds: from the fault to that end.
    """

    fault: str
    units: int
    begun: float = field(default_factory=time.monotonic)
    code: int | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        end = "" if self.code is None else f", ended with {self.code} after {self.seconds:.1f} s"
        return f"{self.fault} at {self.units} units{end}"


@dataclass(kw_only=True)
class Outcome:
    """A job under faults.

    Attributes:
        commands: how often its command was started.
        workers: processes that measured, or were to.
        lost: what is wrong, if anything.
    """

    job: Job
    rounds: list[Round] = field(default_factory=list)
    commands: int = 0
    workers: set[int] = field(default_factory=set)
    lost: str = ""

    def __str__(self) -> str:
        lines = [f"{self.job.kind}: {self.commands} commands, {len(self.workers)} workers", *map(str, self.rounds)]
        return "; ".join([*lines, f"LOST: {self.lost}" if self.lost else "tables equal"])


class Campaign:
    """Jobs on one cluster.

    Args:
        folder: for all that is temporary.
        keep: for the logs of lost jobs.
        disk: where the warehouses are, if it can be filled.
        faults: the names of those to choose from.
        jobs: kinds of jobs, of `JOBS`.
    """

    def __init__(
        self,
        folder: Path,
        keep: Path,
        cluster: Cluster,
        disk: SmallDisk | None,
        faults: Sequence[str],
        jobs: Sequence[str],
    ) -> None:
        self._folder, self._keep, self._cluster, self._disk = folder, keep, cluster, disk
        self._faults = {name: FAULTS[name] for name in faults if disk or name != "disk full"}
        self._processes: Any = multiprocessing.get_context("forkserver")
        kinds = [kind for kind in jobs if any(kind in fault.jobs for fault in self._faults.values())]
        self._jobs = [self._undisturbed(kind) for kind in kinds]

    def _undisturbed(self, kind: str) -> Job:
        """A job with its expected tables: from one process, or from a gang where its sums are rounded otherwise."""
        folder = self._folder / kind
        model = save_tokenizer(folder / "model")
        llama(len(kind), num_hidden_layers=4).save_pretrained(model)
        job = Job(kind=kind, model=model, expected=folder / "warehouse")
        address = self._cluster.address if kind == "tensor_parallel" else None
        driver = self._start(job.arguments(job.expected, address), folder / "log")
        driver.join(COMMAND_SECONDS)
        if driver.exitcode != 0:
            raise SystemExit((folder / "log").read_text())
        return replace(job, num_units=len(unit_times(job.expected)))

    def _start(self, arguments: list[str], log: Path) -> Any:
        begun = self._processes.Event()
        driver = self._processes.Process(target=avss, args=(arguments, log, begun))
        driver.start()
        begun.wait()
        return driver

    def _job(self, number: int, seed: int) -> Job:
        """Each kind comes as often as ``JOBS`` says, in an order of the seed's."""
        jobs = [job for job in self._jobs for _ in range(JOBS[job.kind])]
        turn, place = divmod(number, len(jobs))
        random.Random(f"{seed} turn {turn}").shuffle(jobs)
        return jobs[place]

    def play(self, number: int, seed: int, most: int) -> Outcome:
        """One job, with so many rounds at most. What happens when follows from the seed and the number."""
        dice = random.Random(f"{seed} {number}")
        job = self._job(number, seed)
        suited = {name: fault.weight for name, fault in self._faults.items() if job.kind in fault.jobs}
        faults = dice.choices([*suited], [*suited.values()], k=min(most, dice.randint(4, 8)))
        outcome = Outcome(job=job)
        folder = self._folder / f"job-{number}"
        folder.mkdir()
        warehouse = (self._disk.folder if self._disk else folder) / "warehouse"
        try:
            self._until_done(outcome, deque(faults), warehouse, folder, dice)
            assert_same_tables(warehouse, job.expected)
            assert_same_evaluations(warehouse, job.expected)
        except Exception as problem:  # of the campaign too: the next jobs are played all the same
            outcome.lost = f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
            self._save(folder, number, outcome)
        shutil.rmtree(warehouse, ignore_errors=True)
        shutil.rmtree(folder)
        return outcome

    def _until_done(
        self, outcome: Outcome, faults: deque[str], warehouse: Path, folder: Path, dice: random.Random
    ) -> None:
        """Run the command again and again until it ends well; what it keeps is never measured again."""
        kept: dict[str, int] = {}
        code = -1
        while code != 0:
            if outcome.commands == MOST_COMMANDS:
                raise Lost(f"{MOST_COMMANDS} commands did not finish")
            self._cluster.restore()
            if self._disk:
                self._disk.free()
            outcome.commands += 1
            log = folder / f"log-{outcome.commands}"
            driver = self._start(outcome.job.arguments(warehouse, self._cluster.address), log)
            scene = Scene(cluster=self._cluster, driver=driver, disk=self._disk, dice=dice)
            code = self._watch(outcome, scene, faults, warehouse)
            now = unit_times(warehouse)
            if any(now.get(name) != written for name, written in kept.items()):
                raise Lost("a unit that was kept is gone, or was measured again")
            kept = now
            require_plain(code, log.read_text(errors="replace"))

    def _watch(self, outcome: Outcome, scene: Scene, faults: deque[str], warehouse: Path) -> int:
        """The exit code of a command, which is disturbed on its way."""
        begun = time.monotonic()
        moment = Moment(scene.dice, outcome.job.num_units, begins=True)
        looked = 0.0
        first = len(outcome.rounds)
        try:
            while scene.driver.exitcode is None:
                scene.driver.join(0.02)
                if time.monotonic() - begun > COMMAND_SECONDS:
                    raise Lost(f"a command did not end in {COMMAND_SECONDS:.0f} s")
                if time.monotonic() - looked > 0.5:
                    outcome.workers |= {worker.pid for worker in self._cluster.workers()}
                    self._cluster.replace_nodes()
                    looked = time.monotonic()
                if not faults or scene.driver.exitcode is not None:
                    continue
                units = len(unit_times(warehouse))
                if moment.has_come(units) and FAULTS[faults[0]].harm(scene):
                    outcome.rounds.append(Round(fault=faults.popleft(), units=units))
                    moment = Moment(scene.dice, outcome.job.num_units, done=units)
        finally:
            for process in (scene.driver, *scene.helpers):
                process.kill()
                process.join()
        code = int(scene.driver.exitcode)
        if code and len(outcome.rounds) > first:
            cause = ENDED_BY.get(code)
            last = next((r for r in reversed(outcome.rounds) if r.fault == cause), outcome.rounds[-1])
            last.code, last.seconds = code, time.monotonic() - last.begun
        return code

    def _save(self, folder: Path, number: int, outcome: Outcome) -> None:
        """Keep the logs of a lost job, and begin the next one on a new cluster."""
        target = self._keep / f"job-{number}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        (target / "outcome.txt").write_text(f"{outcome}\n", encoding="utf-8")
        shutil.copytree(self._cluster.logs, target / "ray", ignore_dangling_symlinks=True)
        self._cluster.stop()


class Moment:
    """When a fault comes: some time after some more units are kept, or, often, while a command begins."""

    def __init__(self, dice: random.Random, num_units: int, *, done: int = 0, begins: bool = False) -> None:
        at_once = begins and dice.random() < 0.5
        self._units = 0 if at_once else done + dice.randint(0, num_units // 8)
        self._pause = dice.uniform(0, 6 if at_once else 0.3)
        self._reached: float | None = None

    def has_come(self, units: int) -> bool:
        """Whether it is now, or was."""
        if self._reached is None and units >= self._units:
            self._reached = time.monotonic()
        return self._reached is not None and time.monotonic() - self._reached >= self._pause


def require_plain(code: int, output: str) -> None:
    """A command ends well, is stopped from outside, or says once what is wrong; one that Ray ends says nothing.

    Raises:
        Lost: it ended in another way.
    """
    if code not in (0, 1, 2, 130, -signal.SIGKILL):
        raise Lost(f"a command ended with {code}")
    errors = len(re.findall("^Error: ", output, re.MULTILINE)) + output.count(": failed. ")  # the latter of runs
    if "Traceback" in output or "(raylet)" in output or not (code == 2) <= errors <= (code in (1, 2)):
        raise Lost(f"a command ended with {code} and said: {output[-200:]}")


def report(outcomes: Sequence[Outcome]) -> str:
    """A table: a line for each kind of fault, and one for each kind of job."""
    lines = [f"{'fault':20}{'rounds':>8}{'ended the command':>19}{'in at most':>12}"]
    for name in [*FAULTS, "all"]:
        of = [r for outcome in outcomes for r in outcome.rounds if name in (r.fault, "all")]
        ended = [r.seconds for r in of if r.code is not None]
        lines.append(f"{name:20}{len(of):>8}{len(ended):>19}{max(ended, default=0.0):>10.1f} s")
    lines.append(f"\n{'job':20}{'jobs':>8}{'commands':>10}{'workers':>9}{'units':>7}{'equal':>7}{'lost':>6}")
    for name in [*JOBS, "all"]:
        jobs = [outcome for outcome in outcomes if name in (outcome.job.kind, "all")]
        lost = sum(bool(outcome.lost) for outcome in jobs)
        commands, workers = sum(o.commands for o in jobs), sum(len(o.workers) for o in jobs)
        units = sum(o.job.num_units for o in jobs)
        lines.append(f"{name:20}{len(jobs):>8}{commands:>10}{workers:>9}{units:>7}{len(jobs) - lost:>7}{lost:>6}")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=[*FAULTS], metavar="FAULT", help="these alone")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[*JOBS], help="these kinds alone")
    parser.add_argument("--keep", type=Path, default=Path("chaos-logs"), help="folder for the logs of lost jobs")
    options = parser.parse_args()
    multiprocessing.set_forkserver_preload(["__main__", "avss_dist.executors.ray.executor", "transformers"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave nothing behind
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avss-chaos-")))
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        disk = stack.enter_context(SmallDisk(folder / "disk", megabytes=16)) if os.geteuid() == 0 else None
        cluster = stack.enter_context(Cluster())
        campaign = Campaign(folder, options.keep, cluster, disk, options.faults, options.jobs)
        print("undisturbed tables are there", flush=True)
        left, begun = options.rounds, time.monotonic()
        try:
            while left > 0:
                number = options.first + len(outcomes)
                outcomes.append(campaign.play(number, options.seed, left))
                left -= len(outcomes[-1].rounds)
                print(f"{time.monotonic() - begun:5.0f} s, job {number}: {outcomes[-1]}", flush=True)
        finally:
            print(report(outcomes))
    sys.exit(any(outcome.lost for outcome in outcomes))


if __name__ == "__main__":
    main()
