"""Run llama.cpp's ``convert_hf_to_gguf.py`` for one checkpoint after another: ``llama_cpp_driver.py FOLDER``.

FOLDER has the converter. Standard input has a line ``["checkpoint", "file.gguf"]`` for each file to write, and standard
output a line with the converter's exit code. What the converter prints is in ``file.gguf.log``.

The program takes seconds to import, so that it is imported once. Each file is written by a process of its own, as the
converter's classes keep what they have read of a model.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from typing import Any


def without_tokenizer(model_class: Any) -> Any:
    """Return a class of the converter that writes no tokenizer: it knows those of published models only."""

    def set_vocab(self: Any) -> None:
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    return type(model_class.__name__, (model_class,), {"set_vocab": set_vocab, "model_arch": model_class.model_arch})


def convert(converter: Any, checkpoint: str, file: str) -> None:
    """Run the converter in this process, which ends with its exit code.

    Args:
        converter: the module ``convert_hf_to_gguf``.
    """
    log = os.open(f"{file}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outtype", "f32", "--outfile", file]
    converter.main()


def main(folder: str) -> None:
    """Convert until standard input ends."""
    sys.path.insert(0, folder)
    converter = importlib.import_module("convert_hf_to_gguf")
    class_of = converter.get_model_class
    converter.get_model_class = lambda *names, **options: without_tokenizer(class_of(*names, **options))
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        process = context.Process(target=convert, args=(converter, *json.loads(line)))
        process.start()
        process.join()
        print(json.dumps(process.exitcode), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
