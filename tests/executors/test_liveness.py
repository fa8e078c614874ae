"""An address is tried before Ray is, which would retry for minutes."""

from __future__ import annotations

import socket
import threading

import pytest

from avss_dist.errors import ConfigError
from avss_dist.executors.ray import liveness
from avss_dist.executors.ray.executor import RayExecutor
from avss_dist.settings import Execution, Settings


@pytest.mark.parametrize(("hangs_up", "says"), [(False, "timed out"), (True, "closed without an answer")])
def test_who_listens_and_does_not_speak_grpc_is_not_waited_for(
    hangs_up: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.2", 0)) as server:

        def hang_up() -> None:
            client, _ = server.accept()
            client.recv(100)
            client.close()

        if hangs_up:
            threading.Thread(target=hang_up, daemon=True).start()
        address = f"127.0.0.2:{server.getsockname()[1]}"
        executor = RayExecutor(Execution(executor="ray", address=address), Settings())
        with pytest.raises(ConfigError, match=f"Ray at {address} cannot be reached: .*{says}"):
            executor.reach()
        executor.close()
