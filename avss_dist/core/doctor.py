"""Checks of this machine, run in other processes so that no import and no crash affects this one."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from platform import platform, python_version

import numpy as np

from avss_dist.core.extras import install_hint
from avss_dist.core.files import cache_folder
from avss_dist.core.process import PACKAGES, installed_version
from avss_dist.core.text import describe_bytes

OPTIONAL = {
    "datasets": "datasets",
    "lm_eval": "lm_eval",
    "gguf": "gguf",
    "compressed-tensors": "compressed_tensors",
    "peft": "peft",
}
"""Modules of optional packages."""
NEEDED = (*[name for name in PACKAGES if name not in OPTIONAL], "duckdb", "altair", "vl-convert-python")
CHECK_TIMEOUT_SECONDS = 180.0
LEAST_SHARED_BYTES = 1 << 30  # a container has 64 MiB by default

Check = Callable[[], str]


@dataclass(frozen=True)
class CheckResult:
    """Result of a check.

    Attributes:
        what: name of the check.
        works: whether it succeeded.
        detail: a version, a size, or the error.
    """

    what: str
    works: bool
    detail: str


def check_machine() -> Iterator[CheckResult]:
    """Run all checks and yield their results, in a fixed order, as soon as each is known."""
    yield CheckResult("Python", True, f"{python_version()} on {platform()}, {len(os.sched_getaffinity(0))} CPUs")
    for name in NEEDED:
        version = installed_version(name)
        yield CheckResult(name, version is not None, version or f"not installed: {install_hint(name)}")
    for name, module in OPTIONAL.items():
        yield CheckResult(name, True, installed_version(name) or f"not installed: {install_hint(module)}")
    yield _try("cache folder", _cache_folder)
    yield _try("shared memory", _shared_memory)
    with ThreadPoolExecutor(len(CHECKS)) as threads:
        for group in [threads.submit(run_checks, checks) for checks in CHECKS]:
            yield from group.result()


def run_checks(checks: Mapping[str, Check], timeout_seconds: float = CHECK_TIMEOUT_SECONDS) -> list[CheckResult]:
    """Run checks one after the other in another process, and in a new one after a check that ended it."""
    pending = list(checks.items())
    results: list[CheckResult] = []
    while pending:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_silence) as pool:
            process = pool.submit(os.getpid).result()
            try:
                while pending:
                    what, check = pending.pop(0)
                    results.append(pool.submit(_try, what, check).result(timeout_seconds))
            except TimeoutError:
                _kill(process)
                results.append(CheckResult(what, False, f"no answer in {timeout_seconds:g} seconds"))
            except BrokenProcessPool:
                results.append(CheckResult(what, False, "the process that tried it died"))
    return results


def _kill(pid: int) -> None:
    """Kill a process, and its descendants if psutil is installed, as it is wherever Ray can start any."""
    try:
        import psutil
    except ModuleNotFoundError:
        os.kill(pid, signal.SIGKILL)
        return
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(pid)
        for process in (*worker.children(recursive=True), worker):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _silence() -> None:
    """Discard what libraries print."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _try(what: str, check: Check) -> CheckResult:
    try:
        return CheckResult(what, True, check())
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        return CheckResult(what, False, f"needs {module}: {install_hint(module)}")
    except (Exception, SystemExit) as error:
        return CheckResult(what, False, f"{type(error).__name__}: {str(error).strip()}".splitlines()[0])


# The checks. Packages are imported by name, as this module must import neither heavy ones nor those of a higher layer.


def _cache_folder() -> str:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return str(folder)


def _shared_memory() -> str:
    size = shutil.disk_usage("/dev/shm").total
    text = describe_bytes(size)
    if size < LEAST_SHARED_BYTES:
        text += "; Ray and NCCL need more: for a container, docker run --shm-size=8g"
    return text


def _bfloat16() -> str:
    torch = import_module("torch")
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    if float((x @ x).sum()) != 64**3:
        raise ArithmeticError("a product of matrices is wrong")
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "yes"
    return "yes, emulated: on this CPU, --dtype float32 is several times faster"


def _cuda_devices() -> str:
    cuda = import_module("torch").cuda
    names = []
    for index in range(cuda.device_count()):
        device = cuda.get_device_properties(index)
        names.append(f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not names:
        return "none: models run on the CPU"
    return "; ".join(names)


def _backends() -> str:
    distributed = import_module("torch.distributed")
    available = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    return ", ".join(name for name, is_available in available.items() if is_available)


def _deepspeed() -> str:
    accelerator = "cuda" if import_module("torch").cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    return f"yes, {import_module('deepspeed').__version__}"


def _kernels() -> str:
    counts = np.zeros(65536, np.int64)
    patterns = np.full((3, 5), 7, np.uint16)
    import_module("avss_dist.measure.kernels.cpu").count_patterns(patterns, np.full(3, True), counts)
    if counts[7] != patterns.size:
        raise ArithmeticError("a count is wrong")
    return "yes"


def _cuda_kernels() -> str:
    torch = import_module("torch")
    if not torch.cuda.is_available():
        return "not tried: there is no GPU"
    reference = import_module("avss_dist.measure.kernels.reference")
    x = torch.full((2, 3, 256), 7, dtype=torch.bfloat16, device="cuda")
    kernels = import_module("avss_dist.measure.kernels").kernels_for(x.device)
    into = reference.Accumulator(x, np.ones(1), units=True, geometry=True)
    kernels.add(into, x, torch.ones(2, 3, dtype=torch.bool, device="cuda"), x)
    kernels.finish()
    stats = reference.to_stats({name: t.cpu().numpy() for name, t in into.tensors.items()}, x.dtype, np.ones(1))
    if (stats.count, stats.mean, stats.cosine_sum) != (1536, 7.0, 6.0):
        raise ArithmeticError("a count is wrong")
    if type(kernels).__name__ == "CudaKernels":
        return "yes"
    return "no: torch counts, which is slower"


def _ray() -> str:
    ray = import_module("ray")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return f"yes, {ray.get(ray.remote(lambda: ray.__version__).remote())}"
    finally:
        ray.shutdown()


def _pictures() -> str:
    spec = {"data": {"values": [{"a": 1}]}, "mark": "point", "encoding": {"x": {"field": "a"}}}
    picture = import_module("vl_convert").vegalite_to_png(spec)
    return f"yes, {len(picture)} bytes of PNG"


CHECKS: tuple[Mapping[str, Check], ...] = (  # those of a group share a process; groups run at the same time
    {
        "torch computes bfloat16": _bfloat16,
        "CUDA devices": _cuda_devices,
        "CUDA kernels compile": _cuda_kernels,
        "torch.distributed": _backends,
        "DeepSpeed imports": _deepspeed,
    },
    {"CPU kernels compile": _kernels, "pictures": _pictures},
    {"Ray starts a worker": _ray},
)
