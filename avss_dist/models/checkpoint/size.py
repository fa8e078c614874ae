"""Size of a checkpoint and cost of a forward pass, known before any weight is read.

Names, shapes and ties of the parameters follow from the configuration alone: the model is built on the meta device. The
headers of the weight files add dtypes and sizes. From the hub, only these are fetched.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.process import bound
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import candidate_layers, compute_dtype, skeleton, text_config, without_head
from avss_dist.models.checkpoint.locate import Checkpoint, find_checkpoint, stored_tensors
from avss_dist.models.checkpoint.quantization import can_unpack, packed, quantization_method, unpacking_bytes
from avss_dist.models.checkpoint.safetensors import TensorInfo
from avss_dist.models.structure.head import LOGIT_BYTES

T = TypeVar("T")
_SKELETONS: ContextVar[dict[Any, Any] | None] = ContextVar("skeletons", default=None)
_EXPERT = re.compile(r"(^|\.)experts(\.|$)")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Size of a checkpoint in memory, and the dimensions from which the cost of a forward pass follows.

    All bytes are in the compute dtype.

    Attributes:
        num_parameters: parameters of the loaded model; tied ones count once.
        weight_bytes: bytes of the whole model with its language-model head, as the partition ``single`` holds it.
        layer_bytes: bytes of each transformer layer, in order.
        other_bytes: bytes of the embeddings and norms outside of the layers, without an untied language-model head.
        module_bytes: bytes of each layer and of each other module that is not divided, in the order of the model.
        num_layers, hidden_size: number of layers, and units of the residual stream.
        dtype: the compute dtype.
        attention: the attention implementation, as transformers names it.
        num_heads, attention_width: attention heads, and units of the queries of all heads together.
        attention_layers: number of layers with full attention, quadratic in the number of tokens.
        matmul_parameters: parameters that each token is multiplied by; only the routed experts of a token count.
        mlp_width: units of an MLP's intermediate results that exist at once.
        vocabulary: number of logits of a token.
        expert_bytes: bytes of the routed experts of the largest layer; 0 if it has none.
        embedding_bytes: bytes of the table of token embeddings, of which only the rows of occurring tokens are read.
        cache_bytes: bytes of keys and values for each token, by layer.
        quantized: whether the loaded weights stay quantized.
        can_unpack: whether they could be unpacked.
        unpacking_bytes: bytes that unpacking a quantized weight takes beside the weights; 0 if none is unpacked.
        stored_share: bytes of the weights in their files, in multiples of ``weight_bytes``; 1 if none is unpacked.
    """

    num_parameters: int
    weight_bytes: int
    layer_bytes: tuple[int, ...]
    other_bytes: int
    module_bytes: tuple[int, ...]
    num_layers: int
    hidden_size: int
    dtype: str
    attention: str
    num_heads: int
    attention_width: int
    attention_layers: int
    matmul_parameters: int
    mlp_width: int
    vocabulary: int = 0
    expert_bytes: int = 0
    embedding_bytes: int = 0
    cache_bytes: tuple[int, ...] = ()
    quantized: bool = False
    can_unpack: bool = True
    unpacking_bytes: int = 0
    stored_share: float = 1.0

    @property
    def element_bytes(self) -> int:
        """Number of bytes of one activation."""
        return getattr(torch, self.dtype).itemsize

    def hidden_bytes(self, rows: int, tokens: int) -> int:
        """Return the bytes of the hidden states between two layers."""
        return rows * tokens * self.hidden_size * self.element_bytes

    def activation_bytes(self, rows: int, tokens: int, *, head: bool = False) -> int:
        """Return the peak bytes of activations in a forward pass over one batch, including observed tensors.

        Args:
            head: include the logits that exist at once.
        """
        logits = min(rows * tokens * self.vocabulary * 4, LOGIT_BYTES) if head else 0
        width = 4 * self.hidden_size  # the layer's input, its normed copy, the sublayer's output, the update
        scores = 0
        if self.attention == "eager":  # two copies exist at once, beside one in float32; with others there is none
            scores = rows * self.num_heads * tokens * tokens * (2 * self.element_bytes + 4)
        attention = rows * tokens * (width + 6 * self.attention_width) * self.element_bytes + scores
        return logits + max(attention, rows * tokens * (width + self.mlp_width) * self.element_bytes)

    def forward_flops(self, rows: int, tokens: int) -> int:
        """Return the floating-point operations of the layers in a forward pass, two for each multiply-add."""
        attention = 4 * self.attention_layers * self.attention_width * tokens
        return rows * tokens * (2 * self.matmul_parameters + attention)


