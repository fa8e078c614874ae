"""Interventions: the changes that are made to a model before it answers.

Layers, sublayers and routed experts are removed, the outputs of removed layers are scaled, weights are replaced by a
repair or rounded to a number format, and small activations become zero. Nothing here needs torch:
`models.causal_lm.LanguageModel.applying` carries an intervention out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from avss_dist.core.errors import ConfigError
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.text import count_of, describe_layers
from avss_dist.core.values import NewRow, TableRow

THRESHOLD = "threshold"
TOP_K = "top_k"
"""Criteria by which inputs of a linear map become zero: see `MapSparsity`."""
SPARSITY_RULES = ("all", "last-half")
"""Tokens at which activations are sparse: all; decoded tokens; decoded tokens and the last half of a prompt (as TEAL
evaluates); all but the first of a prompt."""
PARTS = ("attention", "mlp")
"""The sublayers of a layer."""
MAX_LAYERS = 10_000
"""Largest number of layers of a model that a plan can be for. Numbers of removals from here on stand for sublayers."""
MAX_EXPERTS = 10_000
"""Largest number of routed experts of a layer."""
_FIRST_EXPERT = 1_000_000  # number of expert 0 of layer 0
_NAMED_EXPERTS = 8  # maximum number of experts that a description names one by one
_SUBLAYER = re.compile(rf"({'|'.join(PARTS)})\.(\d{{1,9}})", re.ASCII)
_EXPERT = re.compile(r"expert\.(\d{1,9})\.(\d{1,4})", re.ASCII)
PART_NAMES = f"^({_SUBLAYER.pattern}|{_EXPERT.pattern})$"
"""Regular expression of the names of sublayers and experts."""


class _InsideLayer:
    """Order of the removals that are a part of a layer: after all layers, by number."""

    def __lt__(self, other: Removal) -> bool:
        return removal_number(self) < removal_number(other)  # type: ignore[arg-type]

    def __gt__(self, other: Removal) -> bool:
        return removal_number(self) > removal_number(other)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sublayer(_InsideLayer):
    """The attention or the MLP of a layer. Sublayers come after all layers, and MLPs after all attentions.

    Attributes:
        layer: index of the layer.
        part: one of `PARTS`.
    """

    layer: int
    part: str

    def __str__(self) -> str:
        return f"{self.part}.{self.layer}"


@dataclass(frozen=True)
class Expert(_InsideLayer):
    """A routed expert of a layer. Experts come after all sublayers.

    Attributes:
        layer: index of the layer.
        index: index of the expert in its layer.
    """

    layer: int
    index: int

    def __str__(self) -> str:
        return f"expert.{self.layer}.{self.index}"


Removal = int | Sublayer | Expert
"""A layer, by its index from 0, a sublayer, or a routed expert."""
Removals = tuple[Removal, ...]
"""A set of layers, sublayers and experts, ascending. Both sublayers of a layer are the layer."""


def removal_number(removal: Removal) -> int:
    """Return the number of a removal: a layer's index, 10000 + i or 20000 + i for the attention or the MLP of layer i,
    and 1000000 + 10000 i + j for routed expert j of layer i.

    Fingerprints are made of these numbers, and files of schema 3 have them in their column ``drop``.
    """
    if isinstance(removal, Expert):
        return _FIRST_EXPERT + removal.layer * MAX_EXPERTS + removal.index
    if isinstance(removal, Sublayer):
        return MAX_LAYERS * (1 + PARTS.index(removal.part)) + removal.layer
    return removal


def removal_numbers(removals: Iterable[Removal]) -> list[int]:
    """Return the numbers of removals, for fingerprints. See `removal_number`."""
    return [removal_number(removal) for removal in removals]


def numbered_removal(number: int) -> Removal:
    """Return the removal of a number, the inverse of `removal_number`."""
    if number >= _FIRST_EXPERT:
        layer, index = divmod(number - _FIRST_EXPERT, MAX_EXPERTS)
        return Expert(layer, index)
    place, layer = divmod(number, MAX_LAYERS)
    if 0 < place <= len(PARTS):
        return Sublayer(layer, PARTS[place - 1])
    return number


def removal_columns(removals: Removals) -> dict[str, list[int] | list[str]]:
    """Return the columns of a stored row that say what was removed. `stored_removals` is the inverse."""
    parts = [str(removal) for removal in removals if not isinstance(removal, int)]
    return {"drop": list(whole_layers(removals)), "drop_parts": parts}


def stored_removals(row: TableRow) -> Removals:
    """Return the removals of a stored row with the columns ``drop`` (layers) and ``drop_parts`` (all others)."""
    parts = [parse_removal(name) for name in row["drop_parts"]]
    return (*row["drop"], *parts)


def parse_removal(value: object) -> Removal:
    """Return the layer, sublayer or expert that a value in a file names: ``7``, ``attention.7`` or ``expert.7.12``.

    Raises:
        ConfigError: the value names none of them.
    """
    if isinstance(value, Sublayer | Expert) or (type(value) is int and value >= 0):
        return value
    if isinstance(value, str):
        sublayer = _SUBLAYER.fullmatch(value)
        if sublayer:
            return Sublayer(int(sublayer[2]), sublayer[1])
        expert = _EXPERT.fullmatch(value)
        if expert:
            return Expert(int(expert[1]), int(expert[2]))
    raise ConfigError(
        f"{value!r} is neither a layer nor a sublayer nor an expert.",
        "Expected the index of a layer, from 0 (7), the name of a sublayer (attention.7, mlp.7), or that of a routed "
        "expert (expert.7.12: expert 12 of layer 7).",
    )


def removal_names(removals: Iterable[Removal]) -> list[int | str]:
    """Return removals as files have them: a layer as its index, others as their names. See `parse_removal`."""
    return [removal if isinstance(removal, int) else str(removal) for removal in removals]


def layer_of(removal: Removal) -> int:
    """Return the index of a layer, or of the layer that a sublayer or an expert is in."""
    if isinstance(removal, int):
        return removal
    return removal.layer


def sublayers_of(layers: Iterable[int]) -> list[Sublayer]:
    """Return the attention and the MLP of each layer."""
    sublayers = []
    for layer in layers:
        for part in PARTS:
            sublayers.append(Sublayer(layer, part))
    return sublayers


def whole_layers(removals: Iterable[Removal]) -> tuple[int, ...]:
    """Return the layers that are removed as a whole."""
    return tuple(removal for removal in removals if isinstance(removal, int))


def experts_by_layer(removals: Iterable[Removal]) -> dict[int, tuple[int, ...]]:
    """Return the indices of the removed experts of each layer that loses some, ascending."""
    by_layer: dict[int, tuple[int, ...]] = {}
    for expert in sorted(removal for removal in removals if isinstance(removal, Expert)):
        by_layer[expert.layer] = (*by_layer.get(expert.layer, ()), expert.index)
    return by_layer


def joined(removals: Iterable[Removal]) -> Removals:
    """Return removals as a set: a layer for both of its sublayers, and nothing inside of what is removed."""
    every: set[Removal] = set(removals)
    for layer in {layer_of(removal) for removal in every}:
        if every.issuperset(sublayers_of([layer])):
            every.add(layer)
    outermost = [removal for removal in every if every.isdisjoint(_around(removal))]
    return tuple(sorted(outermost))


def _around(removal: Removal) -> list[Removal]:
    """Return the removals that a sublayer or an expert is a part of: its layer, and the MLP of an expert."""
    if isinstance(removal, int):
        return []
    if isinstance(removal, Expert):
        return [removal.layer, Sublayer(removal.layer, "mlp")]
    return [removal.layer]


def can_be_added(removal: Removal, removals: Collection[Removal]) -> bool:
    """Whether a set contains neither the removal nor the layer or sublayers that overlap with it."""
    overlapping: list[Removal] = [removal]
    if isinstance(removal, int):
        overlapping += sublayers_of([removal])
    else:
        overlapping += _around(removal)
    return not any(part in removals for part in overlapping)


def describe_removed(removals: Collection[Removal]) -> str:
    """Return removals as text: ``0-3, 7, attention.5, mlp.8, mlp.9``, or ``64 experts of layers 1-16``."""
    names = []
    layers = whole_layers(removals)
    if layers:
        names.append(describe_layers(layers))
    names += [str(removal) for removal in removals if isinstance(removal, Sublayer)]
    experts = [str(removal) for removal in removals if isinstance(removal, Expert)]
    if len(experts) > _NAMED_EXPERTS:
        places = tuple(experts_by_layer(removals))
        noun = "layer" if len(places) == 1 else "layers"
        names.append(f"{len(experts)} experts of {noun} {describe_layers(places)}")
    else:
        names += experts
    return ", ".join(names)


def size_removed(removals: Collection[Removal]) -> float:
    """Return the number of removed layers, where a sublayer counts as a half and an expert as nothing."""
    size = 0.0
    for removal in removals:
        if isinstance(removal, int):
            size += 1
        elif isinstance(removal, Sublayer):
            size += 0.5
    return size


def count_removed(removals: Collection[Removal]) -> str:
    """Return counts as text: ``8 layers``, ``1 layer``, ``7 layers, 2 sublayers``, or ``32 experts``."""
    if not removals:
        return count_of(0, "layer")
    kinds = [type(removal) for removal in removals]
    numbers = {"layer": kinds.count(int), "sublayer": kinds.count(Sublayer), "expert": kinds.count(Expert)}
    return ", ".join(count_of(number, noun) for noun, number in numbers.items() if number)


@dataclass(frozen=True, kw_only=True)
class MapSparsity:
    """Rule by which inputs of one linear map become zero.

    Attributes:
        layer, path: the map: its layer, and its module path below the layer.
        outputs, inputs: shape of the whole map.
        by: rule: `THRESHOLD` zeroes inputs up to size ``value``; `TOP_K` the smallest share ``value`` of each token's
            inputs.
        weighted: the size of an input is its absolute value times the norm of the column of the weight that it meets
            (WINA, arXiv 2505.19427); otherwise its absolute value.
    """

    layer: int
    path: str
    outputs: int
    inputs: int
    by: str
    value: float
    weighted: bool = False


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Rules by which activations of a model become zero, and the tokens at which: see `SPARSITY_RULES`."""

    maps: tuple[MapSparsity, ...] = field(repr=False)
    rule: str

    @cached_property
    def key(self) -> str:
        """SHA-256 of the rules, in hex."""
        constant = {"center": 0.0, "kept": 0, "group": 0}  # fields of version 0.2, so that its keys stay the same
        return fingerprint(cuts=[asdict(rule) | constant for rule in self.maps], rule=self.rule)


