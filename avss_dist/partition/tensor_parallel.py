"""Partitions ``tensor_parallel`` and ``expert_parallel``: matrices or experts are split over ranks with the same data.

Each rank counts some rows of every batch, and rank 0 reports the counts of all. transformers splits the families that
it has a plan for (`splitting`), and DeepSpeed AutoTP others (`autotp`). With ``expert_parallel``, attention, dense
matrices and the head are split as with ``tensor_parallel``, if the ranks divide the heads.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from torch import distributed

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import Backbone
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.quantization import quantization_method
from avss_dist.models.checkpoint.size import load_skeleton
from avss_dist.partition.autotp import open_by_autotp, require_autotp
from avss_dist.partition.estimate import MemoryQuery, PartitionEstimate
from avss_dist.partition.group import RankedLanguageModel
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import Replica
from avss_dist.partition.splitting import (
    SplitOptions,
    attention_plan,
    generic_name,
    layer_plan,
    open_by_plan,
    part_bytes,
    require_version,
    scale_obstacle,
    tensor_plan_obstacle,
)

T = TypeVar("T")


class TensorParallelReplica(Replica):
    """One rank of a split model. See `partition.replica.Replica`. All ranks open it in a group (`group.join`)."""

    language_model_type = RankedLanguageModel

    @staticmethod
    def require_ranks(partition: str, checkpoint: Checkpoint, settings: Settings, ranks: int) -> None:
        """Refuse a model that so many ranks cannot divide, by its configuration.

        Raises:
            ConfigError: the weights stay quantized and only DeepSpeed would split the model, which it checks unsplit on
                the CPU; the ranks do not divide a quantized matrix into whole blocks; or see `autotp.require_autotp`.
        """
        model, _ = load_skeleton(checkpoint, replace(settings, attention=None))  # which may not be here
        obstacle = tensor_plan_obstacle(checkpoint, settings, ranks)
        if quantization_method(model.config) and not checkpoint.gguf:
            if obstacle and not settings.dequantize:
                raise ConfigError(
                    f"`partition` tensor_parallel does not split these quantized weights: {obstacle}, and DeepSpeed, "
                    "which splits other models, takes none that stay quantized.",
                    "Set `ranks` to another number, or use `partition` device_map or expert_parallel.",
                )
            blocks = "" if obstacle else scale_obstacle(checkpoint, settings, {"tp_size": ranks})
            if blocks:
                raise ConfigError(
                    f"`partition` tensor_parallel cannot split these quantized weights: {blocks}.",
                    "Set `ranks` to a smaller number.",
                )
        if obstacle:
            require_autotp(model.config.get_text_config(), ranks)

    @classmethod
    def usage(cls, query: MemoryQuery) -> PartitionEstimate:
        """Return the memory of a replica, with a part of the weights on each rank. AutoTP divides the layers alone."""
        size = query.size
        if tensor_plan_obstacle(query.checkpoint, query.settings, query.ranks):
            why = "every rank loads the whole model first, and keeps a part of each layer"
            part = size.other_bytes + sum(size.layer_bytes) // query.ranks
            return query.usage(part, why, host_weights=size.weight_bytes)
        part = part_bytes(query.checkpoint, query.settings, {"tp_size": query.ranks})
        return query.usage(part, "every rank loads and keeps a part of each matrix")

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        """Return this rank's part of the model, whose taps exchange the units of the ranks."""
        if tensor_plan_obstacle(checkpoint, settings, placement.ranks):
            backbone = open_by_autotp(checkpoint, settings, self.device, self.split, head=head)
            self.no_gradients = (
                f"`partition` tensor_parallel has no gradients of a {backbone.columns['family']} model: "
                "transformers has no plan that splits it over these ranks, and DeepSpeed splits models for inference "
                "alone.",
                "Use `partition` fsdp, zero3, single or streaming.",
            )
            return backbone
        return open_by_plan(checkpoint, settings, self.device, head=head, tp_size=placement.ranks)

    def collect(self, counted: T) -> list[T]:
        """Return the counts of all ranks, in order, on the rank that reports."""
        if not self.reports_stats:
            distributed.gather_object(counted, None)
            return []
        every = [counted] * self.split.ranks  # Every entry is replaced.
        distributed.gather_object(counted, every)
        return every


_WITHOUT_EXPERT_PLAN = "Use `partition` fsdp, zero3, device_map or streaming."


class ExpertParallelReplica(TensorParallelReplica):
    """One rank of a mixture of experts. See `tensor_parallel.TensorParallelReplica`."""

    @staticmethod
    def require_ranks(partition: str, checkpoint: Checkpoint, settings: Settings, ranks: int) -> None:
        """Refuse a model whose experts so many ranks cannot divide, by its configuration.

        Raises:
            ConfigError: see `expert_options`; the installed transformers is too old; or the ranks do not divide another
                quantized matrix into whole blocks.
        """
        require_version()
        if obstacle := scale_obstacle(checkpoint, settings, expert_options(checkpoint, settings, ranks)):
            raise ConfigError(
                f"`partition` expert_parallel cannot split the weights beside the experts: {obstacle}.",
                "Set `ranks` to a smaller number.",
            )

    @classmethod
    def usage(cls, query: MemoryQuery) -> PartitionEstimate:
        """Return the memory of a replica. If no plan spreads the experts, parts are those of ``tensor_parallel``."""
        options: SplitOptions = {"tp_size": query.ranks}
        with suppress(ConfigError):
            options = expert_options(query.checkpoint, query.settings, query.ranks)
        part = part_bytes(query.checkpoint, query.settings, options)
        return query.usage(part, "every rank loads and keeps some of the experts of each layer")

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        """Return this rank's part of the model, which has some of the experts of each layer.

        transformers exchanges tokens in passes with gradients, and sums in others.
        """
        options = expert_options(checkpoint, settings, placement.ranks)
        return open_by_plan(checkpoint, settings, self.device, head=head, **options)


def expert_options(checkpoint: Checkpoint, settings: Settings, ranks: int) -> SplitOptions:
    """Return the fields of transformers' ``DistributedConfig`` that spread the experts of a model over ranks.

    Raises:
        ConfigError: the model has no experts that transformers can spread, or the ranks do not divide their number.
    """
    model, _ = load_skeleton(checkpoint, settings)
    rules = layer_plan(model, getattr(model, "ep_plan", {}), settings.layers)
    if checkpoint.gguf or not rules:
        raise ConfigError(
            f"transformers has no plan that spreads experts of {type(model).__name__} over ranks.", _WITHOUT_EXPERT_PLAN
        )
    numbers = {len(stack) for path, stack in model.named_parameters() if generic_name(path) in rules}
    for number in sorted(numbers):
        if number % ranks:
            raise ConfigError(
                f"{ranks} ranks do not divide the {number} experts of a layer of {type(model).__name__}.",
                f"Set `ranks` to a divisor of {number}. {_WITHOUT_EXPERT_PLAN}",
            )
    options: SplitOptions = {"tp_size": ranks, "ep_size": ranks}
    if tensor_plan_obstacle(checkpoint, settings, ranks):
        attention = attention_plan(layer_plan(model, model.tp_plan, settings.layers))
        options["tp_plan"] = dict.fromkeys(attention, "replicate") or None
    return options
