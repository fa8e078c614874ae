"""The model card of a pruned checkpoint."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from avss_dist.core.intervention import count_removed
from avss_dist.core.text import describe_layers, escape_markdown, printable
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.pruning.plan import Plan, describe_reason
from avss_dist.pruning.repair.record import RepairRecord

_BASE = re.compile(r"Base model at (\w+)\.")
TAGS = ("layer-pruning", "expert-pruning")
LICENSE = ("license", "license_name", "license_link")


def model_card(
    checkpoint: Checkpoint, plan: Plan, notes: list[str] | None = None, repair: RepairRecord | None = None
) -> str:
    """Return a model card with the removed layers and experts and the reason, the repair, and the license."""
    name = checkpoint.name if checkpoint.source == "hub" else Path(checkpoint.path).name
    fields = {
        "base_model": name,
        "base_model_relation": "finetune",  # the nearest of the relations that the hub knows
        **source_license(checkpoint.folder),
        "library_name": "transformers",
        "tags": [
            "pruned",
            *(tag for tag, dropped in zip(TAGS, (plan.dropped_layers, plan.experts), strict=True) if dropped),
        ],
    }
    head = printable("\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()))
    source = f", of run {plan.run_id}" if plan.run_id else ""
    known = [*(f"Finding: {line}" for line in plan.findings), *(notes or []), *(repair.describe() if repair else [])]
    known.append(f"Evaluated: {' '.join(plan.evaluated) or 'not when it was planned.'}")
    without = count_removed(plan.drop) if plan.experts else f"{len(plan.drop)} of its {plan.num_layers} layers"
    return (
        f"---\n{head}\n---\n\n# {escape_markdown(name)} without {without}\n\n{_describe_changes(plan, repair)}\n\n"
        f"Chosen {escape_markdown(describe_reason(plan.why))}{source}. Base model at {checkpoint.revision}.\n\n"
        + "".join(f"- {escape_markdown(line)}\n" for line in known)
        + "\nWritten by avss_dist.\n"
    )


def _describe_changes(plan: Plan, repair: RepairRecord | None) -> str:
    """Return sentences with the removed layers and experts, and the changed weights."""
    sentences = []
    if plan.dropped_layers:
        sentences.append(f"Removed, counted from 0: {', '.join(map(str, plan.dropped_layers))}.")
    if plan.experts:
        experts = (f"layer {layer}: {', '.join(map(str, indices))}" for layer, indices in plan.experts.items())
        sentences.append(f"Removed routed experts, both counted from 0: {'; '.join(experts)}.")
    changed = [cut.after for cut in repair.cuts if cut.changed] if repair else []
    if changed:
        sentences.append(f"Of the others, the MLP's last map is changed in {describe_layers(changed)}.")
    else:
        sentences.append("The others are unchanged.")
    return " ".join(sentences)


def pruned_from(folder: Path) -> tuple[str, str] | None:
    """Return base model and revision from the card of a pruned checkpoint, or None for another checkpoint."""
    try:
        values, text = _front_matter(folder), (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    revision = _BASE.search(text)
    if not isinstance(values, dict) or not {*TAGS}.intersection(values.get("tags") or ()) or not revision:
        return None
    name = values.get("base_model")
    return (name, revision[1]) if isinstance(name, str) and name else None


def source_license(folder: Path) -> dict[str, Any]:
    """Return the license that a checkpoint's model card names, else its configuration. Empty if neither does."""
    for read in (_front_matter, _config):
        with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
            values = read(folder)
            if isinstance(values, dict) and values.get("license"):
                return {key: str(values[key]) for key in LICENSE if values.get(key)}
    return {}


def _front_matter(folder: Path) -> Any:
    begin, head, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return None if begin.strip() else yaml.safe_load(head)


def _config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
