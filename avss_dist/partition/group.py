"""The torch.distributed group of the processes that hold one replica, set up for DeepSpeed."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from avss_dist.core.errors import AvssError, ConfigError
from avss_dist.core.settings import Settings
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.sparsity import dense
from avss_dist.models.checkpoint.loading import Backbone
from avss_dist.models.checkpoint.locate import Checkpoint

S = TypeVar("S")
T = TypeVar("T")
TIMEOUT_SECONDS = 1800.0
_LOSSES = ("gloo/", "pair closure")  # in gloo's plain RuntimeErrors: where it was raised, or that it gave up before


def join(
    rank: int,
    world: int,
    address: str,
    port: int,
    *,
    device: torch.device,
    local_rank: int = 0,
    timeout_seconds: float = TIMEOUT_SECONDS,
    host_tensors: bool = False,
) -> None:
    """Join a group of ``world`` processes. Return when all of them have joined.

    Args:
        rank: rank of this process, from 0.
        address, port: address at which rank 0 listens.
        device: ``cpu`` (gloo) or ``cuda`` (nccl).
        local_rank: index of this process's GPU among those that it sees.
        timeout_seconds: time that a collective waits for the other ranks before it fails.
        host_tensors: exchange tensors on the host too, as FSDP does for checkpoints.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device.type,
    }
    # DeepSpeed calls functions by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with quiet_deepspeed():
        import deepspeed
        from deepspeed import ops
        from deepspeed.inference.engine import InferenceEngine
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        if device.type == "cpu":
            # DeepSpeed's own operation for reductions is compiled on first use, waits forever for a rank that died, and
            # leaks 69 MB of shared memory for each rank. Without it, DeepSpeed uses gloo, which has a timeout.
            ops.__compatible_ops__ = {**ops.__compatible_ops__, ShareMemCommBuilder.NAME: False}
        else:
            torch.cuda.set_device(local_rank)
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl" if host_tensors else "nccl"
        deepspeed.init_distributed(backend, timeout=timedelta(seconds=timeout_seconds), verbose=False)
        InferenceEngine.inference_mp_group = distributed.group.WORLD  # or it makes one with a timeout of its own


def leave() -> None:
    """Leave the group. A process may join another afterwards."""
    import deepspeed
    from deepspeed.inference.engine import InferenceEngine

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    InferenceEngine.inference_mp_group = None


@dataclass(frozen=True)
class RowSplit:
    """Share of a batch's rows that a rank counts, if several ranks see the same batch."""

    rank: int = 0
    ranks: int = 1

    def rows(self, number: int) -> slice:
        """Return the slice of this rank's rows of ``number`` rows."""
        start = number * self.rank // self.ranks
        end = number * (self.rank + 1) // self.ranks
        return slice(start, end)


def require_group(partition: str, ranks: int) -> RowSplit:
    """Return this process's share of the rows of a batch, in a group of so many ranks.

    Raises:
        ConfigError: the process is not in a group, or in one of another size.
    """
    if ranks < 2:
        raise ConfigError(f"`partition` {partition} with one rank spreads nothing.", "Use single, or set `ranks` to 2.")
    rank, size = rank_and_size()
    if size != ranks:
        raise ConfigError(
            f"`partition` {partition} needs a group of {ranks} processes; this is one of {size}.",
            "Set `executor` to ray; in Python, call avss_dist.partition.group.join in every process first.",
        )
    return RowSplit(rank, size)


