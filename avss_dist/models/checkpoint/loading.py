"""Loading of a checkpoint: tokenizer and configuration (by the driver), backbone on a device (by every worker)."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from avss_dist.core.errors import ModelError, first_line
from avss_dist.core.extras import pip_command
from avss_dist.core.settings import DTYPES, Settings
from avss_dist.core.values import NewObject, TableRow
from avss_dist.corpus.documents import Tokenizer
from avss_dist.models.checkpoint.complete import require_complete, require_layers
from avss_dist.models.checkpoint.locate import Checkpoint, read_config, stored_tensors
from avss_dist.models.checkpoint.quantization import (
    quantization_method,
    quantization_settings,
    with_quantization,
)
from avss_dist.models.checkpoint.safetensors import TensorInfo, floating_dtype
from avss_dist.models.forward import Output
from avss_dist.models.structure.find import find_structure
from avss_dist.models.structure.layers import Layer, count_parameters, layer_lists

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightTransform
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from transformers.quantizers import HfQuantizer

    AutoClass = type[_BaseAutoModelClass]
    """An auto class of transformers, such as ``AutoModelForCausalLM``."""

Forward = Callable[[torch.Tensor, torch.Tensor | None], Output]
"""Function of token ids and an attention mask, or None."""

_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")
"""Patterns of the names of a tokenizer's files."""
_REFUSALS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    IndexError,
    ArithmeticError,
    AssertionError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)
"""Errors that libraries raise over a bad checkpoint."""
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$")


@contextmanager
def quiet(*silenced: str) -> Iterator[None]:
    """Silence progress bars and warnings of transformers and Accelerate inside the context.

    Errors are reported by this package. Accelerate's warnings are about offloaded weights, which are intended.

    Args:
        silenced: names of loggers that say nothing at all.
    """
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed, which transformers imports, warns on stdout.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as messages

    levels = {"accelerate": logging.ERROR}
    for name in silenced:
        levels[name] = logging.CRITICAL + 1
    with ExitStack() as stack:
        for name, level in levels.items():
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(level)
        stack.callback(messages.set_verbosity, messages.get_verbosity())
        if messages.is_progress_bar_enabled():
            stack.callback(messages.enable_progress_bar)
        messages.set_verbosity_error()
        messages.disable_progress_bar()
        yield


@quiet()
def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Load the checkpoint's tokenizer.

    Raises:
        ModelError: the checkpoint has no tokenizer that transformers can open.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code, **checkpoint.gguf
        )
    except _REFUSALS as error:
        why = "."
        if _has_tokenizer_files(checkpoint):
            why = f" that can be opened: {_first_line(error)}"
        raise _no_tokenizer(checkpoint, why) from error
    if len(tokenizer) == 0:
        raise _no_tokenizer(checkpoint, ": its vocabulary is empty.")
    return tokenizer


def _has_tokenizer_files(checkpoint: Checkpoint) -> bool:
    if checkpoint.gguf:
        return True
    for pattern in _TOKENIZERS:
        if any(checkpoint.folder.glob(pattern)):
            return True
    return False


def _no_tokenizer(checkpoint: Checkpoint, why: str) -> ModelError:
    return ModelError(
        f"'{checkpoint.name}' has no tokenizer{why}",
        "Copy tokenizer.json and tokenizer_config.json of its base model into the folder.",
    )


def _first_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassError):
        error = error.__cause__ or error
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says."
    if isinstance(error, ZeroDivisionError):
        return "a size in its config.json is 0."
    return first_line(error)


