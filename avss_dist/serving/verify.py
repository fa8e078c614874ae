"""Comparison of a checkpoint with a server that serves it: outcome, reasons, and receipt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa
import transformers

from avss_dist.core.errors import AvssError, ConfigError
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.streams import portion, progress_to
from avss_dist.core.streams import report as report_share
from avss_dist.core.text import RedactedURI, describe_layers
from avss_dist.core.values import NewRow
from avss_dist.corpus.documents import Tokenizer
from avss_dist.corpus.tokens import encode, special_tokens_around
from avss_dist.distillation.curve import Preparing
from avss_dist.models.checkpoint.layer_kinds import LLAMA_CPP, rules_of
from avss_dist.models.checkpoint.loading import load_tokenizer, require_head, text_config
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.models.checkpoint.size import load_skeleton
from avss_dist.models.structure.layers import count_parameters
from avss_dist.partition.execution import Execution
from avss_dist.pruning.checkpoint import find_base
from avss_dist.requests import VerifyRequest
from avss_dist.serving.comparison import ENOUGH, EVERYWHERE, TOO_DIFFERENT, Comparison, Group, compare_predictions
from avss_dist.serving.connect import connect
from avss_dist.serving.receipt import Receipt, write_receipt
from avss_dist.serving.reference import compute_reference, server_dtype
from avss_dist.serving.rows import TEXTS, Rows, read_rows
from avss_dist.serving.server import HIDDEN_SIZE, LAYERS, PARAMETERS, Server, ServerInfo, TokensDiffer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SAME = "same"
DIFFERENT = "different"
NOT_COMPARABLE = "not comparable"
SIZE_TOLERANCE = 0.005
"""Share by which numbers of parameters may differ: files of servers have a few more, such as factors of positions."""
OTHER_MODEL = 0.5
"""Share of equal next tokens below which the server may serve another model."""
_READERS = {"llama.cpp": LLAMA_CPP, "Ollama": LLAMA_CPP}
"""Programs whose rules for the kinds of layers are known, by runtime. Ollama runs llama.cpp."""
_FULL_WEIGHTS = ("F16", "BF16", "F32", "all F32")
"""Formats of weights, as servers name them, that are no quantization."""


class Verified(TabularResult):
    """A comparison of a checkpoint with a server.

    Attributes:
        outcome: ``same``, ``different`` or ``not comparable``.
        sentences: the outcome for people, with likely causes and limits.
        runtime: name and version of the server's program.
        comparison: numbers of the checkpoint; None if it is not comparable.
        whole: numbers of the whole model on its server; None without ``original``.
        receipt: record that was written into the checkpoint's folder; None if none was.
    """

    def __init__(
        self,
        outcome: str,
        sentences: Iterable[str],
        runtime: str,
        comparison: Comparison | None = None,
        whole: Comparison | None = None,
        receipt: Receipt | None = None,
    ) -> None:
        self.outcome = outcome
        self.sentences = tuple(sentences)
        self.runtime = runtime
        self.comparison = comparison
        self.whole = whole
        self.receipt = receipt

    @property
    def is_same(self) -> bool:
        """Whether the server computes the checkpoint as transformers does."""
        return self.outcome == SAME

    def table(self) -> pa.Table:
        """Return a table with a row for each group of positions. Without a comparison, one row has the outcome."""
        rows = self.rows() or [{"outcome": self.outcome, "runtime": self.runtime, "reason": " ".join(self.sentences)}]
        return pa.Table.from_pylist(rows)

    def rows(self) -> list[NewRow]:
        """Return the values of each group of positions, those of the whole model first."""
        rows: list[NewRow] = []
        for model, comparison in (("whole", self.whole), ("checkpoint", self.comparison)):
            if comparison is None:
                continue
            for group in comparison.groups:
                rows.append({"outcome": self.outcome, "runtime": self.runtime, "model": model, **group.row()})
        return rows

    def summary(self) -> str:
        """Return the outcome in a line."""
        return f"{self.outcome}, {self.runtime}"


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A checkpoint and the server that serves it.

    Attributes:
        config: configuration of the checkpoint.
        settings: settings of the text and of the computation.
    """

    checkpoint: Checkpoint
    config: PreTrainedConfig
    tokenizer: Tokenizer
    server: Server
    settings: Settings

    @property
    def info(self) -> ServerInfo:
        """Description of the server and its model, by itself."""
        return self.server.info


