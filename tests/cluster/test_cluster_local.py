"""``cluster/local.sh``: separate raylets, a token that is asked for, nodes that are killed, and nothing left behind."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
from support.processes import wait_until
from support.warm_workers import ray_start_environment

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
        return dict(shlex.split(line)[1].split("=", 1) for line in done.stdout.splitlines())

    def processes(self) -> list[psutil.Process]:
        """All that carry this cluster's mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("AVSS_LOCAL_CLUSTER", "").startswith(str(self.home)):
                    found.append(process)
            except psutil.Error:
                continue
        return found


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
    server, token = client["RAY_API_SERVER_ADDRESS"], Path(client["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert [answer(server, t) for t in (token.read_text(), None, "0" * 64)] == [200, 401, 403]

    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    for path in (wrong, tmp_path / "none"):
        env = {**client, "RAY_AUTH_TOKEN_PATH": str(path), "RAY_NUM_REDIS_GET_RETRIES": "2"}
        done = run_avss("score", tiny_llama, "--corpus", "builtin:pydoc", "-w", tmp_path / "w", env=env)
        assert done.returncode == 2 and "cannot be reached" in done.stderr and "token" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and token.read_text() not in done.stdout + done.stderr


@pytest.mark.nightly
def test_started_again_it_says_the_same_and_never_becomes_another(cluster: tuple[Cluster, dict[str, str]]) -> None:
    local, client = cluster
    again = local.start(2)
    assert again.items() <= client.items()
    other = local.script(3)
    assert other.returncode == 2 and "local.sh stop" in other.stderr


@pytest.mark.nightly
def test_stop_ends_one_cluster_and_no_other(cluster: tuple[Cluster, dict[str, str]], tmp_path: Path) -> None:
    _, client = cluster
    other = Cluster(tmp_path)
    exports = other.start(1)
    started = other.processes()
    assert {"raylet", "gcs_server"} <= {process.name() for process in started}
    temp = Path((tmp_path / "state/avss_dist/cluster/temp").read_text().strip())
    assert answer(exports["RAY_API_SERVER_ADDRESS"], Path(exports["RAY_AUTH_TOKEN_PATH"]).read_text()) == 200
    assert other.script("stop").returncode == 0
    assert other.processes() == []
    assert not temp.exists() and not (tmp_path / "state/avss_dist/cluster").exists()
    assert other.script("stop").returncode == 0, "stopping nothing is no mistake"
    assert answer(client["RAY_API_SERVER_ADDRESS"], Path(client["RAY_AUTH_TOKEN_PATH"]).read_text()) == 200


@pytest.mark.parametrize("arguments", [(), (0,), ("three",), (3, "--cpus"), ("kill-node",), ("kill-node", 0), (999,)])
def test_a_mistake_starts_nothing(arguments: tuple[object, ...], tmp_path: Path) -> None:
    local = Cluster(tmp_path)
    done = local.script(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and not done.stdout
    assert local.processes() == [] and list(tmp_path.iterdir()) == []
