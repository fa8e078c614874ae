"""Mends cuts one after the other, in a model that is open; see `repair`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from avss_dist.errors import CorpusError
from avss_dist.models.patching import STREAM, Parameter
from avss_dist.pruning.repair.cuts import Cut, layer_behind
from avss_dist.pruning.repair.fold import Step, Weights, features, fold, num_unknowns, parameters, steps
from avss_dist.pruning.repair.normal_equations import Fit, NormalEquations, fit, fit_plainly
from avss_dist.pruning.repair.outlet import Outlet, RepairError, Seen, is_transposed
from avss_dist.pruning.repair.record import RepairedCut
from avss_dist.pruning.repair.rivals import fit_stream
from avss_dist.pruning.repair.streams import AtCut, Streams
from avss_dist.pruning.repair.text import Portion
from avss_dist.settings import REFITS_BEHIND, RIVAL_PATCHES
from avss_dist.system.progress_bar import tracked

TOKENS_PER_UNKNOWN = 4  # at least; with fewer, a fit follows its text's noise

ReadStored = Callable[[Parameter], torch.Tensor | None]  # a parameter as the checkpoint's files have it, if they do


@dataclass(frozen=True)
class Sharing:
    """How copies of a model share the batches of a fit.

    Attributes:
        local_indices: returns the indices of the batches that this copy takes, given their count.
        all_reduce: makes each tensor its sum over all copies, in place.
    """

    local_indices: Callable[[int], Sequence[int]] = range
    all_reduce: Callable[[Sequence[torch.Tensor]], None] = lambda _tensors: None


ALONE = Sharing()


class Mender:
    """Mends cuts one after the other; each sees what was changed before it.

    Attributes:
        tensors: what was changed so far, in the dtypes of the checkpoint's files.
    """

    def __init__(self, streams: Streams, stored: ReadStored, read: Sequence[Portion], sharing: Sharing) -> None:
        self.tensors: dict[Parameter, torch.Tensor] = {}
        self._streams, self._stored, self._read = streams, stored, read
        self._own, self._sharing = sharing.local_indices(len(read)), sharing

    def mend_all(self, cuts: Sequence[Cut], by: str, layers: int) -> list[RepairedCut]:
        """Mend or patch cuts of a model of so many layers, in order; what cannot be mended is refused first."""
        names = [f"Repairing cut {number} of {len(cuts)}" for number in range(1, len(cuts) + 1)]
        if by in RIVAL_PATCHES:
            return [self.patch(cut, by, name) for cut, name in zip(cuts, names, strict=True)]
        outlets = [self._streams.outlet(cut.after) for cut in cuts]
        for outlet in outlets:
            self.require_tokens(outlet, by)
            self.require_plain(outlet.layer.index, outlet.linear)
        behind = [layer_behind(cut, layers) if by in REFITS_BEHIND else None for cut in cuts]
        readers = [[] if layer is None else self.plain_readers(layer) for layer in behind]
        done = []
        for cut, outlet, layer, groups, name in zip(cuts, outlets, behind, readers, names, strict=True):
            done.append(self.mend(cut, outlet, by, name))
            if layer is not None and groups:
                done.append(self.mend_readers(layer, groups, f"{name}, behind it"))
        return done

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

    def plain_readers(self, layer: int) -> list[Sequence[str]]:
        """The maps of a layer that can be fitted again, by what they read; see `readers.find_readers`."""
        groups = self._streams.readers(layer)
        for module in (module for group in groups for module in group):
            self.require_plain(layer, module)
        return groups

    def require_plain(self, layer: int, module: str) -> None:
        """Refuse weights that the files hold in a form into which no repair can be written."""
        path = f"{module}.weight"
        stored = self._stored((layer, path))
        if stored is None or not stored.is_floating_point() or stored.dtype.itemsize == 1:
            form = "under other names" if stored is None else f"as {str(stored.dtype).removeprefix('torch.')}"
            raise RepairError(
                f"The files hold '{path}' of layer {layer} {form}, quantized or fused: nothing can be added to it.",
                PLAIN,
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

    def mend_readers(self, layer: int, groups: Sequence[Sequence[str]], what: str) -> RepairedCut:
        """Fit the linear maps of the layer behind a cut to give what they give in the whole model, group by group."""
        fits, size = [], 0.0
        for group in groups:
            seen, held_back, length = self._map_sums(layer, group, what)
            found = fit(seen, held_back, "full")
            fits.append(found)
            size += length
            if found.ridge is not None:
                outputs = [self._output_size(layer, path) for path in group]
                for path, fitted in zip(group, found.weights.split(outputs, dim=1), strict=True):
                    self._add(layer, path, fitted)
        before, after = (sum(errors) for errors in zip(*((one.before, one.after) for one in fits), strict=True))
        return RepairedCut(
            after=layer,
            removed=(),
            ridges=tuple(one.ridge for one in fits),
            error_before=(before / size) ** 0.5,
            error_after=(after / size) ** 0.5,
            maps=tuple(path for group in groups for path in group),
        )

    def _map_sums(self, layer: int, group: Sequence[str], what: str) -> tuple[NormalEquations, NormalEquations, float]:
        """The equations of what maps that read the same fail to give, on the tokens to fit to, and on those held back;
        and the sum of squares of what they are to give these."""
        sums: list[NormalEquations] = []
        size = 0.0

        def see(number: int, whole: Mapping[str, Seen], now: Mapping[str, Seen]) -> None:
            nonlocal sums, size
            portion, x = self._read[number], now[group[0]].input.float()
            wanted, given = (torch.cat([seen[path].output.float() for path in group], -1) for seen in (whole, now))
            wanted = wanted.to(x.device)
            masks = [torch.from_numpy(mask).to(x.device) for mask in portion.with_sinks()]
            sums = _added(sums, x, wanted - given, masks, portion.weight)
            size += portion.weight * float(wanted[masks[1]].double().square().sum())

        self._streams.visit_maps(layer, group, see, tracked(self._own, what))
        (seen, held_back), (size,) = self._of_all_copies(sums, size)
        return seen, held_back, size

    def _output_size(self, layer: int, path: str) -> int:
        transposed = is_transposed(self._streams.layer(layer).module.get_submodule(path))
        return self._streams.value(layer, f"{path}.weight").shape[1 if transposed else 0]

    def _add(self, layer: int, path: str, fitted: torch.Tensor) -> None:
        """Add a fit, float64[inputs, outputs], to a linear map."""
        old = self._parameter(layer, f"{path}.weight")
        transposed = is_transposed(self._streams.layer(layer).module.get_submodule(path))
        new = old.to(fitted.device, torch.float64) + (fitted if transposed else fitted.T)
        self._change(layer, f"{path}.weight", _written(new, old, layer))

    def patch(self, cut: Cut, by: str, what: str) -> RepairedCut:
        """Patch the stream behind a cut."""
        numbers = tracked(range(len(self._read)), what)
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
            sums = _added(sums, x, y, masks, portion.weight)
            counted += portion.weight * float(scale[masks[0]].double().square().sum())
            size += portion.weight * float((scale * wanted)[masks[1]].double().square().sum())

        self._streams.visit(outlet, cut.last, see, tracked(self._own, what))
        (seen, held_back), (size, counted) = self._of_all_copies(sums, size, counted)
        return seen, held_back, size, seen.gram / counted

    def _of_all_copies(
        self, sums: Sequence[NormalEquations], *numbers: float
    ) -> tuple[list[NormalEquations], list[float]]:
        """Equations and numbers, each its sum over the copies that share the batches."""
        floats = torch.tensor(numbers, dtype=torch.float64, device=sums[0].gram.device)
        counts = torch.tensor([one.count for one in sums], device=floats.device)
        self._sharing.all_reduce([floats, counts, *(t for one in sums for t in (one.gram, one.cross, one.target))])
        return [replace(one, count=n) for one, n in zip(sums, counts.tolist(), strict=True)], floats.tolist()

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
            self._change(layer, path, _written(value, old[field], layer))

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
            raise RepairError(f"The files hold '{path}' of layer {layer} in another form than the model does.", PLAIN)
        return stored


PLAIN = (
    "Repair the checkpoint that it was quantized from, and quantize the result; or save it again with transformers' "
    "save_pretrained, if it is not quantized."
)


def _added(
    sums: Sequence[NormalEquations], x: torch.Tensor, y: torch.Tensor, masks: Sequence[torch.Tensor], weight: float
) -> list[NormalEquations]:
    """Equations, one for each mask of tokens, with those of a batch; at first there are none."""
    sums = sums or [NormalEquations.zero(x.shape[-1], y.shape[-1], x.device) for _ in masks]
    return [
        one + NormalEquations.of(x[mask], y[mask], weight) if mask.any() else one
        for one, mask in zip(sums, masks, strict=True)
    ]


def _written(value: torch.Tensor, old: torch.Tensor, layer: int) -> torch.Tensor:
    """A parameter in the dtype in which the files have it.

    Raises:
        RepairError: it does not fit.
    """
    written = value.to(old.dtype).cpu().contiguous()
    if not torch.isfinite(written).all():
        raise RepairError(f"The repair of layer {layer} does not fit into {written.dtype}.", "Use another `repair`.")
    return written


def _shape(outlet: Outlet, weight: torch.Tensor) -> tuple[int, int]:
    """Inputs and outputs of an outlet's linear map."""
    rows, columns = weight.shape
    return (rows, columns) if is_transposed(outlet.layer.module.get_submodule(outlet.linear)) else (columns, rows)