@dataclass(frozen=True, kw_only=True)
class RoundedPlace:
    """Linear maps whose weights are rounded to a number format.

    Attributes:
        layer: index of the layer.
        path: module path of a map below the layer; None for all linear maps of the layer.
        format: name of the format, of `number_formats.FORMATS`.
    """

    layer: int
    path: str | None = None
    format: str

    def __str__(self) -> str:
        if self.path:
            return f"{self.format}@{self.layer}.{self.path}"
        return f"{self.format}@{self.layer}"


_PLACE = re.compile(r"([^@]+)@(\d{1,9})(?:\.(.+))?", re.ASCII)


def parse_rounded(key: str) -> RoundedPlace | None:
    """Return the place of a `Rounding` with one place from its key, or None for the key of several places."""
    match = _PLACE.fullmatch(key)
    if not match:
        return None
    return RoundedPlace(format=match[1], layer=int(match[2]), path=match[3])


@dataclass(frozen=True)
class Rounding:
    """Weights of linear maps that are rounded to number formats. The place of a map overrides that of its layer."""

    places: tuple[RoundedPlace, ...] = field(repr=False)

    @cached_property
    def key(self) -> str:
        """Text of the place if there is one (``int4@7``, ``int4@7.mlp.up_proj``), else SHA-256 of all, in hex."""
        texts = sorted(str(place) for place in self.places)
        if len(texts) == 1:
            return texts[0]
        return fingerprint(rounded=texts)

    @property
    def layers(self) -> frozenset[int]:
        """Indices of the layers with a rounded weight."""
        return frozenset(place.layer for place in self.places)

    def formats(self, layer: int, paths: Iterable[str]) -> dict[str, str]:
        """Return the name of the format of each rounded map of a layer, by path.

        Args:
            paths: paths of all linear maps of the layer.
        """
        of_layer = {place.path: place.format for place in self.places if place.layer == layer}
        formats = {}
        for path in paths:
            if path in of_layer:
                formats[path] = of_layer[path]
            elif None in of_layer:
                formats[path] = of_layer[None]
        return formats