def footprint(checkpoint: Checkpoint | str, settings: Settings) -> Footprint:
    """Return the size of a checkpoint, from its configuration and the headers of its weight files alone.

    Args:
        checkpoint: a resolved checkpoint, or a hub id, folder or ``.gguf`` file as a user names it.
        settings: give the compute dtype, the attention implementation and the layer list.

    Raises:
        ModelError: the checkpoint does not exist, or cannot be read or built.
    """
    resolved = (
        find_checkpoint(checkpoint, trust_remote_code=settings.trust_remote_code)
        if isinstance(checkpoint, str)
        else checkpoint
    )
    model, tensors = load_skeleton(resolved, settings)
    loaded = stored_skeleton(resolved, model, settings)
    text, method = model.config.get_text_config(), quantization_method(model.config)
    dtype = compute_dtype(resolved, model.config, settings, tensors)
    quantized = _stays_quantized(resolved, model, settings)
    layers, loaded_layers = find_layers(model, settings), find_layers(loaded, settings)
    stored, size = sum(tensor.size for tensor in tensors), _bytes(loaded)
    if quantized and loaded is model and not stored:
        raise ModelError(
            f"'{resolved.name}' is quantized ({method}), and its configuration alone does not tell the size of its "
            "weights.",
            "Name the checkpoint on the hub, or a folder with its *.safetensors.",
        )
    scale = stored / size if quantized and stored else 1.0
    layer_bytes = tuple(int(_bytes(layer) * scale) for layer in loaded_layers)
    experts = [p for name, p in max(loaded_layers, key=_bytes).named_parameters() if _is_expert(name)]
    unpacking: dict[str, Any] = {}
    if resolved.gguf or (method and settings.dequantize):
        parts = [(unpacking_bytes(p), 0) for p in layers.parameters()]
        if resolved.gguf:  # whose embeddings are quantized, too, and unpacked before there is a layer
            parts += [(unpacking_bytes(p), max(map(_bytes, layers))) for p in model.parameters()]
        if tensors:
            share = stored / _bytes(model)
        else:  # from the configuration alone
            as_stored = stored_skeleton(resolved, model, replace(settings, dequantize=False))
            share = _bytes(find_layers(as_stored, settings)) / _bytes(layers)
        unpacking = {"unpacking_bytes": max(size - beside for size, beside in parts), "stored_share": share}
    heads = _number(text, "num_attention_heads")
    width = heads * _number(text, "head_dim") or (_number(text, "hidden_size") if heads else 0)
    chosen = _chosen_experts(text)
    embeddings = token_embeddings(model)
    undivided = _undivided(loaded, {*loaded_layers}, set())
    attention_layers = [_attends(layer) for layer in layers]
    cache_bytes = []
    for index, attends in enumerate(attention_layers):
        cache_bytes.append(_cache_bytes(text, index, attends, dtype.itemsize))
    return Footprint(
        num_parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=int(size * scale),
        layer_bytes=layer_bytes,
        expert_bytes=int(parameter_bytes(experts) * scale),
        module_bytes=tuple(int(size * scale) for size in undivided),
        other_bytes=int(_bytes(without_head(loaded)) * scale) - sum(layer_bytes),
        quantized=quantized,
        can_unpack=not quantized or can_unpack(resolved, model.config),
        num_layers=len(layers),
        hidden_size=int(getattr(text, "hidden_size", 0) or 0),
        dtype=str(dtype).removeprefix("torch."),
        attention=str(getattr(text, "_attn_implementation", None) or "eager"),
        num_heads=heads,
        attention_width=width,
        attention_layers=sum(attention_layers) if width else 0,
        matmul_parameters=_matmul_parameters(layers, chosen),
        mlp_width=max(_mlp_width(layer, chosen) for layer in layers),
        vocabulary=_number(text, "vocab_size"),
        embedding_bytes=_bytes(embeddings) if embeddings else 0,
        cache_bytes=tuple(cache_bytes),
        **unpacking,
    )


def _matmul_parameters(layers: Iterable[nn.Module], chosen: float) -> int:
    """Return the number of weights of linear maps that a token meets in all layers.

    Args:
        chosen: share of the experts that a token is sent to.
    """
    number = 0
    for layer in layers:
        for name, _, size in _maps(layer):
            number += int(size * chosen) if _is_expert(name) else size
    return number


def _is_expert(name: str) -> bool:
    """Whether a parameter, by its name, is in a module of experts."""
    return bool(_EXPERT.search(name.rpartition(".")[0]))


def _undivided(module: nn.Module, layers: Collection[nn.Module], counted: set[nn.Parameter]) -> Iterator[int]:
    """Yield the bytes of each layer, and of each other module without children, in order.

    Args:
        counted: parameters that count no more, because they are tied to earlier ones.
    """
    children = [] if module in layers else list(module.children())
    own = {*module.parameters(recurse=not children)} - counted
    counted |= own
    if own:
        yield parameter_bytes(own)
    for child in children:
        yield from _undivided(child, layers, counted)


def _stays_quantized(checkpoint: Checkpoint, model: Any, settings: Settings) -> bool:
    """Whether the loaded weights stay quantized.

    A .gguf file is always unpacked.
    """
    return quantization_method(model.config) is not None and not checkpoint.gguf and not settings.dequantize


