"""Versions of what can change a number or a file."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from platform import python_version

PACKAGES = (
    "avss_dist",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "ray",
    "numpy",
    "pyarrow",
    "numba",
    "lm_eval",
)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number or a file."""
    versions = {"python": python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
