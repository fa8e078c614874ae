"""`avss prune`: a checkpoint without the layers of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.options import (
    CodeOption,
    ModelArgument,
    SkipSequencesOption,
    choice,
    takes_settings,
)
from avss_dist.errors import ConfigError
from avss_dist.settings import NO_REPAIR, REPAIRS, Execution, Settings
from avss_dist.system.streams import emit
from avss_dist.text import describe_bytes

if TYPE_CHECKING:
    from avss_dist.pruning.repair.repair import Repair


READING = ("max_sequences", "sequence_length", "batch_size", "layout", "dtype", "dequantize", "attention", "device")
MEMORY = ("partition", "max_memory", "offload_folder")


@takes_settings(*READING, *MEMORY)
def prune(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="PLAN.yaml, by avss plan or by hand.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    repair: Annotated[
        str | None,
        choice(
            (NO_REPAIR, *REPAIRS),
            "What is fitted at each cut, to give back what the removed layers did; map by default where there is text.",
            checked=False,  # a repair that no checkpoint can hold is refused with the reason
        ),
    ] = None,
    repair_corpus: Annotated[
        list[str] | None,
        typer.Option(help="Text that the repair is fitted on, CORPUS or CORPUS=WEIGHT; repeatable."),
    ] = None,
    skip_sequences: SkipSequencesOption = 0,
    trust_remote_code: CodeOption = False,
    **options: Any,
) -> None:
    """Write a checkpoint without the layers that a plan drops, in little memory; on request, a repaired one."""
    from avss_dist.pruning.checkpoint import prune as prune_checkpoint
    from avss_dist.pruning.plan import read_plan

    made = read_plan(plan)
    execution = Execution(**{name: options.pop(name) for name in MEMORY if name in options})
    settings = Settings(**options, trust_remote_code=trust_remote_code)
    wanted = _repair(repair, repair_corpus or [], skip_sequences, settings)
    emit("\n  ".join([f"{plan}:", *made.describe()]))
    done = prune_checkpoint(model, made, out, repair=wanted, execution=execution, trust_remote_code=trust_remote_code)
    emit(f"{out}: {len(made.keep)} of {made.num_layers} layers, {describe_bytes(done['bytes'])} of weights.")
    for line in done["repair"].describe() if done["repair"] else ():
        emit(line)
    if done["difference"] is None:
        emit("Layers have the shapes and settings that they had.")
    else:
        repaired = " and the repaired weights" if wanted else ""
        emit(
            f"Outputs are those of the original with the layers skipped{repaired} "
            f"(largest difference {done['difference']:g})."
        )
    for note in done["notes"]:
        emit(note)


def _repair(by: str | None, corpora: Sequence[str], skip_sequences: int, settings: Settings) -> Repair | None:
    """What was asked for; options of a repair without one are refused."""
    from avss_dist.pruning.repair.repair import Repair

    by = by or ("map" if corpora else NO_REPAIR)
    if by != NO_REPAIR and not corpora:
        raise ConfigError(f"`repair` {by} is fitted on text, and there is none.", "Name it with `repair_corpus`.")
    if by != NO_REPAIR:
        return Repair(by=by, corpora=tuple(corpora), skip_sequences=skip_sequences, settings=settings)
    default = Settings(trust_remote_code=settings.trust_remote_code)
    given = [name for name, value in settings.as_dict().items() if value != getattr(default, name)]
    given += [name for name, value in (("skip_sequences", skip_sequences), ("repair_corpus", corpora)) if value]
    if given:
        raise ConfigError(f"`{given[0]}` has no effect without a repair.", "Leave it out, or name a `repair`.")
    return None
