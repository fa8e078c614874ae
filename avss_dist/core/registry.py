"""Registry of partitions, scores, searches and sparsity methods, and the names in tables.

It imports nothing of the package, so that the command line lists the names without loading anything else.

A new partition is an entry of `PARTITIONS`, and a file with its replica. A new score from activations is an entry of
`SCORES`, and its computation in `stats.scores`: Parquet, charts, plans and comparisons take it from here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# Names in tables: prefixes of tasks, metrics, and labels of answers
SUBLAYER_LOSS = "sublayers:"  # before a corpus: the task of the loss without each sublayer
SEARCH = "search:"  # before a corpus: the task of a search
CONTRAST = "contrast"  # score of an experiment: contrast of hallucinated and truthful answers by AVSS
LOSS = "loss"  # a metric of a model: nats per token; higher is worse
ENTROPY = "entropy"  # a metric of a model: entropy of its predictions, in nats per token
CHANCE = "chance"  # a metric of multiple choice: the accuracy of a guess
PERPLEXITY = "perplexity:"  # before a corpus: the task of predicting it
ROW_START = "row-start:"  # before a corpus: the task of comparing two starts of its rows
TRUTHFUL, INCORRECT = "truthful", "incorrect"  # labels of the answers of TruthfulQA
BEST = "best"  # the label of the first of several truthful answers
TRUTHFULQA = "truthfulqa:"  # before a file: the task of choosing among its answers
AFTER_ANOTHER = ", after another prompt"  # after a label: the stratum of the same answers to other prompts
CONTINUATION = "continuation"  # the task of continuing prompts
REPAIR = "repair:"  # before a repair and its corpora: the task of fitting it
SPARSITY_TASK = "sparsity:"  # before a method and its corpus: the task of allocating sparsity
ROUNDING_TASK = "rounding:"  # before a corpus: the task of predicting the effect of rounded weights
NUM_WEIGHTS, BITS_PER_WEIGHT, PREDICTED_RISE = "num_weights", "bits_per_weight", "predicted"  # its metrics
ROUNDED_LOSS = "rounded:"  # before a number format and a corpus: the task of the loss with each layer rounded
REALIZED = "realized:"  # before the path of a linear map: a metric, the share of its inputs that were zero
SPARSITY = "sparsity"  # a metric of a model: the share of the weights of its linear maps that met a zero


@dataclass(frozen=True, kw_only=True)
class PartitionInfo:
    """A distribution of one replica (a model copy) over devices.

    Attributes:
        opens: ``module:class`` of the replica; the class takes (checkpoint, settings, placement, head=...).
            See `partition.replica.Replica`, which also tells its memory.
        summary: description in a few words.
        whole: one process has the whole model on one device. Such a replica can measure several shards at once, and
            copies of it can share a task. The first such partition is chosen if the model fits.
        layerwise: only running layers have their weights in memory. The first such partition is chosen if no other
            fits.
        gang: a replica is several processes, each a rank with one GPU, or on a CPU.
        several_gpus: one process uses several GPUs. The first such partition is chosen if the model fits on a host's.
        offloads: weights or hidden states may leave the devices: ``max_memory`` limits the memory on devices.
        splits_data: ranks take different shards; otherwise all take the same shard, and rank 0 reports.
        splits_matrices: no process ever has a whole weight, even while a layer runs. Sums have another order than on
            one device, so the number of ranks is fingerprinted. Weights of an open replica can be neither rounded nor
            changed, so that repairs cannot be fitted and evaluated in place.
    """

    opens: str
    summary: str
    whole: bool = False
    layerwise: bool = False
    gang: bool = False
    several_gpus: bool = False
    offloads: bool = False
    splits_data: bool = False
    splits_matrices: bool = False


PARTITIONS = {
    "single": PartitionInfo(
        opens="avss_dist.partition.replica:Replica",
        summary="the whole model on one device",
        whole=True,
    ),
    "device_map": PartitionInfo(
        opens="avss_dist.partition.device_map:DeviceMapReplica",
        summary="layers over the GPUs of one process, the rest in host memory and on disk",
        several_gpus=True,
        offloads=True,
    ),
    "streaming": PartitionInfo(
        opens="avss_dist.partition.streaming.replica:StreamingReplica",
        summary="one layer in memory at a time, read from the files once for each shard",
        layerwise=True,
        offloads=True,
    ),
    "fsdp": PartitionInfo(
        opens="avss_dist.partition.sharded:FsdpReplica",
        summary="each rank holds a part of every parameter, and takes its own data (PyTorch FSDP2)",
        gang=True,
        splits_data=True,
    ),
    "zero3": PartitionInfo(
        opens="avss_dist.partition.sharded:Zero3Replica",
        summary="each rank holds a part of every parameter, and takes its own data (DeepSpeed ZeRO-3)",
        gang=True,
        splits_data=True,
    ),
    "tensor_parallel": PartitionInfo(
        opens="avss_dist.partition.tensor_parallel:TensorParallelReplica",
        summary="each rank computes a part of every matrix product (transformers' plans, or DeepSpeed AutoTP)",
        gang=True,
        splits_matrices=True,
    ),
    "expert_parallel": PartitionInfo(
        opens="avss_dist.partition.tensor_parallel:ExpertParallelReplica",
        summary="each rank computes some of the routed experts of every layer, and a part of the other matrices",
        gang=True,
        splits_matrices=True,
    ),
}
"""Partitions by name, the simplest first."""
GANGS = tuple(name for name, info in PARTITIONS.items() if info.gang)
WHOLE = next(name for name, info in PARTITIONS.items() if info.whole)
"""The partition of a model that fits on one device."""
SEVERAL_GPUS = next(name for name, info in PARTITIONS.items() if info.several_gpus)
"""The partition of a model that fits on the GPUs of one host."""
LAYERWISE = next(name for name, info in PARTITIONS.items() if info.layerwise)
"""The partition of a model that fits nowhere else."""


@dataclass(frozen=True, kw_only=True)
class ShardingInfo:
    """A sharding of a training over ranks: each rank holds a part of what is divided, and all of what is not.

    Attributes:
        weights, gradients, moments: whether they are divided. Moments are those of the optimizer.
        zero_stage: stage of DeepSpeed ZeRO; 0 without DeepSpeed.
    """

    weights: bool = False
    gradients: bool = False
    moments: bool = False
    zero_stage: int = 0

    @property
    def is_fsdp(self) -> bool:
        """Whether PyTorch's FSDP divides it."""
        return self.weights and not self.zero_stage


