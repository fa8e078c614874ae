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


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number or a file."""
    found = {name: installed_version(name) for name in PACKAGES}
    return {"python": python_version()} | {name: seen for name, seen in found.items() if seen}
