"""`avss plan` and `avss prune`: which layers to drop, and a checkpoint without them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avss_dist.cli.choose import choose_runs, choose_scores
from avss_dist.cli.options import CodeOption, RecipeOption, RunOption, SiteOption, ThresholdOption, WarehousePath
from avss_dist.errors import ConfigError, require_known
from avss_dist.settings import GROUND_TRUTH, PUBLISHED_THRESHOLD, RECIPES, SCORES, SITES
from avss_dist.text import describe_bytes

FORMATS = ("plan", "mergekit")


def plan(
    warehouse: WarehousePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="PLAN.yaml.")],
    run: RunOption = None,
    by: Annotated[
        str,
        typer.Option(help=f"{', '.join(SCORES)}; {', '.join(GROUND_TRUTH)} (by avss ablate); random."),
    ] = "avss",
    fraction: Annotated[float | None, typer.Option(help="Drop this share of the layers; 0.25 by default.")] = None,
    count: Annotated[int | None, typer.Option(help="Drop so many layers.")] = None,
    mass: Annotated[float | None, typer.Option(help="Drop the lowest that hold this share of the score.")] = None,
    protect: Annotated[str, typer.Option(help="Layers that stay: first=1,last=1.")] = "",
    contiguous: Annotated[bool, typer.Option("--contiguous", help="Drop neighbours.")] = False,
    seed: Annotated[int, typer.Option(help="Of --by random.")] = 0,
    recipe: RecipeOption = RECIPES[0],
    site: SiteOption = SITES[0],
    threshold: ThresholdOption = f"{PUBLISHED_THRESHOLD:g}",
    format: Annotated[str, typer.Option("--format", help="plan, or mergekit (slices to merge).")] = FORMATS[0],
) -> None:
    """Choose the layers to drop from a run's scores, and write them down with the reason."""
    require_known("format", format, FORMATS)
    from avss_dist.pruning.ground_truth import layer_truth
    from avss_dist.pruning.plan import Choice, make_plan, mergekit_slices, write_text
    from avss_dist.warehouse.reader import Warehouse

    first, last = _protected(protect)
    choice = Choice(
        by=by, fraction=fraction, count=count, mass=mass, first=first, last=last, contiguous=contiguous, seed=seed
    )
    opened = Warehouse(warehouse)
    runs = choose_runs(opened, [run] if run else [])
    truth = layer_truth(opened, runs[0], by) if by in GROUND_TRUTH else None
    made = make_plan(choose_scores(opened, runs, site, recipe, threshold), runs[0], choice, truth)
    if format == "mergekit":
        write_text(output, mergekit_slices(made))
    else:
        made.write(output)
    print(f"{output}: drops {len(made.drop)} of {made.num_layers} layers: {', '.join(map(str, made.drop))}")


def prune(
    model: Annotated[str, typer.Argument(help="Hub id (org/name@revision), or folder: the one that was scored.")],
    plan: Annotated[Path, typer.Argument(help="PLAN.yaml, by avss plan or by hand.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    trust_remote_code: CodeOption = False,
) -> None:
    """Write a checkpoint without the layers that a plan drops; any size, in little memory."""
    from avss_dist.pruning.checkpoint import prune as prune_checkpoint
    from avss_dist.pruning.plan import read_plan

    made = read_plan(plan)
    done = prune_checkpoint(model, made, out, trust_remote_code=trust_remote_code)
    print(f"{out}: {len(made.keep)} of {made.num_layers} layers, {describe_bytes(done['bytes'])} of weights.")
    if done["difference"] is None:
        print("Layers have the shapes and settings that they had; no room to compare the outputs of both models.")
    else:
        print(f"Outputs are those of the original with the layers skipped (largest difference {done['difference']:g}).")


def _protected(text: str) -> tuple[int, int]:
    """Read ``first=1,last=2``."""
    found = {"first": 0, "last": 0}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        require_known("end in --protect", name, found)
        if not number.isdecimal():
            raise ConfigError(f"--protect {part} names no number.", "Write --protect first=1,last=1.")
        found[name] = int(number)
    return found["first"], found["last"]