@quiet()
def text_config(checkpoint: Checkpoint, folder: Path | None = None) -> PreTrainedConfig:
    """Load the checkpoint's configuration.

    Args:
        folder: folder of another ``config.json`` for its weights.

    Raises:
        ModelError: transformers does not know the architecture, or it has far more layers than the files.
    """
    from transformers import AutoConfig, PreTrainedConfig

    folder = folder or checkpoint.folder
    try:
        if checkpoint.gguf:
            values, _ = PreTrainedConfig.get_config_dict(folder, **checkpoint.gguf)
            require_layers(checkpoint, values)
            return AutoConfig.for_model(**values)
        require_layers(checkpoint, read_config(folder, checkpoint.name))
        return AutoConfig.from_pretrained(folder, trust_remote_code=checkpoint.trust_remote_code)
    except _REFUSALS as error:
        raise ModelError(
            f"The configuration of '{checkpoint.name}' cannot be read: {_first_line(error)}",
            f"Is the download complete? A newer model needs a newer transformers ({pip_command()} install -U "
            "transformers); one with Python code of its own needs `trust_remote_code`, once you have read that code.",
        ) from error


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Loaded model on a device, its backbone without the head, and its layers.

    Attributes:
        model: the transformers model with its head.
        module: its backbone, which never runs a language-model head.
        layers: its layers in the order of their calls, with their sites.
        columns: columns of a run's row that describe the model: ``family``, ``architecture``, ``hidden_size``,
            ``num_parameters``, ``dtype``, ``attention_implementation`` and ``notes`` on the layers.
    """

    model: PreTrainedModel
    module: nn.Module
    layers: tuple[Layer, ...]
    columns: TableRow


def load(
    checkpoint: Checkpoint, settings: Settings, device: torch.device, *, head: bool = False, **placing: object
) -> Backbone:
    """Load the weights (safetensors or gguf only) and find the layers.

    Args:
        device: device that computes.
        head: see `load_model`.
        placing: options of ``from_pretrained`` that place weights. By default all go to ``device``, on a GPU tensor by
            tensor, so that the whole model is never in host memory.

    Raises:
        ModelError: the model cannot be loaded or observed; the message names the reason.
    """
    if device.type == "cuda" and not placing:
        placing = {"device_map": {"": device}}
    return open_module(load_model(checkpoint, settings, head=head, **placing), layers=settings.layers, device=device)


def load_model(checkpoint: Checkpoint, settings: Settings, *, head: bool = False, **placing: object) -> Any:
    """Load the checkpoint as a transformers model with its head in evaluation mode, on the CPU or as ``placing`` says.

    Args:
        head: the head is used, so that its weights must be in the files, too.

    Raises:
        ModelError: the model cannot be loaded, or its files lack weights; the message names the reason.
    """
    import transformers

    config = text_config(checkpoint)
    options = _options(settings)
    with quiet(), _explain_errors(checkpoint):
        if checkpoint.gguf:
            # A transformers without this class always unpacks a .gguf file.
            unpack = getattr(transformers, "GgufConfig", None)
            options["quantization_config"] = unpack and unpack(dequantize=True)
        else:
            options["use_safetensors"] = True
            options["config"] = with_quantization(checkpoint, config, settings, placing)
        model, report = auto_class(config).from_pretrained(
            checkpoint.folder, **checkpoint.gguf, **options, **placing, output_loading_info=True
        )
    require_complete(checkpoint, model, without_head(model), report, settings.layers, head=head)
    return model.eval()


def build_model(
    checkpoint: Checkpoint,
    settings: Settings,
    tensors: Callable[[PreTrainedModel], Mapping[str, object]],
    *,
    head: bool = False,
) -> Any:
    """Build the model that `load_model` returns from other tensors under the checkpoint's names.

    Args:
        head: see `load_model`.
        tensors: function of the model on the meta device that returns objects by name, which transformers indexes with
            ``...`` and places by calling ``to(device, dtype)``.

    Raises:
        ModelError: the model cannot be built of them; the message names the reason.
    """
    config = text_config(checkpoint)
    empty = skeleton(copy.deepcopy(config), settings, torch.float32)  # It changes the configuration.
    with quiet(), _explain_errors(checkpoint):
        config = with_quantization(checkpoint, config, settings, {})
        if not isinstance(config, type(empty.config)):
            quantization = quantization_settings(config)
            config = copy.deepcopy(config.get_text_config())
            if quantization:
                config.quantization_config = quantization
        model, report = type(empty).from_pretrained(
            None, config=config, state_dict=tensors(empty), **_options(settings), output_loading_info=True
        )
    require_complete(checkpoint, model, without_head(model), report, settings.layers, head=head)
    return model.eval()


def _options(settings: Settings) -> NewObject:
    """Return the settings as options of `from_pretrained`."""
    options: NewObject = {"dtype": "auto", "trust_remote_code": settings.trust_remote_code}
    if settings.dtype != "auto":
        options["dtype"] = getattr(torch, settings.dtype)
    if settings.attention:
        options["attn_implementation"] = settings.attention
    return options


@contextmanager
def _explain_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Convert transformers' exceptions over a bad checkpoint to ModelError."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(
            f"The weights of '{checkpoint.name}' are damaged or not whole: {_first_line(error)}.",
            "Download or copy them again.",
        ) from error
    except _REFUSALS as error:
        raise ModelError(f"'{checkpoint.name}' cannot be loaded: {_first_line(error)}") from error


def skeleton(config: PreTrainedConfig, settings: Settings, dtype: torch.dtype) -> Any:
    """Build the model that `load` returns on the meta device: names, shapes and ties of parameters, without memory.

    Raises:
        ModelError: transformers cannot build it.
    """
    with quiet(), torch.device("meta"):
        try:
            return auto_class(config).from_config(config, **_options(settings) | {"dtype": dtype})
        except _REFUSALS as error:
            raise ModelError(f"A {config.model_type} model cannot be built: {_first_line(error)}") from error


def skeleton_by(auto: AutoClass, config: PreTrainedConfig, settings: Settings) -> PreTrainedModel | None:
    """Return the model that an auto class builds of a configuration, on the meta device, or None if it cannot."""
    with quiet(), torch.device("meta"):
        try:
            return auto.from_config(copy.deepcopy(config), trust_remote_code=settings.trust_remote_code)
        except _REFUSALS:
            return None


@quiet()
def open_module(model: PreTrainedModel, *, layers: str | None = None, device: torch.device | None = None) -> Backbone:
    """Return a loaded transformers model as a `Backbone`, without its head, with its layers found.

    Args:
        layers: module path of the layer list; None finds it.
        device: device of the token ids; by default that of the parameters.

    Raises:
        ModelError: the layers cannot be found, or a forward pass over token ids fails.
    """
    config = model.config
    text = config.get_text_config()
    if _is_encoder_decoder(model):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoders and encoders can be scored.",
            "Name a model of another family.",
        )
    backbone = without_head(model)
    run = forward_function(backbone)
    token_device = device or next(model.parameters()).device

    def run_on_device(input_ids: torch.Tensor) -> Output:
        return run(input_ids.to(token_device), None)

    try:
        with torch.no_grad():
            num_layers = getattr(text, "num_hidden_layers", None)
            layers_in_order, notes = find_structure(backbone, run_on_device, num_layers, layers)
    except _REFUSALS as error:
        name = type(model).__name__
        if method := quantization_method(config):
            raise ModelError(
                f"{name} is quantized ({method}), and does not run here as it is stored: {_first_line(error)}",
                "Compute where there is a device for that, or set `dequantize`.",
            ) from error
        raise ModelError(f"{name} does not run on token ids alone: {_first_line(error)}") from error
    floating = next(parameter for parameter in backbone.parameters() if parameter.is_floating_point())
    columns = {
        "family": config.model_type,
        "architecture": type(model).__name__,
        "hidden_size": hidden_size(text),
        "num_parameters": count_parameters(model),
        "dtype": dtype_name(floating.dtype),
        "attention_implementation": attention_implementation(text),
        "notes": list(notes),
    }
    return Backbone(model=model, module=backbone, layers=layers_in_order, columns=columns)


def _is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a model has an encoder whose output its decoder reads."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    return hasattr(model.base_model, "encoder") and hasattr(model.base_model, "decoder")


def hidden_size(config: PreTrainedConfig) -> int:
    """Return the units of the residual stream, or 0 if the configuration of the text model does not tell."""
    return int(getattr(config, "hidden_size", 0) or 0)


def attention_implementation(config: PreTrainedConfig) -> str:
    """Return the attention implementation, as transformers names it, from the configuration of the text model."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in torch: ``float32``."""
    return str(dtype).removeprefix("torch.")