def exchange_units_for_rows(part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Return this rank's rows (`RowSplit`) with the units of all ranks concatenated, by an all-to-all.

    A collective: all ranks call it. Tensors are sent as bytes, exact in every dtype, also in those that a backend
    cannot send.

    Args:
        part: this rank's units of all rows, [rows, tokens, widths[rank]].
        widths: units of each rank.
    """
    number, tokens, _ = part.shape
    rows_of_rank = []
    for rank in range(len(widths)):
        split = RowSplit(rank, len(widths)).rows(number)
        rows_of_rank.append(split.stop - split.start)
    rows = rows_of_rank[distributed.get_rank()]
    sent = part.contiguous().flatten().view(torch.uint8)
    sent_bytes = [number_of_rows * part[0].nbytes for number_of_rows in rows_of_rank]
    received_bytes = [rows * tokens * width * part.element_size() for width in widths]
    received = sent.new_empty(sum(received_bytes))
    distributed.all_to_all_single(received, sent, received_bytes, sent_bytes)
    pieces = []
    for piece, width in zip(received.split(received_bytes), widths, strict=True):
        pieces.append(piece.view(part.dtype).view(rows, tokens, width))
    return torch.cat(pieces, dim=-1)


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, or (0, 1) outside of a group."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


class RankedLanguageModel(LanguageModel):
    """Language model of several ranks. The first one reports.

    Ranks take different batches of one task. Those that split matrices, without `whole_weights`, take the same.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings, backbone: Backbone, device: torch.device) -> None:
        super().__init__(checkpoint, settings, backbone, device)
        self._split = RowSplit(*rank_and_size())
        self.reports = self._split.rank == 0

    def total(self, counts: list[list[int]]) -> list[list[int]]:
        """Return the elementwise sum of all ranks' counts, which have equal shapes. All ranks call this.

        What every rank counts, such as the whole maps of a split model, keeps its share.
        """
        totals = []
        for rows_of_ranks in zip(*all_gather(counts), strict=True):
            totals.append([sum(numbers) for numbers in zip(*rows_of_ranks, strict=True)])
        return totals

    def local_indices(self, count: int) -> range:
        """Return the indices of the work items, out of ``count``, that this rank takes.

        Of ranks with different batches they are contiguous, and equally many if ``count`` is a multiple of ranks.
        """
        if not self.whole_weights:
            return range(count)
        return range(count)[self._split.rows(count)]

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors over the ranks with different batches, in place."""
        if not self.whole_weights:
            return
        for tensor in tensors:
            distributed.all_reduce(tensor)


def share(function: Callable[[S], T], items: Iterable[S], idle: Callable[[], object] | None = None) -> list[T]:
    """Return the function's results for all items, in order, each computed by one rank. All ranks call this.

    Args:
        idle: called on a rank that has no item while others have one; by default the function, with the first item.
            No zeros of sparse activations are counted there.
    """
    every = list(items)
    rank, size = rank_and_size()
    results: list[T] = []
    for start in range(0, len(every), size):
        if start + rank < len(every):
            results.append(function(every[start + rank]))
            continue
        with dense():
            if idle:
                idle()
            else:
                function(every[0])
    parts = all_gather(results)
    return [parts[i % size][i // size] for i in range(len(every))]


def all_gather(value: T) -> list[T]:
    """Return the objects of all ranks, in rank order. All ranks call this. Outside of a group there is one."""
    if not distributed.is_initialized():
        return [value]
    every = [value] * distributed.get_world_size()  # Every entry is replaced.
    distributed.all_gather_object(every, value)
    return every


def lost_rank(error: BaseException | None) -> BaseException | None:
    """Return the exception, among an error and its causes, that tells the loss or the timeout of a rank, or None."""
    while error is not None:
        if isinstance(error, distributed.DistError):
            return error
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOSSES):
            return error
        error = error.__cause__
    return None


@contextmanager
def reraise_lost_ranks() -> Iterator[None]:
    """Raise the cause of an `AvssError` if that is the loss or the timeout of a rank.

    The loss of a rank is retried, unlike a mistake of the user.
    """
    try:
        yield
    except AvssError as error:
        if loss := lost_rank(error.__cause__):
            raise loss from None
        raise


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Discard DeepSpeed's prints to stdout inside the context, and send its logged errors to stderr."""
    with redirect_stdout(io.StringIO()):
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        yield
