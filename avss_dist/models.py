"""Open a checkpoint: a hub id, a local folder, or a ``.gguf`` file; say exactly what was opened.

Two steps: `resolve` finds the files and hashes or pins their content without loading a weight (the driver does this);
`load` builds the backbone on a device (every worker does this).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from avss_dist.config import Settings
from avss_dist.errors import ModelError
from avss_dist.structure import Structure, find_structure

WEIGHTS = "*.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_READ = {".json", ".safetensors", ".model", ".txt"}  # suffixes of the files that can change a number
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")
_REFUSALS: tuple[type[Exception], ...] = (  # what libraries raise over a bad checkpoint
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, IndexError),
    *(struct.error, SafetensorError, StrictDataclassError),
)
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights at a revision.

    Attributes:
        name: what the user called it, without a revision.
        source: ``hub``, ``folder`` or ``gguf``.
        path: the local folder, or the ``.gguf`` file.
        revision: the hub's commit, or the SHA-256 of the files that are read.
    """

    name: str
    source: str
    path: str
    revision: str

    @property
    def slug(self) -> str:
        """A readable name for run ids: letters, digits, dots, underscores and hyphens."""
        name = self.name if self.source == "hub" else Path(self.path).resolve().name.removesuffix(".gguf")
        return slug(name)

    @property
    def folder(self) -> Path:
        """Where config and tokenizer are."""
        return Path(self.path).parent if self.source == "gguf" else Path(self.path)

    @property
    def gguf(self) -> dict[str, str]:
        """What transformers must be told to read a ``.gguf`` file."""
        return {"gguf_file": Path(self.path).name} if self.source == "gguf" else {}


def slug(name: str) -> str:
    """``name`` with everything but letters, digits, ``.``, ``_`` and ``-`` replaced; never empty, never hidden."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def resolve(spec: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Find a checkpoint's files and pin their content; a hub id is downloaded (safetensors, config and tokenizer only).

    Args:
        spec: ``org/name``, ``org/name@revision``, a folder, or a ``.gguf`` file.
        trust_remote_code: also fetch the Python files that a hub checkpoint ships.

    Raises:
        ModelError: there is no such checkpoint, or it is not one that can be opened; the message says what to do.
    """
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file '{spec}'.", "Check the path of the .gguf file.")
        return Checkpoint(name=spec, source="gguf", path=str(path.resolve()), revision=content_hash([path]))
    if path.is_dir():
        _check_folder(path, spec, trust_remote_code)
        suffixes = _READ | {".py"} if trust_remote_code else _READ
        files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix in suffixes)
        return Checkpoint(name=spec, source="folder", path=str(path.resolve()), revision=content_hash(files))
    if path.exists():
        raise ModelError(
            f"'{spec}' is a file.", "Name the checkpoint's folder, a .gguf file, or a hub id like org/name."
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", spec) or spec.startswith((".", "/")):
        raise ModelError(f"There is no folder '{spec}'.", "Check the path, or name a hub id like org/name.")
    return _fetch(spec, trust_remote_code)


def _fetch(spec: str, trust_remote_code: bool) -> Checkpoint:
    from huggingface_hub import errors, snapshot_download

    name, _, revision = spec.partition("@")
    patterns = ["*.json", WEIGHTS, "*.model", "*.txt", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except errors.GatedRepoError as error:
        raise ModelError(
            f"'{name}' is gated.", "Ask for access on its page, then log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"'{name}' has no revision '{revision}'.", "Look at its branches and tags on the hub."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"There is no model '{name}', neither as a folder here nor on the hub.",
            "Check the name; a private model needs `hf auth login`.",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"'{spec}' is no folder here, is not in the local hub cache, and the hub cannot be reached.",
            "Check the name and the network, or give the path of a downloaded folder.",
        ) from error
    _check_folder(Path(folder), spec, trust_remote_code)
    return Checkpoint(name=name, source="hub", path=folder, revision=Path(folder).name)


def _check_folder(folder: Path, spec: str, trust_remote_code: bool) -> None:
    config = read_config(folder, spec)
    if not any(folder.glob(WEIGHTS)):
        pickled = sorted(f.name for pattern in PICKLED for f in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"'{spec}' has pickled weights only ({pickled[0]}), which can run code when they are opened.",
                "Convert them to safetensors: load the model where you trust it and call save_pretrained().",
            )
        raise ModelError(f"'{spec}' has no weights (*.safetensors).", "Is the download complete?")
    kind = config.get("model_type")
    if _known(kind) or (config.get("auto_map") and trust_remote_code):
        return
    if config.get("auto_map"):
        raise ModelError(
            f"'{spec}' needs Python code of its own (model_type '{kind}').",
            "Read that code, then pass --trust-remote-code.",
        )
    if kind is None:
        raise ModelError(f"'{spec}' has a config.json without a model_type.", "Add the family's name: llama, say.")
    raise ModelError(
        f"'{spec}' is of model_type '{kind}', which transformers {version('transformers')} does not know.",
        "A newer model needs a newer transformers: pip install -U transformers.",
    )


def read_config(folder: Path, spec: str) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        ModelError: it is missing or is not JSON.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"'{spec}' has no config.json.", "Name the folder that save_pretrained() wrote.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a model's configuration.")
    return config


def _known(model_type: str | None) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def content_hash(files: list[Path]) -> str:
    """SHA-256 over names and bytes of files; remembered by path, size and time, so a checkpoint is read once."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{_file_hash(file.resolve())}\n".encode())
    return digest.hexdigest()


def _file_hash(file: Path) -> str:
    stat = file.stat()
    key = hashlib.sha256(f"{file}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}".encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "avss_dist" / "sha256" / key
    if stat.st_size > 1 << 20 and cache.is_file():
        return cache.read_text(encoding="ascii")
    with file.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    if stat.st_size > 1 << 20:
        _remember(cache, value)
    return value


def _remember(cache: Path, value: str) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_text(value, encoding="ascii")
        temporary.replace(cache)
    except OSError:
        return  # only a convenience: without it the file is hashed again


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        ModelError: it has none that transformers can open.
    """
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code, **checkpoint.gguf
            )
        except _REFUSALS as error:
            there = checkpoint.gguf or any(any(checkpoint.folder.glob(pattern)) for pattern in _TOKENIZERS)
            raise _no_tokenizer(checkpoint, f" that can be opened: {_first_line(error)}" if there else ".") from error
    if not len(tokenizer):
        raise _no_tokenizer(checkpoint, ": its vocabulary is empty.")
    return tokenizer


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
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def text_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the part that reads text.

    Raises:
        ModelError: transformers does not know the architecture, or the model is an encoder-decoder.
    """
    from transformers import AutoConfig

    with _quiet():
        try:
            config = AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code, **checkpoint.gguf
            )
        except _REFUSALS as error:
            raise ModelError(
                f"The configuration of '{checkpoint.name}' cannot be read: {_first_line(error)}",
                "Is the download complete? A newer model needs a newer transformers: pip install -U transformers.",
            ) from error
    return config


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A model without its head on a device, with its layers found.

    Attributes:
        module: the backbone; calling it never runs a language-model head.
        structure: its layers and sites.
        family: ``config.model_type``; architecture: the class; hidden_size: units of the residual stream.
        num_parameters: of the whole checkpoint, as loaded.
        dtype, attention_implementation: what computes.
    """

    module: nn.Module
    structure: Structure
    family: str
    architecture: str
    hidden_size: int
    num_parameters: int
    dtype: str
    attention_implementation: str


