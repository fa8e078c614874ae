"""Weight files of a checkpoint's folder, found without torch."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from avss_dist.core.errors import ModelError

WEIGHTS = "*.safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads: the single file, or those of the index.

    Raises:
        ModelError: the index cannot be read, or names a file outside of the folder.
    """
    single = folder / SINGLE
    index = folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob(WEIGHTS))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            _require_inside(index, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"no {error}"
        raise ModelError(f"{index} cannot be read: {reason}.", "Download or copy it again.") from error
    return [folder / name for name in names]


def _require_inside(index: Path, name: str) -> None:
    """Refuse a file outside of the folder of an index.

    Raises:
        ModelError: the path of the file is absolute, or goes up.
    """
    file = PurePosixPath(name)
    if file.is_absolute() or ".." in file.parts:
        raise ModelError(
            f"{index} names the file '{name}', which is outside of its folder.",
            "Put all weights into the folder, and name them by their paths in it.",
        )