def candidate_layers(model: PreTrainedModel, path: str | None) -> dict[str, nn.ModuleList]:
    """Return the module lists that may be the layers of a model with its head, by path; see `layers.layer_lists`.

    Args:
        model: the model, which may be a skeleton.
        path: module path of the layers, if a user names it.
    """
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return layer_lists(without_head(model), num_layers, path)


def without_head(model: PreTrainedModel) -> nn.Module:
    """Return the model below its head.

    This is the decoder of a model that is its own base.
    """
    base = model.base_model
    if base is model and model.get_output_embeddings() is not None:
        base = model.get_decoder() or model
    return base


def forward_function(backbone: nn.Module) -> Forward:
    """Return a function of (token ids, attention mask or None) that runs the backbone without a key-value cache."""
    parameters = inspect.signature(backbone.forward).parameters
    takes_anything = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    takes_use_cache = takes_anything or "use_cache" in parameters

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Output:
        options: dict[str, torch.Tensor | bool] = {}
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
        if takes_use_cache:
            options["use_cache"] = False
        return backbone(input_ids=input_ids, **options)

    return run


def auto_class(config: PreTrainedConfig) -> AutoClass:
    """Return the auto class for a configuration. A language model with a vision tower reads only text here."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto_models

    kind = config.model_type
    architectures = getattr(config, "architectures", None) or []
    multimodal: str | tuple[str, ...] = auto_models.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind, ())
    if isinstance(multimodal, str):
        multimodal = (multimodal,)
    if set(architectures).intersection(multimodal):
        return AutoModelForImageTextToText
    if architectures:
        is_causal = any(_CAUSAL.search(name) for name in architectures)
    else:
        masked = auto_models.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        is_causal = kind in auto_models.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in masked
    if is_causal:
        return AutoModelForCausalLM
    return AutoModel


def auto_classes(config: PreTrainedConfig) -> list[AutoClass]:
    """Return the auto classes that know a configuration, one for each class of models that they open.

    Classes that the checkpoint's own code adds are among them.
    """
    from transformers.models.auto import modeling_auto

    custom = getattr(config, "auto_map", None) or {}
    classes: dict[type, AutoClass] = {}
    for name, auto in vars(modeling_auto).items():
        if not name.startswith("AutoModel"):
            continue
        if name in custom:
            classes[custom[name]] = auto
        elif type(config) in auto._model_mapping:
            classes.setdefault(auto._model_mapping[type(config)], auto)
    return [*classes.values()]


def has_head(config: PreTrainedConfig) -> bool:
    """Whether the model that `load_model` returns predicts the next token."""
    return auto_class(config).__name__ != "AutoModel"


def require_head(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model that predicts no next token, before anything is measured.

    A checkpoint with code of its own passes, because its model is not known before it is opened.

    Args:
        name: the checkpoint as the user named it.

    Raises:
        ModelError: the model has no head that predicts the next token.
    """
    if has_head(config) or getattr(config, "auto_map", None):
        return
    architectures = getattr(config, "architectures", None) or [config.model_type]
    raise no_head(name, architectures[0])


