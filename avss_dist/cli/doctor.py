"""`avss doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from avss_dist.cli.base import console


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of what was tried.")] = False,
) -> int:
    """Say what works here: devices, Ray, DeepSpeed, versions."""
    from avss_dist.system.doctor import findings

    out, made = console(), []
    for finding in findings():
        made.append(finding)
        if not as_json:
            out.print(f"[{'green]ok ' if finding.works else 'red]NO '}[/] {finding.what:<24}", end="")
            out.print(finding.detail, markup=False)
    if as_json:
        print(json.dumps([asdict(finding) for finding in made], indent=2))
    return 0 if all(finding.works for finding in made) else 1
