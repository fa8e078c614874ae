"""Size of a checkpoint and cost of a forward pass, known before any weight is read.

Names, shapes and ties of the parameters follow from the configuration alone: the model is built on the meta device. The
headers of the weight files add dtypes and sizes. From the hub, only these are fetched.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.process import bound
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import (
    attention_implementation,
    candidate_layers,
    compute_dtype,
    dtype_name,
    hidden_size,
    skeleton,
    text_config,
    without_head,
)
from avss_dist.models.checkpoint.locate import Checkpoint, find_checkpoint, stored_tensors
from avss_dist.models.checkpoint.quantization import can_unpack, packed, quantization_method, unpacking_bytes
from avss_dist.models.checkpoint.safetensors import TensorInfo
from avss_dist.models.structure.head import FLOAT32_BYTES, LOGIT_BYTES
from avss_dist.models.structure.layers import count_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")
_SKELETONS: ContextVar[dict[Hashable, Any] | None] = ContextVar("skeletons", default=None)
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
        positions = rows * tokens
        # The layer's input, its normed copy, the sublayer's output and the update exist at once.
        width = 4 * self.hidden_size
        attention = positions * (width + 6 * self.attention_width) * self.element_bytes
        if self.attention == "eager":
            # Two copies of the scores exist at once, beside one in float32. Other implementations have none.
            score_bytes = 2 * self.element_bytes + FLOAT32_BYTES
            attention += self.num_heads * positions * tokens * score_bytes
        mlp = positions * (width + self.mlp_width) * self.element_bytes
        activations = max(attention, mlp)
        if head:
            activations += min(positions * self.vocabulary * FLOAT32_BYTES, LOGIT_BYTES)
        return activations

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
    if isinstance(checkpoint, str):
        checkpoint = find_checkpoint(checkpoint, trust_remote_code=settings.trust_remote_code)
    model, tensors = load_skeleton(checkpoint, settings)
    loaded = stored_skeleton(checkpoint, model, settings)
    dtype = compute_dtype(checkpoint, model.config, settings, tensors)
    stored = sum(tensor.size for tensor in tensors)
    quantized = _stays_quantized(checkpoint, model, settings)
    if quantized and loaded is model and stored == 0:
        raise ModelError(
            f"'{checkpoint.name}' is quantized ({quantization_method(model.config)}), and its configuration alone does "
            "not tell the size of its weights.",
            "Name the checkpoint on the hub, or a folder with its *.safetensors.",
        )
    scale = 1.0
    if quantized and stored:
        scale = stored / _bytes(loaded)
    sizes = _weight_sizes(loaded, find_layers(loaded, settings), scale)
    unpacking = _unpacking(checkpoint, model, stored, settings)
    unpacks = not quantized or can_unpack(checkpoint, model.config)

    layers = find_layers(model, settings)
    text = model.config.get_text_config()
    heads = _number(text, "num_attention_heads")
    attention_width = heads * _number(text, "head_dim")
    if attention_width == 0 and heads:
        attention_width = _number(text, "hidden_size")
    attention_layers = 0
    cache_bytes = []
    for index, layer in enumerate(layers):
        attends = _attends(layer)
        if attends and attention_width:
            attention_layers += 1
        cache_bytes.append(_cache_bytes(text, index, attends, dtype.itemsize))
    embeddings = token_embeddings(model)
    embedding_bytes = _bytes(embeddings) if embeddings else 0
    vocabulary = _number(text, "vocab_size")
    chosen = _chosen_experts(text)
    matmul_parameters = _matmul_parameters(layers, chosen)
    mlp_width = max(_mlp_width(layer, chosen) for layer in layers)
    num_parameters = count_parameters(model)
    num_layers = len(layers)
    attention = attention_implementation(text)
    return Footprint(
        num_parameters=num_parameters,
        weight_bytes=sizes.whole,
        layer_bytes=sizes.layers,
        expert_bytes=sizes.experts,
        module_bytes=sizes.modules,
        other_bytes=sizes.others,
        quantized=quantized,
        can_unpack=unpacks,
        unpacking_bytes=unpacking.extra_bytes,
        stored_share=unpacking.stored_share,
        num_layers=num_layers,
        hidden_size=hidden_size(text),
        dtype=dtype_name(dtype),
        attention=attention,
        num_heads=heads,
        attention_width=attention_width,
        attention_layers=attention_layers,
        matmul_parameters=matmul_parameters,
        mlp_width=mlp_width,
        vocabulary=vocabulary,
        embedding_bytes=embedding_bytes,
        cache_bytes=tuple(cache_bytes),
    )


@dataclass(frozen=True)
class _WeightSizes:
    """Bytes of the weights of a model.

    Attributes:
        whole: all weights.
        layers: weights of each layer.
        experts: routed experts of the largest layer.
        modules: weights of each layer and of each other module without children, in order.
        others: weights outside of the layers, without the head.
    """

    whole: int
    layers: tuple[int, ...]
    experts: int
    modules: tuple[int, ...]
    others: int


def _weight_sizes(model: PreTrainedModel, layers: nn.ModuleList, scale: float) -> _WeightSizes:
    """Return the sizes of the weights of a model.

    Args:
        scale: bytes of the stored weights, in multiples of those of the model.
    """
    layer_bytes = tuple(int(_bytes(layer) * scale) for layer in layers)
    largest = max(layers, key=_bytes)
    experts = [parameter for name, parameter in largest.named_parameters() if _is_expert(name)]
    modules = _undivided(model, set(layers), set())
    return _WeightSizes(
        whole=int(_bytes(model) * scale),
        layers=layer_bytes,
        experts=int(parameter_bytes(experts) * scale),
        modules=tuple(int(size * scale) for size in modules),
        others=int(_bytes(without_head(model)) * scale) - sum(layer_bytes),
    )


@dataclass(frozen=True)
class _Unpacking:
    """Cost of unpacking quantized weights.

    Attributes:
        extra_bytes: largest number of bytes beside the weights.
        stored_share: bytes of the weights in their files, in multiples of those in memory.
    """

    extra_bytes: int = 0
    stored_share: float = 1.0


def _unpacking(checkpoint: Checkpoint, model: PreTrainedModel, stored: int, settings: Settings) -> _Unpacking:
    """Return the cost of unpacking the weights of a checkpoint, which is none if they are not unpacked.

    Args:
        model: the model of `load_skeleton`.
        stored: bytes of the weights in their files; 0 if the files are not known.
    """
    is_dequantized = bool(quantization_method(model.config)) and settings.dequantize
    if not checkpoint.gguf and not is_dequantized:
        return _Unpacking()
    layers = find_layers(model, settings)
    extra = max(unpacking_bytes(parameter) for parameter in layers.parameters())
    if checkpoint.gguf:
        # Its embeddings are quantized, too, and unpacked before there is a layer.
        largest_layer = max(_bytes(layer) for layer in layers)
        largest = max(unpacking_bytes(parameter) for parameter in model.parameters())
        extra = max(extra, largest - largest_layer)
    if stored:
        return _Unpacking(extra, stored / _bytes(model))
    # The configuration alone tells how layers are stored.
    as_stored = stored_skeleton(checkpoint, model, replace(settings, dequantize=False))
    return _Unpacking(extra, _bytes(find_layers(as_stored, settings)) / _bytes(layers))


def _matmul_parameters(layers: Iterable[nn.Module], chosen: float) -> int:
    """Return the number of weights of linear maps that a token meets in all layers.

    Args:
        chosen: share of the experts that a token is sent to.
    """
    number = 0
    for layer in layers:
        for weight in _maps(layer):
            if _is_expert(weight.name):
                number += int(weight.elements * chosen)
            else:
                number += weight.elements
    return number


def _is_expert(name: str) -> bool:
    """Whether a parameter, by its name, is in a module of experts."""
    return bool(_EXPERT.search(name.rpartition(".")[0]))


def _undivided(module: nn.Module, layers: Collection[nn.Module], counted: set[nn.Parameter]) -> Iterator[int]:
    """Yield the bytes of each layer, and of each other module without children, in order.

    Args:
        counted: parameters that count no more, because they are tied to earlier ones.
    """
    children: list[nn.Module] = []
    if module not in layers:
        children = list(module.children())
    own = set(module.parameters(recurse=not children)) - counted
    counted |= own
    if own:
        yield parameter_bytes(own)
    for child in children:
        yield from _undivided(child, layers, counted)


def _stays_quantized(checkpoint: Checkpoint, model: PreTrainedModel, settings: Settings) -> bool:
    """Whether the loaded weights stay quantized.

    A .gguf file is always unpacked.
    """
    return quantization_method(model.config) is not None and not checkpoint.gguf and not settings.dequantize


def load_skeleton(checkpoint: Checkpoint, settings: Settings) -> tuple[PreTrainedModel, Sequence[TensorInfo]]:
    """Return a checkpoint's model on the meta device in the compute dtype, and the tensors that its headers list.

    Raises:
        ModelError: see `footprint`.
    """

    def build() -> tuple[PreTrainedModel, Sequence[TensorInfo]]:
        tensors = stored_tensors(checkpoint)
        config = text_config(checkpoint)
        dtype = compute_dtype(checkpoint, config, settings, tensors)
        return skeleton(config, settings, dtype), tensors

    return _shared(("skeleton", checkpoint, settings), build)


@contextmanager
def sharing_skeletons() -> Iterator[None]:
    """Build each skeleton once inside the outermost of these contexts. None may be changed there."""
    built = _SKELETONS.get()
    with bound(_SKELETONS, {} if built is None else built):
        yield


def _shared(key: Hashable, build: Callable[[], T]) -> T:
    """Return the value of a function, or that of an earlier call with this key in `sharing_skeletons`."""
    built = _SKELETONS.get()
    if built is None:
        return build()
    if key not in built:
        built[key] = build()
    return built[key]


def stored_skeleton(checkpoint: Checkpoint, model: PreTrainedModel, settings: Settings) -> PreTrainedModel:
    """Return the model of `load_skeleton` with parameters of the size in which a device holds them.

    Weights that stay quantized are bytes, of the layouts that `quantization.packed` knows.
    """
    if not _stays_quantized(checkpoint, model, settings):
        return model

    def build() -> PreTrainedModel | None:
        return packed(checkpoint, model.config, copy.deepcopy(model))

    quantized = _shared(("packed", checkpoint, settings), build)
    if quantized is None:
        return model
    return quantized


def find_layers(model: PreTrainedModel, settings: Settings) -> nn.ModuleList:
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


def token_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return the module of the token embeddings, or None if transformers does not know it."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _number(config: PreTrainedConfig, *names: str, layer: int | None = None) -> int:
    """Return the first of these attributes that is a positive integer, or 0.

    Args:
        layer: index of the layer in attributes that have a number for each layer. None takes the largest of these.
    """
    for name in names:
        value = _attribute(config, name)
        if isinstance(value, (list, tuple)):
            by_layer = value if layer is None else value[layer : layer + 1]
            value = max((number for number in by_layer if isinstance(number, int)), default=0)
        if isinstance(value, int) and value:
            return value
    return 0


def _attribute(config: PreTrainedConfig, name: str) -> object:
    """Return an attribute of a configuration, a list of those of its layers if they differ, or None."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of transformers, where layers differ
        return [getattr(layer_config, name, None) for layer_config in config.per_layer_config]