def load_skeleton(checkpoint: Checkpoint, settings: Settings) -> tuple[Any, Sequence[TensorInfo]]:
    """Return a checkpoint's model on the meta device in the compute dtype, and the tensors that its headers list.

    Raises:
        ModelError: see `footprint`.
    """

    def build() -> tuple[Any, Sequence[TensorInfo]]:
        tensors, config = stored_tensors(checkpoint), text_config(checkpoint)
        return skeleton(config, settings, compute_dtype(checkpoint, config, settings, tensors)), tensors

    return _shared(("skeleton", checkpoint, settings), build)


@contextmanager
def sharing_skeletons() -> Iterator[None]:
    """Build each skeleton once inside the outermost of these contexts. None may be changed there."""
    built = _SKELETONS.get()
    with bound(_SKELETONS, {} if built is None else built):
        yield


def _shared(key: Any, build: Callable[[], T]) -> T:
    """Return the value of a function, or that of an earlier call with this key in `sharing_skeletons`."""
    built = _SKELETONS.get()
    if built is None:
        return build()
    if key not in built:
        built[key] = build()
    return built[key]


def stored_skeleton(checkpoint: Checkpoint, model: Any, settings: Settings) -> Any:
    """Return the model of `load_skeleton` with parameters of the size in which a device holds them.

    Weights that stay quantized are bytes, of the layouts that `quantization.packed` knows.
    """
    if not _stays_quantized(checkpoint, model, settings):
        return model
    return (
        _shared(("packed", checkpoint, settings), lambda: packed(checkpoint, model.config, copy.deepcopy(model)))
        or model
    )


def find_layers(model: Any, settings: Settings) -> nn.ModuleList:
    """Return the layer list of a model, the first candidate if there are several.

    The model may be a skeleton.

    Raises:
        ModelError: the model has no module list of blocks.
    """
    return next(iter(candidate_layers(model, settings.layers).values()))


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of parameters together."""
    return sum(p.numel() * p.element_size() for p in parameters)


def _bytes(module: nn.Module) -> int:
    return parameter_bytes(module.parameters())


def token_embeddings(model: Any) -> nn.Module | None:
    """Return the module of the token embeddings, or None if transformers does not know it."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _number(config: Any, *names: str, layer: int | None = None) -> int:
    """Return the first of these attributes that is a positive integer, or 0.

    Args:
        layer: index of the layer in attributes that have a number for each layer. None takes the largest of these.
    """
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers' own, where layers differ
            value = [getattr(layer_config, name, None) for layer_config in config.per_layer_config]
        if isinstance(value, (list, tuple)):
            by_layer = value if layer is None else value[layer : layer + 1]
            value = max((number for number in by_layer if isinstance(number, int)), default=0)
        if isinstance(value, int) and value:
            return value
    return 0


def _cache_bytes(config: Any, layer: int, attends: bool, itemsize: int) -> int:
    """Return the bytes of a layer's key-value cache for each token, 0 for a recurrent layer of constant state."""
    kinds = getattr(config, "layer_types", None) or ()
    kind = str(kinds[layer]) if layer < len(kinds) else "attention"
    if not attends or "attention" not in kind or "linear" in kind:
        return 0
    number = partial(_number, config, layer=layer)
    if latent := number("kv_lora_rank"):
        return (latent + number("qk_rope_head_dim")) * itemsize
    heads = number("num_attention_heads")
    width = number("head_dim") or (number("hidden_size") // heads if heads else 0)
    return 2 * (number("num_key_value_heads") or heads) * width * itemsize


def _attends(layer: nn.Module) -> bool:
    return any(_ATTENTION.search(name.rpartition(".")[2]) for name, _ in layer.named_modules())


def _chosen_experts(config: Any) -> float:
    """Return the share of a layer's experts that a token is routed to, 1 without experts."""
    experts = _number(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k")
    return min(1.0, chosen / experts) if experts and chosen else 1.0


def _maps(layer: nn.Module) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield (name, shape, elements) of every weight of a layer that multiplies hidden states."""
    for name, parameter in layer.named_parameters():
        leaf = name.rpartition(".")[2]
        if (leaf == "weight" and parameter.dim() in (2, 3)) or (parameter.dim() == 3 and _EXPERT.search(name)):
            yield name, tuple(parameter.shape), parameter.numel()


def _mlp_width(layer: nn.Module, chosen: float) -> int:
    """Return the larger dimension of every linear map outside of attention, summed.

    Experts count by their share.
    """
    width = 0.0
    for name, shape, _ in _maps(layer):
        if _is_expert(name):
            width += max(shape[-2:]) * chosen * (shape[0] if len(shape) == 3 else 1)
        elif not _ATTENTION.search(name.rpartition(".")[0]):
            width += max(shape)
    return int(width)
