"""Repair: what is missing in the stream where layers were removed, given back by the last layer before them.

At each cut, in order of depth: X is the stream after the last layer before it, in the pruned model with the repairs so
far; Y is the whole model's stream after the last layer that is removed there; R = Y - X is fitted from what the MLP
before the cut adds, or from its hidden units (`fold`). ``refit_all`` does the same at every layer behind the first cut,
for what earlier repairs could not give back goes on through them. The stream of the first token of each row is hundreds
of times as long as others in some models, and all others attend to it: it is scaled to their length. One row of ten is
held back: it chooses the ridge, and says what the fit is worth; a step that is worth nothing is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field

from avss_dist.corpus.shards import CorpusPlan, plan
from avss_dist.errors import CorpusError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer, text_config
from avss_dist.models.patching import STREAM, Parameter, Patch
from avss_dist.models.pinning import pin
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.cuts import Cut, require_cuts
from avss_dist.pruning.repair.fold import Step, Weights, features, fold, num_unknowns, parameters, steps
from avss_dist.pruning.repair.normal_equations import Fit, NormalEquations, fit, fit_plainly
from avss_dist.pruning.repair.outlet import Outlet, RepairError, is_transposed
from avss_dist.pruning.repair.record import RepairedCut, RepairRecord, RepairText
from avss_dist.pruning.repair.rivals import fit_stream
from avss_dist.pruning.repair.streams import AtCut, OpenStreams, Streams, opened_streams
from avss_dist.pruning.repair.text import Portion, count_tokens, portions
from avss_dist.pruning.repair.weighted import weighted
from avss_dist.settings import REFIT_ALL, REPAIRS, RIVAL_PATCHES, Execution, OneOf, Settings, checked
from avss_dist.system.devices import pick_device
from avss_dist.system.progress_bar import tracked
from avss_dist.text import RedactedURI, describe_layers

TOKENS_PER_UNKNOWN = 4  # at least; with fewer, a fit follows its text's noise

ReadStored = Callable[[Parameter], torch.Tensor | None]  # a parameter as the checkpoint's files have it, if they do
Show = Callable[[Sequence[int], str], Iterable[int]]  # numbers of batches, while somebody sees how far it is


@checked
class Repair:
    """How a pruned model is repaired.

    Raises:
        ConfigError: values out of their range.
    """

    by: Annotated[str, OneOf((*REPAIRS, *RIVAL_PATCHES))] = "map"
    """What is fitted."""
    corpora: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """The texts that it is fitted on; each counts alike, however long, or by a weight: CORPUS=0.5."""
    skip_sequences: Annotated[int, Field(ge=0)] = 0
    """Rows at the start of each text that are not read."""
    settings: Settings = Field(default_factory=Settings)
    """How texts are read, and how the model computes."""

    def __post_init__(self) -> None:
        self.weights  # noqa: B018  (refuses those that are none)

    @property
    def texts(self) -> list[RedactedURI]:
        """The corpora without their weights."""
        return [weighted(corpus)[0] for corpus in self.corpora]

    @property
    def weights(self) -> list[float]:
        """Of each text."""
        return [weighted(corpus)[1] for corpus in self.corpora]


@dataclass(frozen=True)
class Repaired:
    """Weights to write in place of the checkpoint's, in their dtypes, and what is to be said of them."""

    tensors: Patch
    record: RepairRecord
    notes: Sequence[str]


def repair_layers(
    checkpoint: Checkpoint, made: Plan, repair: Repair, stored: ReadStored, execution: Execution | None = None
) -> Repaired:
    """Fit the repair of a plan's cuts, on a model whose weights fit in memory, or by streaming.

    Args:
        stored: reads a parameter from the checkpoint's files; its dtype is the one that is written.
        execution: with ``partition`` and the memory for it; it is chosen by default.

    Raises:
        RepairError: a cut cannot be repaired; the message says why.
        CorpusError: a text cannot be read, or has too few tokens.
        ConfigError: the partition is none in which repairs are fitted, or has not the memory that it needs.
        FitError: hidden states are not finite.
    """
    require_cuts(made, every_layer=repair.by == REFIT_ALL)
    device = pick_device(repair.settings.device)
    config = text_config(checkpoint, trust_remote_code=repair.settings.trust_remote_code)
    settings = replace(pin(repair.settings, checkpoint, config, device.type), layers=made.layers)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
    texts = [plan(corpus, tokenizer, settings, skip_sequences=repair.skip_sequences) for corpus in repair.texts]
    with opened_streams(checkpoint, settings, device, execution or Execution()) as open_streams:
        return fit_repair(checkpoint, open_streams, made, replace(repair, settings=settings), texts, stored)


