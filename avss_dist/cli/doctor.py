"""`avss doctor`."""

from __future__ import annotations

from avss_dist.cli.base import console


def doctor() -> int:
    """Say what works here: devices, Ray, DeepSpeed, versions."""
    from avss_dist.system.doctor import findings

    out = console()
    works = True
    for what, fine, seen in findings():
        works &= fine
        out.print(f"[{'green' if fine else 'red'}]{'ok ' if fine else 'NO '}[/] {what:<24}", end="")
        out.print(seen, markup=False)
    return 0 if works else 1