SHARDINGS = {
    "ddp": ShardingInfo(),
    "zero1": ShardingInfo(moments=True, zero_stage=1),
    "zero2": ShardingInfo(moments=True, gradients=True, zero_stage=2),
    "zero3": ShardingInfo(moments=True, gradients=True, weights=True, zero_stage=3),
    "fsdp": ShardingInfo(moments=True, gradients=True, weights=True),
}
"""Shardings by name, the simplest first."""


@dataclass(frozen=True, kw_only=True)
class ScoreInfo:
    """A score of layers. Low is unimportant for every score but the controls: one that is not is stored as ``1 - x``.

    Attributes:
        title: its name in tables and charts.
        meaning: a noun phrase, for lists of scores.
        column: column of the table ``scores`` of a score that is computed from activations; else empty.
        definition: formula, for the description of that column.
        unit: unit of that column.
        caption: the caption of its chart on the page of a report.
        task: prefix of the task that measures it, before a corpus; empty if none does.
        ground_truth: whether it is the loss without layers itself, or its linearization; else an estimate.
        lookahead: how many layers later hidden states are compared, for a metric of `tasks.damage.Damage`.
        mean_rank_of: other scores whose mean rank it is.
        of_sets: whether it is defined for sets of layers only.
        ablate: options of `ablate` that measure it alone.
    """

    title: str
    meaning: str
    column: str = ""
    definition: str = ""
    unit: str = ""
    caption: str = ""
    task: str = ""
    ground_truth: bool = False
    lookahead: int | None = None
    mean_rank_of: tuple[str, ...] = ()
    of_sets: bool = False
    ablate: Mapping[str, Any] = field(default_factory=dict)


