"""The faults of a campaign: what each of them does to a command that runs on a cluster."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from support.disks import SmallDisk
from support.processes import wait_until
from support.ray_cluster import Cluster, children

GANGS = ("fsdp", "zero3", "tensor_parallel")
ALONE = ("score", "ablate", "experiment")


@dataclass(kw_only=True)
class Scene:
    """What a fault may harm.

    Attributes:
        driver: the process of the command.
        disk: where its warehouse is.
        helpers: processes that go on until the command has ended.
    """

    cluster: Cluster
    driver: Any
    disk: SmallDisk | None
    dice: random.Random
    helpers: list[Any] = field(default_factory=list)


Harm = Callable[[Scene], bool]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault: whom it harms, False where nobody is there yet; and the jobs that it suits.

    Attributes:
        weight: how often it comes, compared with others.
    """

    harm: Harm
    jobs: Sequence[str] = (*ALONE, *GANGS)
    weight: int = 2


def _signal(processes: Sequence[Any], number: signal.Signals, dice: random.Random) -> bool:
    if not processes:
        return False
    try:
        os.kill(dice.choice(processes).pid, number)
    except ProcessLookupError:
        return False
    return True


def _kill_service(scene: Scene, name: str) -> bool:
    """Kill one, and wait until it is gone: what restores the cluster must not take it for alive."""
    before = len(scene.cluster.services(name))
    killed = _signal(scene.cluster.services(name), signal.SIGKILL, scene.dice)
    wait_until(lambda: not killed or len(scene.cluster.services(name)) < before)
    return killed


def kill_worker(scene: Scene) -> bool:
    return _signal(scene.cluster.workers(), signal.SIGKILL, scene.dice)


def freeze_worker(scene: Scene) -> bool:
    return _signal(scene.cluster.workers(), signal.SIGSTOP, scene.dice)


def kill_rank(scene: Scene) -> bool:
    """One of a gang, when all are there."""
    return len(scene.cluster.workers()) > 1 and kill_worker(scene)


def kill_node(scene: Scene) -> bool:
    """Not the driver's."""
    if others := scene.cluster.nodes[1:]:
        scene.cluster.kill_node(scene.dice.choice(others))
    return bool(others)


def drain_node(scene: Scene) -> bool:
    """Notice of preemption for a node that is not the driver's, and that has none yet."""
    others = [node for node in scene.cluster.nodes[1:] if node.node_id not in scene.cluster.draining()]
    if others:
        scene.cluster.drain(scene.dice.choice(others))
    return bool(others)


def kill_raylet(scene: Scene) -> bool:
    """Of any node, the driver's too."""
    return _kill_service(scene, "raylet")


def kill_agent(scene: Scene) -> bool:
    """A dashboard agent of any node, the driver's too."""
    agents = [agent for node in scene.cluster.nodes for agent in children(node, "ray::DashboardAgent")]
    return _signal(agents, signal.SIGKILL, scene.dice)


def kill_gcs(scene: Scene) -> bool:
    return _kill_service(scene, "gcs_server")


def kill_driver(scene: Scene) -> bool:
    return _signal([scene.driver], signal.SIGKILL, scene.dice)


def interrupt_driver(scene: Scene) -> bool:
    """Ctrl-C."""
    return _signal([scene.driver], signal.SIGINT, scene.dice)


def fill_disk(scene: Scene) -> bool:
    assert scene.disk is not None
    scene.disk.fill()
    return True


def fill_object_stores(scene: Scene) -> bool:
    """Of the driver's node and of another one, with objects that cannot be moved to a disk."""
    if not scene.cluster.has_head:
        return False
    context: Any = multiprocessing.get_context("forkserver")
    full = context.Event()
    helper = context.Process(target=_hold_objects, args=(scene.cluster.address, full), daemon=True)
    helper.start()
    scene.helpers.append(helper)
    full.wait(60)
    return True


def _hold_objects(address: str, full: Any) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    holder = ray.remote(_Holder).options(num_cpus=0, scheduling_strategy="SPREAD").remote()
    here = _Holder()
    here.fill()
    ray.get(holder.fill.remote())
    full.set()
    signal.pause()


class _Holder:
    def fill(self) -> None:
        import numpy as np
        import ray

        block = np.zeros(4_000_000, np.uint8)
        self._references = [ray.put(block) for _ in range(19)]
        self._views = ray.get(self._references)


FAULTS = {
    "worker killed": Fault(harm=kill_worker, jobs=ALONE, weight=3),
    "worker frozen": Fault(harm=freeze_worker, jobs=("score", "experiment", *GANGS)),
    "rank killed": Fault(harm=kill_rank, jobs=GANGS, weight=6),
    "node killed": Fault(harm=kill_node),
    "node drained": Fault(harm=drain_node),
    "raylet killed": Fault(harm=kill_raylet),
    "agent killed": Fault(harm=kill_agent),
    "GCS killed": Fault(harm=kill_gcs),
    "driver killed": Fault(harm=kill_driver),
    "driver interrupted": Fault(harm=interrupt_driver),
    "disk full": Fault(harm=fill_disk),
    "object stores full": Fault(harm=fill_object_stores, weight=1),
}
