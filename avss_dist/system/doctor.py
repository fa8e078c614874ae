"""What works on this machine, found out by trying it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from platform import platform, python_version

PACKAGES = (
    *("avss_dist", "torch", "transformers", "accelerate", "deepspeed", "ray", "numba", "numpy", "pyarrow", "duckdb"),
    *("altair", "vl-convert-python", "datasets"),
)
Finding = tuple[str, bool, str]

_CHECKS = {
    "torch computes bfloat16": """
import torch
x = torch.ones(64, 64, dtype=torch.bfloat16)
print(float((x @ x).sum()) == 64**3 and f"yes, {torch.get_num_threads()} threads")
""",
    "CUDA devices": """
import torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print("; ".join(f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices) or "none: models run on the CPU")
""",
    "CPU kernels compile": """
import numpy as np
from avss_dist.kernels import loops
total = np.zeros(65536, np.int64)
loops.flush_patterns(np.full(65536, 7, np.uint32), total)
assert (total == 7).all()
print("yes")
""",
    "Ray starts a worker": """
import logging, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
print(f"yes, {ray.get(ray.remote(lambda: ray.__version__).remote())}")
ray.shutdown()
""",
    "DeepSpeed imports": """
import os
os.environ.setdefault("DS_ACCELERATOR", "cuda" if __import__("torch").cuda.is_available() else "cpu")
import deepspeed
print(f"yes, {deepspeed.__version__}")
""",
    "torch.distributed": """
import torch.distributed as d
print(", ".join(name for name, there in (("gloo", d.is_gloo_available()), ("nccl", d.is_nccl_available())) if there))
""",
    "pictures": """
import vl_convert
spec = {"data": {"values": [{"a": 1}]}, "mark": "point", "encoding": {"x": {"field": "a"}}}
print(f"yes, {len(vl_convert.vegalite_to_png(spec))} bytes of PNG")
""",
}


def findings() -> Iterator[Finding]:
    """(what, whether it works, what was seen), one after the other as they are found."""
    yield "Python", True, f"{python_version()} on {platform()}, {len(os.sched_getaffinity(0))} CPUs"
    for name in PACKAGES:
        try:
            yield name, True, version(name)
        except PackageNotFoundError:
            yield (
                name,
                name == "datasets",
                "not installed" + (" (only hf: sources need it)" if name == "datasets" else ""),
            )
    for what, code in _CHECKS.items():
        yield what, *_try(code)


def _try(code: str) -> tuple[bool, str]:
    """Run a check in a process of its own, so that no import or crash reaches this one."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        return False, "no answer in 180 seconds"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"