class _NotComparable(Exception):
    """The reason why a checkpoint and a server cannot be compared."""


def verify(request: VerifyRequest, causes: Sequence[str] = ()) -> Verified:
    """Compare a checkpoint with a server, and write the receipt.

    Args:
        causes: sentences on likely causes of a difference, beside those that are known here.

    Raises:
        AvssError: a mistake, or a server that fails (`ServerFailed`).
    """
    report = _reporter(request.on_event)
    report("reading the checkpoint", 0.0)
    checkpoint = resolve(str(request.model), trust_remote_code=request.trust_remote_code)
    side = _open_side(request, checkpoint, request.server, request.served_model)
    original = None
    if request.original is not None:
        original = _open_side(request, _base(request, checkpoint), request.original, request.original_model)
    execution = Execution(partition=request.partition, max_memory=request.max_memory)
    try:
        rows = _read(request, side, original)
        whole = None
        if original is not None:
            whole = _compare(original, rows, execution, _named(report, "the whole model: "))
            _require_fit(original, whole)
        comparison = _compare(side, rows, execution, report)
        groups = comparison.different_groups(whole)
        if not groups:
            _require_enough(side, comparison)
    except (_NotComparable, TokensDiffer) as error:
        return Verified(NOT_COMPARABLE, [f"Not comparable: {error}"], side.info.name)
    if groups:
        outcome = DIFFERENT
        sentences = [
            *_describe_difference(side, comparison, groups),
            *_describe_causes(side, groups),
            *causes,
        ]
    else:
        outcome = SAME
        sentences = [_describe_same(side, comparison)]
    if whole is not None:
        sentences.append(_describe_whole(whole))
    sentences += rows.notes
    receipt = _receipt(request, side, rows, comparison, whole, groups)
    sentences.append(_write(side.checkpoint, receipt))
    return Verified(outcome, sentences, side.info.name, comparison, whole, receipt)


def _reporter(on_event: Callable[[Preparing], object] | None) -> Callable[[str, float], None]:
    """Return a function that passes an activity and the share of it that is done to the callback of a request."""

    def report(activity: str, share: float) -> None:
        if on_event is not None:
            on_event(Preparing(activity, share))

    return report


def _named(report: Callable[[str, float], None], prefix: str) -> Callable[[str, float], None]:
    """Return a function that reports activities with a prefix."""
    return lambda activity, share: report(f"{prefix}{activity}", share)


def _base(request: VerifyRequest, checkpoint: Checkpoint) -> Checkpoint:
    """Return the whole model of a checkpoint.

    Raises:
        ConfigError: neither the request nor the model card names it, or it is not there.
    """
    if request.base is not None:
        return resolve(str(request.base), trust_remote_code=request.trust_remote_code)
    hint = "Name the whole model with `base`."
    base = find_base(checkpoint, checkpoint.name, hint)
    if base is None:
        raise ConfigError(f"The model card of '{checkpoint.name}' names no model that it was pruned from.", hint)
    return base


def _open_side(request: VerifyRequest, checkpoint: Checkpoint, url: str, served_model: str | None) -> _Side:
    """Return a checkpoint and its server, without weights in memory."""
    config = text_config(checkpoint)
    require_head(checkpoint.name, config)
    tokenizer = load_tokenizer(checkpoint)
    settings = replace(request.settings, batch_size=1, chat_template=False)
    settings = replace(settings, dtype=server_dtype(checkpoint, config, settings))
    server = connect(url, request.kind, served_model, request.timeout, tokenizer)
    return _Side(checkpoint=checkpoint, config=config, tokenizer=tokenizer, server=server, settings=settings)


def _read(request: VerifyRequest, side: _Side, original: _Side | None) -> Rows:
    """Return the rows to compare, which have room on all servers."""
    limits = [entry.info.limit for entry in (side, original) if entry is not None and entry.info.limit is not None]
    settings = replace(side.settings, max_sequences=request.max_sequences)
    return read_rows(request.corpus, side.tokenizer, settings, side.config, min(limits, default=None))


