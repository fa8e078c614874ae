"""Versions of packages that can change a number or a file."""

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
    "gguf",
    "compressed-tensors",
    "lm_eval",
)


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can change a number or a file."""
    versions = {name: installed_version(name) for name in PACKAGES}
    return {"python": python_version()} | {name: number for name, number in versions.items() if number}
