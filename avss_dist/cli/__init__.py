"""The command line: parse, call, print.

Exit codes: 0 done, 1 a run failed, 2 a mistake, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
"""

from collections.abc import Callable
from typing import Any

from avss_dist.cli import (
    ablate,
    compare,
    contrast,
    doctor,
    evaluate,
    jobs,
    plan,
    prune,
    publish,
    read,
    report,
    run,
    sample,
    score,
    shrink,
)
from avss_dist.cli.base import app, jobs_app, main
from avss_dist.cli.examples import epilog
from avss_dist.cli.options import takes_output

COMMANDS: dict[str, tuple[Callable[..., Any], ...]] = {
    "Measure": (score.score, ablate.ablate, evaluate.evaluate, shrink.shrink, run.run, score.estimate),
    "Read": (
        read.ls,
        read.show,
        compare.quantiles,
        compare.compare,
        contrast.contrast,
        compare.findings,
        compare.scorecard,
        read.plot,
        report.report,
        publish.publish,
        read.query,
    ),
    "Change a model": (plan.plan, prune.prune, sample.sample),
    "Run elsewhere": (doctor.doctor,),
}
"""Every command, by what it is for; `jobs` has its own."""

for panel, commands in COMMANDS.items():
    for command in commands:
        name = command.__name__
        app.command(name, rich_help_panel=panel, epilog=epilog(name))(takes_output(command))
app.add_typer(jobs_app, name="jobs", rich_help_panel="Run elsewhere")
JOBS: tuple[Callable[..., Any], ...] = (jobs.submit, jobs.list_, jobs.logs, jobs.stop)
for command in JOBS:
    name = command.__name__.rstrip("_")
    jobs_app.command(name, epilog=epilog(f"jobs {name}"))(takes_output(command))

__all__ = ["app", "main"]