def fit_repair(
    checkpoint: Checkpoint,
    open_streams: OpenStreams,
    made: Plan,
    repair: Repair,
    texts: Sequence[CorpusPlan],
    stored: ReadStored,
    show: Show = tracked,
) -> Repaired:
    """As `repair_layers`, with an open model and texts that are read; the settings of ``repair`` are pinned."""
    cuts = require_cuts(made, every_layer=repair.by == REFIT_ALL)
    read = portions(texts, repair.settings.batch_size, repair.weights)
    starts = [cut.last for cut in cuts[:-1]]
    streams = open_streams([portion.batch for portion in read], made.drop, starts)
    mender = _Mender(streams, stored, read, show)
    names = [f"Repairing cut {number} of {len(cuts)}" for number in range(1, len(cuts) + 1)]
    if repair.by in RIVAL_PATCHES:
        done = [mender.patch(cut, repair.by, name) for cut, name in zip(cuts, names, strict=True)]
        return Repaired(mender.tensors, _record(checkpoint, made, repair, texts, read, done), _notes(made, repair.by))
    outlets = [streams.outlet(cut.after) for cut in cuts]
    for outlet in outlets:
        mender.require_tokens(outlet, repair.by)
        mender.require_plain(outlet)
    done = [mender.mend(cut, at, repair.by, name) for cut, at, name in zip(cuts, outlets, names, strict=True)]
    return Repaired(mender.tensors, _record(checkpoint, made, repair, texts, read, done), _notes(made, repair.by))


class _Mender:
    """Mends cuts one after the other; each sees what was changed before it.

    Attributes:
        tensors: what was changed so far, in the dtypes of the checkpoint's files.
    """

    def __init__(self, streams: Streams, stored: ReadStored, read: Sequence[Portion], show: Show) -> None:
        self.tensors: dict[Parameter, torch.Tensor] = {}
        self._streams, self._stored, self._read, self._show = streams, stored, read, show

    def require_tokens(self, outlet: Outlet, by: str) -> None:
        """Refuse a fit to too few tokens."""
        inputs, outputs = _shape(outlet, self._streams.value(outlet.layer.index, f"{outlet.linear}.weight"))
        given = sum(int(portion.fitted.sum()) for portion in self._read)
        for step in steps(by, outlet):
            needed = TOKENS_PER_UNKNOWN * num_unknowns(step, inputs if step.reads == "inputs" else outputs)
            if given < needed:
                raise CorpusError(
                    f"The repair {by} of this model needs {needed:,} tokens to fit to at least; {given:,} are given.",
                    "Give more text, raise `max_sequences`, or choose a `repair` of fewer unknowns (channel, scale).",
                )

    def require_plain(self, outlet: Outlet) -> None:
        """Refuse weights that the files hold in a form into which no repair can be written."""
        layer, path = outlet.layer.index, f"{outlet.linear}.weight"
        stored = self._stored((layer, path))
        if stored is None or not stored.is_floating_point() or stored.dtype.itemsize == 1:
            form = "under other names" if stored is None else f"as {str(stored.dtype).removeprefix('torch.')}"
            raise RepairError(
                f"The files hold '{path}' of layer {layer} {form}, quantized or fused: nothing can be added to it.",
                _PLAIN,
            )

    def mend(self, cut: Cut, outlet: Outlet, by: str, what: str) -> RepairedCut:
        """Fit and fold every step of a cut."""
        fits = []
        old = {path: self._parameter(outlet.layer.index, path) for path in self._names(outlet).values()}
        for step in steps(by, outlet):
            plainly = by == "replace_me"
            seen, held_back, size, moment = self._sums(cut, outlet, step, what, plainly=plainly)
            found = (fit_plainly if plainly and step.form == "full" else fit)(seen, held_back, step.form)
            if found.ridge is not None:
                self._fold(outlet, step, found, moment)
            fits.append(found)
        before, after, ridges = fits[0].before, fits[-1].after, tuple(found.ridge for found in fits)
        if after > before and by != "replace_me":  # behind a norm, a fit is folded approximately
            after, ridges = before, (None,) * len(fits)
            for path, value in old.items():
                self._change(outlet.layer.index, path, value)
        return RepairedCut(
            after=cut.after,
            removed=cut.removed,
            ridges=ridges,
            error_before=(before / size) ** 0.5,
            error_after=(after / size) ** 0.5,
        )

    def patch(self, cut: Cut, by: str, what: str) -> RepairedCut:
        """Patch the stream behind a cut."""
        numbers = self._show(range(len(self._read)), what)
        value, done = fit_stream(by, self._streams, cut.after, cut.removed, self._read, numbers)
        self._change(cut.after, STREAM, value)
        return done

    def _sums(
        self, cut: Cut, outlet: Outlet, step: Step, what: str, *, plainly: bool
    ) -> tuple[NormalEquations, NormalEquations, float, torch.Tensor]:
        """The equations of a step on the tokens to fit to, and on those held back; the sum of |Y|^2 of these, and the
        mean of x^T x.

        Args:
            plainly: the first token of each row takes no part.
        """
        sums: list[NormalEquations] = []
        size = counted = 0.0

        def see(number: int, whole: torch.Tensor, now: AtCut) -> None:
            nonlocal sums, size, counted
            portion, wanted = self._read[number], whole.to(now.stream.device).float()
            scale = portion.scale(wanted)
            x, y = scale * features(step, outlet, now.linear, now.last), scale * (wanted - now.stream.float())
            if plainly:  # no ridge is above what float32 rounds
                x, y = x.double(), y.double()
            kept = (portion.fitted, portion.held_back) if plainly else portion.with_sinks()
            masks = [torch.from_numpy(mask).to(x.device) for mask in kept]
            if not sums:
                sums = [NormalEquations.zero(x.shape[-1], y.shape[-1], x.device)] * 2
            sums = [
                one + NormalEquations.of(x[mask], y[mask], portion.weight) if mask.any() else one
                for one, mask in zip(sums, masks, strict=True)
            ]
            counted += portion.weight * float(scale[masks[0]].double().square().sum())
            size += portion.weight * float((scale * wanted)[masks[1]].double().square().sum())

        self._streams.visit(outlet, cut.last, see, self._show(range(len(self._read)), what))
        seen, held_back = sums
        return seen, held_back, size, seen.gram / counted

    def _fold(self, outlet: Outlet, step: Step, found: Fit, moment: torch.Tensor) -> None:
        """Change the weights of an outlet, in the model and in what is written; ``moment`` is that of `fold`."""
        layer = outlet.layer.index
        names = self._names(outlet)
        old = {field: self._parameter(layer, path) for field, path in names.items()}
        device = found.weights.device
        values = {field: tensor.to(device, torch.float64) for field, tensor in old.items()}
        transposed = is_transposed(outlet.layer.module.get_submodule(outlet.linear))
        linear = values["linear"] if transposed else values["linear"].T
        gain = values["gain"] + outlet.offset if "gain" in values else None
        new = fold(step, Weights(linear, values.get("bias"), gain), found.weights, moment, outlet.factor)
        folded = {
            "linear": new.linear if transposed else new.linear.T,
            "bias": new.bias,
            "gain": None if new.gain is None else new.gain - outlet.offset,
        }
        for field, path in names.items():
            value = folded[field]
            assert value is not None
            written = value.to(old[field].dtype).cpu().contiguous()
            if not torch.isfinite(written).all():
                raise RepairError(
                    f"The repair of layer {layer} does not fit into {written.dtype}.", "Use another `repair`."
                )
            self._change(layer, path, written)

    def _change(self, layer: int, path: str, value: torch.Tensor) -> None:
        self.tensors[layer, path] = value
        self._streams.change(layer, path, value)

    def _names(self, outlet: Outlet) -> Mapping[str, str]:
        """The parameters of an outlet; see `fold.parameters`."""
        return parameters(outlet, bias=self._streams.has(outlet.layer.index, f"{outlet.linear}.bias"))

    def _parameter(self, layer: int, path: str) -> torch.Tensor:
        """A parameter as it is to be written so far."""
        if (changed := self.tensors.get((layer, path))) is not None:
            return changed
        stored, loaded = self._stored((layer, path)), self._streams.value(layer, path)
        if loaded.is_meta:
            raise RepairError(
                f"'{path}' of layer {layer} is kept off the devices that compute, and cannot be changed.",
                "Use `partition` single, or device_map with more `max_memory`.",
            )
        if stored is None or stored.shape != loaded.shape or not torch.equal(stored.to(loaded.dtype), loaded.cpu()):
            raise RepairError(f"The files hold '{path}' of layer {layer} in another form than the model does.", _PLAIN)
        return stored


