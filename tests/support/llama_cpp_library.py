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