def no_head(name: str, architecture: str) -> ModelError:
    """Return the refusal of a checkpoint whose model predicts no next token."""
    return ModelError(
        f"'{name}' ({architecture}) has no head that predicts the next token.", "Name a causal language model."
    )


def predictor(model: Any) -> Any:
    """Return the module that predicts the next token: the model, or its language tower if that has the head.

    Such a tower is a complete text model, while the model around it may require images.
    """
    head = model.get_output_embeddings()
    if head is None:
        return model
    for child in model.children():
        if hasattr(child, "get_output_embeddings") and child.get_output_embeddings() is head:
            return child
    return model


def pin(settings: Settings, checkpoint: Checkpoint, config: PreTrainedConfig, device: str) -> Settings:
    """Return settings in which every ``auto`` that can change a number is resolved.

    Args:
        config: from `text_config`.

    Raises:
        ModelError: ``sequence_length`` exceeds the model's maximum, or the weight files have no header.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < settings.sequence_length:
        raise ModelError(
            f"'{checkpoint.name}' reads at most {longest} tokens, not the {settings.sequence_length} of "
            "`sequence_length`.",
            f"Make `sequence_length` {longest} or less.",
        )
    dtype = dtype_name(compute_dtype(checkpoint, config, settings))
    if dtype not in DTYPES:
        dtype = settings.dtype
    return replace(settings, device=device, dtype=dtype)


def compute_dtype(
    checkpoint: Checkpoint, config: PreTrainedConfig, settings: Settings, tensors: Sequence[TensorInfo] | None = None
) -> torch.dtype:
    """Return the compute dtype: that of the settings, else of the configuration, else of the weight files.

    Without any of them, as for the published configuration of gpt-oss alone, quantized weights compute in bfloat16.

    Args:
        tensors: tensors of the weight files; None reads their headers if they are needed.

    Raises:
        ModelError: torch has no dtype of the configuration's name.
    """
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    value = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if value is not None:
        dtype = getattr(torch, str(value).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ModelError(
                f"The config.json of '{checkpoint.name}' names the dtype {value!r}, which torch does not have.",
                "Set `dtype`, or correct config.json.",
            )
        return dtype
    if checkpoint.gguf:
        return torch.float32  # transformers unpacks it to this dtype.
    if tensors is None:
        tensors = stored_tensors(checkpoint)
    if not tensors and quantization_settings(config):
        return torch.bfloat16
    return floating_dtype(tensors)


class NameConversion(NamedTuple):
    """Conversion of the names of stored tensors to those of weights.

    Attributes:
        rename: function of a stored tensor's name, which returns the name of the weight that the tensor becomes. Of a
            part of several weights, it is the first one.
        conversions: transformers' conversions of the model.
        weights: weights of the model by name.
    """

    rename: Callable[[str], str]
    conversions: list[WeightTransform]
    weights: dict[str, torch.Tensor]


def renaming(model: PreTrainedModel, quantizer: HfQuantizer | None = None) -> NameConversion:
    """Return the conversion of the names of a checkpoint's tensors.

    It uses private interfaces of transformers, which may change: expect ImportError, TypeError, AttributeError,
    KeyError and ValueError.

    Args:
        model: a transformers model, which may be on the meta device.
        quantizer: transformers' quantizer that unpacks the stored tensors; None if they are not quantized.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict(keep_vars=True)

    def rename(stored: str) -> str:
        name, *_ = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        return str(name)

    return NameConversion(rename, mapping, state)