_PLAIN = (
    "Repair the checkpoint that it was quantized from, and quantize the result; or save it again with transformers' "
    "save_pretrained, if it is not quantized."
)


def _shape(outlet: Outlet, weight: torch.Tensor) -> tuple[int, int]:
    """Inputs and outputs of an outlet's linear map."""
    rows, columns = weight.shape
    return (rows, columns) if is_transposed(outlet.layer.module.get_submodule(outlet.linear)) else (columns, rows)


def _record(
    checkpoint: Checkpoint,
    made: Plan,
    repair: Repair,
    texts: Sequence[CorpusPlan],
    read: Sequence[Portion],
    done: Sequence[RepairedCut],
) -> RepairRecord:
    settings = repair.settings
    return RepairRecord(
        repair=repair.by,
        model=checkpoint.name,
        revision=checkpoint.revision,
        removed=made.drop,
        texts=tuple(
            RepairText(
                corpus=text.source,
                fingerprint=text.corpus_fingerprint,
                rows=text.num_sequences,
                tokens=count,
                weight=weight,
            )
            for text, count, weight in zip(texts, count_tokens(read, len(texts)), repair.weights, strict=True)
        ),
        cuts=tuple(done),
        sequence_length=settings.sequence_length,
        layout=settings.layout,
        skip_sequences=repair.skip_sequences,
        max_sequences=settings.max_sequences,
        dtype=settings.dtype,
    )


def _notes(made: Plan, by: str) -> list[str]:
    if 0 not in made.drop or by == REFIT_ALL:
        return []
    first = describe_layers([layer for layer in made.drop if set(range(layer)) <= set(made.drop)])
    return [f"Nothing stands before layers {first}: what they did is not given back."]
