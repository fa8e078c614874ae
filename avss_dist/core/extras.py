"""Optional parts of the installation, and what to type where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from avss_dist.core.errors import ConfigError

EXTRAS: dict[str, tuple[str, ...]] = {
    "run": (
        *("torch", "transformers", "accelerate", "deepspeed", "ray", "numba", "greenlet", "psutil"),
        *("huggingface_hub", "safetensors", "tokenizers", "tqdm", "fsspec", "requests", "grpc"),
    ),
    "gguf": ("gguf",),
    "lora": ("peft",),
    "eval": ("lm_eval",),
    "hf": ("datasets",),
    "quantization": ("compressed_tensors",),
}
"""Modules of other packages by the extra that installs them. Without extras, the package reads warehouses."""


def install_hint(module: str) -> str:
    """Return the command that installs a module."""
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    return f"pip install 'avss_dist[{extra}]'" if extra else f"pip install {module}"


def require_package(module: str, what: str) -> None:
    """Raise ConfigError if a module is not installed.

    Args:
        what: what needs it, as the subject of a sentence: "`train` lora".
    """
    if find_spec(module) is None:
        raise _needs(what, module)


def not_installed(error: ModuleNotFoundError, what: str) -> ConfigError | None:
    """Return the error to show if an import failed because an extra is not installed, or None for any other module.

    Args:
        what: see `require_package`.
    """
    module = (error.name or "").partition(".")[0]
    if any(module in modules for modules in EXTRAS.values()):
        return _needs(what, module)
    return None


def _needs(what: str, module: str) -> ConfigError:
    return ConfigError(f"{what} needs {module}, which is not installed.", install_hint(module))