def load(checkpoint: Checkpoint, settings: Settings, device: torch.device) -> Backbone:
    """Load the weights (safetensors or gguf only) and find the layers.

    Raises:
        ModelError: the model cannot be loaded or observed; the message names the reason.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    kind = AutoModelForCausalLM if _is_causal(config) else AutoModel
    options: dict[str, Any] = {"attn_implementation": settings.attention} if settings.attention else {}
    if not checkpoint.gguf:
        options |= {"use_safetensors": True, "config": config}
    with _quiet():
        try:
            model = kind.from_pretrained(
                checkpoint.folder,
                dtype="auto" if settings.dtype == "auto" else getattr(torch, settings.dtype),
                trust_remote_code=settings.trust_remote_code,
                **checkpoint.gguf,
                **options,
            )
        except SafetensorError as error:
            raise ModelError(
                f"The weights of '{checkpoint.name}' are damaged or not whole: {_first_line(error)}.",
                "Download or copy them again.",
            ) from error
        except _REFUSALS as error:
            raise ModelError(f"'{checkpoint.name}' cannot be loaded: {_first_line(error)}") from error
        return open_module(model.eval().to(device=device), layers=settings.layers)


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    architectures = getattr(config, "architectures", None) or []
    if architectures:
        return any(_CAUSAL.search(name) for name in architectures)
    return config.model_type in CAUSAL and config.model_type not in MASKED


def open_module(model: Any, *, layers: str | None = None) -> Backbone:
    """A loaded transformers model as a Backbone: its head is left out, its layers are found.

    Raises:
        ModelError: the layers cannot be found, or a forward pass over token ids fails.
    """
    config: Any = model.config
    text = config.get_text_config()
    if (
        getattr(config, "is_encoder_decoder", False)
        and hasattr(model.base_model, "encoder")
        and hasattr(model.base_model, "decoder")
    ):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoders and encoders can be scored.",
            "Load its encoder or its decoder as a checkpoint of its own.",
        )
    backbone = _without_head(model)
    run = forward_function(backbone)
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            structure = find_structure(
                backbone, lambda ids: run(ids.to(device), None), getattr(text, "num_hidden_layers", None), layers
            )
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
        raise ModelError(f"{type(model).__name__} does not run on token ids alone: {_first_line(error)}") from error
    return Backbone(
        module=backbone,
        structure=structure,
        family=config.model_type,
        architecture=type(model).__name__,
        hidden_size=int(getattr(text, "hidden_size", 0) or 0),
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(next(p.dtype for p in backbone.parameters() if p.is_floating_point())).removeprefix("torch."),
        attention_implementation=str(getattr(text, "_attn_implementation", None) or "eager"),
    )


def _without_head(model: Any) -> nn.Module:
    """The model below its head. A few families name themselves as their base; theirs is the decoder."""
    base = model.base_model
    if base is model and model.get_output_embeddings() is not None:
        base = model.get_decoder() or model
    return base


def forward_function(backbone: nn.Module) -> Callable[[torch.Tensor, torch.Tensor | None], Any]:
    """How to run the backbone on (token ids, attention mask or None): no cache, only the arguments that it takes."""
    parameters = inspect.signature(backbone.forward).parameters
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    options = {"use_cache": False} if anything or "use_cache" in parameters else {}

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
        if attention_mask is not None:
            return backbone(input_ids=input_ids, attention_mask=attention_mask, **options)
        return backbone(input_ids=input_ids, **options)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings: errors are ours to tell."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which transformers imports, warns on stdout
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