def round_place(name: str, layer: int, path: str | None = None) -> Rounding:
    """Return the rounding of one layer, or of one linear map, to a format."""
    return Rounding((RoundedPlace(format=name, layer=layer, path=path),))


@dataclass(frozen=True)
class EncodedPatch:
    """Encoded weights that replace a model's own. Patches with the same key are equal.

    Attributes:
        key: SHA-256 of the bytes, in hex.
        read: returns the weights as `models.change.patches.encode_patch` encodes them.
    """

    key: str
    read: Callable[[], bytes] = field(compare=False, repr=False)


class InterventionKey(NamedTuple):
    """Key of an intervention, as stored in rows of ``cells``, ``evaluations`` and ``experiments``.

    Attributes:
        removed: as for `Intervention`.
        patch, sparsity, rounding: their keys; None without one.
    """

    removed: Removals = ()
    patch: str | None = None
    sparsity: str | None = None
    rounding: str | None = None

    @classmethod
    def of_row(cls, row: TableRow) -> InterventionKey:
        """Return the key of a stored row. Columns that older files do not have are null."""
        return cls(
            removed=stored_removals(row),
            patch=row.get("patch"),
            sparsity=row.get("sparsity_plan"),
            rounding=row.get("rounding"),
        )

    def row(self) -> NewRow:
        """Return the columns of a stored row."""
        return {
            **removal_columns(self.removed),
            "patch": self.patch,
            "sparsity_plan": self.sparsity,
            "rounding": self.rounding,
        }


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """Changes that are made to a model before it answers. The default makes none.

    Attributes:
        removed: layers, sublayers and routed experts that the model computes without.
        patch: weights that replace the model's own.
        sparsity: rules by which activations become zero.
        rounding: weights, of those after the patch, that are rounded to number formats.
    """

    removed: Removals = ()
    patch: EncodedPatch | None = None
    sparsity: Sparsity | None = None
    rounding: Rounding | None = None

    def __bool__(self) -> bool:
        return self != NO_INTERVENTION

    @property
    def key(self) -> InterventionKey:
        """Key of the intervention, which rows of results also have."""
        return InterventionKey(
            removed=self.removed,
            patch=None if self.patch is None else self.patch.key,
            sparsity=None if self.sparsity is None else self.sparsity.key,
            rounding=None if self.rounding is None else self.rounding.key,
        )

    def split(self) -> tuple[Intervention, Intervention]:
        """Return the changes of weights and activations, and the removals, as two interventions."""
        return replace(self, removed=()), Intervention(removed=self.removed)

    def differing_layers(self, other: Intervention) -> set[int]:
        """Return the layers at which two interventions differ, of those that they remove and round."""
        removals = set(self.removed) ^ set(other.removed)
        layers = {layer_of(removal) for removal in removals}
        places = set(self._rounded_places()) ^ set(other._rounded_places())
        layers.update(place.layer for place in places)
        return layers

    def _rounded_places(self) -> tuple[RoundedPlace, ...]:
        if self.rounding is None:
            return ()
        return self.rounding.places

    def without(self, *more: Removal) -> Intervention:
        """Return the intervention with more layers, sublayers or experts removed."""
        return replace(self, removed=joined([*self.removed, *more]))


NO_INTERVENTION = Intervention()
"""The unchanged model."""
