"""What people start clusters with, checked as far as a machine without a cloud can."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import jsonschema
import psutil
import pytest
import yaml
from support.json_files import write_json
from support.processes import wait_until
from support.rows import values_in
from support.warm_workers import ray_start_environment

from avss_dist.core.process import current_umask

CLUSTER = Path(__file__).parents[2] / "cluster"
DOCKERFILE = CLUSTER / "docker" / "Dockerfile"
SCRIPTS = sorted([*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch")])
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_UP = sorted(CLUSTER.glob("*/cluster.yaml"))
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}]}
RESOURCES = {"type": "object", "required": ["cpu", "memory"], "additionalProperties": QUANTITY}


def list_of(items: dict[str, Any], **limits: int) -> dict[str, Any]:
    """The schema of a list."""
    return {"type": "array", "items": items, **limits}


def strict(required: str, optional: str = "", **properties: Any) -> dict[str, Any]:
    """The schema of an object that has these keys and no others."""
    keys = required.split()
    known = {name: properties.get(name, {}) for name in [*keys, *optional.split()]}
    return {"type": "object", "required": keys, "properties": known, "additionalProperties": False}


VARIABLE = strict("name", "value valueFrom", value={"type": "string"})
PORT = strict("containerPort name", containerPort={"type": "integer"}, name=NAME)
CONTAINER = strict(
    "name image resources",
    "ports env volumeMounts",
    name=NAME,
    resources=strict("requests limits", requests=RESOURCES, limits=RESOURCES),
    env=list_of(VARIABLE),
    volumeMounts=list_of(strict("name mountPath", "readOnly")),
    ports=list_of(PORT),
)
NOT_ROOT = {"properties": {"runAsNonRoot": {"const": True}}, "required": ["runAsNonRoot", "runAsUser"]}
POD = strict(
    "spec",
    spec=strict(
        "containers securityContext",
        "serviceAccountName tolerations volumes",
        containers=list_of(CONTAINER, minItems=1),
        securityContext=NOT_ROOT,
    ),
)
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
WORKERS = strict(
    "groupName replicas minReplicas maxReplicas rayStartParams template",
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=STRINGS,
    template=POD,
)
RAY_CLUSTER = strict(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=strict("mode", mode={"const": "token"}),
    headGroupSpec=strict("rayStartParams template", rayStartParams=STRINGS, template=POD),
    workerGroupSpecs=list_of(WORKERS, minItems=1),
)
RAY_JOB = strict(
    "entrypoint rayClusterSpec",
    "submissionMode backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished",
    entrypoint={"type": "string", "pattern": "^avss run "},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
    backoffLimit=COUNT,
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=RAY_CLUSTER,
)
METADATA = strict("name", "labels", name=NAME, labels=STRINGS)
KINDS = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_every_folder_says_what_it_is_and_is_on_the_map() -> None:
    folders = sorted(path for path in CLUSTER.iterdir() if path.is_dir())
    assert {f.name for f in folders} >= {"kuberay", "aws", "gcp", "slurm", "docker"}
    for folder in folders:
        assert (folder / "README.md").read_text().startswith("# ")
        assert f"[{folder.name}]({folder.name})" in (CLUSTER / "README.md").read_text(), folder


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_kuberay_manifests_have_the_keys_of_their_kind(path: Path) -> None:
    """The keys are KubeRay's (ray.io/v1) that are used here; another one is a slip."""
    manifest = load(path)
    spec = KINDS[manifest["kind"]]
    version = {"const": "ray.io/v1"}
    schema = strict("apiVersion kind metadata spec", apiVersion=version, metadata=METADATA, spec=spec)
    jsonschema.validate(manifest, schema)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_kuberay_groups_agree_with_themselves(path: Path) -> None:
    spec = cluster_spec(path)
    head = spec["headGroupSpec"]
    groups = spec["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0", "no worker beside the driver"
    assert len(values_in(groups, "groupName")) == len(groups)
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert gpus_of(group) > 0
    assert gpus_of(head) == 0
    images: set[str] = set()
    for group in (head, *groups):
        pod = group["template"]["spec"]
        volumes = values_in(pod["volumes"], "name")
        images |= values_in(pod["containers"], "image")
        for container in pod["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"], "nothing is taken away later"
            assert values_in(container["volumeMounts"], "name") == volumes
            for variable in container["env"]:
                assert "TOKEN" not in variable["name"] or "value" not in variable
    assert len(images) == 1


def cluster_spec(manifest: Path) -> dict[str, Any]:
    """The specification of the Ray cluster of a manifest, or of its job."""
    spec = load(manifest)["spec"]
    return spec.get("rayClusterSpec", spec)


def gpus_of(group: dict[str, Any]) -> int:
    """The GPUs of the first container of a group of nodes."""
    first, *_ = group["template"]["spec"]["containers"]
    return first["resources"]["limits"].get("nvidia.com/gpu", 0)


def test_the_manifests_name_the_ray_of_the_image() -> None:
    (version,) = re.findall(r"^ARG RAY_VERSION=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    for path in MANIFESTS:
        assert cluster_spec(path)["rayVersion"] == version


@pytest.mark.nightly
@pytest.mark.parametrize("path", RAY_UP, ids=lambda p: p.parent.name)
def test_ray_up_takes_the_configuration(path: Path) -> None:
    """Ray's own defaults, schema and checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    assert path.parent.name == load(path)["provider"]["type"]
    config = prepare_config(load(path))
    validate_config(config)
    assert config["setup_commands"] == [], "what is in the image is not installed again, from who knows where"
    types = config["available_node_types"]
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= config["max_workers"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert start.startswith("RAY_AUTH_MODE=token ")
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert list(config["file_mounts"]) == ["/home/avss/.ray/auth_token"]


def installed(program: str) -> str | None:
    """Where a program is, of this Python's environment first."""
    return shutil.which(program, path=path_of_this_python())


def path_of_this_python() -> str:
    """The search path of programs, with the folder of this Python first."""
    folder = Path(sys.executable).parent
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(path: Path) -> None:
    """bash reads them, shellcheck has nothing to say, they stop at the first failure, and can be started."""
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = installed("shellcheck")
    assert shellcheck, "pip install -e '.[test]' has it"
    checked = subprocess.run([shellcheck, "--shell=bash", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    script = path.read_text()
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script
    assert path.stat().st_mode & stat.S_IXUSR


def test_the_recipe_of_skypilot_is_one_and_its_shell_is_sound() -> None:
    """The keys are SkyPilot's that are used here."""
    task = load(CLUSTER / "skypilot" / "job.yaml")
    schema = strict(
        "name workdir num_nodes resources envs secrets setup run",
        num_nodes={"type": "integer", "minimum": 1},
        resources=strict("accelerators use_spot disk_size"),
        envs=STRINGS,
        secrets={"type": "object", "additionalProperties": {"const": ""}},
    )
    jsonschema.validate(task, schema)
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert (CLUSTER.parent / task["envs"]["AVSS_JOB"]).is_file()


def test_the_image_is_pinned_and_runs_without_rights() -> None:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    (base,) = [rest for step, rest in steps if step == "FROM"]
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base), "a version, not 'latest'"
    users = [rest for step, rest in steps if step == "USER"]
    assert users
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    copied: list[str] = []
    runs_as_last_user = 0
    for step, rest in steps:
        if step in ("RUN", "USER"):
            assert "sudo" not in rest
        if step == "USER":
            runs_as_last_user = 0
        elif step == "RUN":
            runs_as_last_user += 1
        elif step == "COPY":
            copied += rest.split()[1:-1]
    assert runs_as_last_user == 1, "pip installs as the user"
    allowed = (CLUSTER / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    for source in copied:
        assert (CLUSTER.parent / source).exists()
        assert f"!{source}" in allowed
    assert not re.search(r"(TOKEN|SECRET|PASSWORD|KEY)\s*=", text)


def test_the_recipe_of_the_image_has_no_fault() -> None:
    hadolint = installed("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; pip install -e '.[test]' has it")
    checked = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def alone(*command: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command that sees no process but its own, so that its ``ray stop`` ends no other Ray."""
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child", *command],
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.nightly
def test_a_slurm_node_starts_ray_runs_the_job_and_stops(tiny_llama: Path, tmp_path: Path) -> None:
    """The script of a node, as the only one of its allocation: a real ``ray symmetric-run`` of a real job file."""
    if not shutil.which("unshare") or alone("true", env=dict(os.environ)).returncode:
        pytest.skip("needs unprivileged namespaces: symmetric-run ends with 'ray stop'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    warehouse = tmp_path / "warehouse"
    job = {
        "warehouse": str(warehouse),
        "models": [str(tiny_llama)],
        "corpora": ["builtin:pydoc"],
        "settings": {"max_sequences": 8, "sequence_length": 64},
    }
    job_file = tmp_path / "job.yaml"
    write_json(job_file, job)
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    env = clean | {
        "PATH": path_of_this_python(),
        "AVSS_JOB": str(job_file),
        "AVSS_HEAD": "127.0.0.1",
        "AVSS_PORT": str(port),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_worker_niceness": "0",
    }
    done = alone("bash", str(CLUSTER / "slurm" / "node.sh"), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((warehouse / "runs").rglob("*.parquet")), done.stdout + done.stderr


SCRIPT = Path(__file__).parents[2] / "cluster" / "local.sh"


class Cluster:
    """One that the script starts, in a state folder of its own."""

    def __init__(self, home: Path) -> None:
        private = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = {**private, "HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "OMP_NUM_THREADS": "1"}
        self.env["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
        self.home = home

    def script(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [SCRIPT, *map(str, arguments)]
        return subprocess.run(command, env=self.env, cwd=self.home, capture_output=True, text=True)

    def start(self, nodes: int) -> dict[str, str]:
        """What the script says to export."""
        done = self.script(nodes)
        assert done.returncode == 0, done.stderr
        exports = {}
        for line in done.stdout.splitlines():
            _export, assignment = shlex.split(line)
            name, _, value = assignment.partition("=")
            exports[name] = value
        return exports

    def processes(self) -> list[psutil.Process]:
        """All that carry this cluster's mark."""
        marked = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("AVSS_LOCAL_CLUSTER", "").startswith(str(self.home)):
                    marked.append(process)
            except psutil.Error:
                continue
        return marked


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, private_cache: Path, warm_workers: None
) -> Iterator[tuple[Cluster, dict[str, str]]]:
    """Two nodes of one CPU, and the environment of their clients. A test kills node 1."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.env |= ray_start_environment()
    exports = cluster.start(2)
    yield cluster, {**cluster.env, **exports}
    assert cluster.script("stop").returncode == 0
    assert cluster.processes() == []


@pytest.mark.nightly
def test_a_node_is_killed_once(cluster: tuple[Cluster, dict[str, str]]) -> None:
    """With all of its processes. What a run does then is tested in `executors`."""
    local, _ = cluster

    def raylets() -> int:
        return sum(process.name() == "raylet" for process in local.processes())

    before = raylets()
    assert local.script("kill-node", 1).returncode == 0
    wait_until(lambda: raylets() == before - 1)
    assert local.script("kill-node", 1).returncode == 2, "it is gone already"


def answer(url: str, token: str | None) -> int:
    """The HTTP status that the job server gives to who shows this token."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urlopen(Request(f"{url}/api/jobs/", headers=headers), timeout=30) as response:
            return response.status
    except HTTPError as error:
        return error.code


@pytest.mark.nightly
def test_who_has_no_token_or_a_wrong_one_is_refused(
    cluster: tuple[Cluster, dict[str, str]], tiny_llama: Path, tmp_path: Path, run_avss: Callable
) -> None:
    _, client = cluster
    server = client["RAY_API_SERVER_ADDRESS"]
    token = Path(client["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert answer(server, token.read_text()) == 200
    assert answer(server, None) == 401
    assert answer(server, "0" * 64) == 403

    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    for path in (wrong, tmp_path / "none"):
        env = {**client, "RAY_AUTH_TOKEN_PATH": str(path), "RAY_NUM_REDIS_GET_RETRIES": "2"}
        done = run_avss("score", tiny_llama, "--corpus", "builtin:pydoc", "-w", tmp_path / "w", env=env)
        assert done.returncode == 2, done.stderr
        assert "cannot be reached" in done.stderr, done.stderr
        assert "token" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert token.read_text() not in done.stdout + done.stderr


@pytest.mark.nightly
def test_its_processes_have_the_umask_of_who_started_it(cluster: tuple[Cluster, dict[str, str]]) -> None:
    local, _ = cluster
    masks: set[str] = set()
    for process in local.processes():
        status = Path(f"/proc/{process.pid}/status").read_text()
        masks |= set(re.findall(r"^Umask:\s*(\S+)", status, re.MULTILINE))
    assert masks == {f"{current_umask():04o}"}


@pytest.mark.nightly
def test_started_again_it_says_the_same_and_never_becomes_another(cluster: tuple[Cluster, dict[str, str]]) -> None:
    local, client = cluster
    again = local.start(2)
    assert again.items() <= client.items()
    other = local.script(3)
    assert other.returncode == 2
    assert "local.sh stop" in other.stderr


@pytest.mark.nightly
def test_stop_ends_one_cluster_and_no_other(cluster: tuple[Cluster, dict[str, str]], tmp_path: Path) -> None:
    _, client = cluster
    other = Cluster(tmp_path)
    exports = other.start(1)
    started = other.processes()
    names = {process.name() for process in started}
    assert "raylet" in names
    assert "gcs_server" in names
    state = tmp_path / "state/avss_dist/cluster"
    temp = Path((state / "temp").read_text().strip())
    assert status_of(exports) == 200
    assert other.script("stop").returncode == 0
    assert other.processes() == []
    assert not temp.exists()
    assert not state.exists()
    assert other.script("stop").returncode == 0, "stopping nothing is no mistake"
    assert status_of(client) == 200


def status_of(client: dict[str, str]) -> int:
    """The HTTP status that a job server gives to a client in this environment."""
    token = Path(client["RAY_AUTH_TOKEN_PATH"])
    return answer(client["RAY_API_SERVER_ADDRESS"], token.read_text())


@pytest.mark.parametrize("arguments", [(), (0,), ("three",), (3, "--cpus"), ("kill-node",), ("kill-node", 0), (999,)])
def test_a_mistake_starts_nothing(arguments: tuple[object, ...], tmp_path: Path) -> None:
    local = Cluster(tmp_path)
    done = local.script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert not done.stdout
    assert local.processes() == []
    assert list(tmp_path.iterdir()) == []
