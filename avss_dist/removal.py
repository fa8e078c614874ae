"""What can be left out of a model, each named by one number: a layer by its index, a sublayer by a larger one.

So a set of them is an ascending tuple, and a key, whatever it is made of. Leaving out both sublayers of a layer is
leaving out the layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from avss_dist.text import count_of, describe_layers

Drop = tuple[int, ...]
"""What is left out, ascending."""
SUBLAYERS = {"attention": 10_000, "mlp": 20_000}
"""What is added to a layer's index to name its attention or its MLP alone."""
MAX_LAYERS = min(SUBLAYERS.values())
"""Most layers of a model of which some can be left out: a larger index would name a sublayer."""


def layer_of(removed: int) -> int:
    """The layer that it is, or that it is in."""
    return removed % MAX_LAYERS


def sublayers_of(layers: Iterable[int]) -> list[int]:
    """The attention and the MLP of each of some layers."""
    return [first + layer for layer in layers for first in SUBLAYERS.values()]


def is_whole(removed: int) -> bool:
    """Whether it is a layer, and no sublayer of one."""
    return removed < MAX_LAYERS


def whole_layers(drop: Iterable[int]) -> Drop:
    """The layers that are left out as a whole."""
    return tuple(removed for removed in drop if is_whole(removed))


def layers_by_sublayer(drop: Iterable[int]) -> dict[str, Drop]:
    """The layers whose attention alone is left out, and those whose MLP is."""
    within = [removed for removed in drop if not is_whole(removed)]
    return {
        kind: tuple(layer_of(removed) for removed in within if removed - layer_of(removed) == first)
        for kind, first in SUBLAYERS.items()
    }


def joined(removed: Iterable[int]) -> Drop:
    """As a set: a layer for both of its sublayers, and nothing within a layer that is left out."""
    found = {*removed}
    found |= {layer for layer in map(layer_of, found) if found.issuperset(sublayers_of([layer]))}
    return tuple(sorted(one for one in found if is_whole(one) or layer_of(one) not in found))


def can_be_added(removed: int, drop: Collection[int]) -> bool:
    """Whether it is left out beside others, none of which is in it or has it."""
    others = sublayers_of([removed]) if is_whole(removed) else [layer_of(removed)]
    return removed not in drop and not any(other in drop for other in others)


def describe_removed(drop: Iterable[int]) -> str:
    """``0-3, 7, attention of 5, MLP of 8-9``."""
    return ", ".join(_described([*drop]))


def _described(drop: list[int]) -> Iterator[str]:
    if whole := whole_layers(drop):
        yield describe_layers(whole)
    attention, mlp = layers_by_sublayer(drop).values()
    if attention:
        yield f"attention of {describe_layers(attention)}"
    if mlp:
        yield f"MLP of {describe_layers(mlp)}"


def size_removed(drop: Collection[int]) -> float:
    """How many layers it is, sublayers being halves."""
    return (len(drop) + len(whole_layers(drop))) / 2


def count_removed(drop: Collection[int]) -> str:
    """``8 layers``, ``1 layer``, or ``7 layers, 2 sublayers``."""
    whole = len(whole_layers(drop))
    within = len(drop) - whole
    counts = {"layer": whole, "sublayer": within}
    return ", ".join(count_of(n, name) for name, n in counts.items() if n or (name == "layer" and not within))
