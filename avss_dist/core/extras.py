"""Optional parts of the installation, and what to type where one is missing."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from avss_dist.core.errors import ConfigError
from avss_dist.core.values import JsonObject

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
PATH_MEANING = "where PATH is a clone of the repository or a wheel built from it"


def install_hint(module: str) -> str:
    """Return the command that installs a module into this environment."""
    for extra, modules in EXTRAS.items():
        if module in modules:
            return package_hint(f"[{extra}]")
    return f"{pip_command()} install {module}"


def package_hint(extra: str = "") -> str:
    """Return the command that installs this package again, from where it was installed.

    No index has the package: pip recorded the folder, the wheel or the address that it was installed from.

    Args:
        extra: an extra in brackets that the command adds.
    """
    pip = f"{pip_command()} install"
    origin = _origin()
    if origin is None:
        return f"{pip} 'PATH{extra}', {PATH_MEANING}"
    url = str(origin["url"])
    if urlsplit(url).scheme != "file":
        if "vcs_info" in origin:
            url = _repository(url, origin["vcs_info"])
        return f"{pip} {shlex.quote(f'avss_dist{extra} @ {url}')}"
    path = url2pathname(urlsplit(url).path)
    if not Path(path).exists():
        return f"{pip} 'PATH{extra}', {PATH_MEANING} ({path} is no longer there)"
    if origin.get("dir_info", {}).get("editable"):
        pip += " -e"
    return f"{pip} {shlex.quote(f'{path}{extra}')}"


def pip_command() -> str:
    """Return the words that start the pip of this environment, which is another one's where it is not activated."""
    script = shutil.which("pip")
    if script and Path(script).parent == Path(sys.prefix, "bin"):
        return "pip"
    return f"{shlex.quote(sys.executable)} -m pip"


def _origin() -> JsonObject | None:
    """Return what pip recorded of the origin of this package (PEP 610), or the clone that is imported, if known."""
    from importlib.metadata import PackageNotFoundError, distribution  # takes a tenth of the time of a help

    try:
        recorded = distribution("avss_dist").read_text("direct_url.json")
    except PackageNotFoundError:
        recorded = None
    if recorded:
        return json.loads(recorded)
    folder = Path(__file__).parents[2]
    if (folder / "pyproject.toml").is_file():
        return {"url": folder.as_uri(), "dir_info": {}}
    return None


def _repository(url: str, recorded: JsonObject) -> str:
    """Return the address of a repository as pip takes it, at the branch, tag or commit that was installed."""
    revision = recorded.get("requested_revision")
    address = f"{recorded['vcs']}+{url}"
    if revision:
        address += f"@{revision}"
    return address


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
