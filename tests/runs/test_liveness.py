"""An address is tried before Ray is, which would retry for minutes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.command_line import avss, in_one_line
from support.processes import wait_until
from support.ray_cluster import Cluster, children
from support.warm_workers import own_workers, ray_start_environment

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.partition.execution import Execution
from avss_dist.runs.ray import cluster
from avss_dist.runs.ray.executor import RayExecutor


@pytest.mark.parametrize("hangs_up", [False, True])
def test_who_listens_and_does_not_speak_grpc_is_not_waited_for(hangs_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.2", 0)) as server:

        def hang_up() -> None:
            client, _ = server.accept()
            client.recv(100)
            client.close()

        if hangs_up:
            threading.Thread(target=hang_up, daemon=True).start()
        address = f"127.0.0.2:{server.getsockname()[1]}"
        executor = RayExecutor(Execution(executor="ray", address=address), Settings())
        with pytest.raises(
            ConfigError, match=f"Ray at {address} cannot be reached: it did not answer as a gRPC server"
        ):
            _ = executor.devices
        executor.close()


AVSS = "from avss_dist.__main__ import main; main()"


def score(model: Path, out: Path, executor: str, *options: str, forked: bool = False) -> subprocess.Popen[str]:
    """Start the command in a process that imports what it needs, or is forked; workers of its Ray are forked."""
    program = ["-m", "avss_dist"] if forked else ["-c", AVSS]
    command = ["score", model, "--corpus", "builtin:pydoc", "-w", out, "--executor", executor, *options]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, command)],
        env={**os.environ, **ray_start_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_a_raylet_that_dies_while_devices_are_counted_ends_a_command(tiny_llama: Path, tmp_path: Path) -> None:
    """A worker counts them; it is stopped, so that it is still at it."""
    with own_workers(), Cluster(nodes=1) as cluster:
        driver = score(tiny_llama, tmp_path, "ray", "--address", cluster.address)
        (node,) = cluster.nodes
        counting: list[psutil.Process] = []

        def begun() -> bool:
            counting[:] = children(node, "ray::devices_here") + children(node, "ray::_devices")
            return bool(counting) or driver.poll() is not None

        wait_until(begun)
        counting[0].suspend()
        (raylet,) = cluster.services("raylet")
        raylet.kill()
        printed, said = driver.communicate()
        with suppress(psutil.NoSuchProcess):
            counting[0].kill()
    assert driver.returncode == 1, said
    assert printed == "", said
    ours = [line for line in said.splitlines() if "core_worker.cc" not in line]  # Ray's library may say something first
    assert not ours or re.match("Error: The Ray node of this process has died", ours[0]), said
    assert len(ours) <= 2
    assert "Traceback" not in said


DEAF = """
import sys, time
from avss_dist.cli.program import interrupt_again

class Deaf:
    def __del__(self):
        raise KeyboardInterrupt if sys.argv[1] == "ctrl-c" else ValueError("a bug")

sys.unraisablehook = interrupt_again
try:
    Deaf()
    time.sleep(2 if sys.argv[1] == "bug" else 600)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(("what", "printed"), [("ctrl-c", "interrupted"), ("bug", "")])
def test_ctrl_c_is_not_lost_where_nothing_can_be_raised(what: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", DEAF, what], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == printed
    assert ("ValueError: a bug" in done.stderr) == (what == "bug")
    assert "KeyboardInterrupt" not in done.stderr


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize("executor", ["ray", "local"])
def test_ctrl_c_that_goes_on_and_on_ends_a_command_in_order(executor: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Every 20 ms, from the first shard on: no traceback."""
    many = ["--max-sequences", "800", "--sequence-length", "64", "--sequences-per-shard", "4"]
    driver = score(tiny_llama, tmp_path, executor, *many)
    wait_until(lambda: list((tmp_path / "shard_stats").rglob("*.parquet")) or driver.poll() is not None)
    ended: Any = threading.Thread(target=driver.wait)
    ended.start()
    while ended.is_alive():
        driver.send_signal(signal.SIGINT)
        time.sleep(0.02)
    printed, said = driver.communicate()
    assert driver.returncode == 130, said
    assert printed == "", said
    assert said.count("Stopped") == said.count("kept; run the same command again to finish.") == 1
    assert "Traceback" not in said
    assert "Error" not in said
    assert "Exception" not in said


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_a_terminated_command_says_what_is_kept_and_the_run_is_listed(tiny_llama: Path, tmp_path: Path) -> None:
    """SIGTERM, as a cluster stops a job: no stack trace. `test_ray` stops a driver of workers."""
    many = ["--max-sequences", "800", "--sequence-length", "64", "--sequences-per-shard", "4"]
    driver = score(tiny_llama, tmp_path, "local", *many, forked=True)
    shard_stats = tmp_path / "shard_stats"
    wait_until(lambda: len([*shard_stats.rglob("*.parquet")]) >= 2 or driver.poll() is not None)
    driver.send_signal(signal.SIGTERM)
    printed, said = driver.communicate()
    kept_shards = len([*shard_stats.rglob("*.parquet")])
    assert driver.returncode == 143, said
    assert printed == "", said
    stopped = re.fullmatch(
        r"Stopped, (\d+) of 200 shards are kept; run the same command again to finish\.", said.splitlines()[-1]
    )
    assert stopped, said
    # Workers may have written more since the last message.
    assert 2 <= int(stopped[1]) <= kept_shards, said
    assert "***" not in said
    assert "Traceback" not in said
    assert "Error" not in said
    listed = avss("ls", "-w", tmp_path)
    assert listed.exit_code == 0
    assert f"unfinished, {kept_shards} of 200 shards" in in_one_line(listed.stdout)
    row = json.loads(avss("ls", "-w", tmp_path, "--format", "json").stdout)
    assert row["status"] == "unfinished"
    assert row["kept_shards"] == kept_shards
    assert row["num_shards"] == 200
    assert row["model"] == str(tiny_llama)
    assert row["corpus"] == "builtin:pydoc"
    shown = avss("show", "-w", tmp_path)
    assert shown.exit_code == 2
    assert f"has no finished run yet.\n1 run has begun: avss ls -w {tmp_path}" in shown.stderr