def _compare(side: _Side, rows: Rows, execution: Execution, report: Callable[[str, float], None]) -> Comparison:
    """Return the comparison of a checkpoint with its server.

    Raises:
        _NotComparable: the server has another model, reads texts as other tokens, or predicts nothing.
    """
    _require_same_sizes(side)
    _require_same_tokens(side, rows)

    def asking(_: str, share: float) -> None:
        report(f"asking {side.info.runtime}", share)

    predictions = []
    for number, row in enumerate(rows.rows):
        with progress_to(asking), portion(number / len(rows.rows), 1 / len(rows.rows)):
            report_share("asking", 0.0)
            predictions += side.server.predict(row)
    if not predictions:
        raise _NotComparable(f"{side.info.name} predicts nothing for the rows of the text.")
    reference = compute_reference(side.checkpoint, predictions, side.settings, execution, report)
    comparison = compare_predictions(predictions, reference, side.tokenizer, rows.windows, side.settings.dtype)
    if comparison is None:
        raise _NotComparable(f"{side.info.name} predicts nothing for the rows of the text.")
    return comparison


def _require_same_sizes(side: _Side) -> None:
    """Raise _NotComparable if a server says that its model has other sizes than the checkpoint."""
    text = side.config.get_text_config()
    expected = {LAYERS: getattr(text, "num_hidden_layers", None), HIDDEN_SIZE: getattr(text, "hidden_size", None)}
    if text is side.config and PARAMETERS in side.info.sizes:
        # A model of images and text is divided into several files for llama.cpp, with parameters in each.
        expected[PARAMETERS] = count_parameters(load_skeleton(side.checkpoint, side.settings)[0])
    for size, number in side.info.sizes.items():
        own = expected.get(size)
        if own is None:
            continue
        tolerance = SIZE_TOLERANCE * own if size == PARAMETERS else 0
        if abs(number - own) > tolerance:
            raise _NotComparable(
                f"the model '{side.info.model}' of {side.info.name} has {number:,} {size}, and the checkpoint has "
                f"{own:,}. It is another model: serve this checkpoint."
            )


def _require_same_tokens(side: _Side, rows: Rows) -> None:
    """Raise _NotComparable if a server reads texts as other tokens than the checkpoint's tokenizer."""
    start = len(special_tokens_around(side.tokenizer).prefix)
    for row in rows.rows[-TEXTS:]:
        text = side.tokenizer.decode(row.ids[start:].tolist(), clean_up_tokenization_spaces=False)
        expected = encode([text], side.tokenizer, special=True)[0]
        tokens = side.server.tokens_of(text)
        count = side.server.count_tokens(text) if tokens is None else len(tokens)
        if count == len(expected) and (tokens is None or list(tokens) == list(expected)):
            continue
        reason = ""
        if count > len(expected) and (tokens is None or list(tokens[1:]) == expected):
            reason = ": it puts a token before the text that the tokenizer does not put there, such as a second BOS"
        elif count < len(expected) and (tokens is None or list(tokens) == expected[1:]):
            reason = ": it leaves out the token that the tokenizer puts before a text (BOS)"
        raise _NotComparable(
            f"{side.info.name} reads a text of {len(expected)} tokens as {count} tokens"
            f"{reason or ', or as others'}. Correct the settings of its tokenizer."
        )


def _require_fit(side: _Side, whole: Comparison) -> None:
    """Raise _NotComparable if the whole model itself differs so much that nothing can be said about a cut."""
    if whole.share_different > TOO_DIFFERENT:
        raise _NotComparable(
            f"{side.info.name} computes the whole model differently, too: {whole.share_different:.1%} of the positions "
            "differ by more than rounding, so that a difference of the cut cannot be told apart."
        )


def _require_enough(side: _Side, comparison: Comparison) -> None:
    """Raise _NotComparable if too few tokens were compared to call a server the same."""
    if comparison.positions < ENOUGH:
        raise _NotComparable(
            f"only {comparison.positions} of the next tokens of {side.info.name} could be compared. Raise "
            "`max_sequences`, or name another text with `corpus`."
        )


def _describe_same(side: _Side, comparison: Comparison) -> str:
    """Return the sentence of a checkpoint that is computed as transformers does."""
    return (
        f"The same: {side.info.name} predicts {comparison.share_equal:.1%} of {comparison.positions:,} next tokens as "
        f"transformers does. {comparison.share_different:.2%} of the positions differ by more than the rounding "
        f"of {comparison.dtype} (up to {comparison.tolerance:.2g} nats)."
    )


