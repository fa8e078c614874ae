"""llama.cpp's own library behind the interface of ``llama-server``: the predictions are those of llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.inference_servers import InferenceServer

BATCH = 512


class LlamaCppLibrary(InferenceServer):
    """A server of the kind llama.cpp that computes with libllama. Like the original, it keeps what it has computed.

    Args:
        file: a .gguf file.
        context: most tokens of a prompt.
        tokenizer: tokenizer of texts, if the file has none.
    """

    def __init__(self, file: Path, context: int, tokenizer: Any = None) -> None:
        from llama_cpp_py_sync import Llama

        self.llama: Any = Llama(str(file), n_ctx=context, n_batch=BATCH, n_threads=2)
        super().__init__("llama.cpp", self.llama, tokenizer, limit=context)
        self.sizes = {"n_embd": self.llama.n_embd, "n_vocab": self.llama.n_vocab}
        self._computed: list[int] = []

    def _parameters(self) -> int:
        return int(self.llama.get_model_n_params())

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is not None:
            return super()._encode(text)
        return list(self.llama.tokenize(text, add_special=True, parse_special=True))

    def _text(self, token: int) -> str:
        if self.tokenizer is not None:
            return super()._text(token)
        return str(self.llama.token_to_piece(token))

    def logs(self, ids: list[int]) -> torch.Tensor:
        """Return the log-probabilities of the token after the last one, float32[1, vocabulary]."""
        with self.lock:
            known = len(self._computed)
            if ids[:known] != self._computed or known == len(ids):
                self.llama._clear_context_state()
                known = 0
            self.llama._eval_tokens(ids[known:], known)
            self._computed = list(ids)
            library = self.llama._lib
            interface = self.llama._ffi
            pointer = library.llama_get_logits_ith(self.llama._ctx, -1)
            values = np.frombuffer(interface.buffer(pointer, 4 * self.llama.n_vocab), np.float32).copy()
        return torch.from_numpy(values).log_softmax(dim=-1)[None]


def logits_of(file: Path, rows: torch.Tensor) -> torch.Tensor:
    """Return the logits of every position, float32[rows, positions, vocabulary], computed with a cache of float32.

    Args:
        file: a .gguf file.
        rows: token ids, int64[rows, positions].
    """
    from llama_cpp_py_sync import Llama

    positions = rows.shape[1]
    options = {"n_ctx": positions, "n_batch": positions, "n_threads": 1, "flash_attn_type": 0}
    with Llama(str(file), **options, type_k="f32", type_v="f32") as llama:
        logits = [_decode(llama, row) for row in rows.tolist()]
    return torch.from_numpy(np.stack(logits))


def _decode(llama: Any, row: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the logits of every position of a row."""
    library = llama._lib
    batch = library.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for position, token in enumerate(row):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    llama._clear_context_state()
    status = library.llama_decode(llama._ctx, batch)
    library.llama_batch_free(batch)
    if status != 0:
        raise RuntimeError(f"llama_decode has failed with {status}.")
    buffer = llama._ffi.buffer(library.llama_get_logits(llama._ctx), 4 * llama.n_vocab * len(row))
    return np.frombuffer(buffer, np.float32).reshape(len(row), llama.n_vocab).copy()