ROUNDING_ESTIMATES = {
    "first_order": ScoreInfo(
        title="first order",
        meaning="rise of the loss with rounded weights, predicted from gradients of the text's labels",
    ),
    "second_order": ScoreInfo(
        title="second order",
        meaning="the same, from gradients of drawn labels, summed over the linear maps of the layer",
    ),
    "predicted": ScoreInfo(title="first + second order", meaning="first_order + second_order"),
    "output_error": ScoreInfo(
        title="error of outputs",
        meaning="relative squared change of the outputs of linear maps with rounded weights, without gradients",
    ),
}
"""Estimates of a layer's sensitivity to rounded weights by metric; high is sensitive."""
SECOND_ORDER = "second_order"
"""Estimate that the number format of each linear map is chosen by, unless another one is named. It holds on other text
than that of the estimate, where the first order does not."""
PRECISION_ESTIMATES = {
    "predicted": "where the loss that avss ablate --quantize predicts rises the least",
    SECOND_ORDER: "where its second order, which is never negative, rises the least",
    "output_error": "where the outputs of linear maps change the least",
}
"""Estimates that the number format of each linear map is chosen by, with their meanings."""
PRECISION_METHODS = PRECISION_ESTIMATES | {
    "uniform": "one format for all linear maps",
    "random": "linear maps in random order",
}
"""Methods of choosing the number format of each linear map, with their meanings."""
PRECISION_FILES = ("plan", "llama-cpp", "llm-compressor")
"""Formats of files of number formats: that of this package, and those of other programs."""
RECIPES = ("pooled", "element", "unit")
"""Samples that the variance and sparsity of AVSS are computed from: token means, elements, or unit means."""
READING = ("site", "recipe", "threshold", "threshold_kind")
"""Columns that tell readings of AVSS apart."""
LOWEST_SHARE = 0.25
"""Default share of the layers, those with the lowest score, that plans drop and comparisons compare."""
DRAWS = 2
"""Default number of labels that are drawn from the model's predictions for each token, for the score `damage`."""
LAST, RANDOM = "last", "random"  # controls
BLOCK_DISTANCE, GREEDY = "block_distance", "greedy"  # scores of sets of layers
DAMAGE_TASK = "damage:"
_DAMAGE = {"leave_one_out": False, "damage": True}

SCORES = {
    "loss": ScoreInfo(
        title="loss",
        meaning="rise of the loss without the layer, measured",
        task="ablation:",
        ground_truth=True,
    ),
    "shapley": ScoreInfo(
        title="shapley",
        meaning="mean rise of the loss over sampled sets of other removed layers",
        task="shapley:",
        ground_truth=True,
        ablate={"leave_one_out": False, "shapley": 32},
    ),
    "taylor": ScoreInfo(
        title="taylor",
        meaning="rise of the loss, estimated from gradients to first order",
        task="gradients:",
        ground_truth=True,
        ablate={"leave_one_out": False, "gradients": True},
    ),
    "damage": ScoreInfo(
        title="damage",
        meaning="a layer's mean rank by predicted and by propagated",
        task=DAMAGE_TASK,
        mean_rank_of=("propagated", "predicted"),
        ablate=_DAMAGE,
    ),
    "predicted": ScoreInfo(
        title="predicted",
        meaning="rise of the loss, predicted from gradients and from hidden states three layers later",
        task=DAMAGE_TASK,
        lookahead=3,
        ablate=_DAMAGE,
    ),
    "propagated": ScoreInfo(
        title="propagated",
        meaning="relative distance of the hidden states two layers later",
        task=DAMAGE_TASK,
        lookahead=2,
        ablate=_DAMAGE,
    ),
    BLOCK_DISTANCE: ScoreInfo(
        title="block distance",
        meaning="mean angle between hidden states before and after a run of neighbours",
        task=DAMAGE_TASK,
        of_sets=True,
        ablate=_DAMAGE,
    ),
    GREEDY: ScoreInfo(
        title="greedy search",
        meaning="a search: removes the layer without which the loss is least, again and again",
        of_sets=True,
    ),
    "avss": ScoreInfo(
        title="smoothed AVSS",
        meaning="variance of the activations over their sparsity, smoothed",
        column="avss_smoothed",
        definition="as avss, with sparsity (near_zero_count + 0.5) / (count + 1); rank is of it",
        caption="Activation variance over sparsity, each as a share of its sum over layers; low is unimportant. The "
        "band is the 95% interval over shards, from eight shards and five elements near zero on. Triangles mark the "
        "25% of layers with the lowest score of each chart.",
    ),
    "block_influence": ScoreInfo(
        title="block influence",
        meaning="1 - mean cosine of the layer's input and output",
        column="block_influence",
        definition="1 - mean cosine of the block's input and output (ShortGPT)",
        caption="1 minus the cosine between a layer's input and output.",
    ),
    "angular_distance": ScoreInfo(
        title="angular distance",
        meaning="mean angle between the layer's input and output",
        column="angular_distance",
        definition="mean angle of block input and output (Gromov et al.)",
        unit="pi radians",
        caption="The angle between input and output, as a share of a half turn.",
    ),
    "relative_magnitude": ScoreInfo(
        title="relative magnitude",
        meaning="mean size of the layer's update, over the size of its input",
        column="relative_magnitude",
        definition="mean |output - input| / |input|",
        caption="The length of a layer's update, relative to its input.",
    ),
    "update_variance_ratio": ScoreInfo(
        title="update / input variance",
        meaning="variance of the layer's update, over the variance of its input",
        column="update_variance_ratio",
        definition="variance of the update / variance of the block's input",
        caption="The variance of a layer's update, relative to its input's.",
    ),
    LAST: ScoreInfo(
        title="place from the end (a control)", meaning="position from the end, except for the final layer, a control"
    ),
    RANDOM: ScoreInfo(title="random", meaning="random order, a control"),
}
"""Scores by the name of the option `by`."""
FROM_ACTIVATIONS = tuple(name for name, info in SCORES.items() if info.column)
"""Scores that every run has: AVSS, then `BASELINES`."""
BASELINES = FROM_ACTIVATIONS[1:]
"""Scores that AVSS is compared with; each has the name of its column."""
MEASURED_ONLY = "measured"
"""Status of a row like those of ``runs`` for a checkpoint that was measured and not scored; no table has it."""
GROUND_TRUTH = tuple(name for name, info in SCORES.items() if info.ground_truth)
"""Scores that say what leaving out a layer does to the loss."""
MEASURED = tuple(name for name, info in SCORES.items() if info.task and not info.of_sets)
"""Scores of every layer that `ablate` measures: `GROUND_TRUTH`, and estimates by a few passes."""