def _describe_difference(side: _Side, comparison: Comparison, groups: Sequence[Group]) -> list[str]:
    """Return sentences on a checkpoint that is read differently."""
    firsts = [group.first for group in groups if group.first is not None]
    first = min(firsts)
    positions = sum(group.positions for group in groups)
    equal = sum(group.equal for group in groups) / positions
    different = sum(group.differences for group in groups) / positions
    sentence = (
        f"{side.info.name} reads this checkpoint differently, from token {first:,} of a row on: {equal:.1%} of "
        f"{positions:,} next tokens are equal, and {different:.1%} of the positions differ by more than the rounding "
        f"of {comparison.dtype} (up to {comparison.tolerance:.2g} nats)"
    )
    losses = []
    for group in groups:
        if group.loss is not None and group.server_loss is not None:
            place = "" if group.name == EVERYWHERE else f" with {group.name} tokens before"
            losses.append(f"{group.server_loss:.4f} for {group.loss:.4f}{place}")
    if losses:
        sentence += f". Its loss is {', and '.join(losses)}"
    sentences = [f"{sentence}."]
    if len(groups) < len(comparison.groups):
        others = [group.name for group in comparison.groups if group not in groups]
        sentences.append(
            f"Predictions with {' and '.join(others)} tokens before are the same: windows of attention, or the "
            "positions of late tokens, are read differently."
        )
    if equal < OTHER_MODEL and first <= 3:
        sentences.append("So much differs that it may be another model.")
    return sentences


def _describe_causes(side: _Side, groups: Sequence[Group]) -> list[str]:
    """Return sentences on likely causes of a difference."""
    sentences = []
    reader = _READERS.get(side.info.runtime)
    for rule in rules_of(side.config):
        places = rule.misread(range(len(rule.whole)))
        if rule.reader == reader and places:
            sentences.append(
                f"Likely cause: {reader} {rule.meaning}, and so takes others than config.json says for such "
                f"layers: {describe_layers(places)}, counted from 0, are read as another kind."
            )
    if side.info.weights and not side.info.weights.startswith(_FULL_WEIGHTS):
        sentences.append(
            f"The server's weights are {side.info.weights}. To tell what that changes, serve the whole model in the "
            "same format, and name its address with `original`."
        )
    if not sentences and side.settings.dtype != "bfloat16" and max(group.largest for group in groups) < 1:
        sentences.append("If the server computes in bfloat16, set `dtype` bfloat16.")
    return sentences


def _describe_whole(whole: Comparison) -> str:
    """Return a sentence on the whole model on its server."""
    return (
        f"The whole model on its server: {whole.share_equal:.1%} of {whole.positions:,} next tokens are equal, and "
        f"{whole.share_different:.1%} of the positions differ by more than rounding."
    )


def _receipt(
    request: VerifyRequest,
    side: _Side,
    rows: Rows,
    comparison: Comparison,
    whole: Comparison | None,
    groups: Sequence[Group],
) -> Receipt:
    """Return the record of a comparison. It does not have the address of the server."""
    firsts = [group.first for group in groups if group.first is not None]
    shares: NewRow = {
        "positions": comparison.positions,
        "equal": comparison.share_equal,
        "different": comparison.share_different,
        "largest": comparison.largest,
        "loss": comparison.loss,
        "server_loss": comparison.server_loss,
        "first": min(firsts, default=None),
        "whole_different": whole.share_different if whole else None,
    }
    return Receipt(
        runtime=side.info.runtime,
        version=side.info.version,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        outcome=DIFFERENT if groups else SAME,
        revision=side.checkpoint.revision,
        corpus=RedactedURI(request.corpus),
        rows=rows.fingerprint,
        dtype=comparison.dtype,
        tolerance=comparison.tolerance,
        transformers=transformers.__version__,
        **shares,
    )


def _write(checkpoint: Checkpoint, receipt: Receipt) -> str:
    """Write a receipt into the checkpoint's folder, and return a sentence on that."""
    if checkpoint.source != "folder":
        return "No receipt was written, as the checkpoint is not a folder of yours."
    try:
        write_receipt(checkpoint.folder, receipt)
    except (OSError, AvssError) as error:
        return f"The receipt could not be written into {checkpoint.folder}: {error}"
    return f"The receipt is in {checkpoint.folder} (avss_verified.json, and a line of its model card)."