def _cache_bytes(config: PreTrainedConfig, layer: int, attends: bool, itemsize: int) -> int:
    """Return the bytes of a layer's key-value cache for each token, 0 for a recurrent layer of constant state."""
    kinds = getattr(config, "layer_types", None) or ()
    kind = "attention"
    if layer < len(kinds):
        kind = str(kinds[layer])
    if not attends or "attention" not in kind or "linear" in kind:
        return 0
    if latent := _number(config, "kv_lora_rank", layer=layer):
        return (latent + _number(config, "qk_rope_head_dim", layer=layer)) * itemsize
    heads = _number(config, "num_attention_heads", layer=layer)
    width = _number(config, "head_dim", layer=layer)
    if width == 0 and heads:
        width = _number(config, "hidden_size", layer=layer) // heads
    key_heads = _number(config, "num_key_value_heads", layer=layer) or heads
    return 2 * key_heads * width * itemsize


def _attends(layer: nn.Module) -> bool:
    return any(_ATTENTION.search(name.rpartition(".")[2]) for name, _ in layer.named_modules())


def _chosen_experts(config: PreTrainedConfig) -> float:
    """Return the share of a layer's experts that a token is routed to, 1 without experts."""
    experts = _number(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k")
    if experts == 0 or chosen == 0:
        return 1.0
    return min(1.0, chosen / experts)


@dataclass(frozen=True)
class _Map:
    """Weight of a layer that multiplies hidden states: of a linear map, or of all experts."""

    name: str
    shape: tuple[int, ...]
    elements: int


def _maps(layer: nn.Module) -> Iterator[_Map]:
    """Yield every weight of a layer that multiplies hidden states."""
    for name, parameter in layer.named_parameters():
        leaf = name.rpartition(".")[2]
        is_matrix = leaf == "weight" and parameter.dim() in (2, 3)
        is_stack = parameter.dim() == 3 and _EXPERT.search(name)
        if is_matrix or is_stack:
            yield _Map(name, tuple(parameter.shape), parameter.numel())


def _mlp_width(layer: nn.Module, chosen: float) -> int:
    """Return the larger dimension of every linear map outside of attention, summed.

    Experts count by their share.
    """
    width = 0.0
    for weight in _maps(layer):
        if _is_expert(weight.name):
            number = weight.shape[0] if len(weight.shape) == 3 else 1
            width += max(weight.shape[-2:]) * chosen * number
        elif not _ATTENTION.search(weight.name.rpartition(".")[0]):
            width += max(weight.shape)
    return int(width)
