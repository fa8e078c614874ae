"""Settings of a measurement: options in groups, with their defaults and valid values."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Self

from avss_dist.core.errors import ConfigError
from avss_dist.core.sites import SITES, Sites
from avss_dist.core.thresholds import THRESHOLDS, Thresholds
from avss_dist.core.validation import RARE, Count, OneOf, Positive, checked
from avss_dist.core.values import JsonObject, NewObject

ROW_STARTS = ("auto", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


@checked
class TextOptions:
    """Options by which a text becomes rows of tokens.

    Raises:
        ConfigError: values out of their range; the message names all of them, and the nearest valid ones.
    """

    max_sequences: Positive | None = None
    """Rows to read at most; by default the whole corpus."""
    skip_sequences: Annotated[Count, RARE] = 0
    """Skip this many rows at the start of each text."""
    sequence_length: Positive = 256
    """Tokens in a row."""
    shuffle_seed: Annotated[Count | None, RARE] = None
    """Read the whole corpus and take its rows in a random order with this seed; by default they keep their order."""
    chat_template: Annotated[bool, RARE] = False
    """Format conversations (columns of messages), and questions of tasks, with the tokenizer's chat template."""
    layout: Annotated[str, OneOf(("packed", "padded")), RARE] = "packed"
    """Rows of equal length without padding (packed), or one document per row (padded)."""
    row_start: Annotated[str, OneOf(ROW_STARTS), RARE] = "auto"
    """Put the tokenizer's own special tokens, such as BOS, around the text of each packed row (auto), or not (none)."""

    @classmethod
    def from_stored(cls, values: JsonObject) -> Self:
        """Make an instance from stored values by name, without names that it does not have."""
        values = {"row_start": "none", **values}  # default of what was stored before this option existed
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def text_options(self) -> NewObject:
        """Return the values of the fields of `TextOptions` by name."""
        return {name: getattr(self, name) for name in TEXT_OPTIONS}


TEXT_OPTIONS = tuple(f.name for f in fields(TextOptions))


@checked
class ModelOptions:
    """How a model is opened."""

    dtype: Annotated[str, OneOf(DTYPES)] = "auto"
    """Compute dtype: auto (the checkpoint's own), float32, bfloat16 or float16."""
    layers: Annotated[str | None, RARE] = None
    """Module path of the layer list, if it is not found automatically."""
    attention: Annotated[Annotated[str, OneOf(ATTENTIONS)] | None, RARE] = None
    """Attention implementation; by default transformers chooses."""
    device: Annotated[str, OneOf(("auto", "cpu", "cuda"))] = "auto"
    """Device that computes; auto is cuda where there is one."""
    trust_remote_code: Annotated[bool, RARE] = False
    """Run the Python code that comes with the checkpoint."""


@checked
class BatchOptions:
    """How a model computes its rows."""

    batch_size: Positive = 8
    """Rows in a forward pass."""
    sequences_per_shard: Annotated[Positive | None, RARE] = None
    """Rows in a shard, the unit of work, retry and resampling; by default by the model's size, 32 in evaluations."""
    dequantize: Annotated[bool, RARE] = False
    """Unpack quantized weights to the compute dtype instead of computing with them as stored."""
    threads: Annotated[Positive, RARE] = 1
    """CPU threads that compute one shard or one part of a task. Remaining cores compute others at the same time."""


@checked
class StatisticsOptions:
    """Statistics to measure inside of layers."""

    sites: Sites = SITES
    """Sites in a layer to measure; inputs are those of its linear maps."""
    thresholds: Thresholds = THRESHOLDS
    """Absolute near-zero thresholds; the published 1e-5 is always included."""
    experts: Annotated[bool, RARE] = False
    """Also measure routed experts: their tokens, gates and outputs, which computes each expert twice."""
    skip_first_tokens: Annotated[Count, RARE] = 0
    """Leave this many tokens at the start of every row out of the statistics."""
    allow_pickle: Annotated[bool, RARE] = False
    """Accept pickled weights (pytorch_model*.bin, FSDP's .distcp): load tensors only, and cache them as safetensors."""


@checked
class Settings(StatisticsOptions, BatchOptions, ModelOptions, TextOptions):
    """Settings of a measurement. Every field can change a number, so every field is fingerprinted."""

    def __post_init__(self) -> None:
        if self.skip_first_tokens >= self.sequence_length:
            raise ConfigError(
                f"`skip_first_tokens` {self.skip_first_tokens} leaves nothing of {self.sequence_length} tokens.",
                "It must be smaller than `sequence_length`.",
            )

    def as_dict(self) -> NewObject:
        """Return the settings as JSON-ready values, `skip_sequences` only if rows are skipped, as it is newer."""
        return {name: value for name, value in vars(self).items() if name != "skip_sequences" or value}

    def numbers(self, *, statistics: bool) -> NewObject:
        """Return the settings that can change a number, except those of the text, whose tokens are hashed.

        Args:
            statistics: include the settings of statistics inside of layers.
        """
        without = {*TEXT_OPTIONS, "trust_remote_code", "allow_pickle"} - {"sequence_length"}
        if not statistics:
            without |= {"sites", "thresholds", "experts", "sequences_per_shard"}
        return {name: value for name, value in self.as_dict().items() if name not in without}