EXPERT_SCORES = {
    "reap": "mean of gate * |output| over the tokens of the expert (REAP, arXiv 2510.13999)",
    "tokens": "share of the routed tokens that the expert gets",
    "gate": "mean gate over the tokens of the expert",
    RANDOM: SCORES[RANDOM].meaning,
}
"""Scores of routed experts by the name of the option `by`, with their meaning. Low is unimportant."""
SPARSITY_METHODS = {
    "uniform": "the same sparsity everywhere, by thresholds",
    "loss": "where the predicted loss rises the least, by one backward pass",
    "teal": "greedily inside of each block, by what its output changes (TEAL, arXiv 2408.14690)",
    "acttail": "by the heavy tail of each weight's spectrum, the largest of each token (ActTail, arXiv 2603.12272)",
    "wina": "the same everywhere, the largest of each token, weighted by columns (WINA, arXiv 2505.19427)",
}
"""Methods of allocating a sparsity over linear maps, with their meanings."""


def metrics_of(score: str) -> tuple[str, ...]:
    """Return the metrics of the table ``evaluations`` that hold a measured score, or the scores that it averages."""
    info = SCORES[score]
    if info.mean_rank_of:
        return tuple(metric for part in info.mean_rank_of for metric in metrics_of(part))
    return (score if info.lookahead is None else f"{score}_{info.lookahead}",)


SCORE_GROUP = "avss_dist.scores"
"""Group of entry points of functions that score the layers of a run. See `analysis.scorecard.own_score`."""
OWN_VALUES = "values:"
OWN_FILES = (".csv", ".parquet")
"""Endings of the files that have scores of people's own."""


def score_functions() -> dict[str, EntryPoint]:
    """Return the functions of installed packages that score layers, by the name of their entry point."""
    from importlib.metadata import entry_points  # takes a tenth of the time of a help

    return {point.name: point for point in entry_points(group=SCORE_GROUP)}


def is_own(name: str) -> bool:
    """Whether a name is that of a score that people bring: ``FILE:COLUMN``, or an entry point.

    A file without a column counts. Where it is read, the error has its columns.
    """
    return ":" in name or name.endswith(OWN_FILES) or name in score_functions()


def name_values(value: Any) -> Any:
    """Return a name that holds the values of a mapping from layer to value, and any other value unchanged."""
    if not isinstance(value, Mapping):
        return value
    return OWN_VALUES + json.dumps({str(int(layer)): float(number) for layer, number in value.items()})
