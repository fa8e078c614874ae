"""`avss doctor`."""

from __future__ import annotations

from dataclasses import asdict

from avss_dist.core.settings import Request
from avss_dist.system.streams import console, emit_json


def doctor(_: Request, format: str) -> int:
    """Check what works on this machine: devices, Ray, DeepSpeed, versions."""
    from avss_dist.system.doctor import check_machine

    terminal, results = console(), []
    for result in check_machine():
        results.append(result)
        if format == "text":
            terminal.print(f"[{'green]ok ' if result.works else 'red]NO '}[/] {result.what:<24}", end="")
            terminal.print(result.detail, markup=False)
    if format == "json":
        emit_json([asdict(result) for result in results], indent=2)
    return 0 if all(result.works for result in results) else 1
