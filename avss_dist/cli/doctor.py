"""`avss doctor`."""

from __future__ import annotations

from dataclasses import asdict

from avss_dist.cli.options import TEXT_FORMATS, TextFormatOption
from avss_dist.system.streams import console, emit_json


def doctor(format: TextFormatOption = TEXT_FORMATS[0]) -> int:
    """Check what works on this machine: devices, Ray, DeepSpeed, versions."""
    from avss_dist.system.doctor import findings

    terminal, made = console(), []
    for finding in findings():
        made.append(finding)
        if format == "text":
            terminal.print(f"[{'green]ok ' if finding.works else 'red]NO '}[/] {finding.what:<24}", end="")
            terminal.print(finding.detail, markup=False)
    if format == "json":
        emit_json([asdict(finding) for finding in made], indent=2)
    return 0 if all(finding.works for finding in made) else 1
