"""Choice of the transformers class for a checkpoint, and of the module that predicts the next token."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from avss_dist.core.errors import ModelError

_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$")


def auto_class(config: Any) -> Any:
    """Return the auto class for a configuration."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    if _reads_images(config):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if _is_causal(config) else AutoModel


def auto_classes(config: Any) -> list[Any]:
    """Return the auto classes that know a configuration, one for each class of models that they open.

    Classes that the checkpoint's own code adds are among them.
    """
    from transformers.models.auto import modeling_auto

    custom = getattr(config, "auto_map", None) or {}
    known: dict[Any, Any] = {}
    for name, auto in vars(modeling_auto).items():
        if not name.startswith("AutoModel"):
            continue
        if name in custom:
            known[custom[name]] = auto
        elif type(config) in (mapping := auto._model_mapping):
            known.setdefault(mapping[type(config)], auto)
    return [*known.values()]


def has_head(config: Any) -> bool:
    """Whether the model that `load_model` returns predicts the next token."""
    return _is_causal(config) or _reads_images(config)


def require_head(name: str, config: Any) -> None:
    """Refuse a model that predicts no next token, before anything is measured.

    A checkpoint with code of its own passes, because its model is not known before it is opened.

    Args:
        name: the checkpoint as the user named it.

    Raises:
        ModelError: the model has no head that predicts the next token.
    """
    if not has_head(config) and not getattr(config, "auto_map", None):
        raise no_head(name, (getattr(config, "architectures", None) or [config.model_type])[0])


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
    towers = (child for child in model.children() if head is not None and _head_of(child) is head)
    return next(towers, model)


def _reads_images(config: Any) -> bool:
    """Whether the checkpoint is a language model with a vision tower, which reads only text here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL

    known = MULTIMODAL.get(config.model_type, ())
    classes = {known} if isinstance(known, str) else set(known)
    return bool(classes.intersection(getattr(config, "architectures", None) or []))


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    architectures = getattr(config, "architectures", None) or []
    if architectures:
        return any(_CAUSAL.search(name) for name in architectures)
    return config.model_type in CAUSAL and config.model_type not in MASKED


def _head_of(module: nn.Module) -> nn.Module | None:
    find = getattr(module, "get_output_embeddings", None)
    return find() if find else None
