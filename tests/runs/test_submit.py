"""Jobs of many checkpoints on real Ray clusters, with token authentication; `test_job_server` has the refusals."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
import ray
from support.checkpoints import llama, one_thread
from support.processes import ray_processes, wait_until
from support.ray_cluster import Cluster as RayCluster
from support.s3_server import Server
from support.tables import assert_same_tables, run_rows
from support.texts import sentences
from support.warm_workers import own_workers, ray_start_environment

import avss_dist
from avss_dist.core.devices import devices_here
from avss_dist.core.process import UMASK
from avss_dist.runs.events import RunEnded, RunEvent, RunReading
from avss_dist.runs.job_file import read_job
from avss_dist.runs.ray.executor import RayExecutor
from avss_dist.runs.scoring import run_job
from avss_dist.warehouse.reader import Warehouse

LOCAL_CLUSTER = Path(__file__).parents[2] / "cluster" / "local.sh"
SETTINGS = {"max_sequences": 48, "sequence_length": 64, "batch_size": 2, "sequences_per_shard": 8}
Avss = Callable[..., "subprocess.CompletedProcess[str]"]


def start_cluster(state: Path, **environment: str) -> dict[str, str]:
    """A cluster of one node that starts with this environment; what its users export."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    started = subprocess.run(
        [LOCAL_CLUSTER, "1", "--cpus", "2"],
        env={**ours, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(state), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert started.returncode == 0, started.stderr
    return dict(re.findall(r"export (\w+)='?([^'\n]+)'?", started.stdout))


def stop_cluster(state: Path) -> None:
    subprocess.run([LOCAL_CLUSTER, "stop"], env={**os.environ, "XDG_STATE_HOME": str(state)}, check=True)


PLANTED = {name: f"planted-{name}" for name in ("HF_TOKEN", "HF_HUB_TOKEN", "WANDB_API_KEY")}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def cluster(server: Server, warm_workers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Its processes know keys, and where an object store is."""
    state = tmp_path_factory.mktemp("state")
    where = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "AWS_REGION": "us-east-1"}
    yield start_cluster(state, **PLANTED, **where, **ray_start_environment(), AWS_EC2_METADATA_DISABLED="true")
    stop_cluster(state)


@pytest.fixture(scope="module")
def run_avss(run_avss: Avss, warm_workers: None) -> Avss:
    """It need not import everything each time."""
    return lambda *args, env=None, **options: run_avss(*args, env={**ray_start_environment(), **(env or {})}, **options)


@pytest.fixture(scope="module")
def models(save_checkpoint: Callable[[Any, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("training")
    return [save_checkpoint(llama(seed), folder / f"step-{seed}") for seed in (1, 2)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def job_file(folder: Path, models: list[Any], corpus: str = "builtin:pydoc") -> str:
    lines = [f"warehouse: {folder}/w", f"corpora: [{corpus}]", "models:", *(f"- {m}" for m in models)]
    lines += ["settings:", *(f"  {name}: {value}" for name, value in SETTINGS.items())]
    Path("job.yaml").write_text("\n".join(lines))
    return "job.yaml"


def refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    for part in says:
        assert part in done.stderr


def assert_same_as_alone(folder: Path, models: list[Path], corpus: str = "builtin:pydoc") -> None:
    """Compare the tables of a job with what `avss score` makes of each model, one after the other in one process."""
    alone = folder / "alone"
    with one_thread():
        for model in models:
            avss_dist.score(model, corpus=corpus, warehouse=alone, executor="local", **SETTINGS)
    assert_same_tables(folder / "w", alone)


@pytest.mark.nightly
def test_a_submitted_job_gives_the_tables_of_one_by_one(
    cluster: dict[str, str], models: list[Path], run_avss: Avss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text beside the working directory travels with it. A model that does not exist fails alone."""
    text = tmp_path / "mine.txt"
    text.write_text("In the beginning was the word, and the word was with the tokenizer. " * 200)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    job = job_file(tmp_path, [*models, "/absent"], corpus="../mine.txt")
    done = run_avss("jobs", "submit", job, "--follow", "--replicas", "1", env=cluster)
    assert done.returncode == 1, done.stderr
    assert "3 runs: 2 done, 1 failed." in done.stdout
    assert "There is no folder '/absent'" in done.stdout
    assert re.search(r"\d of 3 runs: .*step-1 done", done.stdout)
    assert_same_as_alone(tmp_path, models, str(text))
    assert {row["status"] for row in run_rows(tmp_path / "w")} == {"done", "failed"}

    job = job_file(tmp_path, models, corpus="../mine.txt")
    again = run_avss("jobs", "submit", job, env=cluster)
    assert again.returncode == 0
    job_id = again.stdout.strip()
    assert re.fullmatch(r"avss-job-[0-9a-f]{6}", job_id)
    followed = run_avss("jobs", "logs", job_id, "--follow", env=cluster)
    assert followed.returncode == 0
    assert "2 runs: 2 skipped." in followed.stdout
    assert "2 runs: 2 skipped." in run_avss("jobs", "logs", job_id, env=cluster).stdout
    listed = run_avss("jobs", "list", env=cluster).stdout
    assert listed.count("avss-job-") == 2
    assert "SUCCEEDED" in listed
    assert "FAILED" in listed
    stopped = run_avss("jobs", "stop", job_id, env=cluster)
    assert stopped.returncode == 0
    assert stopped.stdout == f"{job_id}: it has ended already (succeeded).\n"
    refused(run_avss("jobs", "stop", "avss-expired-000000", env=cluster), "has no job 'avss-expired-000000'")


@pytest.mark.nightly
def test_a_submitted_watch_gives_the_tables_of_one_by_one(
    cluster: dict[str, str], models: list[Path], run_avss: Avss, tmp_path: Path
) -> None:
    job = job_file(tmp_path, [models[0].parent / "step-*"])
    watch = ["--watch", "--until", "2", "--watch-seconds", "1"]
    done = run_avss("jobs", "submit", job, "--follow", "--replicas", "1", *watch, env=cluster)
    assert done.returncode == 0, done.stderr
    assert "2 runs: 2 done." in done.stdout
    assert_same_as_alone(tmp_path, models)


@pytest.mark.nightly
def test_the_files_of_a_job_have_the_rights_that_its_user_gives(
    cluster: dict[str, str], models: list[Path], run_avss: Avss, tmp_path: Path
) -> None:
    """Also those that workers write, whatever umask the cluster was started with."""
    env = {**cluster, UMASK: "027"}  # `run_avss` forks the command from a process with another umask
    done = run_avss("jobs", "submit", job_file(tmp_path, models[:1]), "--follow", env=env)
    assert done.returncode == 0, done.stderr
    warehouse = tmp_path / "w"
    paths = [warehouse, *warehouse.rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o750}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o640}


@pytest.mark.nightly
def test_a_job_is_stopped_and_goes_on_when_it_is_submitted_again(
    cluster: dict[str, str], models: list[Path], run_avss: Avss, tmp_path: Path
) -> None:
    job = job_file(tmp_path, models[:1])
    text = (tmp_path / job).read_text().replace("max_sequences: 48", "max_sequences: 320")
    (tmp_path / job).write_text(text.replace("sequences_per_shard: 8", "sequences_per_shard: 2"))
    job_id = run_avss("jobs", "submit", job, env=cluster).stdout.strip()
    warehouse = tmp_path / "w"
    partials = warehouse / "shard_stats"
    wait_until(lambda: len(list(partials.rglob("*.parquet"))) >= 3)
    for worker in ray_processes():
        worker.send_signal(signal.SIGSTOP)  # or it may have ended before it is stopped
    stopped = run_avss("jobs", "stop", job_id, env=cluster)
    assert stopped.returncode == 0
    assert stopped.stdout == f"{job_id}: stopped.\n"
    followed = run_avss("jobs", "logs", job_id, "--follow", env=cluster)
    kept_shards = len(list(partials.rglob("*.parquet")))
    assert followed.returncode == 1
    assert "***" not in followed.stdout
    assert "Traceback" not in followed.stdout
    assert f"Stopped, {kept_shards} of 160 shards are kept; run the same command again to finish." in followed.stdout
    assert kept_shards >= 3
    assert not list((warehouse / "runs").rglob("*.parquet"))
    (run,) = run_job(read_job(job), executor="local")
    assert run.status == "done"
    assert run.num_shards == 160
    assert run.resumed_shards == kept_shards


@pytest.mark.nightly
def test_a_job_tells_no_key_and_no_token(
    cluster: dict[str, str], server: Server, models: list[Path], run_avss: Avss, tmp_path: Path
) -> None:
    """Neither in its log nor in what the job server remembers, of a job that is done and of one that fails.

    Nor in its warehouse, of an experiment whose texts all have keys.
    """
    for seed, name in enumerate("abc"):
        server.client.put_object(Bucket="lab", Key=f"{name}.txt", Body="\n".join(sentences(300, seed=seed)).encode())
    told = []
    with server.asking_for_keys():
        user = f"s3://{server.key}:{quote(server.secret, safe='')}@lab"
        experiment = {
            "tasks": [f"perplexity:{user}/b.txt"],
            "random": 1,
            "repairs": ["channel"],
            "repair_corpora": [f"{user}/c.txt"],
            "max_sequences": 4,
        }
        for name, says in (("a.txt", "Leaving out the last"), ("absent.txt", "s3://lab/absent.txt: no such file")):
            job = job_file(tmp_path, models[:1], corpus=f'"{user}/{name}"')
            with Path(job).open("a") as file:
                file.write(f"\nexperiment: {json.dumps(experiment)}\n")
            done = run_avss("jobs", "submit", job, "--follow", env={**cluster, **PLANTED})
            assert says in done.stdout, done.stderr
            (job_id,) = set(re.findall(r"avss-job-[0-9a-f]{6}", done.stderr))
            told += [done.stdout, done.stderr]
            for command in (["logs", job_id], ["logs", job_id, "--follow"], ["list"], ["list", job_id]):
                shown = run_avss("jobs", *command, env=cluster)
                told += [shown.stdout, shown.stderr]
    token = Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    url = f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    with urlopen(Request(url, headers={"Authorization": f"Bearer {token}"})) as response:
        told.append(response.read().decode())
    assert job_id in told[-1]
    written = {path: path.read_bytes() for path in (tmp_path / "w").rglob("*") if path.is_file()}
    assert any("experiments" in path.parts for path in written)
    for secret in (server.key, server.secret, quote(server.secret, safe=""), token, *PLANTED.values()):
        assert not any(secret in text for text in told), secret
        assert not [path for path, data in written.items() if secret.encode() in data]


@pytest.mark.nightly
def test_workers_without_the_package_are_told_of(
    models: list[Path], run_avss: Avss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster's Python cannot import avss_dist, as in an image that lacks it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'avss_dist':\n"
        "            raise ModuleNotFoundError(f\"No module named '{name}'\", name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        cluster = RayCluster(nodes=1)
        with own_workers():
            cluster.restore()
    try:
        done = run_avss("run", job_file(tmp_path, models), "--replicas", "2", "--address", cluster.address)
        refused(done, "The cluster's workers cannot import avss_dist", "Install this version in the image")
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def whole_machine(warm_workers: None) -> Iterator[None]:
    """One private Ray whose CPUs one replica can fill."""
    cpus = devices_here("cpu").cpus
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.nightly
@pytest.mark.usefixtures("whole_machine")
def test_a_sweep_gives_the_tables_of_one_by_one_with_two_processes(
    models: list[Path], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not exist and one that cannot be opened are recorded; the workers outlive them."""
    broken = shutil.copytree(models[0], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-400])
    hired: list[Any] = []
    hire = RayExecutor._new_gang
    monkeypatch.setattr(RayExecutor, "_new_gang", lambda *args: hired.append(args) or hire(*args))
    events: list[RunEvent] = []
    every = [models[0], tmp_path / "absent", models[1], broken, tiny_bert]
    runs = run_job(read_job(job_file(tmp_path, every)), on_event=events.append, executor="ray", replicas=2)
    assert [run.status for run in runs] == ["done", "failed", "done", "failed", "done"]
    assert [run.model for run in runs] == [str(model) for model in every]
    assert_same_as_alone(tmp_path, [*models, tiny_bert])
    assert len(hired) == 2
    failed = Warehouse(tmp_path / "w").sql("SELECT model, error FROM runs WHERE status = 'failed'").to_pylist()
    errors = {Path(row["model"]).name: row["error"] for row in failed}
    assert "There is no folder" in errors["absent"]
    assert "are damaged" in errors["broken"]
    order = [(type(event), event.name) for event in events if isinstance(event, (RunReading, RunEnded))]
    assert order.index((RunReading, str(models[1]))) < order.index((RunEnded, str(models[0])))
    again = run_job(read_job(job_file(tmp_path, models)), executor="ray", replicas=2)
    assert [run.status for run in again] == ["skipped"] * 2
